"""Load sharded optimizer state from PyTorch distributed checkpoints, in whatever topology the next trainers need."""

from shardferry.catalog import Catalog
from shardferry.checkpoint import open_checkpoint
from shardferry.errors import ShardferryError
from shardferry.handoff import Shard, ShardHandle
from shardferry.keys import KeyReport
from shardferry.load import load_optimizer_state
from shardferry.receiver import OptimizerReceiver
from shardferry.region import Region

__all__ = [
    "Catalog",
    "KeyReport",
    "OptimizerReceiver",
    "Region",
    "Shard",
    "ShardHandle",
    "ShardferryError",
    "load_optimizer_state",
    "open_checkpoint",
]
