"""The face for users of ``torch.distributed.checkpoint.optimizer``: change the import, keep the call.

Same names, same types in and out; right where torch's are wrong: state lies as its parameter's ShardedTensor or DTensor
does (torch shards over the whole world, which corrupts HSDP), no whole tensor is allocated, only needed bytes are read,
holes and wrong keys are errors, and a rank that fails makes all ranks raise. Each helper also has torch's own name.
"""

from __future__ import annotations

from shardferry.dcp.helpers import (
    STATE_DICT_2D_LAYOUT,
    alloc_tensor,
    create_colwise_spec,
    get_state_dict_2d_layout,
    is_nested_tensor,
    rank_device,
)
from shardferry.dcp.load import load_sharded_optimizer_state_dict
from shardferry.dcp.reader_with_offset import ReaderWithOffset

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
