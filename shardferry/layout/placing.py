"""A layout's placements in torch's own classes."""

from __future__ import annotations

from torch.distributed.tensor import DeviceMesh
from torch.distributed.tensor import Replicate as TorchReplicate
from torch.distributed.tensor import Shard as TorchShard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement

from shardferry.layout.mesh import Replicate
from shardferry.layout.tensor_layout import TensorLayout


def torch_placements(layout: TensorLayout, mesh: DeviceMesh) -> list[TorchPlacement]:
    """By mesh axis."""
    assert layout.placements is not None
    result: list[TorchPlacement] = []
    for axis, placement in enumerate(layout.placements):
        if isinstance(placement, Replicate):
            result.append(TorchReplicate())
            continue
        inner = 1
        for later in range(axis + 1, mesh.ndim):
            if layout.placements[later] == placement:
                inner *= mesh.size(later)
        result.append(TorchShard(placement.dim) if inner == 1 else strided_shard(placement.dim, inner))
    return result


def strided_shard(dim: int, split_factor: int) -> TorchPlacement:
    """FSDP2's placement over TP. Private in torch: touched only here and in tests/core/test_private_apis.py."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(dim, split_factor=split_factor)
