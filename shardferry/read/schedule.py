"""Turn the saved chunks of which a rank wants something into works: what one thread does in one go.

Where a chunk's data lies is guessed from its length, and each guess is checked by the item's own head, which comes with the
first of its data. So nothing waits for heads, and a chunk costs one request where it used to cost two::

    item      |head|raw bytes ...                              |tail|
    lead      [----------]  the head, and the first request for data
    follows               [----------][----------]

A slab, which is read for other ranks, is never delivered before the head has been checked: it is part of the lead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from shardferry.checkpoint.catalog import Catalog, RawItem
from shardferry.plan.cooperative import SharedPlan, SharedRead
from shardferry.plan.planner import LoadPlan, ReadItem
from shardferry.read.coalesce import Extent, JoinLimits
from shardferry.read.destinations import PlacedRequest, PlacedSlab
from shardferry.read.items import ItemReader, TensorItem, tensor_item, usual_layout
from shardferry.read.requests import Request, brings_head, requests_for
from shardferry.read.zip_header import ItemLayout
from shardferry.region import row_major_strides


@dataclass(frozen=True, slots=True)
class Piece:
    """A read item and where its first element goes."""

    item: ReadItem
    arena_offset: int  # bytes


@dataclass(slots=True, eq=False)
class Chunk:
    """A saved chunk of which this rank wants something."""

    item: TensorItem
    row: int  # of the catalog's tensors
    pieces: list[Piece] = field(default_factory=list)
    shared: list[SharedRead] = field(default_factory=list)
    nbytes: int = 0  # that are wanted of it
    bytes_to_read: int = 0  # of it, without its head
    is_checked: bool = False  # its head is as it was guessed
    bytes_done: list[int] = field(default_factory=list)  # as guessed
    put_off: list[PlacedRequest] = field(default_factory=list)  # until the head is checked

    def add(self, piece: Piece) -> None:
        """Something that this rank wants for itself."""
        nbytes = piece.item.source.numel * self.item.dtype.itemsize
        self.pieces.append(piece)
        self.nbytes += nbytes
        self.bytes_to_read += nbytes

    def add_shared(self, read: SharedRead) -> None:
        """Something that it reads for several ranks: a replica's bytes are wanted twice and read once."""
        itemsize = self.item.dtype.itemsize
        self.shared.append(read)
        self.nbytes += read.numel_wanted * itemsize
        self.bytes_to_read += read.numel * itemsize


@dataclass(frozen=True, slots=True)
class SmallChunks:
    """Chunks whose items are read in one request."""

    extent: Extent[Chunk]

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return sum(chunk.nbytes for chunk in self.extent.members)


@dataclass(frozen=True, slots=True)
class Lead:
    """What is read of a chunk together with its head."""

    chunk: Chunk
    layout: ItemLayout  # as guessed
    works: tuple[PlacedRequest | PlacedSlab, ...]  # the first of them starts first in the item
    brings_head: bool  # with the first of them

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return sum(work.nbytes for work in self.works)


@dataclass(frozen=True, slots=True)
class Follow:
    """What is read of a chunk whose head may not be checked yet."""

    chunk: Chunk
    placed: PlacedRequest

    @property
    def nbytes(self) -> int:
        """Bytes that are wanted."""
        return self.placed.nbytes


# A chunk where its item has to be read whole.
Work = PlacedRequest | PlacedSlab | Lead | Follow | SmallChunks | Chunk


