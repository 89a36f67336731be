"""Checkpoints that Megatron-Core wrote (tests/data): which formats are loaded, bit for bit, and which are refused, and how."""

from __future__ import annotations

import logging
import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

import shardferry
from shardferry.checkpoint.megatron import megatron_entry
from shardferry.checkpoint.open import storage_of
from shardferry.errors import LayoutError, PlanError
from shardferry.pipeline.inspecting import inspect_report
from shardferry.read.verify import verify_checkpoint
from tests.support.damage import edit_metadata
from tests.support.models import STEP, Model, adamw, check_state, fsdp2
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

ARCHIVE = Path(__file__).resolve().parent.parent.parent / "data" / "megatron-0.16.1.tar.xz"
SHAPES = {"first.weight": (6, 4), "second.weight": (3, 6), "second.bias": (3,)}
STACKED = {"first.weight": (6, 4), "layers.weight": (2, 3, 6), "second.bias": (3,)}
NUM_ELEMENTS = 2 * (6 * 4 + 3 * 6 + 3)
OTHER = {"lr": 9.0, "weight_decay": 8.0}


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Of a run on two tensor-parallel ranks, by kind; what each kind is stands in tests/data/write_megatron.py."""
    with tarfile.open(ARCHIVE) as files:
        files.extractall(tmp_path, filter="data")
    return tmp_path


def load(path: Path | str, shapes: dict[str, tuple[int, ...]] = SHAPES) -> tuple[Model, torch.optim.Optimizer]:
    model = Model(shapes)
    optimizer = torch.optim.AdamW(model.parameters(), **OTHER)
    shardferry.load_optimizer_state(model, optimizer, path, optimizer_key="optimizer")
    return model, optimizer


def test_a_tensor_a_parameter(checkpoints: Path) -> None:
    model, optimizer = load(checkpoints / "canonical")
    assert check_state(model, optimizer) == NUM_ELEMENTS
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.5)
    steps = [optimizer.state[parameter]["step"] for parameter in model.parameters()]
    assert len({step.data_ptr() for step in steps}) == len(steps)  # each parameter counts for itself
    model().backward()
    optimizer.step()
    assert {float(step) for step in steps} == {STEP + 1}


def load_fsdp2(path: str) -> int:
    model = fsdp2(Model(SHAPES))
    optimizer = adamw(model)
    shardferry.load_optimizer_state(model, optimizer, path, optimizer_key="optimizer")
    return check_state(model, optimizer)


def test_loaded_on_three_ranks(ranks: RankPool, checkpoints: Path) -> None:
    assert sum(ranks.run(3, load_fsdp2, str(checkpoints / "canonical"))) == NUM_ELEMENTS


def test_the_trainers_arguments_beside_the_state(checkpoints: Path) -> None:
    model, optimizer = load(checkpoints / "args")
    assert check_state(model, optimizer) == NUM_ELEMENTS


def test_the_step_among_the_param_groups(checkpoints: Path) -> None:
    """The distributed optimizer, and those with master weights, put theirs one level deeper."""
    groups = [{"lr": 0.125, "weight_decay": 0.5, "step": int(STEP)}]
    common = {"optimizer": {"optimizer": {"param_groups": groups}, "param_state_sharding_type": "fully_reshardable"}}
    torch.save(common, checkpoints / "canonical" / "common.pt")
    model, optimizer = load(checkpoints / "canonical")
    assert check_state(model, optimizer) == NUM_ELEMENTS
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], "step" in group) == (0.125, 0.5, False)


def test_groups_that_differ_leave_the_live_hyperparameters(checkpoints: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model, optimizer = load(checkpoints / "groups")
    assert check_state(model, optimizer) == NUM_ELEMENTS
    (group,) = optimizer.param_groups
    assert {name: group[name] for name in OTHER} == OTHER
    assert "2 param groups that differ, and Megatron doesn't record which parameters are in which" in caplog.text


def test_stacked_layers_are_one_tensor_under_one_name(checkpoints: Path) -> None:
    model, optimizer = load(checkpoints / "stacked", STACKED)
    state = optimizer.state[dict(model.named_parameters())["layers.weight"]]
    for name in ("exp_avg", "exp_avg_sq"):
        zeros, second = state[name]
        assert torch.equal(zeros, torch.zeros(3, 6))
        assert torch.equal(second, full_tensor("second.weight", name, (3, 6)))
    with pytest.raises(PlanError, match=r"second\.weight: the checkpoint .*has no state for this parameter"):
        load(checkpoints / "stacked")


def test_flat_buffers_are_refused(checkpoints: Path) -> None:
    with pytest.raises(
        PlanError, match=r"Megatron-Core's flat buffers .* save with --dist-ckpt-optim-fully-reshardable"
    ):
        load(checkpoints / "buckets")


def test_flat_slices_of_blocks_are_refused(checkpoints: Path) -> None:
    """Megatron-Core up to 0.14: each key with its shape in blocks, and the parameter's shape in `mcore_data`."""
    key = "optimizer.state.exp_avg.first.weight"

    def edit(metadata: Metadata) -> None:
        metadata.mcore_data = {key: {"nd_reformulated_orig_global_shape": (6, 4)}}
        saved = metadata.state_dict_metadata[key]
        saved.size = torch.Size((2, 1, 12))
        for row, chunk in enumerate(saved.chunks):
            chunk.offsets, chunk.sizes = torch.Size((row, 0, 0)), torch.Size((1, 1, 12))

    edit_metadata(checkpoints / "canonical", edit)
    problems = shardferry.open_checkpoint(checkpoints / "canonical").problems
    assert any(problem.startswith(f"{key}: saved by Megatron-Core as flat slices of blocks") for problem in problems)
    with pytest.raises((LayoutError, PlanError, shardferry.errors.InstallError), match=r"first\.weight"):
        load(checkpoints / "canonical")


