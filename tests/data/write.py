"""Turn the torch that runs it into ``torch-<version>.tar.xz`` beside it: small checkpoints of AdamW state, by its own writer.

    /path/to/that/torch/bin/python tests/data/write.py

Self-contained, and runs on torch 2.1 and everything later. Three checkpoints each, where the version can write them:

* ``sharded``: rows on two ranks (DTensor, gloo), nested keys.
* ``alone``: one process, nested keys; one state tensor lies transposed in memory.
* ``flattened``: one process, ``flatten_optimizer_state_dict=True``.
"""

from __future__ import annotations

import io
import lzma
import multiprocessing
import os
import sys
import tarfile
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

try:
    from torch.distributed.tensor import DeviceMesh, DTensor, Shard, distribute_tensor
except ImportError:  # torch before 2.5
    from torch.distributed._tensor import DeviceMesh, DTensor, Shard, distribute_tensor
try:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
except ImportError:  # torch 2.1
    StateDictOptions = get_optimizer_state_dict = None

SHAPES = {"first.weight": (6, 4), "second.weight": (3, 6), "second.bias": (3,)}
STEP = 7.0
GROUPS = ({"lr": 0.125, "weight_decay": 0.5}, {"lr": 0.25, "weight_decay": 0.0})  # matrices, vectors
TRANSPOSED = ("second.weight", "exp_avg")  # lies so in the checkpoint `alone`


def oracle(fqn: str, name: str) -> torch.Tensor:
    """The same values as tests/support/oracle.py gives for float32."""
    shape = SHAPES[fqn]
    seed = zlib.crc32(f"{fqn}/{name}".encode())
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.int64)
    return ((index * 2654435761 + seed) % (2**24 - 1) + 1).to(torch.float32).view(shape)


def model_of(mesh: Any) -> torch.nn.Module:
    model = torch.nn.Module()
    for fqn in SHAPES:
        module, name = fqn.split(".")
        if module not in model._modules:
            model.add_module(module, torch.nn.Module())
        getattr(model, module).register_parameter(name, torch.nn.Parameter(placed(oracle(fqn, "weight"), mesh)))
    return model


def placed(tensor: torch.Tensor, mesh: Any) -> torch.Tensor:
    return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)])


def adamw(model: torch.nn.Module, mesh: Any) -> torch.optim.Optimizer:
    named = dict(model.named_parameters())
    matrices = [p for fqn, p in named.items() if len(SHAPES[fqn]) == 2]
    vectors = [p for fqn, p in named.items() if len(SHAPES[fqn]) == 1]
    groups = [{"params": p, **values} for p, values in zip((matrices, vectors), GROUPS, strict=True)]
    optimizer = torch.optim.AdamW(groups)
    for fqn, parameter in named.items():
        state = {name: placed(oracle(fqn, name), mesh) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.tensor(STEP), **state}
    return optimizer


def optimizer_state(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By FQN; torch 2.1 has no function for that, so we do what its FSDP.optim_state_dict does."""
    if get_optimizer_state_dict is not None:
        return get_optimizer_state_dict(model, optimizer)
    names = {parameter: fqn for fqn, parameter in model.named_parameters()}
    groups = [{**g, "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups]
    return {"state": {names[p]: s for p, s in optimizer.state.items()}, "param_groups": groups}


def save(state: dict[str, Any], path: Path) -> None:
    options: dict[str, Any] = {"storage_writer": dcp.FileSystemWriter(str(path))}
    if hasattr(dcp, "save"):
        dcp.save(state, **options)
    else:  # torch 2.1
        dcp.save_state_dict(state, planner=dcp.DefaultSavePlanner(), no_dist=not dist.is_initialized(), **options)


def save_sharded(rank: int, rendezvous: str, path: Path) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(rendezvous, 2), rank=rank, world_size=2)
    mesh = DeviceMesh("cpu", [0, 1])
    model = model_of(mesh)
    optimizer = adamw(model, mesh)
    state = optimizer_state(model, optimizer)
    assert all(isinstance(s["exp_avg"], DTensor) for s in state["state"].values())
    save({"optim": state}, path)
    dist.destroy_process_group()


def save_alone(path: Path) -> None:
    model = model_of(None)
    optimizer = adamw(model, None)
    fqn, name = TRANSPOSED
    state = optimizer.state[dict(model.named_parameters())[fqn]]
    state[name] = state[name].t().contiguous().t()
    save({"optim": optimizer_state(model, optimizer)}, path)


def save_flattened(path: Path) -> None:
    model = model_of(None)
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    save({"optim": get_optimizer_state_dict(model, adamw(model, None), options=options)}, path)


def write(directory: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    (directory / "sharded").mkdir()
    work = [(rank, str(directory / "rendezvous"), directory / "sharded") for rank in range(2)]
    ranks = [spawn.Process(target=save_sharded, args=arguments) for arguments in work]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
        assert rank.exitcode == 0
    (directory / "rendezvous").unlink(missing_ok=True)
    save_alone(directory / "alone")
    if "flatten_optimizer_state_dict" in getattr(StateDictOptions, "__dataclass_fields__", {}):
        save_flattened(directory / "flattened")


def pack(directory: Path) -> bytes:
    """The same bytes for the same files, whoever writes them and when."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(p for p in directory.rglob("*") if p.is_file()):
            entry = tarfile.TarInfo(str(path.relative_to(directory)))
            entry.size = path.stat().st_size
            archive.addfile(entry, io.BytesIO(path.read_bytes()))
    return lzma.compress(buffer.getvalue(), preset=9)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"  # else a rank may be done before a late one has connected to it
    version = torch.__version__.partition("+")[0]
    with tempfile.TemporaryDirectory() as temporary:
        write(Path(temporary))
        target = Path(__file__).parent / f"torch-{version}.tar.xz"
        target.write_bytes(pack(Path(temporary)))
    print(target.name, target.stat().st_size, "bytes", file=sys.stderr)
