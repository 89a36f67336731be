"""Load sharded optimizer state from PyTorch distributed checkpoints, in whatever topology the next trainers need."""

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import ShardferryError
from shardferry.handoff.handle import Shard, ShardHandle
from shardferry.handoff.receiver import OptimizerReceiver
from shardferry.load import load_optimizer_state
from shardferry.plan.match_keys import KeyReport
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
