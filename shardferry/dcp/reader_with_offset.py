"""Plan reads of ShardedTensors that lie at an offset inside the saved tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_read_items, create_read_items_for_chunk_list

from shardferry.errors import PlanError
from shardferry.region import Region


class ReaderWithOffset(DefaultLoadPlanner):
    """A load planner that reads each ShardedTensor from an offset inside the saved tensor.

    Args:
        fqn_to_offset: by key, elements; keys that are missing have none.
    """

    def __init__(self, fqn_to_offset: Mapping[str, Sequence[int]]) -> None:
        super().__init__()
        self.fqn_to_offset = dict(fqn_to_offset)
        self.metadata = Metadata({})
        self.state_dict: dict[str, Any] = {}
        self.translation: dict[MetadataIndex, MetadataIndex] = {}

    def create_local_plan(self) -> LoadPlan:
        """Plan this rank's reads.

        Raises:
            PlanError: a key isn't saved, or a shard with its offset lies outside the saved tensor.
        """
        self.translation = {}
        requests: list[ReadItem] = []
        assert self.metadata is not None
        for key, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(key)
            if saved is None:
                raise PlanError(
                    f"{key}: is not in the checkpoint, which has {len(self.metadata.state_dict_metadata)} keys"
                )
            offset = self.fqn_to_offset.get(key)
            if offset is None or not isinstance(value, ShardedTensor):
                requests += _create_read_items(key, saved, value)
            else:
                requests += self._shifted(key, saved, value, offset)
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The local tensor that a read goes to."""
        return super().lookup_tensor(self.translation.get(index, index))

    def _shifted(self, key: str, saved: Any, value: ShardedTensor, offset: Sequence[int]) -> list[ReadItem]:
        if not isinstance(saved, TensorStorageMetadata):
            raise PlanError(f"{key}: is wanted as a tensor, but was saved as a Python object")
        chunks = []
        for shard in value.local_shards():
            start = tuple(a + b for a, b in zip(shard.metadata.shard_offsets, offset, strict=True))
            sizes = tuple(shard.metadata.shard_sizes)
            if any(o + s > n for o, s, n in zip(start, sizes, saved.size, strict=True)):
                raise PlanError(f"{key}: {Region(start, sizes)} lies outside the saved shape {tuple(saved.size)}")
            chunks.append(ChunkStorageMetadata(offsets=torch.Size(start), sizes=torch.Size(sizes)))
        requests = create_read_items_for_chunk_list(key, saved, chunks)
        for request in requests:
            assert request.dest_index.offset is not None
            local = tuple(a - b for a, b in zip(request.dest_index.offset, offset, strict=True))
            self.translation[request.dest_index] = dataclasses.replace(request.dest_index, offset=torch.Size(local))
        return requests
