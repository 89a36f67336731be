"""Plan reads of ShardedTensors that lie at an offset inside the saved tensor, and check what they ask for."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner
from torch.distributed.checkpoint._nested_dict import FLATTEN_MAPPING
from torch.distributed.checkpoint._traverse import set_element, traverse_state_dict_v_2_3
from torch.distributed.checkpoint.default_planner import create_default_local_load_plan
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import _create_chunk_list, create_read_items_for_chunk_list
from torch.distributed.tensor import DTensor

from shardferry.dcp.cover import check_cover
from shardferry.dcp.sharded_tensors import region_of, size_of
from shardferry.errors import PlanError
from shardferry.read.items import decode_object
from shardferry.region import Region


class ReaderWithOffset(DefaultLoadPlanner):
    """A load planner that reads each ShardedTensor from an offset inside the saved tensor.

    Beside that it is torch's default planner with what that lacks: elements that nobody saved are an error, and saved
    Python objects are decoded without executing anything. Any number of local shards will do, none too.

    Args:
        fqn_to_offset: by key, elements; keys that are missing have none.
        allow_partial_load: leave values alone whose keys aren't saved, instead of raising.
    """

    def __init__(
        self,
        fqn_to_offset: Mapping[str, Sequence[int]],
        *,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
    ) -> None:
        super().__init__(flatten_state_dict, flatten_sharded_tensors, allow_partial_load)
        self.fqn_to_offset = dict(fqn_to_offset)
        self.metadata = Metadata({})
        self.state_dict: dict[str, Any] = {}
        self.translation: dict[MetadataIndex, MetadataIndex] = {}

    def create_local_plan(self) -> LoadPlan:
        """Plan this rank's reads.

        Raises:
            PlanError: a key isn't saved, sizes disagree, a shard with its offset lies outside the saved tensor, or an
                element of it was not saved.
        """
        assert self.metadata is not None
        if self.flatten_state_dict:
            self._flatten_as_its_writer_did(self.metadata)
        self.translation = {}
        requests: list[ReadItem] = []
        for key, value in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(key)
            if saved is None:
                self._check_may_be_missing(key)
            elif isinstance(value, ShardedTensor) and key in self.fqn_to_offset:
                requests += self._shifted(key, saved, value, self.fqn_to_offset[key])
            else:
                requests += self._as_it_stands(key, saved, value)
        return LoadPlan(requests)

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The local tensor that a read goes to."""
        return super().lookup_tensor(self.translation.get(index, index))

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a saved Python object in its place. Raises DecodeError where it isn't plain data."""
        key = read_item.dest_index.fqn
        loaded = decode_object(value.getvalue())
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:  # torch's planner puts it into its own copy only
            self.state_dict[key] = self.original_state_dict[key] = loaded

    def _flatten_as_its_writer_did(self, metadata: Metadata) -> None:
        """Writers before torch 2.4 left lists and dicts whole that hold no tensor.

        Torch tells them by a module-wide flag that it sets meanwhile, and looks for them whenever the checkpoint has more
        keys than are asked for; here only a key that is really missing makes it look.
        """
        saved = metadata.state_dict_metadata.keys()
        if self.state_dict.keys() <= saved:
            return
        values: dict[str, Any] = {}
        mappings: FLATTEN_MAPPING = {}

        def visit(path: Any, value: Any) -> None:
            key = ".".join(map(str, path))
            values[key], mappings[key] = value, path

        traverse_state_dict_v_2_3(self.original_state_dict, visit)
        if values.keys() & (saved - self.state_dict.keys()):
            self.state_dict, self.mappings = values, mappings

    def _check_may_be_missing(self, key: str) -> None:
        if not self.allow_partial_load:
            assert self.metadata is not None
            raise PlanError(
                f"{key}: is not in the checkpoint, which has {len(self.metadata.state_dict_metadata)} keys; "
                "leave it out of the state dict, or allow_partial_load"
            )

    def _as_it_stands(self, key: str, saved: Any, value: Any) -> list[ReadItem]:
        """What torch's default planner would read, once sizes and cover are checked."""
        assert self.metadata is not None
        if not isinstance(saved, TensorStorageMetadata):
            objects: list[ReadItem] = create_default_local_load_plan({key: value}, self.metadata, True).items
            return objects
        if not isinstance(value, torch.Tensor):
            raise PlanError(f"{key}: is wanted as a {type(value).__name__}, but was saved as a tensor")
        if tuple(size_of(value)) != tuple(saved.size):
            raise PlanError(
                f"{key}: size mismatch: {tuple(saved.size)} is saved, {tuple(size_of(value))} is wanted; "
                "this checkpoint belongs to another model"
            )
        if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
            return []  # it lies on other ranks
        return _read_items(key, saved, [Region(tuple(c.offsets), tuple(c.sizes)) for c in _create_chunk_list(value)])

    def _shifted(self, key: str, saved: Any, value: ShardedTensor, offset: Sequence[int]) -> list[ReadItem]:
        if not isinstance(saved, TensorStorageMetadata):
            raise PlanError(f"{key}: is wanted as a tensor, but was saved as a Python object")
        if not len(offset) == len(saved.size) == len(size_of(value)):
            raise PlanError(
                f"{key}: size mismatch: {tuple(saved.size)} is saved, {tuple(size_of(value))} at {tuple(offset)} is wanted"
            )
        requests = _read_items(key, saved, [region_of(shard.metadata, offset) for shard in value.local_shards()])
        for request in requests:
            assert request.dest_index.offset is not None
            local = tuple(a - b for a, b in zip(request.dest_index.offset, offset, strict=True))
            self.translation[request.dest_index] = dataclasses.replace(request.dest_index, offset=torch.Size(local))
        return requests


def _read_items(key: str, saved: TensorStorageMetadata, wanted: Sequence[Region]) -> list[ReadItem]:
    for region in wanted:
        if any(start < 0 or end > n for start, end, n in zip(region.offsets, region.ends, saved.size, strict=True)):
            raise PlanError(f"{key}: {region} lies outside the saved shape {tuple(saved.size)}")
        check_cover(key, saved, region)
    chunks = [ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes)) for region in wanted]
    requests: list[ReadItem] = create_read_items_for_chunk_list(key, saved, chunks)
    return requests
