"""What a plan will ask of storage, foretold from the metadata alone: the same rules as the reader's, no data read."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch

from shardferry.catalog import Catalog
from shardferry.decode import HEAD_BYTES, ItemLayout
from shardferry.item_format import TransformedItem, ZipItem
from shardferry.plan import LoadPlan, ReadItem
from shardferry.region import Region, row_major_strides
from shardferry.requests import Request, requests_for
from shardferry.sharing import SharedPlan, SharedRead

_USUAL_RAW_START = 704  # bytes; where torch.save puts a tensor's data. Only an item's own header says for sure.


def predict_reads(plan: LoadPlan, catalog: Catalog, shared: SharedPlan | None = None) -> tuple[int, int]:
    """Bytes and requests of one rank's reads.

    Exact where saved chunks are row-major, on a local disk. Strides stand only in the data files, which aren't looked at.

    Args:
        shared: its part of its node's reads; None where it reads for itself.
    """
    by_chunk: dict[int, list[_Read]] = defaultdict(list)
    for item in plan.reads if shared is None else shared.own:
        by_chunk[item.chunk].append(_Read(item.source, item.chunk_shape, item.strides, _dtype(plan, item)))
    for read in () if shared is None else shared.shared:
        strides = row_major_strides(read.region.sizes)
        by_chunk[read.chunk].append(_Read(read.region, read.chunk_shape, strides, _dtype(plan, read)))
    num_requests = len(plan.objects)
    nbytes = sum(planned.nbytes for planned in plan.objects)
    for chunk, reads in by_chunk.items():
        item_format, item_bytes = catalog.formats[catalog.chunk_format[chunk]], int(catalog.chunk_byte_length[chunk])
        if isinstance(item_format, TransformedItem):  # whole
            num_requests += 1
            nbytes += item_bytes
            continue
        if isinstance(item_format, ZipItem):  # its head
            num_requests += 1
            nbytes += min(HEAD_BYTES, item_bytes)
        for one in reads:
            requests = one.requests()
            num_requests += len(requests)
            nbytes += sum(request.nbytes for request in requests)
    return nbytes, num_requests


@dataclass(frozen=True, slots=True)
class _Read:
    """A box of a chunk on its way to memory."""

    box: Region  # in the chunk, elements
    chunk_shape: tuple[int, ...]
    strides: tuple[int, ...]  # elements, of the place
    dtype: torch.dtype

    def requests(self) -> list[Request]:
        layout = ItemLayout(_USUAL_RAW_START, self.dtype, self.chunk_shape, row_major_strides(self.chunk_shape), 0)
        offsets, sizes = self.box.offsets, self.box.sizes
        return requests_for(layout, source_offsets=offsets, sizes=sizes, arena_offset=0, strides=self.strides)


def _dtype(plan: LoadPlan, read: ReadItem | SharedRead) -> torch.dtype:
    return plan.tensors[read.tensor].dtype
