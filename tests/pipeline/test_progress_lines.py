"""Progress in a log: a line every few seconds, whose rate counts from the first bytes."""

from __future__ import annotations

import pytest

from shardferry.actors.progress import Progress
from shardferry.pipeline import cluster, display, progress
from shardferry.schemas import StageConfig


def test_the_start_of_the_actors_does_not_count(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with display.byte_progress("loading") as bar:
        for at, done, total in (
            (3.0, 0, 0),
            (5.0, 0, 0),
            (60.0, 0, 4_000_000),
            (61.0, 1_000_000, 4_000_000),
            (66.0, 2_000_000, 4_000_000),
            (71.0, 3_000_000, 4_000_000),
            (76.0, 4_000_000, 4_000_000),
            (90.0, 4_000_000, 4_000_000),
        ):
            now[0] = at
            bar.show(done, total)
    assert capsys.readouterr().err.splitlines() == [
        "loading: waiting for the ranks to start",
        "loading:   0% 0 B of 3.8 MiB",
        "loading:  50% 1.9 MiB of 3.8 MiB, 200 kB/s, 10 s left",
        "loading:  75% 2.9 MiB of 3.8 MiB, 200 kB/s, 5 s left",
        "loading: 100% 3.8 MiB of 3.8 MiB, 200 kB/s",
    ]


def test_a_line_names_the_slowest_rank(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: now[0])
    with progress() as shown:
        now[0] = 6.0
        shown([Progress(500_000, 1_000_000), Progress(250_000, 1_000_000)])
    assert capsys.readouterr().err == "loading:  38% 732.4 KiB of 1.9 MiB; slowest is rank 1 at 25%\n"


@pytest.mark.parametrize("form", [None, "json"])
def test_an_embedded_ray_shows_the_loaders_lines_where_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, form: str | None
) -> None:
    asked: list[dict[str, object]] = []
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", lambda **options: asked.append(options))
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("SHARDFERRY_LOG", raising=False)
    if form:
        monkeypatch.setenv("SHARDFERRY_LOG", form)
    with cluster.ray_for(StageConfig(), 2, address=None, num_gpus=None):
        pass
    assert [options["log_to_driver"] for options in asked] == [form is not None]
