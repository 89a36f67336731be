"""The transport `collective` beside what its contract says: no group but its own, and nothing left of either side that ends."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from shardferry.arena import Arena, HostArena
from shardferry.errors import HandoffError
from shardferry.handoff import collective
from shardferry.handoff.collective import Collective
from shardferry.handoff.transport import Route
from tests.support.leftovers import wait_while
from tests.support.processes import forking
from tests.support.ranks import RankPool
from tests.support.transport_contract import Other, content, is_content

ROUTE = Route(world_rank=3, node="127.0.0.1", timeout_s=20.0)
NUM_MESSAGES = 50


@pytest.fixture
def arena() -> HostArena:
    return filled()


def filled() -> HostArena:
    made = HostArena(content(1).numel())
    made.as_bytes().copy_(content(1))
    return made


@pytest.fixture
def small_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this process opens: the opener says how large messages are."""
    monkeypatch.setattr(collective, "_MESSAGE_BYTES", content(1).numel() // NUM_MESSAGES)


def sent(arena: Arena) -> Collective:
    return Collective.from_arena(arena, exclusive=False).along(ROUTE)


def refusal(transport: Collective) -> str:
    with pytest.raises(HandoffError) as raised:
        transport.open()
    return str(raised.value)


def listening() -> set[str]:
    """The sockets on which this process listens."""
    table = [line.split() for line in Path("/proc/self/net/tcp").read_text().splitlines()[1:]]
    table += [line.split() for line in Path("/proc/self/net/tcp6").read_text().splitlines()[1:]]
    of_all = {f"socket:[{row[9]}]" for row in table if row[3] == "0A"}
    own = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            own.add(str(descriptor.readlink()))
        except FileNotFoundError:
            continue
    return of_all & own


def threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("shardferry-collective")}


@pytest.mark.usefixtures("small_messages")
def test_many_messages_and_nothing_is_left() -> None:
    before, arena = listening(), filled()
    transport = sent(arena)
    assert is_content(transport.open(), 1)
    wait_while(lambda: threads() != {"shardferry-collective"})
    assert threads() == {"shardferry-collective"}, "it listens, as long as there is an arena"
    assert len(listening() - before) == 1, "the store of the opening is gone"
    del arena
    wait_while(lambda: threads() or listening() - before)
    assert not threads()
    assert not listening() - before
    assert "has ended before" in refusal(transport)


def all_groups() -> tuple[Any, ...]:
    """What this process knows of process groups."""
    world = distributed_c10d._world
    return dist.group.WORLD, dict(world.pg_map), dict(world.pg_names), world.group_count


def open_beside_the_default_group() -> None:
    arena, message, before = filled(), [None], all_groups()
    if dist.get_rank() == 0:
        message = [sent(arena)]
    dist.broadcast_object_list(message, src=0)
    dist.barrier()
    (transport,) = message
    if dist.get_rank() == 1:
        assert is_content(transport.open(), 1)
    assert all_groups() == before
    number = torch.ones(1)
    dist.all_reduce(number)
    assert number.item() == 2


def test_the_trainers_own_process_groups_are_not_touched(ranks: RankPool) -> None:
    ranks.run(2, open_beside_the_default_group)


def dies_meanwhile() -> Callable[[Collective], bool]:
    wait = collective._Pair.wait

    def die_after_some(pair: Any, work: Any, asking: socket.socket) -> None:
        wait(pair, work, asking)
        os.kill(os.getpid(), signal.SIGKILL)

    def work(transport: Collective) -> bool:
        collective._Pair.wait = die_after_some  # type: ignore[method-assign]
        return is_content(transport.open(), 1)

    return work


@pytest.mark.usefixtures("small_messages")
def test_a_trainer_that_dies_meanwhile_is_named_and_hinders_nobody(
    arena: HostArena, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = Other(forking(), dies_meanwhile)
    transport, before = sent(arena), listening()
    with pytest.raises((EOFError, ConnectionError)):
        trainer.call(transport)
    wait_while(lambda: threads() != {"shardferry-collective"})
    assert threads() == {"shardferry-collective"}
    assert not listening() - before
    assert "sending its shard to the trainer of rank 3 on 127.0.0.1" in caplog.text
    assert is_content(transport.open(), 1)


def sends_and_dies() -> Callable[[], Collective]:
    wait, arena = collective._Pair.wait, filled()

    def die_after_some(pair: Any, work: Any, asking: socket.socket) -> None:
        wait(pair, work, asking)
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> Collective:
        collective._Pair.wait = die_after_some  # type: ignore[method-assign]
        return sent(arena)

    return work


@pytest.mark.usefixtures("small_messages")
def test_a_loader_that_dies_meanwhile_is_named() -> None:
    loader, before = Other(forking(), sends_and_dies), listening()
    words = refusal(loader.call())
    assert words.startswith(
        f"rank 3 on 127.0.0.1: the loader (process {loader.process.pid}) that held this shard has ended"
    )
    wait_while(lambda: listening() - before)
    assert not listening() - before


def test_a_loader_that_fails_says_why(arena: HostArena, monkeypatch: pytest.MonkeyPatch) -> None:
    transport = sent(arena)
    arena.close()
    assert "the memory of its arena was given back; load again" in refusal(transport)


def test_nobody_gets_bytes_without_the_token(arena: HostArena) -> None:
    transport = sent(arena)
    assert "has ended before" in refusal(replace(transport, token="0" * 32))
    with socket.create_connection(("127.0.0.1", transport.port), timeout=20) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(ConnectionResetError):  # what was not read of the request
            assert stranger.recv(1) == b""
    assert transport.token not in repr(transport)
    assert is_content(transport.open(), 1)
