"""Send boxes between ranks that share no memory, over their process group, while both go on reading.

A reader packs the boxes for one relay into messages of some MiB. Each message starts with a header that lists its boxes, so
that boxes are sent in the order in which they were read. A relay has one thread per reader: it receives the next header, then
the bytes, and delivers the boxes to the arenas of its memory group::

    reader   part 7 ─┐                                         ┌─ relay: box 3 -> arenas of ranks 4 and 5
             part 9 ─┴─ message [header: boxes 3, 4][bytes] ───┴─        box 4 -> arena of rank 6

No rank waits forever. Messages in flight are bounded in both directions. A relay receives the next message even if it failed to
deliver the one before. A reader that fails tells its relays. Every wait has a deadline.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Self

import numpy as np
import torch
import torch.distributed as dist

from shardferry.config import MessageLimits
from shardferry.errors import StorageError
from shardferry.plan.cooperative import CooperativePlan, ForwardedBox
from shardferry.stats import BusyTimes

_MAX_BOXES = 256  # of a message
_HEADER_TAG, _BYTES_TAG = 0x5FE0, 0x5FE1  # of the process group's messages
_FAILED = -1  # in a header, instead of the number of boxes

Deliver = Callable[[ForwardedBox, memoryview], None]  # a box, and its elements packed row-major


class Channel:
    """How ranks talk: a process group that carries host memory, and a deadline for all messages.

    Args:
        timeout_s: from now on; None: no deadline.
        busy: clocks the waits.
    """

    def __init__(self, process_group: dist.ProcessGroup, timeout_s: float | None, busy: BusyTimes) -> None:
        self.busy = busy
        self._process_group = process_group
        self._timeout_s = timeout_s
        self._stop_s = None if timeout_s is None else time.monotonic() + timeout_s

    def send(self, world_rank: int, header: torch.Tensor, data: torch.Tensor | None) -> list[dist.Work]:
        """Post a message; it is sent when the works are done."""
        parts = [(header, _HEADER_TAG), *([] if data is None else [(data, _BYTES_TAG)])]
        works = [dist.isend(part, group=self._process_group, group_dst=world_rank, tag=tag) for part, tag in parts]
        return [work for work in works if work is not None]

    def receive(self, world_rank: int, into: torch.Tensor, tag: int) -> None:
        """Wait for a part of a message. Raises StorageError."""
        work = dist.irecv(into, group=self._process_group, group_src=world_rank, tag=tag)
        assert work is not None
        self.wait(work, world_rank)

    def wait(self, work: dist.Work, world_rank: int) -> None:
        """Raises StorageError where a message to or from a rank doesn't come through in time, or the rank has ended."""
        left_s = None if self._stop_s is None else max(0.001, self._stop_s - time.monotonic())
        try:
            work.wait(*([] if left_s is None else [timedelta(seconds=left_s)]))
        except RuntimeError as error:
            late = self._stop_s is not None and time.monotonic() >= self._stop_s
            what = "it has ended, or can't be reached"
            if late:
                what = f"not done within timeouts.load_s ({self._timeout_s} s)"
            raise StorageError(f"the exchange with rank {world_rank} failed: {what} ({error})") from error


@dataclass(slots=True)
class _Message:
    """Boxes on their way to one relay."""

    data: torch.Tensor  # uint8
    indices: list[int] = field(default_factory=list)
    nbytes: int = 0

    def has_room(self, nbytes: int) -> bool:
        return len(self.indices) < _MAX_BOXES and self.nbytes + nbytes <= self.data.numel()

    def add(self, index: int, block: np.ndarray) -> None:
        place = self.data.numpy()[self.nbytes : self.nbytes + block.nbytes]
        np.copyto(place.view(block.dtype).reshape(block.shape), block)
        self.indices.append(index)
        self.nbytes += block.nbytes

    def header(self) -> torch.Tensor:
        header = _empty_header()
        header[:2] = torch.tensor([len(self.indices), self.nbytes])
        header[2 : 2 + len(self.indices)] = torch.tensor(self.indices, dtype=torch.int64)
        return header


def _empty_header() -> torch.Tensor:
    return torch.zeros(2 + _MAX_BOXES, dtype=torch.int64)


