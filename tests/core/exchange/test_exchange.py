"""Boxes between ranks that share no memory: real gloo ranks, every byte compared, every failure bounded in time."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from shardferry.config import MessageLimits
from shardferry.errors import StorageError
from shardferry.exchange.point_to_point import Channel, Exchange, Inbox, Outbox
from shardferry.plan.cooperative import CooperativePlan, CooperativeRead, Forward, ForwardedBox
from shardferry.region import Region
from shardferry.stats import BusyTimes
from tests.support.ranks import RankPool

BOXES = {
    "many small ones": [Region((0,), (3 + i % 5,)) for i in range(300)],
    "larger than a message": [Region((0, 0), (200, 300)), Region((0,), (1,)), Region((0, 0), (400, 301))],
    "a scalar": [Region((), ())],
}


IN_SMALL_MESSAGES = {"message_bytes": 4000, "max_in_flight": MessageLimits().max_in_flight}


def content(reader: int, index: int, box: Region) -> np.ndarray:
    count = np.arange(box.numel, dtype=np.uint32).reshape(box.sizes)
    return count + np.uint32(1000 * index + 7 * reader)


def forwarded(boxes: list[Region]) -> tuple[ForwardedBox, ...]:
    return tuple(ForwardedBox(0, 0, box, 4, ()) for box in boxes)


def read_of(index: int, box: Region, forwards: tuple[Forward, ...]) -> CooperativeRead:
    return CooperativeRead(
        tensor=0, chunk=index, chunk_shape=box.sizes, region=box, copies=(), forwards=forwards, numel_wanted=box.numel
    )


def plan_of(rank: int, size: int, boxes: list[Region]) -> CooperativePlan:
    """Each rank sends all boxes to each other one."""
    others = [other for other in range(size) if other != rank]
    reads = tuple(
        read_of(index, box, tuple(Forward(other, box, index) for other in others)) for index, box in enumerate(boxes)
    )
    return CooperativePlan(
        own=(),
        reads=reads,
        bytes_sent=0,
        bytes_received=0,
        forwarded={other: forwarded(boxes) for other in others},
    )


def channel(timeout_s: float = 60) -> Channel:
    return Channel(dist.group.WORLD, timeout_s, BusyTimes())


def swap(boxes: list[Region], memory_budget_bytes: int) -> int:
    """All to all, from several threads, in no order; the number of boxes that came."""
    rank, size = dist.get_rank(), dist.get_world_size()
    plan, came = plan_of(rank, size, boxes), []
    reader_of = {id(box): reader for reader, boxes in plan.forwarded.items() for box in boxes}
    place_of = {id(box): place for boxes in plan.forwarded.values() for place, box in enumerate(boxes)}

    def deliver(box: ForwardedBox, memory: memoryview) -> None:
        found = np.frombuffer(memory, dtype=np.uint32).reshape(box.box.sizes)
        np.testing.assert_array_equal(found, content(reader_of[id(box)], place_of[id(box)], box.box))
        came.append(id(box))

    order = np.random.default_rng(rank).permutation(len(boxes)).tolist()
    exchange = Exchange(channel(), plan, deliver, memory_budget_bytes=memory_budget_bytes, limits=MessageLimits())

    def send(forward: Forward) -> None:
        exchange.outbox.put(forward.relay, forward.index, content(rank, forward.index, forward.box))

    with exchange, ThreadPoolExecutor(3) as pool:
        list(pool.map(send, (forward for index in order for forward in plan.reads[index].forwards)))
    assert len(set(came)) == len(came)
    return len(came)


@pytest.mark.parametrize("boxes", BOXES)
@pytest.mark.parametrize("memory_budget_bytes", [1, 1 << 30])
@pytest.mark.parametrize("size", [2, 5])
def test_every_box_comes_as_it_was(ranks: RankPool, boxes: str, memory_budget_bytes: int, size: int) -> None:
    came = ranks.run(size, swap, BOXES[boxes], memory_budget_bytes)
    assert came == [len(BOXES[boxes]) * (size - 1)] * size


class WatchedChannel(Channel):
    """Counts the parts of messages, two each, that were posted and have not gone yet."""

    now = most = 0
    lock = threading.Lock()

    def send(self, world_rank: int, header: torch.Tensor, data: torch.Tensor | None) -> list[dist.Work]:
        with self.lock:
            WatchedChannel.now += 2
            WatchedChannel.most = max(WatchedChannel.most, WatchedChannel.now)
        return super().send(world_rank, header, data)

    def wait(self, work: dist.Work, world_rank: int) -> None:
        super().wait(work, world_rank)
        with WatchedChannel.lock:
            WatchedChannel.now -= 1


def count_in_flight(num_messages: int) -> int:
    """The most messages that were on their way at once, where the relay is slow."""
    box = Region((0,), (1000,))
    if dist.get_rank() == 1:
        inbox = Inbox(
            channel(), {0: forwarded([box] * num_messages)}, lambda *_: time.sleep(0.002), **IN_SMALL_MESSAGES
        )
        inbox.finish()
        return 0
    WatchedChannel.now = WatchedChannel.most = 0
    outbox = Outbox(WatchedChannel(dist.group.WORLD, 60, BusyTimes()), [1], **IN_SMALL_MESSAGES)
    for index in range(num_messages):
        outbox.put(1, index, content(0, index, box))
    outbox.finish()
    return WatchedChannel.most


def test_messages_in_flight_are_bounded(ranks: RankPool) -> None:
    assert 2 <= ranks.run(2, count_in_flight, 60)[0] <= 2 * MessageLimits().max_in_flight


def wait_for_nothing(timeout_s: float) -> str:
    """Rank 1 sends nothing until rank 0 has given up."""
    if dist.get_rank() == 1:
        time.sleep(2 * timeout_s)
        return "slept"
    inbox = Inbox(channel(timeout_s), {1: forwarded([Region((0,), (1,))])}, lambda *_: None, **IN_SMALL_MESSAGES)
    with pytest.raises(StorageError, match=r"exchange with rank 1 failed: not done within timeouts\.load_s"):
        inbox.finish()
    return "raised"


def test_a_silent_reader_is_named_in_time(ranks: RankPool) -> None:
    assert ranks.run(2, wait_for_nothing, 1.0) == ["raised", "slept"]


def send_to_one_that_fails(where: str) -> str:
    """Either the relay can't write what comes, or the reader fails half-way."""
    rank, boxes = dist.get_rank(), [Region((0,), (1000,))] * 50
    reads = tuple(read_of(i, box, (Forward(1, box, i),)) for i, box in enumerate(boxes))
    nothing = CooperativePlan(own=(), reads=(), bytes_sent=0, bytes_received=0)
    plan = replace(nothing, reads=reads) if rank == 0 else replace(nothing, forwarded={0: forwarded(boxes)})

    content_of = {i: content(0, i, box) for i, box in enumerate(boxes) if where == "relay" or i != 30}

    def deliver(_box: ForwardedBox, _memory: memoryview) -> None:
        if where == "relay":
            raise ValueError("no room")

    try:
        with Exchange(channel(), plan, deliver, memory_budget_bytes=1, limits=MessageLimits()) as exchange:
            for read in plan.reads:
                for forward in read.forwards:
                    exchange.outbox.put(forward.relay, forward.index, content_of[forward.index])
    except (ValueError, KeyError) as error:
        return str(error)
    return "done"


@pytest.mark.parametrize(("where", "outcomes"), [("relay", ["done", "no room"]), ("reader", ["30", "done"])])
def test_who_fails_says_so_and_keeps_nobody_waiting(ranks: RankPool, where: str, outcomes: list[str]) -> None:
    """A relay whose reader has failed ends quietly: the reader's own error reaches all when the ranks agree."""
    assert ranks.run(2, send_to_one_that_fails, where) == outcomes
