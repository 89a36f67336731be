"""Measure what `auto` takes for granted: how fast one rank writes into a neighbour's arena, and sends to one of another node.

``python -m benchmarks.copies``: two processes on this machine, the process group on its loopback; alone and both at once. What
arrives is compared after the clock has stopped.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.machine import describe
from benchmarks.ranks import RankPool
from benchmarks.table import Table, plain
from shardferry.arena import HostArena
from shardferry.exchange.peer_memory import ArenaAddress, PeerArenas
from shardferry.exchange.point_to_point import MAX_IN_FLIGHT, MESSAGE_BYTES
from shardferry.plan import costs

_TOTAL_BYTES = 256 << 20  # from one rank, in a round
_SLAB_BYTES = 1 << 20  # what a rank reads for others in one go: it is copied out of a core's cache
_NUM_MESSAGES = _TOTAL_BYTES // MESSAGE_BYTES


@dataclass(frozen=True, slots=True)
class Way:
    """One way from rank to rank."""

    title: str
    work: Callable[[int, int], list[float]]  # on each of two ranks, of so many givers and rounds: seconds
    assumed: float  # bytes a second


def write_into_arenas(num_givers: int, repeats: int) -> list[float]:
    """Slab by slab into the other rank's memory file, whose pages are there."""
    rank, peer = dist.get_rank(), 1 - dist.get_rank()
    arena = HostArena(_TOTAL_BYTES, num_places=1)
    found = np.frombuffer(arena.memory, dtype=np.uint8, count=_TOTAL_BYTES)
    found[:] = 0xFF
    addresses: list[Any] = [None, None]
    dist.all_gather_object(addresses, ArenaAddress.of(arena))
    slab = _content(rank, _SLAB_BYTES)

    with PeerArenas(rank, arena, dict(enumerate(addresses))) as arenas:

        def write() -> None:
            for start in range(0, _TOTAL_BYTES, _SLAB_BYTES):
                arenas.put(peer, 0, start, slab, (1,))

        seconds = _rounds(write if rank < num_givers else _wait, repeats)
    assert peer >= num_givers or (found.reshape(-1, _SLAB_BYTES) == _content(peer, _SLAB_BYTES)).all()
    return seconds


def send_messages(num_givers: int, repeats: int) -> list[float]:
    """Through the process group, a bounded number of messages under way in each direction."""
    rank, peer = dist.get_rank(), 1 - dist.get_rank()
    sent = [torch.from_numpy(_content(rank, MESSAGE_BYTES)) for _ in range(MAX_IN_FLIGHT)]
    received = [torch.full((MESSAGE_BYTES,), 0xFF, dtype=torch.uint8) for _ in range(MAX_IN_FLIGHT)]

    def posted(place: int) -> Iterator[dist.Work | None]:
        if peer < num_givers:
            yield dist.irecv(received[place], src=peer)
        if rank < num_givers:
            yield dist.isend(sent[place], dst=peer)

    def exchange() -> None:
        under_way: deque[list[dist.Work | None]] = deque()
        for message in range(_NUM_MESSAGES):
            if len(under_way) == MAX_IN_FLIGHT:
                _finish(under_way.popleft())
            under_way.append(list(posted(message % MAX_IN_FLIGHT)))
        for works in under_way:
            _finish(works)

    seconds = _rounds(exchange, repeats)
    assert peer >= num_givers or all((data.numpy() == _content(peer, MESSAGE_BYTES)).all() for data in received)
    return seconds


WAYS = (
    Way("into a neighbour's arena, slabs of 1 MiB", write_into_arenas, costs._ARENA_BYTES_PER_S),
    Way(
        f"through gloo, {MAX_IN_FLIGHT} messages of {MESSAGE_BYTES >> 20} MiB under way",
        send_messages,
        costs._GROUP_BYTES_PER_S,
    ),
)


def _content(rank: int, nbytes: int) -> np.ndarray:
    return np.random.default_rng(rank).integers(0, 255, nbytes, dtype=np.uint8)


def _wait() -> None:
    """The other rank gives, and asks nothing of this one."""


def _finish(works: list[dist.Work | None]) -> None:
    for work in works:
        assert work is not None
        work.wait()


def _rounds(work: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of each round but a first one, in which pages and connections are made."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    dist.barrier()
    return seconds[1:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.copies", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds; figures are medians")
    repeats = parser.parse_args().repeats
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    print(", ".join(f"{what} {value}" for what, value in describe(file_system="none").items()))
    with RankPool() as pool:
        rows = [
            _row(way, num_givers, pool.run(2, way.work, num_givers, repeats)) for way in WAYS for num_givers in (1, 2)
        ]
    header = ["way", "ranks that give", "GB/s of each", "rounds from", "to", "costs.py assumes"]
    print(plain(Table(f"From rank to rank, {_TOTAL_BYTES >> 20} MiB a round; medians of {repeats}", header, rows)))


def _row(way: Way, num_givers: int, seconds: list[list[float]]) -> list[str]:
    """A round is over when the slower rank is done."""
    rates = [_TOTAL_BYTES / 1e9 / max(of_both) for of_both in zip(*seconds, strict=True)]
    shown = [f"{rate:.2f}" for rate in (median(rates), min(rates), max(rates), way.assumed / 1e9)]
    return [way.title, str(num_givers), *shown]


if __name__ == "__main__":
    main()
