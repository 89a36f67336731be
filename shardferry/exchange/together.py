"""Open what a rank needs to read for others: the arenas of its island, and the way to other islands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

from shardferry.arena import Arena, HostArena
from shardferry.exchange.peer_memory import ArenaAddress, PeerArenas, Places
from shardferry.exchange.point_to_point import Channel, Exchange
from shardferry.plan.cooperative import Relayed, SharedPlan
from shardferry.plan.load_plan import LoadPlan
from shardferry.read.destinations import Block, DevicePlace, Ways, deliver
from shardferry.read.execute import Sharing
from shardferry.stats import BusyTimes


@dataclass(frozen=True)
class Together:
    """One rank's part in cooperative reads."""

    shared: SharedPlan
    addresses: Mapping[int, ArenaAddress]  # of its island's arenas, by world rank
    channel: Channel | None  # to other islands

    @contextmanager
    def begin(
        self, plan: LoadPlan, arena: Arena, rows: Mapping[str, int], memory_budget_bytes: int, busy: BusyTimes
    ) -> Iterator[Sharing]:
        """What the reader needs; on leaving, everything has gone to other islands and has come from them.

        Args:
            rows: of the catalog's tensors, by key.
            memory_budget_bytes: of which up to a half goes to messages.

        Raises:
            StorageError: another rank's arena is gone, or a message didn't come through in time.
        """
        with ExitStack() as stack:
            places = self._places(plan, arena, rows, stack)

            def take(relayed: Relayed, memory: memoryview) -> None:
                row = rows[plan.tensors[relayed.tensor].key]
                with busy.at("deliver"):
                    deliver(Block(memory, relayed.box, relayed.itemsize), relayed.deliveries, row, places)

            if self.channel is None or not (self.shared.relays or self.shared.relayed):
                yield Sharing(self.shared, rows, Ways(places, None, busy), reserved_bytes=0)
                return
            exchange = Exchange(
                replace(self.channel, busy=busy), self.shared, take, memory_budget_bytes=memory_budget_bytes // 2
            )
            outbox = stack.enter_context(exchange).outbox
            yield Sharing(self.shared, rows, Ways(places, outbox, busy), exchange.buffer_bytes)

    def _places(self, plan: LoadPlan, arena: Arena, rows: Mapping[str, int], stack: ExitStack) -> Places:
        if isinstance(arena, HostArena):
            return stack.enter_context(PeerArenas(plan.world_rank, arena, self.addresses))
        offsets = {rows[tensor.key]: tensor.arena_offset for tensor in plan.tensors}
        return DevicePlace(plan.world_rank, arena, offsets)