def chunks_in_reading_order(
    plan: LoadPlan, catalog: Catalog, shared: SharedPlan | None, rows: Mapping[str, int]
) -> list[Chunk]:
    """By file and position; each rank starts at another file, so that ranks don't queue for the same one.

    Args:
        rows: of the catalog's tensors, by key; needed for what is shared.
    """
    chunks: dict[int, Chunk] = {}

    def chunk_of(read: ReadItem | SharedRead) -> Chunk:
        found = chunks.get(read.chunk)
        if found is None:
            tensor = plan.tensors[read.tensor]
            item = tensor_item(catalog, tensor.key, tensor.dtype, read.chunk_shape, read.chunk)
            found = chunks[read.chunk] = Chunk(item, rows.get(tensor.key, -1))
        return found

    for read in plan.reads if shared is None else shared.own:
        tensor = plan.tensors[read.tensor]
        chunk_of(read).add(Piece(read, tensor.arena_offset + read.offset * tensor.dtype.itemsize))
    for slab in () if shared is None else shared.shared:
        chunk_of(slab).add_shared(slab)
    paths = sorted({chunk.item.path for chunk in chunks.values()})
    first = plan.world_rank * len(paths) // max(plan.world_size, 1)
    turn = {path: (place - first) % len(paths) for place, path in enumerate(paths)}
    return sorted(chunks.values(), key=lambda chunk: (turn[chunk.item.path], chunk.item.byte_offset))


class Placer:
    """Turns chunks into works, with their places in files and in the arena."""

    def __init__(self, items: ItemReader, limits: JoinLimits) -> None:
        self._items = items
        self._limits = limits
        self._known_requests: dict[tuple[object, ...], Sequence[Request]] = {}  # most pieces look like some other

    def guessed(self, chunk: Chunk) -> list[Work] | None:
        """The works of a chunk that lies as items usually do. None: its head has to be read first."""
        layout = usual_layout(chunk.item)
        if layout is None:
            return None
        placed, slabs = self.placed(chunk, layout, chunk.item.byte_offset), self.slabs(chunk, layout)
        if isinstance(chunk.item.format, RawItem):
            return [*placed, *slabs]
        placed.sort(key=_start)
        slabs.sort(key=_start)
        own_first = bool(placed) and (not slabs or _start(placed[0]) <= _start(slabs[0]))
        led: tuple[PlacedRequest | PlacedSlab, ...] = (*placed[:own_first], *slabs)
        head_comes = brings_head(first_request(led[0]), layout.raw_start, self._limits)
        return [Lead(chunk, layout, led, head_comes), *(Follow(chunk, one) for one in placed[own_first:])]

    def known(self, chunks: Sequence[Chunk]) -> list[Work]:
        """The works of all chunks that can be read in ranges, by their heads, and the others as they are."""
        works: list[Work] = []
        for chunk in chunks:
            if chunk.item.is_ranged:
                layout = self._items.layout(chunk.item)
                works += self.placed(chunk, layout, chunk.item.byte_offset)
                works += self.slabs(chunk, layout)
            else:
                works.append(chunk)
        return works

    def slabs(self, chunk: Chunk, layout: ItemLayout) -> list[PlacedSlab]:
        """What is read of a chunk for several ranks."""
        return [
            PlacedSlab(
                chunk.item,
                chunk.row,
                read,
                self._requests_of(layout, read.region.offsets, read.region.sizes, row_major_strides(read.region.sizes)),
            )
            for read in chunk.shared
        ]

    def placed(self, chunk: Chunk, layout: ItemLayout, item_offset: int) -> list[PlacedRequest]:
        """What is read of a chunk for this rank alone."""
        return [
            PlacedRequest(chunk.item.path, item_offset, piece.arena_offset, request)
            for piece in chunk.pieces
            for request in self._requests_of(
                layout, piece.item.source.offsets, piece.item.source.sizes, piece.item.strides
            )
        ]

    def _requests_of(
        self, layout: ItemLayout, offsets: tuple[int, ...], sizes: tuple[int, ...], strides: tuple[int, ...]
    ) -> Sequence[Request]:
        """Of one box; where they go is counted from the box's place."""
        alike = (layout, offsets, sizes, strides)
        requests = self._known_requests.get(alike)
        if requests is None:
            requests = requests_for(
                layout, source_offsets=offsets, sizes=sizes, arena_offset=0, strides=strides, limits=self._limits
            )
            self._known_requests[alike] = requests
        return requests


def first_request(work: PlacedRequest | PlacedSlab) -> Request:
    """The one that starts first in the item."""
    return work.requests[0] if isinstance(work, PlacedSlab) else work.request


def _start(work: PlacedRequest | PlacedSlab) -> int:
    return first_request(work).byte_offset
