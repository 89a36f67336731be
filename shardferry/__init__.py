"""Load sharded optimizer state from PyTorch distributed checkpoints, in whatever topology the next trainers need."""

from typing import TYPE_CHECKING

from shardferry.errors import (
    ArenaError,
    CatalogError,
    CheckpointNotFound,
    HandoffError,
    InstallError,
    LayoutError,
    LoadCancelled,
    PlanError,
    RankError,
    ShardferryError,
    SpecError,
    StorageError,
)

__version__ = "0.1.0"

__all__ = [
    "ArenaError",
    "Catalog",
    "CatalogError",
    "CheckpointNotFound",
    "HandoffError",
    "InstallError",
    "KeyReport",
    "LayoutError",
    "LoadCancelled",
    "OptimizerReceiver",
    "PlanError",
    "RankError",
    "Region",
    "Shard",
    "ShardHandle",
    "ShardferryError",
    "SpecError",
    "StorageError",
    "attach",
    "describe_layout",
    "kept",
    "load_model_state",
    "load_optimizer_state",
    "open_checkpoint",
    "receive",
]

# A type checker reads the imports. At run time each name's module is imported when the name is first used: `shardferry
# --help` and a program that wants one name don't wait for torch. tests/test_public_names.py compares the two lists.
if TYPE_CHECKING:
    from shardferry.actors.resident.kept import attach, kept
    from shardferry.checkpoint.catalog import Catalog
    from shardferry.checkpoint.open import open_checkpoint
    from shardferry.handoff.handle import Shard, ShardHandle
    from shardferry.load_live import load_model_state, load_optimizer_state
    from shardferry.plan.match_keys import KeyReport
    from shardferry.receiver import OptimizerReceiver, describe_layout, receive
    from shardferry.region import Region
else:
    from shardferry._lazy import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "shardferry.actors.resident.kept": ["attach", "kept"],
            "shardferry.checkpoint.catalog": ["Catalog"],
            "shardferry.checkpoint.open": ["open_checkpoint"],
            "shardferry.handoff.handle": ["Shard", "ShardHandle"],
            "shardferry.load_live": ["load_model_state", "load_optimizer_state"],
            "shardferry.plan.match_keys": ["KeyReport"],
            "shardferry.receiver": ["OptimizerReceiver", "describe_layout", "receive"],
            "shardferry.region": ["Region"],
        },
    )
