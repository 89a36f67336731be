"""A load planner for ShardedTensors that begin at an offset inside the saved tensor; it proves that its reads are complete."""

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

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.from_torch import catalog_from_torch
from shardferry.dcp.sharded_tensors import region_of, size_of
from shardferry.errors import PlanError
from shardferry.plan.cover import covering_chunks
from shardferry.read.objects import decode_object
from shardferry.region import Region


class ReaderWithOffset(DefaultLoadPlanner):
    """Torch's default load planner, with an offset for each ShardedTensor inside the saved tensor.

    It also does what torch's planner lacks: elements that were not saved are an error, and saved Python objects are decoded
    without executing anything. A ShardedTensor may have any number of local shards, or none.

    Args:
        fqn_to_offset: offsets by key, in elements; keys without an entry are not shifted.
        allow_partial_load: leave values alone whose keys are not saved, instead of raising.
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
        self.metadata: Metadata = Metadata({})
        self.state_dict: dict[str, Any] = {}
        self.translation: dict[MetadataIndex, MetadataIndex] = {}

    def create_local_plan(self) -> LoadPlan:
        """Plan this rank's reads.

        Raises:
            PlanError: a key is not saved, sizes disagree, a shard with its offset lies outside the saved tensor, or an
                element of it is in no saved chunk or in two.
        """
        if self.flatten_state_dict:
            self._flatten_as_its_writer_did()
        self.translation = {}
        catalog = catalog_from_torch(self.metadata, location="that the planner was given", keys=self.state_dict.keys())
        return LoadPlan(
            [item for key, value in self.state_dict.items() for item in self._read_items(catalog, key, value)]
        )

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        """The local tensor that a read fills."""
        return super().lookup_tensor(self.translation.get(index, index))

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Put a saved Python object into the state dict. Raises DecodeError if it is not plain data."""
        key = read_item.dest_index.fqn
        loaded = decode_object(value.getvalue())
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[key], loaded)
        else:  # torch's planner puts it into its own copy only
            self.state_dict[key] = self.original_state_dict[key] = loaded

    def _flatten_as_its_writer_did(self) -> None:
        """Flatten as writers before torch 2.4 did, if that gives keys that are saved: lists without tensors stay whole.

        Torch does so, by a module-wide flag, whenever the checkpoint has more keys than the state dict; here it takes a key
        that is not saved.
        """
        saved = self.metadata.state_dict_metadata.keys()
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

    def _read_items(self, catalog: Catalog, key: str, value: Any) -> list[ReadItem]:
        saved = self.metadata.state_dict_metadata.get(key)
        if saved is None and self.allow_partial_load:
            return []
        if saved is None:
            raise PlanError(
                f"{key}: is not in the checkpoint, which has {len(self.metadata.state_dict_metadata)} keys; "
                "leave it out of the state dict, or allow_partial_load"
            )
        offset = self.fqn_to_offset.get(key) if isinstance(value, ShardedTensor) else None
        if isinstance(saved, TensorStorageMetadata):
            if not isinstance(value, torch.Tensor):
                raise PlanError(f"{key}: is wanted as a {type(value).__name__}, but was saved as a tensor")
            return self._tensor_items(catalog, key, value, offset)
        if offset is not None:
            raise PlanError(f"{key}: is wanted as a tensor, but was saved as a Python object")
        objects: list[ReadItem] = create_default_local_load_plan({key: value}, self.metadata, True).items
        return objects

    def _tensor_items(
        self, catalog: Catalog, key: str, value: torch.Tensor, offset: Sequence[int] | None
    ) -> list[ReadItem]:
        """The reads of torch's default planner, shifted by the offset, once sizes and cover are proven."""
        saved = catalog.tensors[key]
        _check_size(key, saved.shape, tuple(size_of(value)), offset)
        regions = _regions_of(value, offset)
        for region in regions:
            if any(
                start < 0 or end > n for start, end, n in zip(region.offsets, region.ends, saved.shape, strict=True)
            ):
                raise PlanError(f"{key}: {region} lies outside the saved shape {saved.shape}")
            covering_chunks(catalog, saved, region)
        chunks = [ChunkStorageMetadata(torch.Size(region.offsets), torch.Size(region.sizes)) for region in regions]
        metadata: Any = self.metadata.state_dict_metadata[key]
        items: list[ReadItem] = create_read_items_for_chunk_list(key, metadata, chunks)
        if offset is not None:
            self.translation |= {item.dest_index: _unshifted(item.dest_index, offset) for item in items}
        return items


def _unshifted(index: MetadataIndex, offset: Sequence[int]) -> MetadataIndex:
    """The same shard, in elements of its own tensor."""
    assert index.offset is not None
    return dataclasses.replace(index, offset=torch.Size(a - b for a, b in zip(index.offset, offset, strict=True)))


def _check_size(key: str, saved: tuple[int, ...], wanted: tuple[int, ...], offset: Sequence[int] | None) -> None:
    if offset is None and saved != wanted:
        raise PlanError(
            f"{key}: size mismatch: {saved} is saved, {wanted} is wanted; this checkpoint belongs to another model"
        )
    if offset is not None and not len(offset) == len(saved) == len(wanted):
        raise PlanError(f"{key}: size mismatch: {saved} is saved, {wanted} at {tuple(offset)} is wanted")


def _regions_of(value: torch.Tensor, offset: Sequence[int] | None) -> list[Region]:
    """The boxes of the saved tensor that this rank holds."""
    if isinstance(value, ShardedTensor):
        return [region_of(shard.metadata, offset) for shard in value.local_shards()]
    if isinstance(value, DTensor) and value.device_mesh.get_coordinate() is None:
        return []  # the mesh has other ranks
    return [Region(tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in _create_chunk_list(value)]
