"""The benchmark itself, in small: every store is measured, what is counted is right, and a wrong result is found."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.checkpoint import disk_directory
from benchmarks.handoff import ARRAY, CHUNKS, DICT, SHARED, STORE, limits
from benchmarks.limits import verdicts
from benchmarks.load import main, write_results
from benchmarks.models import fill_box, state_bytes
from benchmarks.record import Record
from benchmarks.resident import KEPT, WARM
from benchmarks.resident import limits as limits_of_kept_state
from benchmarks.run import Figures
from benchmarks.stock import StockShardedLoad
from benchmarks.stores import Store, StoreKind, drop_page_cache, files_of, resident_share, warm_page_cache
from benchmarks.table import fresh_table, markdown, plain, time_table
from benchmarks.task import Task, WrongResult
from shardferry.region import Region

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = ("Shardferry", "Shardferry, direct", "Shardferry, cooperative")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of one case tells, by store. A result that isn't what was saved would have failed it."""
    directory = tmp_path_factory.mktemp("bench")
    file = directory / "all.json"
    options = ["--megabytes", "3", "--throttled-megabytes", "3", "--cases", "4-3", "--rounds", "1"]
    assert main([*options, "--directory", str(directory), "--json", str(file)]) == 0
    stores: dict[str, Any] = json.loads(file.read_text())["stores"]
    return stores


def test_every_store_is_measured(measured: dict[str, Any]) -> None:
    assert list(measured) == ["warm", "cold", "throttled"]
    for cases in measured.values():
        contenders = cases["4-3"]["contenders"]
        assert {"floor", *OURS, "stock dcp.load"} <= set(contenders)
        assert all(len(found["walls_s"]) == 1 for found in contenders.values())
    assert {len(c["fresh_walls_s"]) for c in measured["warm"]["4-3"]["contenders"].values()} == {1}


@pytest.mark.parametrize("store", ["warm", "cold", "throttled"])
def test_bytes_and_requests_are_counted(measured: dict[str, Any], store: str) -> None:
    contenders, unique = measured[store]["4-3"]["contenders"], measured[store]["4-3"]["state_bytes"]
    floor, stock = contenders["floor"], contenders["stock dcp.load"]
    slack = 128 * 1024  # metadata and heads of a checkpoint this small; in files the interpreter's own reads too
    assert unique <= floor["bytes_asked"] <= unique + slack
    for name in OURS:
        assert unique <= contenders[name]["bytes_asked"] <= 2 * unique + slack, "small gaps are read in vain"
    assert stock["bytes_asked"] > 1.4 * unique, "some saved chunks are wanted by two of the three ranks"
    assert all(found["requests"] > 0 for found in contenders.values())


def test_a_cold_store_is_cold(measured: dict[str, Any]) -> None:
    assert {found["warm_share"] for found in measured["cold"]["4-3"]["contenders"].values()} == {0.0}


def test_the_page_cache_is_dropped_and_looked_at(tmp_path: Path) -> None:
    folder = Path(disk_directory(str(tmp_path), 10**6)) / "files" / "deep"
    folder.mkdir(parents=True)
    (folder / "data").write_bytes(bytes(300_000))
    (folder / "empty").write_bytes(b"")
    assert files_of(str(tmp_path)) == [folder / "data", folder / "empty"]
    warm_page_cache(str(tmp_path))
    assert resident_share(str(tmp_path)) == 1.0
    drop_page_cache(str(tmp_path))
    assert resident_share(str(tmp_path)) == 0.0


def test_a_wrong_result_is_found() -> None:
    shapes = {"a.weight": (4, 6)}
    right = torch.empty(4, 6)
    fill_box(right, "a.weight", "exp_avg", (4, 6), Region((0, 0), (4, 6)))
    store = Store(StoreKind.WARM, "/nowhere", "/nowhere")
    task = Task(CASES[0], store, shapes, state_bytes(shapes), 0, None, {("a.weight", "exp_avg"): right})  # type: ignore[arg-type]
    task.check("somebody", "a.weight", "exp_avg", right.clone())
    wrong = right.clone()
    wrong[3, 5] += 1
    with pytest.raises(WrongResult, match=r"somebody, 4-4, rank 0: a\.weight\.exp_avg is not what was saved"):
        task.check("somebody", "a.weight", "exp_avg", wrong)


