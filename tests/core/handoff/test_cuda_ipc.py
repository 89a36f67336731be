"""What can be shown of `cuda_ipc` without a GPU: who may open, and how often. tests/gpu has the rest."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.multiprocessing import reductions

from shardferry.arena import DeviceArena, HostArena, gpu_identity
from shardferry.errors import HandoffError
from shardferry.handoff import cuda_ipc
from shardferry.handoff.cuda_ipc import CudaIpc
from shardferry.handoff.handle import make_handle
from shardferry.handoff.transport import Recipient
from shardferry.handoff.transports import AUTO, choose_transport
from shardferry.plan.load_plan import Manifest

CONTENT = torch.arange(64, dtype=torch.uint8)
GPU = "9f0a8c3e-one"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[int, torch.Tensor]:
    """A GPU that is host memory, where what is exported can be mapped by its number; and another process than the loader's."""
    exported: dict[int, torch.Tensor] = {}

    def export(memory: torch.Tensor) -> tuple[int, int]:
        exported[len(exported)] = memory
        return (0, len(exported) - 1)

    monkeypatch.setattr(cuda_ipc, "gpu_identity", lambda _: GPU)
    monkeypatch.setattr(cuda_ipc, "_export", export)
    monkeypatch.setattr(cuda_ipc, "_import", lambda handle, _: exported[handle[1]])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: None))
    monkeypatch.setattr(cuda_ipc, "os", SimpleNamespace(getpid=lambda: -1))
    return exported


def arena() -> DeviceArena:
    made = DeviceArena(64, torch.device("cpu"))
    made.as_bytes().copy_(CONTENT)
    return made


def sent(made: DeviceArena, *, exclusive: bool) -> Any:
    return pickle.loads(pickle.dumps(CudaIpc.from_arena(made, exclusive=exclusive)))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("recipient", "name"),
    [
        pytest.param(Recipient(same_host=True, gpu=GPU), "cuda_ipc", id="same-gpu"),
        pytest.param(Recipient(same_host=True, same_process=True, gpu=GPU), "in_process", id="same-process"),
        pytest.param(Recipient(same_host=True, gpu="another"), "object_store", id="another-gpu"),
        pytest.param(Recipient(same_host=True), "object_store", id="no-gpu"),
        pytest.param(Recipient(same_host=False, gpu=GPU), "object_store", id="another-host"),
    ],
)
def test_auto_takes_it_on_one_gpu(recipient: Recipient, name: str) -> None:
    assert choose_transport(AUTO, arena(), recipient).name == name
    assert choose_transport(AUTO, HostArena(64), recipient).name != "cuda_ipc"


def test_the_trainer_of_an_exclusive_arena_gets_it_once(gpu: dict[int, torch.Tensor]) -> None:
    made = arena()
    handle = sent(made, exclusive=True)
    received = handle.open()
    assert torch.equal(received, CONTENT)
    assert received.data_ptr() == gpu[0].data_ptr()
    with pytest.raises(HandoffError, match="handed over already"):
        handle.open()


@pytest.mark.parametrize("lend", [False, True], ids=["copied", "lent"])
def test_a_handle_lends_memory_only_if_the_loader_will_live(gpu: dict[int, torch.Tensor], lend: bool) -> None:
    made = arena()
    handle = make_handle(nothing_planned(), made, "cuda_ipc", exclusive=True, lend=lend)
    opened = handle.source.open()
    assert torch.equal(opened, CONTENT)
    assert (opened.data_ptr() == gpu[0].data_ptr()) is lend


def nothing_planned() -> Manifest:
    return Manifest(world_rank=0, world_size=1, mesh=None, tensors=(), values=(), param_groups=(), fqns=())


@pytest.mark.usefixtures("gpu")
def test_openers_of_a_shared_arena_get_copies() -> None:
    made = arena()
    handle = sent(made, exclusive=False)
    one, other = handle.open(), handle.open()
    one.fill_(7)
    assert torch.equal(other, CONTENT)
    made.close()
    assert torch.equal(other, CONTENT)
    with pytest.raises(HandoffError, match="has ended before the shard was opened"):
        handle.open()


def test_a_trainer_that_does_not_see_the_gpu(gpu: dict[int, torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    made = arena()
    handle = sent(made, exclusive=True)
    monkeypatch.setattr(cuda_ipc, "gpu_identity", lambda _: "another")
    with pytest.raises(HandoffError, match=f"on the GPU {GPU}, which is none of the 1 GPUs that the trainer sees"):
        handle.open()
    monkeypatch.setattr(cuda_ipc, "gpu_identity", lambda _: GPU)
    assert handle.open() is gpu[0], "a failed attempt takes nothing"


@pytest.mark.usefixtures("gpu")
def test_a_loader_does_not_open_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    made = arena()
    handle = sent(made, exclusive=True)
    monkeypatch.setattr(cuda_ipc, "os", os)
    with pytest.raises(HandoffError, match="use in_process"):
        handle.open()


@pytest.mark.parametrize("made", [HostArena(64), DeviceArena(64, torch.device("cpu"))], ids=["host", "device"])
def test_memory_that_is_on_no_gpu_is_refused(made: HostArena | DeviceArena) -> None:
    assert gpu_identity(made.device) is None
    with pytest.raises(HandoffError, match="needs an arena on the trainer's GPU, this one is in host memory"):
        CudaIpc.from_arena(made, exclusive=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_torch_without_cuda_says_so() -> None:
    with pytest.raises(HandoffError, match="CUDA can't export this arena"):
        cuda_ipc._export(CONTENT)


def test_what_torch_exports_is_what_it_imports() -> None:
    """Fails when torch changes its private interface: `_export` and `_import` pass on these eight, with another device."""
    given = _targets_of("_share_cuda_", reductions.reduce_tensor)
    taken = _arguments_of("_new_shared_cuda", reductions.rebuild_cuda_tensor)
    same = ["storage_size_bytes", "storage_offset_bytes", "ref_counter_handle", "ref_counter_offset"]
    same += ["event_handle", "event_sync_required"]
    assert given == ["device", "handle", *same]
    assert taken == ["storage_device", "storage_handle", *same]
    assert callable(torch.UntypedStorage._share_cuda_)
    assert callable(torch.UntypedStorage._new_shared_cuda)


def _targets_of(method: str, function: Any) -> list[str]:
    """The names that the result of a call is unpacked into."""
    (found,) = (
        node.targets[0]
        for node in ast.walk(ast.parse(inspect.getsource(function)))
        if isinstance(node, ast.Assign) and f".{method}(" in ast.unparse(node.value)
    )
    assert isinstance(found, ast.Tuple)
    return [ast.unparse(name) for name in found.elts]


def _arguments_of(method: str, function: Any) -> list[str]:
    (found,) = (
        node
        for node in ast.walk(ast.parse(inspect.getsource(function)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
    )
    return [ast.unparse(argument) for argument in found.args]
