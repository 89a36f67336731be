"""What a checkpoint holds: its metadata, read once and safely, becomes a catalog, in which the saved optimizer is found.

::

    .metadata, __0.metadata ── metadata.py ──► build.py, columns.py ──► Catalog ──► optimizer_state.py
    *.safetensors ── safetensors.py ─────────────────┘                    ▲
    common.pt ── megatron.py ─────────────────────────────────────────────┘         open.py has the list of formats
"""

from shardferry.checkpoint.catalog import NO_FILE, Catalog, SavedObject, SavedTensor
from shardferry.checkpoint.open import open_checkpoint, opened_storage, read_catalog, storage_of
from shardferry.checkpoint.optimizer_state import (
    OptimizerIndex,
    ParamGroup,
    SavedOptimizer,
    StateEntry,
    index_optimizer,
    index_weights,
)

__all__ = [
    "NO_FILE",
    "Catalog",
    "OptimizerIndex",
    "ParamGroup",
    "SavedObject",
    "SavedOptimizer",
    "SavedTensor",
    "StateEntry",
    "index_optimizer",
    "index_weights",
    "open_checkpoint",
    "opened_storage",
    "read_catalog",
    "storage_of",
]