FIGURES = Figures(
    wall_s=1.0,
    cpu_s=1.0,
    fresh_wall_s=None,
    fresh_cpu_s=None,
    bytes_asked=100,
    unique_bytes=100,
    requests=1,
    peak_over_shard=0,
    warm_share=0.0,
    phases={},
    walls_s=[1.0],
    fresh_walls_s=[],
)


def test_limits_of_the_throttled_store() -> None:
    """Stock asks for four times the bytes and takes three times as long: 0.75 of what it should be behind."""
    figures = dict.fromkeys(("floor", *OURS), FIGURES)
    figures["stock dcp.load"] = dataclasses.replace(FIGURES, wall_s=3.0, bytes_asked=400)
    figures["Shardferry"] = dataclasses.replace(FIGURES, wall_s=1.25)
    assert [(v.what, v.found, v.met) for v in verdicts(StoreKind.THROTTLED, figures)] == [
        ("x floor", "1.25", False),
        ("stock/ours", "2.40", True),
        ("of stock's bytes/ours", "0.60", False),
        ("bytes/unique, cooperative", "1.000", True),
        ("auto/better", "1.25", False),
        ("peak over shard, MiB", "0", True),
    ]


def test_the_floor_and_shardferry_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ours.json"
    options = ["--store", "throttled", "--throttled-megabytes", "3", "--cases", "4-2", "--rounds", "1", "--ours"]
    assert main([*options, "--directory", str(tmp_path), "--json", str(file)]) == 0
    case = json.loads(file.read_text())["stores"]["throttled"]["4-2"]
    assert set(case["contenders"]) == {"floor", *OURS}
    assert not any("stock" in verdict["what"] for verdict in case["limits"])
    assert "x floor" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", [["--cases", "4-4"], ["--store", "warm"], ["--throttled-megabytes", "5"], ["--ours"]]
)
def test_what_was_measured_before_is_shown_whole(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--of", "earlier.json", *option])
    assert stop.value.code == 2
    assert f"{option[0]} has no meaning there" in capsys.readouterr().err


def test_who_always_allocates_is_marked_where_the_others_destinations_are_touched() -> None:
    """Of stock's two, and of the cases that it was measured in."""
    figures = dict.fromkeys(("floor", *OURS, "stock dcp.load"), dataclasses.replace(FIGURES, fresh_wall_s=2.0))
    cases = {CASES[0]: {**figures, StockShardedLoad.name: figures["floor"]}, CASES[1]: figures}
    touched = time_table(StoreKind.WARM, cases)
    assert [row[1:] for row in touched.rows] == [[*["1.000 (1.00)"] * 5, cell] for cell in ("1.000 (1.00) †", "-")]
    note = f"\n† {StockShardedLoad.name}: allocates its destinations in every load, so that they are fresh here too\n"
    assert markdown(touched).endswith(note)
    assert plain(touched).endswith(note)
    for table in (fresh_table(StoreKind.WARM, cases), time_table(StoreKind.WARM, {CASES[1]: figures})):
        assert "†" not in markdown(table)


def record_of(*kinds: StoreKind, machine: str = "here") -> Record:
    """Of one case, as if it were measured."""
    figures = dict.fromkeys(("floor", *OURS, "stock dcp.load"), dataclasses.replace(FIGURES, fresh_wall_s=2.0))
    phases = dict.fromkeys(("open", "plan", "allocate", "agree", "read"), 0.1)
    figures["Shardferry"] = dataclasses.replace(FIGURES, phases=phases)
    results = {kind: {CASES[0]: figures} for kind in kinds}
    return Record({"cpu": machine}, 5, results, {kind: {CASES[0].name: 10**6} for kind in kinds})


def test_stores_measured_one_at_a_time_are_shown_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in StoreKind:
        record_of(kind).write(tmp_path / kind.value)
    files = [tmp_path / kind.value for kind in StoreKind]
    assert Record.read(files) == record_of(*StoreKind)
    assert main([*(option for file in files for option in ("--of", str(file))), "--json", str(tmp_path / "all")]) == 0
    assert Record.read([tmp_path / "all"]) == record_of(*StoreKind)
    told = capsys.readouterr().out
    assert all(f"against its limits: {kind.title}" in told for kind in StoreKind)


@pytest.mark.parametrize(
    ("second", "words"),
    [
        pytest.param(lambda file: record_of(StoreKind.WARM).write(file), "has the store warm", id="twice"),
        pytest.param(
            lambda file: record_of(StoreKind.COLD, machine="there").write(file), "another machine", id="elsewhere"
        ),
        pytest.param(lambda file: file.write_text("{}"), "not what --json writes", id="another-file"),
        pytest.param(lambda file: file.write_text("[]"), "not what --json writes", id="a-list"),
        pytest.param(lambda _: None, "can't be read", id="missing"),
    ],
)
def test_runs_that_do_not_belong_together_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], second: Callable[[Path], object], words: str
) -> None:
    first, other = tmp_path / "first.json", tmp_path / "second.json"
    record_of(StoreKind.WARM).write(first)
    second(other)
    assert main(["--of", str(first), "--of", str(other)]) == 2
    complaint = capsys.readouterr().err
    assert f"{other}: " in complaint
    assert words in complaint


