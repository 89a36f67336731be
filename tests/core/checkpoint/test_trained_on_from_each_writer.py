"""One optimizer, saved by each of torch's writers, and trained on from each."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, HuggingFaceStorageWriter
from torch.distributed.checkpoint._extension import ZStandard
from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardferry
from tests.support.alone import save_alone

Writer = Callable[[str], Any]

WRITERS: dict[str, Writer] = {
    "one file": FileSystemWriter,
    "three files": lambda path: FileSystemWriter(path, thread_count=3),
    "one file an item": lambda path: FileSystemWriter(path, single_file_per_rank=False),
    "compressed": lambda path: FileSystemWriter(path, _extensions=[ZStandard()]),
    "fsspec": FsspecWriter,
    "fsspec, compressed": lambda path: FsspecWriter(path, _extensions=[ZStandard()]),
}


def trained(seed: int, *, steps: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.125 if steps else 0.5, weight_decay=0.25)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 8)).sum().backward()
        optimizer.step()
    return model, optimizer


def check_resumed(location: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    fresh, resumed = trained(1, steps=0)
    shardferry.load_optimizer_state(fresh, resumed, location, optimizer_key="optim")
    for saved, loaded in zip(model.parameters(), fresh.parameters(), strict=True):
        assert resumed.state[loaded].keys() == optimizer.state[saved].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for name, value in optimizer.state[saved].items():
            assert torch.equal(resumed.state[loaded][name], value), name
    return resumed


@pytest.mark.parametrize("name", WRITERS)
def test_an_optimizer_trains_on(tmp_path: Path, name: str) -> None:
    in_memory = name.startswith("fsspec")
    location = f"memory://{uuid.uuid4()}" if in_memory else str(tmp_path / "ckpt")
    model, optimizer = trained(0, steps=3)
    save_alone({"optim": get_optimizer_state_dict(model, optimizer)}, location, storage_writer=WRITERS[name](location))
    resumed = check_resumed(location, model, optimizer)
    assert (resumed.param_groups[0]["lr"], resumed.param_groups[0]["weight_decay"]) == (0.125, 0.25)
    if in_memory:
        fsspec.filesystem("memory").rm(location, recursive=True)


def test_safetensors_hold_the_state_and_no_hyperparameters(tmp_path: Path) -> None:
    model, optimizer = trained(0, steps=3)
    state = get_optimizer_state_dict(model, optimizer)["state"]
    flat = {f"optim.state.{fqn}.{name}": value for fqn, names in state.items() for name, value in names.items()}
    path = str(tmp_path / "ckpt")
    save_alone(flat, path, storage_writer=HuggingFaceStorageWriter(path))
    resumed = check_resumed(path, model, optimizer)
    assert resumed.param_groups[0]["lr"] == 0.5  # as it was made: there was none to load
