"""On a real GPU: the contract of transports for arenas on it, and what `cuda_ipc` has of its own."""

from __future__ import annotations

import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from shardferry.arena import DeviceArena, HostArena, gpu_identity
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import ShardHandle, make_handle
from shardferry.handoff.transport import Recipient
from shardferry.handoff.transports import AUTO, TransportEntry, choose_transport, transport_named, wants_device_arena
from shardferry.load import LoadedShard, LoadJob, load_rank
from shardferry.receiver import OptimizerReceiver, Reception
from tests.support.alone import save_alone
from tests.support.transport_contract import Loader, Other, TransportContract, carriers, content, is_content

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no GPU"),
]

GPU = torch.device("cuda", 0)
CARRIERS = carriers(GPU) if torch.cuda.is_available() else []
SPAWN = multiprocessing.get_context("spawn")  # CUDA doesn't work in forked processes


@pytest.fixture(params=CARRIERS, ids=lambda transport: transport.name)
def transport(request: pytest.FixtureRequest) -> TransportEntry:
    found: TransportEntry = request.param
    return found


class TestArenasOnAGpu(TransportContract):
    device = GPU
    context = SPAWN


def test_auto_is_cuda_ipc_on_one_gpu() -> None:
    arena, gpu = DeviceArena(1000, GPU), gpu_identity(GPU)
    assert "cuda_ipc" in {transport.name for transport in CARRIERS}
    assert choose_transport(AUTO, arena, Recipient(same_host=True, gpu=gpu)).name == "cuda_ipc"
    assert choose_transport(AUTO, arena, Recipient(same_host=True, gpu="another")).name == "object_store"
    assert choose_transport(AUTO, HostArena(1000), Recipient(same_host=True, gpu=gpu)).name == "shared_memory"
    assert wants_device_arena(AUTO, Recipient(same_host=True, gpu=gpu), gpu)


def test_one_small_handle_for_the_whole_arena() -> None:
    arena = DeviceArena(2**28, GPU)
    sent = transport_named("cuda_ipc").load().from_arena(arena, exclusive=True)
    assert len(pickle.dumps(sent)) < 2000
    arena.close()


def test_work_that_is_under_way_is_waited_for() -> None:
    """The loader exports while a long kernel still runs before its last write."""
    other = Other(SPAWN, _busy)
    try:
        found = pickle.loads(other.call()).open()
        assert found.unique().tolist() == [9]
    finally:
        other.kill()


def _busy() -> Callable[[], bytes]:
    kept: list[DeviceArena] = []

    def send() -> bytes:
        arena = DeviceArena(2**20, GPU)
        kept.append(arena)
        arena.as_bytes().zero_()
        torch.cuda._sleep(2_000_000_000)  # clock ticks: about a second
        arena.as_bytes().fill_(9)
        return pickle.dumps(transport_named("cuda_ipc").load().from_arena(arena, exclusive=True))

    return send


def test_the_memory_is_the_loaders_own_and_goes_back_when_it_is_let_go() -> None:
    loader = Loader(SPAWN, GPU)
    try:
        loader.send(transport_named("cuda_ipc"), 0, exclusive=True).open()  # starts CUDA on both sides
        before, _ = torch.cuda.mem_get_info(GPU)
        nbytes = 2**28
        found = loader.send(transport_named("cuda_ipc"), 1, exclusive=True, nbytes=nbytes).open()
        assert is_content(found, 1, nbytes)
        assert torch.cuda.mem_get_info(GPU)[0] > before - 1.5 * nbytes, "there are two of it"
        del found
        loader.close_last()
        assert torch.cuda.mem_get_info(GPU)[0] > before - 0.5 * nbytes
    finally:
        loader.kill()


class Trainer(OptimizerReceiver):
    """A model on the GPU, whose optimizer has taken some steps or none."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = torch.nn.Sequential(torch.nn.Linear(37, 65), torch.nn.Linear(65, 3)).to(GPU)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        for number in range(steps):
            self.step(number)

    def step(self, number: int) -> None:
        inputs = content(number, 37).to(GPU).float().view(1, 37) / 255
        self.optimizer.zero_grad()
        self.model(inputs).square().sum().backward()
        self.optimizer.step()

    def saved(self) -> dict[str, Any]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        state = {names[id(p)]: dict(entries) for p, entries in self.optimizer.state.items()}
        groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in self.optimizer.param_groups]
        return {"optim": {"state": state, "param_groups": groups}, "model": self.model.state_dict()}


@pytest.fixture
def loading() -> Iterator[Other]:
    other = Other(SPAWN, _loads_a_checkpoint)
    yield other
    other.kill()


def _loads_a_checkpoint() -> Callable[..., bytes]:
    kept: list[LoadedShard] = []

    def load(path: str, told: Reception, lend: bool) -> bytes:
        recipient = told.process.recipient()
        assert wants_device_arena(AUTO, recipient, gpu_identity(GPU))
        request = LoadRequest("optim", model_key="model")
        loaded = load_rank(
            LoadJob(open_checkpoint(path), told.parts[0].layout, request, GPU, ReadOptions(concurrency=4)),
            Agreement(None),
        )
        kept.append(loaded)
        chosen = choose_transport(AUTO, loaded.arena, recipient).name
        return pickle.dumps(make_handle(loaded.manifest, loaded.arena, chosen, exclusive=True, lend=lend))

    return load


@pytest.mark.parametrize("lend", [False, True], ids=["copied", "lent"])
@pytest.mark.parametrize("steps", [0, 2], ids=["new", "stepped"])
def test_a_trainer_goes_on_as_if_it_had_not_stopped(tmp_path: Path, loading: Other, steps: int, lend: bool) -> None:
    run, trainer = Trainer(steps=3), Trainer(steps, seed=1)
    save_alone(run.saved(), tmp_path / "ckpt")
    handle: ShardHandle = pickle.loads(loading.call(str(tmp_path / "ckpt"), trainer.shardferry_layout(0, 1), lend))
    assert trainer.shardferry_receive(handle)["transport"] == "cuda_ipc"
    if not lend:
        loading.kill()
    for number in (3, 4):
        run.step(number)
        trainer.step(number)
    for expected, found in zip(run.model.parameters(), trainer.model.parameters(), strict=True):
        assert torch.equal(expected, found)
    for expected, found in zip(run.optimizer.state.values(), trainer.optimizer.state.values(), strict=True):
        assert all(torch.equal(expected[name], found[name]) for name in ("step", "exp_avg", "exp_avg_sq"))