def test_tables_and_summary_are_written_beside_the_readme(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results -->\nlast run\n<!-- end of results -->\nafter\n")
    write_results(record_of(*StoreKind), tmp_path)
    text = readme.read_text()
    assert text.startswith("before\n<!-- results -->\n")
    assert text.endswith("<!-- end of results -->\nafter\n")
    assert "last run" not in text
    (row,) = (line for line in text.splitlines() if line.startswith(f"| {CASES[0].title} |"))
    assert len(row.strip("| ").split(" | ")) == 1 + 3 * len(StoreKind)
    for kind in StoreKind:
        page = (tmp_path / "results" / f"{kind.value}.md").read_text()
        assert f"Shardferry against its limits: {kind.title}" in page
        assert f"scripts/bench --store {kind.value}" in page


def test_limits_of_the_hand_over() -> None:
    """The dict is compared with shared memory, the object store with the faster raw way; both of the largest arena."""
    times = {SHARED: 10.0, STORE: 500.0, ARRAY: 440.0, CHUNKS: 390.0, DICT: 990.0}
    small = {way: {"total_ms": 1.0, "open_ms": 6.0} for way in times}
    large = {way: {"total_ms": total, "open_ms": 4.0} for way, total in times.items()}
    results = {
        "passages": {str(2**26): small, str(2**30): large},
        "in_process_bytes": [0, 1000],
        "start_up_s": {"stage": 3.5, "bare actors": 2.0},
    }
    assert [(found, met) for _, _, found, met in limits(results)] == [
        ("6.00", False),
        ("4.00", True),
        ("99", False),
        ("0.78", False),
        ("0", True),
        ("1.50", False),
    ]


def test_limits_of_kept_state() -> None:
    results = {
        "attach": {"64": {"attach_ms": 2.0, "open_ms": 3.0}, "1024": {"attach_ms": 2.0, "open_ms": 5.5}},
        "reshard_s": {"4 -> 3": {KEPT: 1.0, WARM: 1.6}, "rows -> columns": {KEPT: 1.0, WARM: 1.4}},
        "storage_bytes": 1,
    }
    assert [(found, met) for _, _, found, met in limits_of_kept_state(results)] == [
        ("3.00", True),
        ("5.50", False),
        ("2.50", False),
        ("1.60", True),
        ("1.40", False),
        ("1", False),
    ]
