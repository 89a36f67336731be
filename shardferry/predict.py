"""What a plan will ask of storage, foretold from the metadata alone: the same rules as the reader's, no data read."""

from __future__ import annotations

from collections import defaultdict

import torch

from shardferry.catalog import Catalog
from shardferry.decode import HEAD_BYTES, ItemLayout
from shardferry.item_format import TransformedItem, ZipItem
from shardferry.plan import LoadPlan, ReadItem
from shardferry.region import row_major_strides
from shardferry.requests import Request, requests_for

_USUAL_RAW_START = 704  # bytes; where torch.save puts a tensor's data. Only an item's own header says for sure.


def predict_reads(plan: LoadPlan, catalog: Catalog) -> tuple[int, int]:
    """Bytes and requests of one rank's reads.

    Exact where saved chunks are row-major, on a local disk. Strides stand only in the data files, which aren't looked at.
    """
    by_chunk: dict[int, list[ReadItem]] = defaultdict(list)
    for item in plan.reads:
        by_chunk[item.chunk].append(item)
    num_requests = len(plan.objects)
    nbytes = sum(planned.nbytes for planned in plan.objects)
    for chunk, items in by_chunk.items():
        item_format, item_bytes = catalog.formats[catalog.chunk_format[chunk]], int(catalog.chunk_byte_length[chunk])
        if isinstance(item_format, TransformedItem):  # whole
            num_requests += 1
            nbytes += item_bytes
            continue
        if isinstance(item_format, ZipItem):  # its head
            num_requests += 1
            nbytes += min(HEAD_BYTES, item_bytes)
        for item in items:
            requests = _requests(item, plan.tensors[item.tensor].dtype)
            num_requests += len(requests)
            nbytes += sum(request.nbytes for request in requests)
    return nbytes, num_requests


def _requests(item: ReadItem, dtype: torch.dtype) -> list[Request]:
    layout = ItemLayout(_USUAL_RAW_START, dtype, item.chunk_shape, row_major_strides(item.chunk_shape), 0)
    return requests_for(
        layout, source_offsets=item.source.offsets, sizes=item.source.sizes, arena_offset=0, strides=item.strides
    )
