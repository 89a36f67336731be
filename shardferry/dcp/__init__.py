"""A replacement for ``torch.distributed.checkpoint.optimizer``: change the import, keep the call.

Names and types are torch's, and each helper also has torch's own underscored name. What torch gets wrong is right here:
state has its parameter's layout (torch shards over the whole world, which corrupts HSDP), no whole tensor is allocated,
only needed bytes are read, holes and wrong keys are errors, and if one rank fails, all ranks raise.
"""

from __future__ import annotations

from shardferry.dcp.load import load_sharded_optimizer_state_dict
from shardferry.dcp.planner import ReaderWithOffset
from shardferry.dcp.sharded_tensors import (
    STATE_DICT_2D_LAYOUT,
    alloc_tensor,
    create_colwise_spec,
    get_state_dict_2d_layout,
    is_nested_tensor,
    rank_device,
)

# torch's own names
_ReaderWithOffset = ReaderWithOffset
_gen_rank_device = rank_device
_create_colwise_spec = create_colwise_spec
_is_nested_tensor = is_nested_tensor
_alloc_tensor = alloc_tensor
_get_state_dict_2d_layout = get_state_dict_2d_layout

__all__ = [
    "STATE_DICT_2D_LAYOUT",
    "ReaderWithOffset",
    "alloc_tensor",
    "create_colwise_spec",
    "get_state_dict_2d_layout",
    "is_nested_tensor",
    "load_sharded_optimizer_state_dict",
    "rank_device",
]
