"""What `inspect` finds in a checkpoint, and the specs that it and `init` write."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shardferry.checkpoint.open import open_checkpoint
from shardferry.pipeline.commands.suggest import Axes
from shardferry.pipeline.inspect import alike, find_optimizers, fold_layers, inspect_report
from shardferry.schemas import StageConfig
from shardferry.schemas.inspect_report import TensorReport
from tests.support.alone import save_alone
from tests.support.commands import Command
from tests.support.leftovers import nothing_held

LAYERS = 12
SHAPES = {
    "tok.weight": (20, 8),
    **{f"layers.{n}.attention.wq.weight": (8, 8) for n in range(LAYERS)},
    **{f"layers.{n}.attention.wo.weight": (8, 8) for n in range(LAYERS)},
    **{f"layers.{n}.attention.wo.bias": (8,) for n in range(LAYERS)},
    "lm_head.weight": (20, 8),
}


def optimizer(shapes: dict[str, tuple[int, ...]] = SHAPES, *, groups: bool = True) -> dict[str, Any]:
    """As torch's ``get_optimizer_state_dict`` has it."""
    state = {
        fqn: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)}
        for fqn, shape in shapes.items()
    }
    return {"state": state, **({"param_groups": [{"params": list(shapes), "lr": 0.1}]} if groups else {})}


