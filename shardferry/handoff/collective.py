"""Hand an arena over through a process group of loader and trainer alone, straight into memory of the trainer's process::

    loader                                              trainer
    listens  ◄──── the arena's token, a store's port ─── opens a store, and asks
             ──── an answer ──────────────────────────►
    rank 0   ════ gloo, or NCCL between two GPUs ═════► rank 1: each message into its place in one buffer

Each opening has a store, a port and a group of its own, which end with it. No other process group is touched: neither the
trainers' nor the loaders' own. Both sides hold the connection by which the trainer has asked, and see there that the other ends.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import secrets
import socket
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from shardferry.arena import Arena, HostArena, gpu_identity
from shardferry.errors import HandoffError
from shardferry.handoff.transport import Recipient, Route, Transport

_MESSAGE_BYTES = 64 << 20
_FORM_S = 30.0  # for the two to form their group, which both are at
_POLL_S = 1.0
_GRACE_S = 0.5  # until the end of a process is seen everywhere
_LINE_BYTES = 4096
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Collective(Transport):
    """Where a loader listens. Each opener gets a copy, in messages of 64 MiB; no side holds more than that beside it.

    The bytes arrive on the trainer's current GPU, through NCCL, where the arena is on another GPU; else in host memory, through gloo.
    """

    pid: int  # of the loader
    port: int
    token: str = field(repr=False)  # whoever knows it gets the bytes
    nbytes: int
    gpu: str | None  # of the arena, see `shardferry.arena.gpu_identity`
    route: Route = field(default_factory=Route)

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        return True

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        """Freeze the arena, and listen until it is gone. This process must live until it was opened."""
        if isinstance(arena, HostArena) and arena.is_shareable:
            arena.freeze()
        listener, token = socket.create_server(("", 0)), secrets.token_hex(16)
        listener.settimeout(_POLL_S)
        serving = (listener, token, weakref.ref(arena))
        threading.Thread(target=_serve, args=serving, daemon=True, name="shardferry-collective").start()
        return cls(os.getpid(), listener.getsockname()[1], token, arena.nbytes, gpu_identity(arena.device))

    def along(self, route: Route) -> Self:
        return replace(self, route=route)

    def open(self) -> torch.Tensor:
        deadline = time.monotonic() + self.route.trainers_s
        device = self._own_device()
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        try:
            with socket.create_connection((self.route.node, self.port), _left_s(deadline)) as asking:
                try:
                    self._receive(memory, asking, deadline)
                except (OSError, RuntimeError) as error:
                    traceback.clear_frames(error.__traceback__)  # they hold the store and the group, which listen
                    _raise_failure(asking, within_s=_GRACE_S)
                    raise ConnectionError(str(error)) from error
        except (OSError, EOFError) as error:
            is_late = time.monotonic() >= deadline
            raise (self.route.late(self.pid) if is_late else self.route.ended(self.pid, error)) from error
        except _LoaderError as error:
            raise HandoffError(f"{self.route.who(self.pid)} could not send it: {error}; load again") from error
        return memory

    def _own_device(self) -> torch.device:
        """Of the memory that the bytes arrive in."""
        if self.gpu is not None and torch.cuda.is_available() and dist.is_nccl_available():
            device = torch.device("cuda", torch.cuda.current_device())
            if gpu_identity(device) != self.gpu:  # NCCL brings nothing from a GPU to itself
                return device
        return torch.device("cpu")

    def _receive(self, memory: torch.Tensor, asking: socket.socket, deadline: float) -> None:
        """Raises OSError, RuntimeError: something failed; EOFError: the loader has ended; _LoaderError."""
        address = asking.getsockname()[0]
        store = dist.TCPStore(
            address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=_form_s(deadline))
        )
        self._ask(store.port, memory, asking, deadline)
        pair = _Pair(store, 1, address, memory.device, deadline)
        try:
            for message in memory.split(_MESSAGE_BYTES):
                pair.wait(pair.group.recv([message], 0, 0), asking)
        finally:
            pair.close()
        _tell(asking, {})

    def _ask(self, port: int, memory: torch.Tensor, asking: socket.socket, deadline: float) -> None:
        ask = {
            "token": self.token,
            "rank": self.route.world_rank,
            "address": asking.getsockname()[0],
            "port": port,
            "loader": self.route.node,
            "left_s": _left_s(deadline),
            "nccl": memory.is_cuda,
            "message_bytes": _MESSAGE_BYTES,  # gloo ends a process that gets a message of another size
        }
        _tell(asking, ask)
        asking.settimeout(_left_s(deadline))
        _hear(asking)


class _LoaderError(Exception):
    """What the loader says that went wrong."""


def _serve(listener: socket.socket, token: str, arena: Callable[[], Arena | None]) -> None:
    """In the loader: answer whoever asks, until the arena is gone."""
    with listener:
        while arena() is not None:
            with suppress(TimeoutError):
                asking, _ = listener.accept()
                threading.Thread(
                    target=_answer, args=(asking, token, arena), daemon=True, name="shardferry-collective-send"
                ).start()


def _answer(asking: socket.socket, token: str, arena: Callable[[], Arena | None]) -> None:
    with asking:
        asking.settimeout(_FORM_S)
        try:
            ask = _hear(asking)
            if not hmac.compare_digest(str(ask["token"]), token):
                return
        except (OSError, EOFError, ValueError, KeyError, TypeError):  # no trainer of ours
            return
        try:
            _send(ask, asking, arena())
        except Exception as error:
            said = str(error)  # whoever keeps the record keeps no traceback, which would hold the store and the group
            _LOG.warning("sending its shard to the trainer of rank %s on %s: %s", ask["rank"], ask["address"], said)
            with suppress(OSError):
                _tell(asking, {"error": said})


def _send(ask: dict[str, Any], asking: socket.socket, arena: Arena | None) -> None:
    memory = _bytes_of(arena)
    deadline = time.monotonic() + ask["left_s"]
    device = memory.device if ask["nccl"] else torch.device("cpu")
    _tell(asking, {})
    store = dist.TCPStore(
        ask["address"], ask["port"], is_master=False, timeout=timedelta(seconds=_form_s(deadline)), use_libuv=True
    )
    pair = _Pair(store, 0, ask["loader"], device, deadline)
    try:
        for message in memory.split(ask["message_bytes"]):
            pair.wait(pair.group.send([message.to(device)], 1, 0), asking)
        asking.settimeout(_left_s(deadline))
        _hear(asking)  # that everything is there
    finally:
        pair.close()


def _bytes_of(arena: Arena | None) -> torch.Tensor:
    """Raises HandoffError: it is closed, or gone."""
    if arena is not None:
        with suppress(RuntimeError):
            return arena.as_bytes()
    raise HandoffError("the memory of its arena was given back")


class _Pair:
    """The process group of a loader (rank 0) and a trainer (rank 1).

    torch has no public way to make a process group beside the default one without all ranks of that. The constructors of its
    backends are used here alone; tests/core/test_private_apis.py fails when they change.

    Args:
        address: of this process, by which the other one reaches it.
        device: of the memory that is sent or received.
    """

    def __init__(self, store: dist.Store, rank: int, address: str, device: torch.device, deadline: float) -> None:
        self._deadline = deadline
        self._device = device
        left = timedelta(seconds=_form_s(deadline))
        if device.type == "cuda":
            nccl: Any = dist.ProcessGroupNCCL.Options()
            nccl._timeout = left
            self.group: Any = _without_watchdog(lambda: dist.ProcessGroupNCCL(store, rank, 2, nccl))
        else:
            gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=address)]
            gloo._timeout = left
            self.group = dist.ProcessGroupGloo(store, rank, 2, gloo)

    def wait(self, work: Any, asking: socket.socket) -> None:
        """Raises RuntimeError: gloo says that the other has ended, or is late; EOFError, TimeoutError: the same with NCCL."""
        if self._device.type != "cuda":
            work.wait(timedelta(seconds=_left_s(self._deadline)))
            return
        while not work.is_completed():  # NCCL doesn't see that the other has ended
            if time.monotonic() >= self._deadline:
                raise TimeoutError("NCCL has not brought a message")
            _raise_failure(asking, within_s=0.0)
            time.sleep(0.001)
        work.wait()
        torch.cuda.synchronize(self._device)

    def close(self) -> None:
        self.group.abort()


_ENVIRONMENT = threading.Lock()


def _without_watchdog(make: Callable[[], Any]) -> Any:
    """Make a group whose watchdog doesn't end this process when the other one dies; torch reads that from the environment."""
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    with _ENVIRONMENT:
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            return make()
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def _left_s(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def _form_s(deadline: float) -> float:
    return min(_FORM_S, _left_s(deadline))


def _tell(asking: socket.socket, words: dict[str, Any]) -> None:
    asking.sendall(json.dumps(words).encode() + b"\n")


def _hear(asking: socket.socket) -> dict[str, Any]:
    """A line of the other side. Raises EOFError: it has ended; OSError: it says nothing in time; _LoaderError: what it says."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := asking.recv(1)) or len(line) == _LINE_BYTES:
            raise EOFError("it has closed the connection")
        line += byte
    words: dict[str, Any] = json.loads(line)
    if "error" in words:
        raise _LoaderError(words["error"])
    return words


def _raise_failure(asking: socket.socket, *, within_s: float) -> None:
    """Raises EOFError, OSError, _LoaderError: the other side has ended, or says what went wrong; nothing if it says nothing."""
    asking.settimeout(within_s)
    with suppress(BlockingIOError, TimeoutError):
        _hear(asking)
