"""What docs/programs.md shows is what the programs run, and its specs load what the programs saved."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from shardferry import Region, ShardHandle
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
from tests.programs.conftest import SaveWith
from tests.programs.whole_state import WholeState
from tests.support.commands import REPOSITORY

_SECTIONS = {
    "Hugging Face accelerate": ("accelerator",),
    "Lightning Trainer": ("trainer", "ModelParallelStrategy"),
    "Lightning Fabric": ("fabric",),
    "torchtitan": ("titan",),
}


def blocks(section: str, language: str) -> list[str]:
    """A section's blocks of a language."""
    text = (REPOSITORY / "docs/programs.md").read_text(encoding="utf-8")
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return re.findall(rf"```{language}\n(.*?)```", found[1], re.DOTALL)


@pytest.mark.parametrize("section", _SECTIONS)
def test_the_code_is_the_programs(section: str) -> None:
    shown = blocks(section, "python")
    source = (Path(__file__).parent / f"{_SECTIONS[section][0]}.py").read_text(encoding="utf-8")
    assert shown
    for block in shown:
        assert any(textwrap.indent(block, indent) in source for indent in ("", "    ", "        ")), block


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("section", _SECTIONS)
def test_the_spec_loads_what_the_program_saved(saved_with: SaveWith, section: str) -> None:
    saved = saved_with(*_SECTIONS[section])
    (block,) = blocks(section, "yaml")
    spec: dict[str, Any] = yaml.safe_load(block)
    below = spec["checkpoint"]["location"].partition("/")[2]  # as in the docs, below the program's own directory
    spec["checkpoint"]["location"] = str(saved.checkpoint / below)
    expected = {fqn.removeprefix("net."): values for fqn, values in saved.whole_state.items()}
    with OptimizerLoadStage(StageConfig.model_validate(spec)).run() as result:
        compared = sum(check_shard(handle, expected) for handle in result.handles)
    assert compared == sum(values["state.exp_avg"].numel() * 2 for values in expected.values())


def check_shard(handle: ShardHandle, expected: WholeState) -> int:
    """Compare what a shard holds, where it says it lies; returns how many elements."""
    compared = 0
    with handle.open() as shard:
        state = shard.state_dict()["state"]
        assert state.keys() == expected.keys()
        for fqn, values in expected.items():
            assert torch.equal(state[fqn]["step"], values["state.step"])
            for name in ("exp_avg", "exp_avg_sq"):
                for whole, local in shard.regions(fqn, name):
                    found = state[fqn][name][_slices(local)]
                    assert torch.equal(found, values[f"state.{name}"][_slices(whole)]), f"{fqn}: {name}"
                    compared += found.numel()
    return compared


def _slices(region: Region) -> tuple[slice, ...]:
    return tuple(slice(start, end) for start, end in zip(region.offsets, region.ends, strict=True))