def model(shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    return {fqn: torch.zeros(shape) for fqn, shape in shapes.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The form of torch's tutorial: ``{"app": {"model", "optim"}}``, and a number beside it."""
    path = tmp_path_factory.mktemp("inspect") / "ckpt"
    save_alone({"app": {"model": model(), "optim": optimizer()}, "step": 3}, path)
    return path


SMALL = {"a.weight": (4, 2), "state.weight": (4, 2)}


@pytest.mark.parametrize(
    ("saved", "keys"),
    [
        ({"optim": optimizer(SMALL)}, ["optim"]),
        (optimizer(SMALL), [""]),
        ({"app": {"optim": optimizer(SMALL), "model": model(SMALL)}}, ["app.optim"]),
        ({"gen": optimizer(SMALL), "disc": optimizer(SMALL)}, ["gen", "disc"]),
        ({"optim": optimizer(SMALL, groups=False)}, ["optim"]),
        (
            {"optim": {f"{fqn}.{n}": v for fqn, e in optimizer({"a.b": (2,)})["state"].items() for n, v in e.items()}},
            [],
        ),
        # Flattened, as torchtitan saves it.
        (
            {
                "optimizer": {
                    **{f"state.{fqn}.exp_avg": torch.zeros(shape) for fqn, shape in SMALL.items()},
                    **{f"param_groups.{fqn}.lr": 0.1 for fqn in SMALL},
                }
            },
            ["optimizer"],
        ),
        # An optimizer for each parameter.
        (
            {
                "optim": {
                    fqn: {**optimizer({fqn: (4, 2)}), "state": {0: {"exp_avg": torch.zeros(4, 2)}}} for fqn in "ab"
                }
            },
            ["optim"],
        ),
        ({"model": model({"state.weight": (4, 2)}), "optim": optimizer(SMALL)}, ["optim"]),
        ({"model": model({"a.weight": (4, 2)})}, []),
    ],
    ids=["optim", "alone", "nested", "two", "no groups", "none", "flattened", "one each", "a module state", "weights"],
)
def test_optimizers_are_found(tmp_path: Path, saved: dict[str, Any], keys: list[str]) -> None:
    save_alone(saved, tmp_path / "ckpt")
    found = find_optimizers(open_checkpoint(tmp_path / "ckpt"))
    assert sorted(index.optimizer_key for index in found) == sorted(keys)


def tensor(fqn: str, shape: list[int] | None = None) -> TensorReport:
    return TensorReport(fqn=fqn, shape=shape or [2], dtype="float32", num_chunks=1, nbytes=8, grid=[1])


def unfolded(name: str) -> set[str]:
    """The keys that a folded name stands for."""
    found = re.search(r"\{([^}]*)\}", name)
    if found is None:
        return {name}
    first, dots, last = found[1].partition("..")
    numbers = map(str, range(int(first), int(last) + 1)) if dots else found[1].split(",")
    return {key for n in numbers for key in unfolded(name.replace(found[0], n, 1))}


@pytest.mark.parametrize(
    ("keys", "folded"),
    [
        (["a.0.w", "a.1.w", "a.2.w"], ["a.{0..2}.w x 3"]),
        (["a.0.w", "a.10.w", "a.2.w"], ["a.{0,2,10}.w x 3"]),
        (["a.w", "b.w"], ["a.w x 1", "b.w x 1"]),
        ([f"a.{n}.e.{e}.w" for n in range(2) for e in range(3)], ["a.{0..1}.e.{0..2}.w x 6"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0"], ["a.0.e.{0..1} x 2", "a.1.e.0 x 1"]),
    ],
)
def test_layers_are_folded(keys: list[str], folded: list[str]) -> None:
    groups = [fold_layers([t.fqn for t in group]) for group in alike([tensor(key) for key in keys])]
    assert [f"{name} x {count}" for name, count in groups] == folded
    assert [key for name, _ in groups for key in sorted(unfolded(name))] == sorted(keys)


def test_what_differs_is_not_folded() -> None:
    assert len(alike([tensor("a.0.w"), tensor("a.1.w", [3])])) == 2


def test_the_optimizer_comes_first(shardferry: Command, checkpoint: Path) -> None:
    done = shardferry("inspect", checkpoint)
    assert done.status == 0
    first, *lines = done.stdout.splitlines()
    assert first.startswith("optimizer 'app.optim': 38 parameters with step, exp_avg, exp_avg_sq; ")
    text = "\n".join(lines)
    assert text.index("app.optim.state.tok.weight.exp_avg") < text.index("app.model.tok.weight")
    assert "app.optim.state.layers.{0..11}.attention.wq.weight.exp_avg x 12" in text
    assert re.search(r"^saved as: .* \(by 1 rank\)$", text, re.MULTILINE)
    report = inspect_report(open_checkpoint(checkpoint))
    assert report.tensors[0].fqn.startswith("app.optim.")
    assert len(report.tensors) == report.num_tensors == 4 * len(SHAPES)


def test_some_tensors_are_selected(shardferry: Command, checkpoint: Path) -> None:
    done = shardferry("inspect", checkpoint, "--key", "app.model", "--filter", "*.wo.*", "--json")
    report = json.loads(done.stdout)
    assert {t["fqn"] for t in report["tensors"]} == {f"app.model.{fqn}" for fqn in SHAPES if ".wo." in fqn}
    assert report["num_tensors"] == 4 * len(SHAPES)
    assert report["optimizers"][0]["key"] == "app.optim"
    done = shardferry("inspect", checkpoint, "--key", "app.model")
    assert f"selected {len(SHAPES)} of {4 * len(SHAPES)} tensors" in done.stdout


@pytest.mark.parametrize(
    ("mesh", "axes"),
    [
        ({"dp_replicate": 2, "dp_shard": 2, "tp": 2, "pp": 2}, Axes(("dp_shard",), ("tp",), ("pp",))),
        ({"fsdp": 4}, Axes(("fsdp",), (), ())),
        ({"world": 4}, Axes(("world",), (), ())),
        ({"ddp": 4}, Axes((), (), ())),
        ({"tp": 4}, Axes((), ("tp",), ())),
        ({"cp": 2, "dp": 2}, Axes(("dp",), (), ())),
    ],
)
def test_what_the_names_of_axes_say(mesh: dict[str, int], axes: Axes) -> None:
    assert Axes.of(mesh) == axes


def config_of(text: str) -> StageConfig:
    return StageConfig.from_values(yaml.safe_load(text), source="test")


def test_a_spec_for_tensor_and_pipeline_parallelism(shardferry: Command, checkpoint: Path) -> None:
    done = shardferry("init", checkpoint, "--mesh", "pp=2,dp_shard=2,tp=2")
    assert done.status == 0, done.stderr
    assert "the optimizer 'app.optim', 38 parameters" in done.stdout
    assert '# model_key: "app.model"' in done.stdout
    config = config_of(done.stdout)
    assert (config.checkpoint.location, config.checkpoint.optimizer_key) == (str(checkpoint), "app.optim")
    assert config.topology is not None
    layout = config.topology.layout()
    placed = {fqn: list(map(str, layout.placements(fqn, len(shape))))[1:] for fqn, shape in SHAPES.items()}
    for fqn, (dp, tp) in placed.items():
        kind = fqn.split(".")[-2]
        cut = {"wq": "Shard(dim=0)", "lm_head": "Shard(dim=0)", "wo": "Shard(dim=1)"}.get(kind, "Replicate()")
        assert re.sub(r"^S\((\d)\)$", r"Shard(dim=\1)", dp) == "Shard(dim=0)", fqn
        expected = "Replicate()" if fqn.endswith("bias") else cut
        assert re.sub(r"^S\((\d)\)$", r"Shard(dim=\1)", tp.replace("R", "Replicate()") if tp == "R" else tp) == expected
    holders = {
        n: [r for r in range(8) if layout.rank(r).holds(f"layers.{n}.attention.wq.weight")] for n in range(LAYERS)
    }
    assert holders == {n: list(range(4)) if n < 6 else list(range(4, 8)) for n in range(LAYERS)}
    assert layout.rank(7).holds("tok.weight")
    assert config_of(shardferry("inspect", checkpoint, "--suggest", "3").stdout).topology.mesh == {"dp_shard": 3}  # type: ignore[union-attr]


def test_the_suggested_spec_runs(cluster: None, shardferry: Command, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text(shardferry("inspect", checkpoint, "--suggest", "2").stdout)
    with nothing_held():
        done = shardferry("run", tmp_path / "stage.yaml", "--report", "-")
    assert done.status == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["world_size"], report["optimizer_key"], report["mesh"]) == (2, "app.optim", {"dp_shard": 2})
    for mesh in ("dp_replicate=2,dp_shard=2,tp=2", "pp=3,tp=2", "ep=2"):
        (tmp_path / "stage.yaml").write_text(shardferry("init", checkpoint, "--mesh", mesh).stdout)
        assert shardferry("plan", tmp_path / "stage.yaml").status == 0, mesh


def test_a_spec_for_weights_alone(shardferry: Command, tmp_path: Path) -> None:
    save_alone({"model": model(SMALL)}, tmp_path / "ckpt")
    config = config_of(shardferry("init", tmp_path / "ckpt", "--mesh", "dp_shard=2").stdout)
    assert (config.checkpoint.optimizer_key, config.checkpoint.model_key) == (None, "model")
    save_alone(model(SMALL), tmp_path / "flat")
    config = config_of(shardferry("init", tmp_path / "flat", "--mesh", "dp_shard=2").stdout)
    assert (config.checkpoint.optimizer_key, config.checkpoint.model_key) == (None, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "--suggest", "2", "--json"], r"--suggest: prints YAML; leave --json out"),
        (["init", "--mesh", "dp_shard"], r"'dp_shard' is not an axis"),
        (["init", "--mesh", "dp_shard=0"], r"topology\.mesh\.dp_shard: .*greater than 0"),
    ],
)
def test_what_is_wrong(shardferry: Command, checkpoint: Path, arguments: list[str], says: str) -> None:
    done = shardferry(arguments[0], checkpoint, *arguments[1:])
    assert (done.status, done.stdout) == (2, "")
    assert re.search(says, done.stderr)
