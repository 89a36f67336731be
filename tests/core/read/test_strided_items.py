"""Saved tensors that are not row-major: the strides stand only in the item, and every element must still be right."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import Shard

from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.load import LoadedShard, LoadJob, load_rank
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor

SHAPES = {"transposed": (40, 30), "channels_last": (8, 12, 4, 4), "row_major": (64, 48), "vector": (77,)}
DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64]


def strided(fqn: str, tensor: torch.Tensor) -> torch.Tensor:
    if fqn == "transposed":
        return tensor.t().contiguous().t()
    return tensor.contiguous(memory_format=torch.channels_last) if fqn == "channels_last" else tensor


def load(path: Path, dim: int, world_rank: int, world_size: int, *, concurrency: int = 4) -> LoadedShard:
    mesh = Mesh((("dp", world_size),))
    catalog = open_checkpoint(path)
    rules = (Rule("vector", {"dp": Shard(0)}),) if "optim.state.vector.exp_avg" in catalog.tensors else ()
    spec = SpecLayout(mesh, rules, {"dp": Shard(dim)})
    options = ReadOptions(concurrency=concurrency)
    job = LoadJob(catalog, spec.rank(world_rank), LoadRequest("optim"), torch.device("cpu"), options)
    return load_rank(job, Agreement(None))


@pytest.mark.conformance(12)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_every_element(tmp_path: Path, dtype: torch.dtype, dim: int) -> None:
    state = {fqn: {"exp_avg": strided(fqn, full_tensor(fqn, "exp_avg", shape, dtype))} for fqn, shape in SHAPES.items()}
    assert state["transposed"]["exp_avg"].stride() == (1, 40)
    save_alone({"optim": {"state": state}}, tmp_path / "ckpt")
    compared = 0
    for rank in range(3):
        loaded = load(tmp_path / "ckpt", dim, rank, 3).state()
        for fqn, shape in SHAPES.items():
            found = loaded.state_dict()["state"][fqn]["exp_avg"]
            assert found.is_contiguous()
            for whole, local in loaded.regions(fqn, "exp_avg"):
                box = tuple(map(slice, whole.offsets, whole.ends))
                here = tuple(map(slice, local.offsets, local.ends))
                assert torch.equal(found[here], full_tensor(fqn, "exp_avg", shape, dtype)[box]), fqn
                compared += found[here].numel()
    assert compared == sum(torch.Size(shape).numel() for shape in SHAPES.values())


@pytest.mark.parametrize("concurrency", [1, 8])
@pytest.mark.parametrize("dim", [0, 1])
def test_bytes_asked_for_are_those_needed(tmp_path: Path, dim: int, concurrency: int) -> None:
    """Rows and columns of matrices of a usual size: at most 5 % more than the needed bytes, on each rank."""
    state = {f"w{n}": {"exp_avg": full_tensor(f"w{n}", "exp_avg", (512, 512))} for n in range(6)}
    save_alone({"optim": {"state": state}}, tmp_path / "ckpt")
    for rank in range(4):
        loaded = load(tmp_path / "ckpt", dim, rank, 4, concurrency=concurrency)
        assert loaded.plan.bytes_needed == 6 * 512 * 512 * 4 // 4
        assert loaded.plan.bytes_needed <= loaded.counters.bytes_requested <= 1.05 * loaded.plan.bytes_needed
