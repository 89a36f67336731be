"""One state, written in each form that stock torch has for it: keys, steps, dtypes, files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.tensor import Shard

import shardferry
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.errors import PlanError
from shardferry.exchange.agreement import Agreement
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadJob, load_rank
from tests.support.alone import save_alone
from tests.support.damage import edit_metadata
from tests.support.matrix import load_and_compare, save_and_describe
from tests.support.models import (
    SHAPES,
    STATES,
    STEP,
    Model,
    adamw,
    check_state,
    fill_state,
    fsdp2,
    load_fsdp2,
)
from tests.support.networks import OTHERS, numbers_of, parameters
from tests.support.ranks import RankPool
from tests.support.topologies import TOPOLOGIES

NUM_ELEMENTS = len(STATES) * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def save(path: str, flattened: bool, writer: dict[str, Any]) -> None:
    model = fsdp2(Model())
    optimizer = adamw(model)
    fill_state(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flattened)
    state_dict = {"optim": get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(state_dict, storage_writer=dcp.FileSystemWriter(path, **writer))


@pytest.mark.conformance(9)
@pytest.mark.parametrize("with_paths", [True, False], ids=["planner_data", "no-planner_data"])
@pytest.mark.parametrize("flattened", [False, True], ids=["nested", "flattened"])
def test_keys(ranks: RankPool, tmp_path: Path, flattened: bool, with_paths: bool) -> None:
    path = tmp_path / "ckpt"
    ranks.run(3, save, str(path), flattened, {})
    if not with_paths:
        edit_metadata(path, lambda metadata: setattr(metadata, "planner_data", None))
    assert sum(ranks.run(2, load_fsdp2, str(path))) == NUM_ELEMENTS


@pytest.mark.conformance(9)
def test_a_wrong_key_is_named_beside_those_that_are_there(saved_by: dict[int, Path]) -> None:
    model = Model()
    optimizer = adamw(model, OTHERS)
    with pytest.raises(PlanError, match=r"optimizer_key 'optimizer'; top-level keys are 'model', 'optim'"):
        shardferry.load_optimizer_state(model, optimizer, saved_by[2], optimizer_key="optimizer")
    assert not optimizer.state


@pytest.mark.conformance(14)
@pytest.mark.parametrize(
    "writer", [{"thread_count": 4}, {"single_file_per_rank": False}, {"sync_files": False}], ids=lambda w: next(iter(w))
)
def test_files(ranks: RankPool, tmp_path: Path, writer: dict[str, Any]) -> None:
    path = tmp_path / "ckpt"
    ranks.run(3, save, str(path), False, writer)
    assert sum(ranks.run(2, load_fsdp2, str(path))) == NUM_ELEMENTS


@pytest.mark.conformance(14)
def test_several_shards_of_one_parameter_in_one_file(ranks: RankPool, tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    boxes, target = (next(t for t in TOPOLOGIES if t.name == name) for name in ("boxes", "fsdp2-2"))
    ranks.run(boxes.world_size, save_and_describe, boxes, str(path))
    metadata: Metadata = pickle.loads((path / ".metadata").read_bytes())
    places = [info.relative_path for index, info in metadata.storage_data.items() if "seven.exp_avg_sq" in index.fqn]
    assert len(places) == 6
    assert len(set(places)) == 3
    compared = ranks.run(target.world_size, load_and_compare, target, str(path), ())
    assert len(set.union(*compared)) == sum(numbers_of(fqn).numel() for fqn in parameters())


STEPS: dict[str, Callable[[], Any]] = {
    "float": lambda: STEP,
    "0-dim": lambda: torch.tensor(STEP),
    "size-1": lambda: torch.tensor([STEP]),
    "float64": lambda: torch.tensor(STEP, dtype=torch.float64),
    "int": lambda: int(STEP),
}


@pytest.mark.conformance(10)
@pytest.mark.parametrize("form", STEPS)
def test_step_as_it_was_saved(tmp_path: Path, form: str) -> None:
    model, resumed = Model(), Model()
    optimizer = adamw(model)
    fill_state(model, optimizer)
    for state in optimizer.state.values():
        state["step"] = STEPS[form]()
    save_alone({"optim": get_optimizer_state_dict(model, optimizer)}, tmp_path / "ckpt")
    loaded = adamw(resumed, OTHERS)
    shardferry.load_optimizer_state(resumed, loaded, tmp_path / "ckpt")
    assert check_state(resumed, loaded) == NUM_ELEMENTS
    for state in loaded.state.values():
        saved = STEPS[form]()
        assert isinstance(state["step"], torch.Tensor), "torch's AdamW makes a tensor of a number"
        if isinstance(saved, torch.Tensor):
            assert (state["step"].shape, state["step"].dtype) == (saved.shape, torch.float32), "as torch counts it"


BYTES = torch.arange(6 * 4 * 16, dtype=torch.int64).to(torch.uint8)
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.complex64, torch.complex128,
]  # fmt: skip


@pytest.mark.conformance(13)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Columns of a matrix, byte for byte, also bytes that are no number of the dtype."""
    content = BYTES % 2 if dtype == torch.bool else BYTES
    whole = content[: 24 * dtype.itemsize].view(dtype).view(6, 4)
    save_alone({"optim": {"state": {"w": {"exp_avg": whole}}, "param_groups": []}}, tmp_path / "ckpt")
    spec = SpecLayout(Mesh((("tp", 2),)), default={"tp": Shard(1)})
    catalog = open_checkpoint(tmp_path / "ckpt")
    for world_rank in range(2):
        job = LoadJob(
            catalog, spec.rank(world_rank), LoadRequest("optim"), torch.device("cpu"), ReadOptions(concurrency=2)
        )
        found = load_rank(job, Agreement(None)).state().state_dict()["state"]["w"]["exp_avg"]
        expected = whole[:, 2 * world_rank : 2 * world_rank + 2].contiguous()
        assert found.dtype == dtype
        assert torch.equal(found.contiguous().view(torch.uint8), expected.view(torch.uint8))
