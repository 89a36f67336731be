"""The registry of transports: what each promises, and which one `auto` takes."""

from __future__ import annotations

import mmap
import pickle
import subprocess
import sys
from dataclasses import replace
from typing import Self

import pytest
import torch

from shardferry.arena import Arena, DeviceArena, HostArena
from shardferry.errors import HandoffError
from shardferry.handoff import transports
from shardferry.handoff.handle import make_handle
from shardferry.handoff.in_process import InProcess
from shardferry.handoff.loader_file import LoaderFile, take
from shardferry.handoff.object_store import ObjectStore
from shardferry.handoff.shared_memory import SharedMemory
from shardferry.handoff.transport import Recipient, Transport
from shardferry.handoff.transports import (
    AUTO,
    TRANSPORTS,
    TransportEntry,
    choose_transport,
    needs_host_arena,
    stage_transport_names,
    transport_named,
    wants_device_arena,
)
from shardferry.plan.load_plan import Manifest
from shardferry.receiver import OptimizerReceiver
from tests.support.commands import REPOSITORY

CONTENT = torch.arange(64, dtype=torch.uint8)
SAME_PROCESS = Recipient(same_host=True, same_process=True)
SAME_HOST = Recipient(same_host=True)
OTHER_HOST = Recipient(same_host=False)


def host_arena() -> HostArena:
    return HostArena(64)


def private_arena() -> HostArena:
    return HostArena(64, is_shareable=False)


def device_arena() -> DeviceArena:
    """Bytes that are in no memory file, as on a GPU."""
    return DeviceArena(64, torch.device("cpu"))


ARENAS = {"host": host_arena, "private": private_arena, "device": device_arena}


def filled(kind: str) -> Arena:
    arena = ARENAS[kind]()
    arena.as_bytes().copy_(CONTENT)
    return arena


@pytest.mark.parametrize(
    ("kind", "recipient", "expected"),
    [
        pytest.param("host", SAME_PROCESS, InProcess, id="host-same-process"),
        pytest.param("host", SAME_HOST, SharedMemory, id="host-same-host"),
        pytest.param("host", OTHER_HOST, ObjectStore, id="host-other-host"),
        pytest.param("private", SAME_PROCESS, InProcess, id="private-same-process"),
        pytest.param("private", SAME_HOST, ObjectStore, id="private-same-host"),
        pytest.param("device", SAME_PROCESS, InProcess, id="device-same-process"),
        pytest.param("device", SAME_HOST, ObjectStore, id="device-same-host"),
        pytest.param("device", OTHER_HOST, ObjectStore, id="device-other-host"),
    ],
)
def test_auto_takes_the_first_that_can_carry_the_arena(
    kind: str, recipient: Recipient, expected: type[Transport]
) -> None:
    assert choose_transport(AUTO, filled(kind), recipient).load() is expected


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_transport_that_is_named_is_taken(transport: TransportEntry) -> None:
    assert transport_named(transport.name) is transport
    assert choose_transport(transport.name, filled("host"), OTHER_HOST) is transport


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("kind", ARENAS)
@pytest.mark.parametrize("exclusive", [True, False])
def test_a_transport_brings_each_arena_that_it_says_it_can(
    transport: TransportEntry, kind: str, exclusive: bool
) -> None:
    arena = filled(kind)
    kind_of_transport = transport.load()
    if not kind_of_transport.can_carry(arena, SAME_PROCESS):
        assert kind != "host" or transport.keeps_on_device
        refusals = "shared_memory needs an arena on the host|for its own process alone|cuda_ipc needs an arena on the"
        with pytest.raises(HandoffError, match=refusals):
            kind_of_transport.from_arena(arena, exclusive=exclusive)
        return
    sent = kind_of_transport.from_arena(arena, exclusive=exclusive)
    if transport.crosses_processes:
        sent = pickle.loads(pickle.dumps(sent))
    else:
        with pytest.raises(HandoffError, match="can't leave its process"):
            pickle.dumps(sent)
    if transport.outlives_loader:
        arena.close()
    received = sent.open()
    assert torch.equal(received, CONTENT)
    received.fill_(7)  # the trainer may write


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_only_those_that_say_so_need_an_arena_on_the_host(transport: TransportEntry) -> None:
    can_carry = transport.load().can_carry
    assert transport.needs_host_arena is (
        not can_carry(filled("device"), SAME_PROCESS) and can_carry(filled("host"), SAME_PROCESS)
    )
    assert needs_host_arena(transport.name) is transport.needs_host_arena
    assert not needs_host_arena(AUTO)


