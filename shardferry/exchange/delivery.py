"""Deliver boxes to the ranks that want them: into this rank's arena, into arenas of its memory group, or to other groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from shardferry.arena import Arena, Destination, HostArena, HostMemory, destination_of, strided_view
from shardferry.config import MessageLimits
from shardferry.exchange.peer_memory import ArenaAddress, PeerArenas
from shardferry.exchange.point_to_point import Channel, Exchange, Outbox
from shardferry.plan.cooperative import CooperativePlan, CooperativeRead, ForwardedBox
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.split import RankCopy
from shardferry.region import Region, row_major_strides
from shardferry.stats import BusyTimes


@dataclass(frozen=True, slots=True)
class _Block:
    """A box of a chunk in memory, packed row-major."""

    memory: memoryview
    region: Region  # in the chunk, elements
    itemsize: int  # bytes

    def part(self, box: Region) -> np.ndarray:
        """A view of a box inside the region."""
        strides = row_major_strides(self.region.sizes)
        inside = box.relative_to(self.region.offsets)
        start = sum(o * s for o, s in zip(inside.offsets, strides, strict=True)) * self.itemsize
        return strided_view(self.memory, byte_offset=start, sizes=inside.sizes, strides=strides, itemsize=self.itemsize)


class Delivery:
    """The way from one rank's reads to every rank that wants something of them. Safe to use from several threads.

    Attributes:
        cooperative: this rank's part in the reads.
        message_bytes: of the memory budget, held for messages to and from other memory groups.
    """

    def __init__(
        self,
        plan: LoadPlan,
        cooperative: CooperativePlan,
        own: Destination,
        rows: Mapping[str, int],
        busy: BusyTimes,
        peers: PeerArenas | None,
    ) -> None:
        self.cooperative = cooperative
        self.message_bytes = 0
        self._plan = plan
        self._own = own
        self._rows = rows
        self._busy = busy
        self._peers = peers
        self._outbox: Outbox | None = None

    def connect(self, exchange: Exchange) -> None:
        """Use an exchange for what goes to other memory groups."""
        self._outbox, self.message_bytes = exchange.outbox, exchange.buffer_bytes

    def own_memory(self, part: CooperativeRead) -> memoryview | None:
        """This rank's memory for a whole part, where it wants the part as it is; None elsewhere and on a GPU."""
        if not isinstance(self._own, HostMemory):
            return None
        tensor = self._plan.tensors[part.tensor]
        packed = row_major_strides(part.region.sizes)
        for rank_copy in part.copies:
            copy = rank_copy.copy
            is_whole = copy.source == part.region and copy.strides == packed
            if rank_copy.world_rank == self._plan.world_rank and is_whole:
                start = tensor.arena_offset + copy.offset * tensor.dtype.itemsize
                return self._own.memory[start : start + part.region.numel * tensor.dtype.itemsize]
        return None

    def give(self, part: CooperativeRead, packed: memoryview, *, to_itself: bool = True) -> None:
        """Deliver a part that was read.

        Args:
            packed: its bytes, row-major.
            to_itself: also to this rank, if it wants something of the part.

        Raises:
            StorageError: a rank's arena is gone, or a message was not sent in time.
        """
        block = _Block(packed, part.region, self._plan.tensors[part.tensor].dtype.itemsize)
        for forward in part.forwards:
            assert self._outbox is not None
            self._outbox.put(forward.relay, forward.index, block.part(forward.box))
        me = self._plan.world_rank
        self._put(block, part.tensor, (c for c in part.copies if to_itself or c.world_rank != me))

    def receive(self, forwarded: ForwardedBox, packed: memoryview) -> None:
        """Deliver a box that arrived from another memory group. Raises StorageError: a rank's arena is gone."""
        self._put(_Block(packed, forwarded.box, forwarded.itemsize), forwarded.tensor, forwarded.copies)

    def _put(self, block: _Block, tensor_row: int, copies: Iterable[RankCopy]) -> None:
        tensor = self._plan.tensors[tensor_row]
        with self._busy.at("deliver"):
            for rank_copy in copies:
                copy, itemsize = rank_copy.copy, block.itemsize
                elements = block.part(copy.source)
                byte_strides = tuple(stride * itemsize for stride in copy.strides)
                if rank_copy.world_rank == self._plan.world_rank:
                    self._own.scatter(tensor.arena_offset + copy.offset * itemsize, elements, byte_strides)
                else:
                    assert self._peers is not None
                    row = self._rows[tensor.key]
                    self._peers.put(rank_copy.world_rank, row, copy.offset * itemsize, elements, byte_strides)


@contextmanager
def open_delivery(
    plan: LoadPlan,
    cooperative: CooperativePlan,
    arena: Arena,
    *,
    rows: Mapping[str, int],
    addresses: Mapping[int, ArenaAddress],
    channel: Channel | None,
    memory_budget_bytes: int,
    busy: BusyTimes,
    limits: MessageLimits,
) -> Iterator[Delivery]:
    """A delivery for one load; on leaving, everything was sent to other memory groups, has arrived from them, and is in place.

    Args:
        rows: of the catalog's tensors, by key.
        addresses: of the memory group's arenas, by world rank.
        channel: to other memory groups; None where there are none.
        memory_budget_bytes: at most half of it goes to messages.

    Raises:
        StorageError: another rank's arena is gone, or a message was late.
    """
    with ExitStack() as stack:
        peers = stack.enter_context(PeerArenas(addresses)) if isinstance(arena, HostArena) else None
        own = destination_of(arena, busy)
        stack.callback(own.finish)
        delivery = Delivery(plan, cooperative, own, rows=rows, busy=busy, peers=peers)
        if channel is not None and (cooperative.relays or cooperative.forwarded):
            budget_bytes = memory_budget_bytes // 2
            exchange = Exchange(channel, cooperative, delivery.receive, memory_budget_bytes=budget_bytes, limits=limits)
            delivery.connect(stack.enter_context(exchange))
        yield delivery
