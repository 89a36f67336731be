"""``checkpoint.cache`` of a spec says where plans are kept, too: a checkpoint of many chunks, which the stage loads twice."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo

from shardferry.pipeline import OptimizerLoadStage
from shardferry.pipeline.cli import main
from shardferry.schemas import StageConfig
from tests.support.synthetic_metadata import SyntheticSave

SAVE = SyntheticSave(num_parameters=50, grid=(240,), num_files=2, states=("exp_avg", "exp_avg_sq"), piece=4)
PIECE = torch.tensor([1.0, 2.0, 3.0, 4.0])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24,000 chunks, all of them the same few numbers."""
    path = tmp_path_factory.mktemp("many") / "ckpt"
    path.mkdir()
    stream = io.BytesIO()
    torch.save(PIECE, stream)
    item = stream.getvalue()
    metadata = SAVE.metadata()
    counts = dict.fromkeys({info.relative_path for info in metadata.storage_data.values()}, 0)
    for index, info in metadata.storage_data.items():
        start = counts[info.relative_path] * len(item)
        metadata.storage_data[index] = _StorageInfo(info.relative_path, start, len(item))
        counts[info.relative_path] += 1
    for name, count in counts.items():
        (path / name).write_bytes(item * count)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return path


def spec(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """Two copies of everything."""
    return {
        "checkpoint": {"location": str(checkpoint), "cache": str(cache)},
        "topology": {"mesh": {"copies": 2}, "default": {}},
        "read": {"strategy": "cooperative"},
    }


def plans(cache: Path) -> dict[str, os.stat_result]:
    return {path.name: path.stat() for path in cache.glob("*.plan")}


def assert_used_again(before: dict[str, os.stat_result], after: dict[str, os.stat_result]) -> None:
    assert len(before) == 2
    assert {name: stat.st_ino for name, stat in after.items()} == {name: stat.st_ino for name, stat in before.items()}
    assert all(stat.st_mtime_ns > before[name].st_mtime_ns for name, stat in after.items()), "not used"


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_the_stage_loads_by_the_plans_that_it_kept(checkpoint: Path, tmp_path: Path) -> None:
    cache, read = tmp_path / "cache", []
    for _ in range(2):
        before = plans(cache)
        config = StageConfig.model_validate(spec(checkpoint, cache))
        with OptimizerLoadStage(config).run() as result:
            read.append([(rank.bytes_read, rank.bytes_sent) for rank in result.report.ranks])
            for handle in result.handles:
                with handle.open() as shard:
                    for state in shard.state_dict()["state"].values():
                        for tensor in state.values():
                            assert torch.equal(tensor, PIECE.repeat(SAVE.grid[0]))
    assert read[0] == read[1]
    assert_used_again(before, plans(cache))


def test_a_dry_run_keeps_them_too(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, file = tmp_path / "cache", tmp_path / "stage.json"
    file.write_text(json.dumps(spec(checkpoint, cache)))
    reports = []
    for _ in range(2):
        before = plans(cache)
        assert main(["plan", str(file), "--json"]) == 0
        reports.append(capsys.readouterr().out)
    assert reports[0] == reports[1]
    assert_used_again(before, plans(cache))