class Outbox:
    """What a rank sends to relays in other memory groups. `put` may be called from several threads.

    Args:
        message_bytes: that a message holds; a larger box gets a message of its own.
    """

    def __init__(self, channel: Channel, relays: Sequence[int], *, message_bytes: int, max_in_flight: int) -> None:
        self._channel = channel
        self._open: dict[int, _Message] = {}
        self._locks = {relay: threading.Lock() for relay in relays}  # of its open message, and of the order of sending
        self._buffers = _Buffers(len(relays) + max_in_flight, message_bytes)
        self._in_flight = threading.Semaphore(max_in_flight)
        self._waiters = ThreadPoolExecutor(max_in_flight, thread_name_prefix="shardferry-send")
        self._failure: StorageError | None = None

    def put(self, relay: int, index: int, block: np.ndarray) -> None:
        """Pack a box; it is sent with others. Waits while too much is in flight.

        Args:
            index: the box's place among all that goes to this relay.

        Raises:
            StorageError: something didn't come through.
        """
        if self._failure is not None:
            raise self._failure
        with self._locks[relay]:
            message = self._open.get(relay)
            if message is not None and not message.has_room(block.nbytes):
                self._send(relay, self._open.pop(relay))
                message = None
            if message is None:
                message = self._open[relay] = _Message(self._buffers.take(block.nbytes))
            message.add(index, block)

    def _send(self, relay: int, message: _Message) -> None:
        self._in_flight.acquire()
        works = self._channel.send(relay, message.header(), message.data[: message.nbytes])
        self._waiters.submit(self._wait, relay, works, message)

    def _wait(self, relay: int, works: Sequence[dist.Work], message: _Message) -> None:
        try:
            with self._channel.busy.at("exchange"):
                for work in works:
                    self._channel.wait(work, relay)
        except StorageError as error:
            self._failure = error
        finally:
            self._buffers.give(message.data)
            self._in_flight.release()

    def finish(self) -> None:
        """Send what is left, and wait until all has gone. Raises StorageError."""
        for relay, lock in self._locks.items():
            with lock:
                if relay in self._open:
                    self._send(relay, self._open.pop(relay))
        self._waiters.shutdown(wait=True)
        if self._failure is not None:
            raise self._failure

    def give_up(self) -> None:
        """Tell every relay that no more comes. Raises nothing: what went wrong is known better elsewhere."""
        header = _empty_header()
        header[0] = _FAILED
        for relay in self._locks:
            with suppress(RuntimeError, StorageError):  # the relay has ended
                for work in self._channel.send(relay, header, None):
                    self._channel.wait(work, relay)
        self._waiters.shutdown(wait=True)


class _Buffers:
    """Message buffers, used again and again; at most so many are out."""

    def __init__(self, count: int, nbytes: int) -> None:
        self._left = threading.Semaphore(count)
        self._nbytes = nbytes
        self._free: list[torch.Tensor] = []

    def take(self, nbytes: int) -> torch.Tensor:
        self._left.acquire()
        if nbytes <= self._nbytes:
            with suppress(IndexError):
                return self._free.pop()
        return torch.empty(max(nbytes, self._nbytes), dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        if buffer.numel() == self._nbytes:
            self._free.append(buffer)
        self._left.release()


class Inbox:
    """What a rank receives from readers in other memory groups, each on a thread of its own."""

    def __init__(
        self,
        channel: Channel,
        forwarded: Mapping[int, Sequence[ForwardedBox]],
        deliver: Deliver,
        *,
        message_bytes: int,
        max_in_flight: int,
    ) -> None:
        self._channel = channel
        self._deliver = deliver
        self._buffers = _Buffers(max_in_flight, message_bytes)
        self._pool = ThreadPoolExecutor(max(1, len(forwarded)), thread_name_prefix="shardferry-receive")
        self._readers = [self._pool.submit(self._take_all, reader, boxes) for reader, boxes in forwarded.items()]

    def finish(self) -> None:
        """Wait until everything has come, or the readers have failed. Raises the first error of delivering."""
        self.drain()
        for taken in self._readers:
            taken.result()

    def drain(self) -> None:
        """The same, for a rank that has failed: what goes wrong now is not of interest."""
        self._pool.shutdown(wait=True)

    def _take_all(self, reader: int, boxes: Sequence[ForwardedBox]) -> None:
        num_left, header = len(boxes), _empty_header()
        failure: Exception | None = None
        while num_left:
            self._channel.receive(reader, header, _HEADER_TAG)
            num_boxes, nbytes, *indices = header.tolist()
            if num_boxes == _FAILED:  # it raises its own error, and the ranks' agreement brings that to all
                return
            num_left -= num_boxes
            buffer = self._buffers.take(nbytes)
            try:
                with self._channel.busy.at("exchange"):
                    self._channel.receive(reader, buffer[:nbytes], _BYTES_TAG)
                if failure is None:
                    failure = self._deliver_all([boxes[index] for index in indices[:num_boxes]], buffer.numpy().data)
            finally:
                self._buffers.give(buffer)
        if failure is not None:
            raise failure

    def _deliver_all(self, boxes: Sequence[ForwardedBox], data: memoryview) -> Exception | None:
        """Returns what went wrong: the reader goes on sending, and its messages must be taken."""
        start = 0
        try:
            for box in boxes:
                self._deliver(box, data[start : start + box.nbytes])
                start += box.nbytes
        except Exception as error:
            return error
        return None


class Exchange:
    """Both directions, as long as a ``with`` lasts: leaving it, everything has gone out and has come in.

    Args:
        memory_budget_bytes: of all messages that are being packed, sent and taken; many relays share it.
    """

    def __init__(
        self,
        channel: Channel,
        plan: CooperativePlan,
        deliver: Deliver,
        *,
        memory_budget_bytes: int,
        limits: MessageLimits,
    ) -> None:
        relays, in_flight = sorted(plan.relays), limits.max_in_flight
        num_messages = len(relays) + 2 * in_flight
        message_bytes = min(limits.message_bytes, max(limits.min_message_bytes, memory_budget_bytes // num_messages))
        self.buffer_bytes = num_messages * message_bytes
        self.outbox = Outbox(channel, relays, message_bytes=message_bytes, max_in_flight=in_flight)
        self._inbox = Inbox(channel, plan.forwarded, deliver, message_bytes=message_bytes, max_in_flight=in_flight)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _where: object) -> None:
        if error is not None:
            self.outbox.give_up()
            self._inbox.drain()
            return
        try:
            self.outbox.finish()
        except StorageError:
            self._inbox.drain()
            raise
        self._inbox.finish()
