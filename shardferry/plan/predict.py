"""What a plan will ask of storage, foretold from the metadata alone: the same rules as the reader's, no data read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from shardferry._gc import paused_gc
from shardferry.checkpoint.catalog import Catalog, KnownValue, RawItem, TransformedItem
from shardferry.plan.cooperative import SharedPlan, SharedRead
from shardferry.plan.planner import LoadPlan, PlannedObject, ReadItem
from shardferry.read.coalesce import JoinLimits, join, whole_items
from shardferry.read.items import USUAL_RAW_START, TensorItem, tensor_item, usual_layout
from shardferry.read.requests import Gather, Request, brings_head, requests_for
from shardferry.read.zip_header import HEAD_BYTES, ItemLayout
from shardferry.region import Region, row_major_strides


@paused_gc()
def predict_reads(
    plan: LoadPlan, catalog: Catalog, limits: JoinLimits, shared: SharedPlan | None = None
) -> tuple[int, int]:
    """Bytes and requests of one rank's reads.

    Exact where saved chunks are row-major. Strides stand only in the data files, which aren't looked at.

    Args:
        limits: of joined reads.
        shared: its part of its node's reads; None where it reads for itself.
    """
    by_chunk: dict[int, list[_Read]] = defaultdict(list)
    for item in plan.reads if shared is None else shared.own:
        by_chunk[item.chunk].append(_read(plan, item, item.source, item.strides))
    for read in () if shared is None else shared.shared:
        by_chunk[read.chunk].append(_read(plan, read, read.region, row_major_strides(read.region.sizes)))
    chunks = [_Chunk(_item(catalog, chunk, reads[0]), tuple(reads)) for chunk, reads in by_chunk.items()]
    chunks.sort(key=lambda chunk: (chunk.item.path, chunk.item.byte_offset))
    extents, alone = join(chunks, limits)
    nbytes, num_requests = predict_objects(plan.objects, catalog, limits)
    num_requests += len(extents)
    nbytes += sum(extent.stop - extent.start for extent in extents)
    for chunk in alone:
        if isinstance(chunk.item.format, TransformedItem):  # whole
            num_requests += 1
            nbytes += chunk.item.byte_length
        else:
            asked, length = _ranged(chunk, limits)
            num_requests += asked
            nbytes += length
    return nbytes, num_requests


def predict_objects(objects: Iterable[PlannedObject], catalog: Catalog, limits: JoinLimits) -> tuple[int, int]:
    """Bytes and requests of what is read whole, by one rank."""
    keys = {planned.key: planned.nbytes for planned in objects}
    tensors = [nbytes for key, nbytes in keys.items() if key not in catalog.objects]
    items = whole_items(catalog, [key for key in keys if key in catalog.objects])
    extents, alone = join([one for one in items if not isinstance(one.item.format, KnownValue)], limits)
    lengths = [extent.stop - extent.start for extent in extents] + [one.item.byte_length for one in alone] + tensors
    return sum(lengths), len(lengths)


def _ranged(chunk: _Chunk, limits: JoinLimits) -> tuple[int, int]:
    """Requests and bytes of a chunk that is read in ranges."""
    guess = usual_layout(chunk.item)
    layout = guess or ItemLayout(
        USUAL_RAW_START, chunk.item.dtype, chunk.item.shape, row_major_strides(chunk.item.shape), 0
    )
    requests = [request for one in chunk.reads for request in one.requests(layout, limits)]
    nbytes = sum(_asked_bytes(request, limits) for request in requests)
    if isinstance(chunk.item.format, RawItem):
        return len(requests), nbytes
    first = min(requests, key=lambda request: request.byte_offset)
    if guess is None:  # its head is read before
        return len(requests) + 1, nbytes + min(HEAD_BYTES, chunk.item.byte_length)
    if not brings_head(first, layout.raw_start, limits):
        return len(requests) + 1, nbytes + layout.raw_start
    is_mapped = isinstance(first, Gather) and limits.maps_files
    return len(requests), nbytes + (layout.raw_start if is_mapped else first.byte_offset)


def _asked_bytes(request: Request, limits: JoinLimits) -> int:
    if isinstance(request, Gather) and not limits.maps_files:
        return request.window_bytes
    return request.nbytes


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A saved chunk, and what is read of it."""

    item: TensorItem
    reads: tuple[_Read, ...]

    @property
    def bytes_to_read(self) -> int:
        return sum(one.box.numel for one in self.reads) * self.item.dtype.itemsize


def _item(catalog: Catalog, chunk: int, read: _Read) -> TensorItem:
    return tensor_item(catalog, read.key, read.dtype, read.chunk_shape, chunk)


@dataclass(frozen=True, slots=True)
class _Read:
    """A box of a chunk on its way to memory."""

    key: str
    box: Region  # in the chunk, elements
    chunk_shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements, of the place
    dtype: torch.dtype

    def requests(self, layout: ItemLayout, limits: JoinLimits) -> list[Request]:
        return requests_for(
            layout,
            source_offsets=self.box.offsets,
            sizes=self.box.sizes,
            arena_offset=0,
            strides=self.strides,
            limits=limits,
        )


def _read(plan: LoadPlan, read: ReadItem | SharedRead, box: Region, strides: tuple[int, ...]) -> _Read:
    tensor = plan.tensors[read.tensor]
    return _Read(tensor.key, box, read.chunk_shape, strides, tensor.dtype)
