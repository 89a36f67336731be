"""Two checkpoints compared: against what was done to the second one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shardferry.pipeline.commands.diff import compare
from tests.support.alone import save_alone
from tests.support.commands import Command


def state(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    values = {"a": torch.randn(6, 4), "b": torch.arange(5), "c": torch.ones(3, dtype=torch.bfloat16), "lr": 0.1}
    return {"optim": {name: value for name, value in {**values, **changes}.items() if value is not None}}


@pytest.fixture
def before(tmp_path: Path) -> Path:
    save_alone(state(), tmp_path / "before")
    return tmp_path / "before"


def diff(shardferry: Command, before: Path, after: dict[str, Any], *options: str) -> tuple[int, dict[str, Any]]:
    if not (before.parent / "after").exists():
        save_alone(after, before.parent / "after")
    done = shardferry("diff", before, before.parent / "after", "--json", *options)
    return done.status, json.loads(done.stdout)


def test_the_same(shardferry: Command, before: Path) -> None:
    status, report = diff(shardferry, before, state(), "--values")
    assert (status, report["num_compared"]) == (0, 3)
    assert [report[name] for name in ("tensors", "objects", "only_in_first", "only_in_second")] == [[], [], [], []]
    assert "keys, shapes, dtypes and values are the same" in shardferry("diff", before, before, "--values").stdout


def test_keys_shapes_and_dtypes_without_reading(shardferry: Command, before: Path) -> None:
    changed = state(a=torch.zeros(6, 5), b=None, c=torch.ones(3), d=torch.zeros(1), lr=torch.tensor(0.1))
    save_alone(changed, before.parent / "after")
    for directory in (before, before.parent / "after"):
        for file in directory.glob("*.distcp"):
            file.write_bytes(b"")
    done = shardferry("diff", before, before.parent / "after", "--json")
    report = json.loads(done.stdout)
    assert done.status == 1
    assert (report["only_in_first"], report["only_in_second"]) == (["optim.b"], ["optim.d"])
    assert [(t["fqn"], t["shapes"], t["dtypes"], t["norm"]) for t in report["tensors"]] == [
        ("optim.a", [[6, 4], [6, 5]], None, None),
        ("optim.c", None, ["bfloat16", "float32"], None),
    ]
    assert report["objects"] == [{"fqn": "optim.lr", "values": ["a Python value", "a tensor of float32"]}]


def test_values_by_norm(shardferry: Command, before: Path) -> None:
    a = state()["optim"]["a"]
    changed = a.clone()
    changed[1, 2] += 3.0
    changed[4, 0] -= 4.0
    status, report = diff(shardferry, before, state(a=changed, c=torch.ones(3), lr=0.2), "--values")
    assert status == 1
    [of_a, of_c] = report["tensors"]
    assert (of_a["fqn"], of_a["num_differing"]) == ("optim.a", 2)
    assert of_a["norm"] == pytest.approx(5.0, rel=1e-6)
    assert of_a["max_abs"] == pytest.approx(4.0, rel=1e-6)
    assert of_a["relative_norm"] == pytest.approx(5.0 / float(torch.linalg.vector_norm(a)), rel=1e-6)
    assert (of_c["dtypes"], of_c["num_differing"]) == (["bfloat16", "float32"], None)
    assert report["objects"] == [{"fqn": "optim.lr", "values": ["0.1", "0.2"]}]
    done = shardferry("diff", before, before.parent / "after", "--values")
    assert done.status == 1
    assert "optim.lr: 0.1 and 0.2" in done.stdout
    assert "values differ" in done.stdout


def test_some_keys_are_compared(shardferry: Command, before: Path) -> None:
    changed = state(a=torch.zeros(6, 4), b=None, lr=0.2)
    assert diff(shardferry, before, changed, "--values", "--filter", "*.c")[0] == 0
    status, report = diff(shardferry, before, changed, "--values", "--key", "optim.a")
    assert (status, len(report["tensors"]), report["only_in_first"]) == (1, 1, [])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool, torch.complex64]
)
def test_one_element_of_each_dtype(dtype: torch.dtype) -> None:
    first = torch.tensor([1, 0, 1, 1]).to(dtype)
    second = torch.tensor([1, 0, 0, 1]).to(dtype)
    assert compare("x", first, first.clone()) is None
    found = compare("x", first, second)
    assert found is not None
    assert (found.num_differing, found.norm, found.max_abs) == (1, 1.0, 1.0)
    assert found.relative_norm == pytest.approx(3**-0.5)


def test_numbers_that_are_none() -> None:
    nan = torch.tensor([float("nan"), 1.0])
    assert compare("x", nan, nan.clone()) is None
    found = compare("x", nan, torch.tensor([2.0, 1.0]))
    assert found is not None
    assert found.num_differing == 1
    found = compare("x", torch.zeros(2), torch.ones(2))
    assert found is not None
    assert found.relative_norm is None


def test_what_is_not_there(shardferry: Command, before: Path) -> None:
    done = shardferry("diff", before, before.parent / "nowhere")
    assert (done.status, done.stdout) == (1, "")
    assert "nowhere: no such directory" in done.stderr
