"""``checkpoint.cache`` of a spec says where catalogs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shardferry.errors import SpecError
from shardferry.pipeline.cli import main
from shardferry.schemas import StageConfig
from tests.support.alone import save_alone

SPEC = """
checkpoint: {{location: {location}{cache}}}
topology: {{mesh: {{dp: 2}}, default: {{dp: "Shard(0)"}}}}
"""


@pytest.mark.parametrize("is_given", [False, True])
def test_planning_keeps_the_catalog_where_the_spec_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_given: bool
) -> None:
    save_alone({"optim": {"state": {"w": {"exp_avg": torch.ones(4)}}}}, tmp_path / "ckpt")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    where, spec = tmp_path / "own", tmp_path / "stage.yaml"
    spec.write_text(SPEC.format(location=tmp_path / "ckpt", cache=f", cache: {where}" if is_given else ""))
    assert main(["plan", str(spec), "--json"]) == 0
    assert [file.suffix for file in where.glob("*")] == [".catalog"] * is_given
    assert not (tmp_path / "HOME").exists()
    assert not (tmp_path / "XDG_CACHE_HOME").exists()


@pytest.mark.parametrize("cache", [None, "dir"])
def test_what_a_spec_may_say(cache: str | None) -> None:
    config = StageConfig.from_values({"checkpoint": {"cache": cache}}, source="spec")
    assert config.checkpoint.cache == cache
    assert StageConfig().checkpoint.cache is None


@pytest.mark.parametrize("cache", ["", True, False, [], {"a": 1}], ids=repr)
def test_what_a_spec_may_not_say(cache: object) -> None:
    with pytest.raises(SpecError, match=r"spec: checkpoint\.cache"):
        StageConfig.from_values({"checkpoint": {"cache": cache}}, source="spec")
