"""What the README shows, runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml
from torch.distributed.tensor import Replicate, Shard

from shardferry.schemas import StageConfig
from tests.support.commands import REPOSITORY

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first block of a language."""
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_twelve_lines_print_what_they_say(tmp_path: Path) -> None:
    code = block("python")
    said = re.search(r"print\(.*\)\s+# (.*)$", code, re.MULTILINE)
    assert said is not None
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == said[1]


def test_the_spec_is_one() -> None:
    """It says who has what, and elsewhere what holds without it, but for the storage's bandwidth."""
    spec, default = StageConfig.from_values(yaml.safe_load(block("yaml")), source="README.md"), StageConfig()
    assert spec.topology is not None
    layout = spec.topology.layout()
    holders = {
        fqn: [rank for rank in range(layout.world_size) if layout.rank(rank).holds(fqn)]
        for fqn in ("layers.3.attention.wo.weight", "layers.4.ffn.w1.weight", "norm.weight")
    }
    assert list(holders.values()) == [[0, 1, 2, 3], [4, 5, 6, 7], list(range(8))]
    columns, rows = (
        (Replicate(), Replicate(), Shard(0), Shard(1)),
        (Replicate(), Replicate(), Shard(0), Replicate()),
    )
    assert [layout.placements(fqn) for fqn in holders] == [columns, rows, rows]
    assert spec.read.model_copy(update={"storage_bandwidth": None}) == default.read
    assert (spec.actors, spec.handoff, spec.timeouts) == (default.actors, default.handoff, default.timeouts)
    assert (spec.checkpoint.keys, spec.checkpoint.dtype) == (default.checkpoint.keys, default.checkpoint.dtype)


def test_it_is_short_and_has_one_picture() -> None:
    assert README.count("\n") <= 150
    assert len(re.findall(r"!\[", README)) == 1


def test_no_number_is_missing() -> None:
    assert "@@" not in README
