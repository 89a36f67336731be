"""``checkpoint.cache`` of a spec says where catalogs are kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardferry.errors import SpecError
from shardferry.pipeline.cli import main
from shardferry.schemas import StageConfig
from tests.support.synthetic_metadata import SyntheticSave

SAVE = SyntheticSave(num_parameters=50, grid=(240,), num_files=64, states=("exp_avg", "exp_avg_sq"))  # 24,000 chunks

SPEC = """
checkpoint: {{location: {location}, cache: {cache}}}
topology: {{mesh: {{dp: 2}}, default: {{dp: "Shard(0)"}}}}
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "ckpt"
    SAVE.write(path)
    return path


def files_below(directory: Path) -> list[str]:
    return [path.suffix for path in directory.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("cache", "user", "own"), [("true", [".catalog"], []), ("false", [], []), ("own", [], [".catalog"])]
)
def test_planning_keeps_the_catalog_where_the_spec_says(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str, user: list[str], own: list[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    where = tmp_path / "own"
    spec = tmp_path / "stage.yaml"
    spec.write_text(SPEC.format(location=checkpoint, cache=where if cache == "own" else cache))
    main(["plan", str(spec), "--json"])  # the plan itself fails: the checkpoint has metadata and nothing else
    assert (files_below(tmp_path / "user"), files_below(where)) == (user, own)


@pytest.mark.parametrize(("cache", "is_kept"), [(True, True), (False, False), ("dir", "dir")])
def test_what_a_spec_may_say(cache: bool | str, is_kept: bool | str) -> None:
    config = StageConfig.from_values({"checkpoint": {"cache": cache}}, source="spec")
    assert config.checkpoint.cache == is_kept
    assert StageConfig().checkpoint.cache is True


@pytest.mark.parametrize("cache", ["", None, [], {"a": 1}], ids=repr)
def test_what_a_spec_may_not_say(cache: object) -> None:
    with pytest.raises(SpecError, match=r"spec: checkpoint\.cache"):
        StageConfig.from_values({"checkpoint": {"cache": cache}}, source="spec")
