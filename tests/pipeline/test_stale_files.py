"""Data files younger than their metadata, on the command line and in a stage's spec and report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from shardferry.checkpoint.open import open_checkpoint
from shardferry.pipeline.reports import build_report
from shardferry.receiver import WantedPart
from shardferry.schemas.stage_config import StageConfig
from tests.support.commands import Command
from tests.support.small_net import Net, adamw, fill, save

SPEC = """
checkpoint: {{location: {location}, optimizer_key: optim, stale: {stale}}}
topology: {{mesh: {{dp: 2}}}}
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = Path(save(tmp_path / "ckpt", *fill(model := Net(), adamw(model))))
    time = (path / ".metadata").stat().st_mtime + 3600
    for file in path.glob("*.distcp"):
        os.utime(file, (time, time))
    return path


def test_inspect_and_verify_warn(shardferry: Command, checkpoint: Path) -> None:
    for command in ("inspect", "verify"):
        done = shardferry(command, checkpoint, "--json")
        assert done.status == 0, done.stderr
        found = json.loads(done.stdout)
        assert found["problems"] == []
        assert "1 of 1 data files (__0_0.distcp) are younger than .metadata by 3600." in found["warnings"][0]
        assert "warning: " in shardferry(command, checkpoint).stdout


def test_a_dry_run_refuses_where_the_spec_does(shardferry: Command, checkpoint: Path, tmp_path: Path) -> None:
    for stale, status in (("warn", 0), ("error", 1)):
        spec = tmp_path / f"{stale}.yaml"
        spec.write_text(SPEC.format(location=checkpoint, stale=stale))
        done = shardferry("plan", spec, "--json")
        assert (done.status, "younger than .metadata" in done.stderr) == (status, status == 1)


def test_the_stages_report_warns(checkpoint: Path) -> None:
    config = StageConfig.from_values({"topology": {"mesh": {"dp": 1}}}, source="test")
    catalog = open_checkpoint(checkpoint)
    assert config.topology is not None
    parts = [[WantedPart(None, config.topology.layout().rank(0))]]
    assert build_report(config, catalog, parts, [], {}).warnings == [catalog.stale]
