"""Carry out works: bring what they ask of storage to where it belongs, with each buffer out of the rank's budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from shardferry.arena import Arena, HostArena
from shardferry.read.buffers import Budget, buffer_bytes
from shardferry.read.coalesce import Extent, JoinLimits
from shardferry.read.destinations import Courier, PlacedRequest, PlacedSlab, Ways, make_sink
from shardferry.read.items import ItemReader
from shardferry.read.requests import InPlaceRead, Request
from shardferry.read.schedule import Chunk, Follow, Lead, Placer, SmallChunks, Work, first_request
from shardferry.read.source import Counters, HeadedSource, StorageSource, WrongGuess
from shardferry.read.zip_header import HEAD_BYTES
from shardferry.storage.base import ByteSource, RangeReader
from shardferry.storage.memory import MemorySource


class Carrier:
    """Carries out the works of one rank; safe to use from several threads.

    Args:
        ways: to the ranks for which slabs are read.
    """

    def __init__(
        self,
        storage: RangeReader,
        arena: Arena,
        limits: JoinLimits,
        budget: Budget,
        counters: Counters,
        ways: Ways | None,
    ) -> None:
        self._source = StorageSource(storage, counters, budget)
        self._items = ItemReader(self._source)
        self._placer = Placer(self._items, limits)
        self._sink = make_sink(arena, counters.busy)
        self._courier = None if ways is None else Courier(ways, budget)
        self._budget = budget
        self._counters = counters
        self._stages = not isinstance(arena, HostArena)
        self._holds_bodies = storage.traits.holds_bodies
        self._guesses_hold = True
        self._left: dict[int, Chunk] = {}  # whose heads have to be read before their data; by identity

    def guess(self, chunks: Iterable[Chunk]) -> list[Work]:
        """The works of all chunks that lie as items usually do; the others are kept for later."""
        works: list[Work] = []
        for chunk in chunks:
            guessed = self._placer.guessed(chunk)
            if guessed is None:
                self._leave(chunk)
            else:
                works += guessed
        return works

    def left(self) -> tuple[list[Work], list[Chunk]]:
        """What has to be done when all works are carried out: works, and chunks whose heads have to be read first."""
        works: list[Work] = []
        unknown: list[Chunk] = []
        for chunk in self._left.values():
            if chunk.is_checked:
                works += chunk.put_off
            else:
                unknown.append(chunk)
                self._counters.done(-sum(chunk.bytes_done))  # in vain
        self._left = {}
        return works, sorted(unknown, key=lambda chunk: (chunk.item.path, chunk.item.byte_offset))

    def look(self, chunks: Sequence[Chunk]) -> list[Work]:
        """The works of some chunks, by their heads. Raises StorageError, DecodeError."""
        with self._budget.claim(2 * HEAD_BYTES):
            return self._placer.known(chunks)

    def carry_out(self, works: Sequence[Work]) -> None:
        """One after the other. Raises StorageError, DecodeError."""
        for work in works:
            if self._leases_several(work):
                with self._budget.claim(self._buffer_bytes(work)):
                    self._carry_out(work)
            else:
                self._carry_out(work)

    def _carry_out(self, work: Work) -> None:
        match work:
            case Lead():
                self._lead(work)
            case Follow():
                self._follow(work)
            case SmallChunks():
                self._extent(work.extent)
                self._counters.done(work.nbytes)
            case Chunk():
                self._whole(work, self._items.content(work.item))
                self._counters.done(work.nbytes)
            case _:
                self._read(work, self._source)
                self._counters.done(work.nbytes)

    def _read(self, work: PlacedRequest | PlacedSlab, source: ByteSource) -> None:
        if isinstance(work, PlacedRequest):
            self._sink.carry_out(work, source)
            return
        assert self._courier is not None
        self._courier.carry_out(work, work.item.byte_offset, source)

    def _lead(self, lead: Lead) -> None:
        chunk, layout = lead.chunk, lead.layout
        if not self._guesses_hold:
            self._leave(chunk)
            return
        headed = HeadedSource(
            self._source,
            chunk.item.path,
            chunk.item.byte_offset,
            layout.raw_start,
            lambda head: self._items.is_as_expected(layout, head),
        )
        try:
            if not lead.brings_head:
                headed.check_head()
            for work in lead.works:
                self._read(work, headed)
        except WrongGuess:
            self._guesses_hold = False
            self._leave(chunk)
            return
        chunk.is_checked = True
        self._done(chunk, lead.nbytes)

    def _follow(self, follow: Follow) -> None:
        chunk = follow.chunk
        if not self._guesses_hold and not chunk.is_checked:
            chunk.put_off.append(follow.placed)
            self._leave(chunk)
            return
        self._read(follow.placed, self._source)
        self._done(chunk, follow.nbytes)

    def _done(self, chunk: Chunk, nbytes: int) -> None:
        chunk.bytes_done.append(nbytes)
        self._counters.done(nbytes)

    def _leave(self, chunk: Chunk) -> None:
        self._left[id(chunk)] = chunk

    def _extent(self, extent: Extent[Chunk]) -> None:
        with self._budget.lease(extent.stop - extent.start) as data:
            self._source.read_into(extent.path, extent.start, data)
            for chunk in extent.members:
                self._whole(chunk, data[extent.place_of(chunk)])

    def _whole(self, chunk: Chunk, content: bytes | memoryview) -> None:
        """What is wanted of an item whose bytes are in memory."""
        content = memoryview(content)
        layout, memory = self._items.layout_in(content, chunk.item), MemorySource(content)
        for request in self._placer.placed(chunk, layout, 0):
            self._sink.carry_out(request, memory)
        for slab in self._placer.slabs(chunk, layout):
            assert self._courier is not None
            self._courier.carry_out_in(slab, content)

    def _leases_several(self, work: Work) -> bool:
        """Whether it holds more at once than one buffer."""
        match work:
            case Chunk() | PlacedSlab():
                return True
            case Lead():
                return self._holds_bodies or self._stages or bool(work.chunk.shared)
            case SmallChunks():
                return self._holds_bodies or self._stages or any(chunk.shared for chunk in work.extent.members)
            case _:
                return self._holds_bodies or self._stages

    def _buffer_bytes(self, work: Work) -> int:
        """What carrying it out holds at once beside the arena."""
        match work:
            case Lead():
                return self._lead_bytes(work)
            case Follow():
                return self._bytes_of(work.placed)
            case SmallChunks():
                nbytes = work.extent.stop - work.extent.start
                return buffer_bytes(nbytes) + max(self._body_bytes(nbytes), _largest_part(work))
            case Chunk():  # as it is stored, and as it was saved
                return 2 * work.item.byte_length + work.bytes_to_read + self._body_bytes(work.item.byte_length)
            case _:
                return self._bytes_of(work)

    def _lead_bytes(self, lead: Lead) -> int:
        before = first_request(lead.works[0]).byte_offset if lead.brings_head else 0
        alone = 0 if lead.brings_head else buffer_bytes(lead.layout.raw_start) + self._body_bytes(lead.layout.raw_start)
        return max(alone, self._bytes_of(lead.works[0], before), *map(self._bytes_of, lead.works[1:]))

    def _bytes_of(self, work: PlacedRequest | PlacedSlab, before: int = 0) -> int:
        """With so many bytes before its first request."""
        if isinstance(work, PlacedRequest):
            return self._request_bytes(work.request, before) + (work.nbytes if self._stages else 0)
        slab = buffer_bytes(work.nbytes_read)
        return slab + max(self._request_bytes(request, before) for request in work.requests)

    def _request_bytes(self, request: Request, before: int) -> int:
        if isinstance(request, InPlaceRead):
            return (buffer_bytes(before) if before else 0) + self._body_bytes(before + request.nbytes)
        if self._source.maps_files:
            return 0
        return buffer_bytes(before + request.window_bytes) + self._body_bytes(before + request.window_bytes)

    def _body_bytes(self, nbytes: int) -> int:
        return nbytes if self._holds_bodies else 0


def _largest_part(small: SmallChunks) -> int:
    """Bytes of a buffer for a slab of any of some chunks, or for staging what is wanted of one."""
    return max(buffer_bytes(max(chunk.nbytes, chunk.bytes_to_read)) for chunk in small.extent.members)
