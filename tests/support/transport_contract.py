"""What every transport promises, shown with real processes: a loader that holds arenas, and trainers that open them.

tests/core/handoff and tests/gpu run the contract, each with arenas of its own kind, for each transport that carries them.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from typing import Any

import pytest
import torch

from shardferry.arena import Arena, allocate_arena, gpu_identity
from shardferry.errors import HandoffError
from shardferry.handoff.transport import Recipient, Route, Transport
from shardferry.handoff.transports import TRANSPORTS, TransportEntry, transport_named
from tests.support.oracle import random_bits

NBYTES = 3 * 2**20 + 5
_PATIENCE_S = 90.0
_Letter = tuple[bytes, list[bytes]]  # a pickled transport, and its buffers out of band


def carriers(device: torch.device) -> list[TransportEntry]:
    """The transports that bring an arena on this device to another process beside it."""
    beside = Recipient(same_host=True, gpu=gpu_identity(device))
    return [t for t in TRANSPORTS if t.crosses_processes and t.load().can_carry(allocate_arena(1, device), beside)]


@lru_cache(maxsize=16)
def content(seed: int, nbytes: int = NBYTES) -> torch.Tensor:
    """The bytes of an arena; not to be changed."""
    return random_bits((nbytes,), torch.uint8, seed)


def is_content(memory: torch.Tensor, seed: int, nbytes: int = NBYTES) -> bool:
    """Whether all bytes are those of an arena."""
    return torch.equal(memory.cpu(), content(seed, nbytes))


class Other:
    """Another process, which calls a function with whatever it is sent, and sends back what it returns or raises.

    Args:
        make: called there with ``args``; gives the function.
    """

    def __init__(self, context: BaseContext, make: Callable[..., Callable[..., Any]], *args: Any) -> None:
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, *args), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def call(self, *args: Any) -> Any:
        """What the function returns. Raises what it raises."""
        self._pipe.send(args)
        assert self._pipe.poll(_PATIENCE_S), "the other process doesn't answer"
        done, value = self._pipe.recv()
        if not done:
            raise value
        return value

    def kill(self) -> None:
        self.process.kill()
        self.process.join(_PATIENCE_S)


def _serve(pipe: Connection, make: Callable[..., Callable[..., Any]], *args: Any) -> None:
    torch.set_num_threads(1)
    work = make(*args)
    while True:
        try:
            pipe.send((True, work(*pipe.recv())))
        except EOFError:
            return
        except Exception as error:
            pipe.send((False, error))


class Loader(Other):
    """A process that holds arenas, and makes them ready to be opened elsewhere."""

    def __init__(self, context: BaseContext, device: torch.device) -> None:
        super().__init__(context, _loads, device)

    def send(self, transport: TransportEntry, seed: int, *, exclusive: bool, nbytes: int = NBYTES) -> Transport:
        """A new arena, as it arrives in this process."""
        return _arrived(self.call(transport.name, seed, nbytes, exclusive))

    def send_again(self, transport: TransportEntry, *, exclusive: bool) -> Transport:
        """The arena that was sent last."""
        return _arrived(self.call(transport.name, None, 0, exclusive))

    def close_last(self) -> None:
        """Give the memory of the arena back that was sent last."""
        self.call(None)

    def stop(self) -> None:
        """Let it do nothing any more, and not die."""
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGSTOP)


def _loads(device: torch.device) -> Callable[..., _Letter | None]:
    arenas: list[Arena] = []

    def send(name: str | None, seed: int | None = None, nbytes: int = 0, exclusive: bool = False) -> _Letter | None:
        if name is None:
            arenas.pop().close()
            return None
        if seed is not None:
            arenas.append(allocate_arena(nbytes, device))
            arenas[-1].as_bytes().copy_(content(seed, nbytes))
        return _letter(transport_named(name).load().from_arena(arenas[-1], exclusive=exclusive))

    return send


def _letter(sent: Transport) -> _Letter:
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(sent, protocol=5, buffer_callback=buffers.append)
    return text, [bytes(buffer.raw()) for buffer in buffers]


def _arrived(letter: _Letter) -> Transport:
    """Its buffers are read-only, as an object store gives them."""
    text, buffers = letter
    arrived: Transport = pickle.loads(text, buffers=buffers)
    return arrived


class Trainer(Other):
    """Another process that opens arenas."""

    def __init__(self, context: BaseContext) -> None:
        super().__init__(context, _trains)

    def open(self, sent: Transport, seed: int) -> bool:
        """Whether it finds the right bytes. Raises HandoffError, as `Transport.open`."""
        return bool(self.call("open", _letter(sent), seed))

    def write(self) -> None:
        """Change every byte of what was opened last."""
        self.call("write", None, 0)


def _trains() -> Callable[..., bool]:
    opened: list[torch.Tensor] = []

    def act(what: str, letter: _Letter | None, seed: int) -> bool:
        if what == "open":
            assert letter is not None
            opened.append(_arrived(letter).open())
            return is_content(opened[-1], seed)
        opened[-1].fill_(7)
        if opened[-1].is_cuda:
            torch.cuda.synchronize()
        return True

    return act


class TransportContract:
    """The contract. A subclass says where arenas are; its module has the fixture ``transport``: one of `carriers`."""

    device: torch.device
    context: BaseContext

    @pytest.fixture(autouse=True)
    def _installed(self, transport: TransportEntry) -> None:
        """Its optional package is; scripts/gpu runs without any, the other tests have all."""
        try:
            transport.load().require()
        except HandoffError as error:
            pytest.skip(str(error))

    @pytest.fixture
    def loader(self) -> Iterator[Loader]:
        with _killed_at_last(Loader(self.context, self.device)) as loader:
            yield loader

    @pytest.fixture
    def trainer(self) -> Iterator[Trainer]:
        with _killed_at_last(Trainer(self.context)) as trainer:
            yield trainer

    @pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
    def test_bytes_arrive_and_may_be_written(
        self, transport: TransportEntry, loader: Loader, trainer: Trainer, exclusive: bool
    ) -> None:
        for seed, nbytes in enumerate((1, 4097, NBYTES)):
            found = loader.send(transport, seed, exclusive=exclusive, nbytes=nbytes).open()
            assert (found.dtype, found.shape) == (torch.uint8, (nbytes,))
            assert is_content(found, seed, nbytes)
            found.fill_(7)
            assert found.unique().tolist() == [7]
        assert trainer.open(loader.send(transport, 9, exclusive=exclusive), 9)
        trainer.write()

    def test_nobody_sees_what_another_writes(self, transport: TransportEntry, loader: Loader, trainer: Trainer) -> None:
        sent = loader.send(transport, 1, exclusive=False)
        one, other = sent.open(), sent.open()
        assert trainer.open(sent, 1)
        trainer.write()
        one.fill_(3)
        assert is_content(other, 1)
        assert is_content(sent.open(), 1)
        assert trainer.open(sent, 1)

    def test_an_exclusive_arena_goes_to_one_trainer(
        self, transport: TransportEntry, loader: Loader, trainer: Trainer
    ) -> None:
        sent = loader.send(transport, 1, exclusive=True)
        assert trainer.open(sent, 1)
        trainer.write()
        second = _opened(sent)
        assert "handed over already" in second if isinstance(second, str) else is_content(second, 1)

    def test_of_two_that_open_at_once_none_gets_what_the_other_writes(
        self, transport: TransportEntry, loader: Loader
    ) -> None:
        sent = loader.send(transport, 0, exclusive=True)
        sent.open()
        is_copied = not isinstance(_opened(sent), str)
        for seed in range(8):
            sent, start, found = loader.send(transport, seed, exclusive=True), threading.Barrier(2), []

            def open_it(sent: Transport = sent, start: threading.Barrier = start, found: list[Any] = found) -> None:
                start.wait(_PATIENCE_S)
                found.append(_opened(sent))

            threads = [threading.Thread(target=open_it) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(_PATIENCE_S)
            opened = [one for one in found if not isinstance(one, str)]
            assert len(opened) == (2 if is_copied else 1), found
            for one in opened:
                assert is_content(one, seed)
                one.fill_(7)

    @pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
    def test_a_loader_that_is_killed_before(self, transport: TransportEntry, loader: Loader, exclusive: bool) -> None:
        sent = loader.send(transport, 1, exclusive=exclusive)
        loader.kill()
        found = _opened(sent)
        if transport.outlives_loader:
            assert not isinstance(found, str), found
            assert is_content(found, 1)
        else:
            assert isinstance(found, str)
            assert f"the loader (process {loader.process.pid}) that held this shard has ended before" in found

    def test_a_loader_that_is_killed_meanwhile(self, transport: TransportEntry, loader: Loader) -> None:
        """It is opened again and again: with the right bytes, or with an error that names the loader."""
        sent = loader.send(transport, 1, exclusive=False)
        outcomes: list[torch.Tensor | str] = [_opened(sent)]  # the first one loads the machinery, which takes long
        killing = threading.Timer(0.2, loader.kill)
        killing.start()
        deadline = time.monotonic() + _PATIENCE_S
        while time.monotonic() < deadline and killing.is_alive():
            outcomes.append(_opened(sent))
            assert isinstance(outcomes[-1], str) or is_content(outcomes[-1], 1)
        outcomes.append(_opened(sent))
        assert not isinstance(outcomes[0], str), outcomes[0]
        assert isinstance(outcomes[-1], str) is not transport.outlives_loader
        assert {one for one in outcomes if isinstance(one, str) and "has ended before" not in one} == set()

    @pytest.mark.parametrize("exclusive", [False, True], ids=["shared", "exclusive"])
    def test_a_loader_that_is_killed_after(self, transport: TransportEntry, loader: Loader, exclusive: bool) -> None:
        if exclusive and transport.lends_memory:
            return  # promised only as long as the loader lives
        found = loader.send(transport, 1, exclusive=exclusive).open()
        loader.kill()
        assert is_content(found, 1)
        found.fill_(7)
        assert found.unique().tolist() == [7]

    def test_a_second_delivery_beside_the_first(self, transport: TransportEntry, loader: Loader) -> None:
        first = loader.send(transport, 1, exclusive=True).open()
        second = loader.send(transport, 2, exclusive=True).open()
        assert is_content(first, 1)
        assert is_content(second, 2)
        second.fill_(7)
        assert is_content(first, 1)

    def test_a_second_handle_of_one_arena(self, transport: TransportEntry, loader: Loader) -> None:
        first = loader.send(transport, 1, exclusive=False).open()
        first.fill_(7)
        assert is_content(loader.send_again(transport, exclusive=False).open(), 1)

    def test_a_loader_that_hangs_delays_nobody(self, transport: TransportEntry, loader: Loader) -> None:
        """Where it has to answer, the opener is told within the deadline."""
        loader.send(transport, 0, exclusive=True).open()  # the first one loads the machinery
        sent = loader.send(transport, 1, exclusive=True).along(Route(3, "127.0.0.1", 2.0))
        loader.stop()
        start = time.monotonic()
        found = _opened(sent)
        assert time.monotonic() - start < 5
        if transport.asks_loader:
            assert isinstance(found, str)
            assert found.startswith(f"rank 3 on 127.0.0.1: the loader (process {loader.process.pid})")
            assert "timeouts.handoff_s = 2 s" in found
        else:
            assert not isinstance(found, str), found
            assert is_content(found, 1)


def _opened(sent: Transport) -> torch.Tensor | str:
    """The bytes, or why there are none."""
    try:
        return sent.open()
    except HandoffError as error:
        return str(error)


@contextmanager
def _killed_at_last(other: Any) -> Iterator[Any]:
    try:
        yield other
    finally:
        other.kill()