def test_without_the_step_nothing_is_loaded(checkpoints: Path) -> None:
    path = checkpoints / "canonical"
    torch.save({"optimizer": {"state": {}, "args": Namesake()}}, path / "common.pt")
    assert any("common.pt: not readable as plain values" in p for p in shardferry.open_checkpoint(path).problems)
    with pytest.raises(PlanError, match=r"first\.weight: no step .*\.Namesake\).*add_safe_globals before"):
        load(path)
    torch.save({"optimizer": {"param_groups": 3}}, path / "common.pt")
    with pytest.raises(PlanError, match=r"first\.weight: no step .* not readable as plain values"):
        load(path)
    (path / "common.pt").unlink()
    with pytest.raises(PlanError, match=r"first\.weight: no step .* there is no common\.pt"):
        load(path)


class Namesake:
    """A class of the trainer's."""


@pytest.mark.parametrize("kind", ["canonical", "groups", "args", "stacked", "buckets"])
def test_inspected_and_verified(checkpoints: Path, kind: str) -> None:
    catalog = shardferry.open_checkpoint(checkpoints / kind)
    assert inspect_report(catalog).problems == []
    assert verify_checkpoint(catalog, storage_of(catalog), concurrency=2) == []


def test_classes_of_earlier_versions(checkpoints: Path) -> None:
    """Megatron-Core 0.12 to 0.15 pickled subclasses of torch's, by names that are mapped and never imported."""
    before = shardferry.open_checkpoint(checkpoints / "canonical")
    file = checkpoints / "canonical" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    for plan in metadata.all_local_plans:
        plan.__dict__["mcore_data"] = {}
    data = pickle.dumps(metadata, protocol=2)  # names in plain text
    module = b"cmegatron.core.dist_checkpointing.strategies.torch\n"
    for torch_name, name in (
        (b"ctorch.distributed.checkpoint.metadata\nMetadata\n", b"MCoreMetadata\n"),
        (b"ctorch.distributed.checkpoint.planner\nSavePlan\n", b"MCoreSavePlan\n"),
    ):
        assert torch_name in data
        data = data.replace(torch_name, module + name)
    file.write_bytes(data)
    assert shardferry.open_checkpoint(checkpoints / "canonical").tensors == before.tensors


@pytest.mark.parametrize(
    ("tail", "entry"),
    [
        ("exp_avg.decoder.layers.0.weight", ("decoder.layers.0.weight", "exp_avg")),
        ("param.output.param", ("output.param", "param")),
        ("decoder.weight.exp_avg", None),  # everybody else's order
        ("step.weight.exp_avg", None),  # a module named as a state
        ("exp_avg", None),
    ],
)
def test_key_order(tail: str, entry: tuple[str, str] | None) -> None:
    assert megatron_entry((tail,)) == entry
    assert megatron_entry((*tail.split("."),)) is None  # with a recorded path there is nothing to guess