@pytest.mark.parametrize(
    ("name", "recipient", "gpu", "expected"),
    [
        pytest.param("auto", Recipient(same_host=True, gpu="a"), "a", True, id="one-gpu"),
        pytest.param("auto", Recipient(same_host=True, same_process=True, gpu="a"), "a", True, id="one-process"),
        pytest.param("auto", Recipient(same_host=True, gpu="b"), "a", False, id="two-gpus"),
        pytest.param("auto", Recipient(same_host=True), "a", False, id="a-trainer-on-the-cpu"),
        pytest.param("auto", Recipient(same_host=False, gpu="a"), "a", False, id="two-hosts"),
        pytest.param("auto", Recipient(same_host=True, gpu="a"), None, False, id="a-loader-without-gpu"),
        pytest.param("auto", Recipient(same_host=True), None, False, id="no-gpu"),
        pytest.param("cuda_ipc", Recipient(same_host=True), "a", True, id="cuda_ipc"),
        pytest.param("cuda_ipc", Recipient(same_host=True, gpu="a"), None, False, id="cuda_ipc-without-gpu"),
        pytest.param("collective", Recipient(same_host=False), "a", True, id="collective"),
        pytest.param("in_process", Recipient(same_host=True, same_process=True), "a", True, id="in_process"),
        pytest.param("shared_memory", Recipient(same_host=True, gpu="a"), "a", False, id="shared_memory"),
        pytest.param("object_store", Recipient(same_host=True, gpu="a"), "a", False, id="object_store"),
    ],
)
def test_device_auto_is_a_gpu_where_nothing_goes_through_the_host(
    name: str, recipient: Recipient, gpu: str | None, expected: bool
) -> None:
    assert wants_device_arena(name, recipient, gpu) is expected


def test_a_receiver_tells_where_it_runs() -> None:
    receiver = OptimizerReceiver()
    receiver.model = torch.nn.Linear(2, 3)
    receiver.optimizer = torch.optim.AdamW(receiver.model.parameters())
    process = receiver.shardferry_layout(0, 1).process
    assert process.recipient() == Recipient(same_host=True, same_process=True, gpu=None)
    elsewhere = replace(process, pid=process.pid + 1, gpu="a")
    assert elsewhere.recipient() == Recipient(same_host=True, gpu="a")


@pytest.mark.parametrize("late", ["map", "take"])
def test_of_two_that_have_a_loaders_file_open_one_gets_it(late: str) -> None:
    arena = HostArena(64)
    file = LoaderFile.of(arena)

    def be_late() -> None:
        with file.opened() as mine:
            with file.opened() as theirs:
                take(theirs)
            if late == "take":
                take(mine)
            mmap.mmap(mine, arena.nbytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)

    for _ in range(2):  # the second time it is taken from the start
        with pytest.raises(HandoffError, match="handed over already"):
            be_late()


def test_a_transport_is_imported_when_it_is_used() -> None:
    program = (
        "import sys; from shardferry.handoff import transports as t; seen = lambda: [e.name for e in t.TRANSPORTS if "
        "e.home.partition(':')[0] in sys.modules]; t.stage_transport_names(); t.needs_host_arena('shared_memory'); "
        "assert not seen(); t.transport_named('object_store').load(); print(seen())"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=250)
    assert done.stdout == "['object_store']\n", done.stderr


def test_names() -> None:
    names = [transport.name for transport in TRANSPORTS]
    assert len(set(names)) == len(names)
    assert AUTO not in names
    assert stage_transport_names() == (
        "auto",
        "in_process",
        "shared_memory",
        "cuda_ipc",
        "object_store",
        "collective",
        "nixl",
    )
    with pytest.raises(
        HandoffError,
        match="'pigeon' is not a transport; use in_process, shared_memory, cuda_ipc, object_store, collective or nixl",
    ):
        choose_transport("pigeon", filled("host"), SAME_HOST)


class Pigeon(Transport):
    """Carries small arenas anywhere."""

    def __init__(self, message: bytes) -> None:
        self._message = message

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        return arena.nbytes < 100

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        return cls(arena.as_bytes().numpy().tobytes())

    def open(self) -> torch.Tensor:
        return torch.frombuffer(bytearray(self._message), dtype=torch.uint8)


def test_a_new_transport_is_a_class_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pigeon = TransportEntry("pigeon", f"{__name__}:Pigeon")
    monkeypatch.setattr(transports, "TRANSPORTS", (pigeon, *TRANSPORTS))
    assert "pigeon" in stage_transport_names()
    assert choose_transport(AUTO, filled("device"), OTHER_HOST) is pigeon
    assert choose_transport(AUTO, HostArena(200), OTHER_HOST).name == "object_store"
    manifest = Manifest(
        world_rank=3, world_size=4, mesh=None, tensors=(), values=(), param_groups=({"params": [], "lr": 0.5},), fqns=()
    )
    handle = make_handle(manifest, filled("host"), "pigeon", exclusive=True)
    assert (handle.world_rank, handle.transport) == (3, "pigeon")
    with handle.open() as shard:
        assert shard.state_dict() == {"state": {}, "param_groups": [{"params": [], "lr": 0.5}]}
