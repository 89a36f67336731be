"""A report as rows on one axis of time, as a trace, and as a page that a real browser shows."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shardferry.errors import SpecError
from shardferry.pipeline.commands.outputs import page_output
from shardferry.pipeline.display import human_rate, print_stage
from shardferry.pipeline.exports.timeline import timeline, total_s
from shardferry.pipeline.exports.trace import chrome_trace
from shardferry.pipeline.reports import lower_bound_terms, storage_rate
from shardferry.schemas.stage_config import StageConfig
from shardferry.schemas.stage_report import FailedStage, RankProgress, StageReport
from shardferry.stats import RequestLog, StorageRequest
from tests.support.commands import Command
from tests.support.stage_reports import STARTED, failed_stage, rank_report, stage_report

PHASES = ("start", "join", "catalog", "values", "plan", "allocate", "agree", "read", "install", "handoff")
DRAWN_WORK = ("deliver", "exchange", "device copy")


def test_the_driver_s_phases_stand_before_and_after_those_of_the_ranks() -> None:
    driver, *ranks = timeline(stage_report(2))
    assert [(span.name, span.start, span.end) for span in driver.spans] == [
        ("catalog", 0.0, 1.0),
        ("start", 1.0, 3.0),
        ("handoff", pytest.approx(13.01), pytest.approx(15.01)),
    ]
    assert [(row.process, row.name) for row in (driver, *ranks)] == [
        ("driver", "driver"),
        ("10.0.0.0", "rank 0"),
        ("10.0.0.0", "rank 1"),
    ]
    assert ranks[0].spans[0].start == 2.5
    assert [(span.name, span.start, span.end) for span in ranks[0].work] == [
        ("storage", 5.0, 12.5),
        ("deliver", 5.5, 12.75),
        ("exchange", 6.0, 12.0),
        ("device copy", 5.5, 13.0),
    ]
    assert total_s(stage_report(2)) == pytest.approx(15.01)


def test_the_timeline_has_every_phase_and_kind_of_work() -> None:
    from shardferry.pipeline.exports.charts import timeline_chart

    chart = timeline_chart(timeline(stage_report(2)))
    names = [*PHASES, *(f"in it: {kind}" for kind in DRAWN_WORK)]
    assert re.findall(r'"name":"([^"]*)"', chart) == names


def test_the_trace_names_processes_and_threads() -> None:
    events = json.loads(chrome_trace(stage_report(9)))["traceEvents"]
    kinds = ("storage", "deliver", "exchange", "device copy")
    named = {(event["pid"], event["tid"], event["args"]["name"]) for event in events if event["name"].endswith("_name")}
    assert named == {
        (1, 0, "driver"),
        (2, 0, "node 10.0.0.0"),
        (3, 0, "node 10.0.0.1"),
        *((2, 1_000 * rank, f"rank {rank}") for rank in range(8)),
        (3, 8_000, "rank 8"),
        *(
            (3 if rank == 8 else 2, 1_000 * rank + 900 + i, f"rank {rank}, {kind}")
            for rank in range(9)
            for i, kind in enumerate(kinds)
        ),
    }
    slices = [event for event in events if event["ph"] == "X"]
    assert Counter(event["name"] for event in slices) == {
        "catalog": 1,
        "start": 1,
        "handoff": 1,
        **dict.fromkeys(("join", "load", "values", "plan", "allocate", "agree", "read", "install", *kinds), 9),
    }
    [work] = (event for event in slices if event["tid"] == 8_902)
    assert (work["name"], work["ts"], work["dur"], work["args"]) == ("exchange", 6e6, 6e6, {"busy seconds": 2.5})
    [start] = (event for event in slices if event["name"] == "start")
    assert (start["pid"], start["ts"], start["dur"]) == (1, 1e6, 2e6)


def test_the_trace_has_the_requests() -> None:
    """Requests that overlap are on threads of their own; the counters add up to all bytes."""
    at = [(STARTED + 4 + start, seconds) for start, seconds in ((0.0, 2.0), (1.0, 2.0), (2.0, 1.0))]
    requests = tuple(StorageRequest(f"f{i}", 10**6, start, seconds) for i, (start, seconds) in enumerate(at))
    # The second rank made twice as many requests as it kept.
    ranks = [rank_report(0, requests=requests, num_requests=3), rank_report(1, requests=requests, num_requests=6)]
    events = json.loads(chrome_trace(stage_report(2, ranks=ranks)))["traceEvents"]
    slices = {(e["tid"], e["name"]): (e["ts"], e["dur"], e["args"]) for e in events if "bytes" in e.get("args", {})}
    assert set(slices) == {
        (1_000 * rank + 1 + lane, f"f{i}, 1,000,000 bytes") for rank in (0, 1) for i, lane in ((0, 0), (1, 1), (2, 0))
    }
    assert slices[1_002, "f1, 1,000,000 bytes"] == (6e6, 2e6, {"file": "f1", "bytes": 10**6})
    counters = [event for event in events if event["ph"] == "C"]
    step_s = 3.0 / 200
    rates = [event["args"]["bytes/s"] for event in counters if event["name"] == "bytes per second"]
    assert sum(rates) * step_s == pytest.approx(9e6, rel=1e-3)
    in_flight = [event["args"]["requests"] for event in counters if event["name"] == "requests in flight"]
    assert max(in_flight) == 6
    assert sum(in_flight) * step_s == pytest.approx(15.0, rel=1e-3)


def test_a_log_of_very_many_requests_is_thinned_evenly() -> None:
    log = RequestLog(8)
    for number in range(100):
        log.add(StorageRequest(str(number), 1, float(number), 1.0))
    assert [int(request.path) for request in log.kept()] == list(range(0, 100, 16))


def test_the_rate_of_the_storage_is_the_one_that_the_load_saw() -> None:
    ranks = [rank_report(0, busy={"storage": 2.0}), rank_report(1, busy={"storage": 3.0})]
    assert storage_rate(ranks) == 1e9
    terms = lower_bound_terms(StageConfig(), 2_000_000_000, ranks)
    assert terms == {"host memory": 0.3, "storage": 2.0}
    stated = StageConfig.from_values({"read": {"storage_bandwidth": "500MB"}}, source="")
    assert lower_bound_terms(stated, 2_000_000_000, ranks)["storage"] == 4.0


def test_without_a_rate_of_the_storage_there_is_no_term_of_it() -> None:
    ranks = [rank_report(0, bytes_read=0, busy={})]
    assert storage_rate(ranks) is None
    assert set(lower_bound_terms(StageConfig(), 1, ranks)) == {"host memory"}


def test_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    print_stage(stage_report(2))
    out = capsys.readouterr().out
    assert "needed once 2.8 GiB, read 2.8 GiB (1.000 x) at 500 MB/s; 15.00 s in all" in out
    assert "planning and reading took 9.000 s, 1.20 x the lower bound of 7.500 s" in out
    print_stage(stage_report(2, lower_bound_s=None, ratio_to_lower_bound=None, lower_bound_terms={}))
    assert "lower bound" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("bytes_per_s", "text"),
    [(999, "999 B/s"), (1.2e8, "120 MB/s"), (5e3, "5 kB/s"), (2.34e9, "2.34 GB/s"), (1.4e12, "1400 GB/s")],
)
def test_rates_for_people(bytes_per_s: float, text: str) -> None:
    assert human_rate(bytes_per_s) == text


REPORTS = {"4 ranks": stage_report(4), "1,024 ranks": stage_report(1_024), "failed": failed_stage(8)}

# What the page is like once all is drawn, for the dump of its content.
_LOOK = """<script>addEventListener("load", () => setTimeout(() => {
  const charts = [...document.querySelectorAll(".js-plotly-plot")];
  const label = document.querySelector(".ytick text");
  Plotly.Fx.hover(charts[0], [{curveNumber: 0, pointNumber: 0}]);
  document.body.dataset.found = JSON.stringify({
    width: document.documentElement.scrollWidth,
    fetched: performance.getEntriesByType("resource").length,
    background: getComputedStyle(document.body).backgroundColor,
    text: getComputedStyle(label).fill,
    label_px: Math.min(...[...document.querySelectorAll(".ytick text")].map(t => t.getBoundingClientRect().height)),
    rows: charts.map(chart => chart.querySelectorAll(".ytick").length),
    overlaps: charts.map(chart => {
      const boxes = [...chart.querySelectorAll(".ytick text")].map(t => t.getBoundingClientRect()).sort((a, b) => a.y - b.y);
      return boxes.filter((box, i) => i && box.y < boxes[i - 1].bottom - 4).length }),
    bars: document.querySelectorAll(".bars path").length,
    axes: [...document.querySelectorAll(".xtitle")].map(t => t.textContent),
    legend: [...charts[0].querySelectorAll(".legendtext")].map(t => t.textContent),
    hover: charts[0].querySelector(".hoverlayer").textContent,
  })}, 500))</script>"""


def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs Debian's package chromium: a real browser")
    return found


def shown(page: str, tmp_path: Path, *, dark: bool = False) -> tuple[dict[str, Any], str]:
    """What a browser of 1,200 px says of a page, and what it wrote on its console."""
    file = tmp_path / "page.html"
    file.write_text(page.replace("</body>", f"{_LOOK}</body>"), encoding="utf-8")
    done = browse(file, tmp_path, "--dump-dom", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return found_in(done), console


def browse(file: Path, tmp_path: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Open a file in a browser of 1,200 px."""
    options = ["--headless", "--no-sandbox", "--disable-background-networking", "--disable-gpu", "--hide-scrollbars"]
    options += ["--window-size=1200,900", "--virtual-time-budget=8000", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", *more]
    return subprocess.run(
        [chromium(), *options, file.as_uri()], capture_output=True, text=True, timeout=240, check=False
    )


def found_in(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What the page's own script has left in the page."""
    found = re.search(r'data-found="([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2_000:]
    values: dict[str, Any] = json.loads(found[1].replace("&quot;", '"'))
    return values


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_page(tmp_path: Path, name: str, dark: bool) -> None:
    from shardferry.pipeline.exports.page import html_page

    report = REPORTS[name]
    found, console = shown(html_page(report), tmp_path, dark=dark)
    assert console == ""
    assert found["fetched"] == 0, "the page needs nothing from elsewhere"
    assert found["width"] <= 1_200
    assert found["background"] == ("rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)")
    assert found["text"] == ("rgb(232, 234, 237)" if dark else "rgb(27, 31, 36)")
    assert found["label_px"] >= 10
    assert not any(found["overlaps"])
    # Each chart names its rows; many ranks share them.
    assert found["rows"] == {"4 ranks": [5, 4, 4, 4, 4], "1,024 ranks": [65, 64, 32, 64, 4], "failed": [8]}[name]
    if isinstance(report, FailedStage):
        assert found["bars"] > 8
        assert found["legend"] == ["needed", "done"]
        assert found["hover"] == "rank 0, needed: 953.7 MiB"
    else:
        assert found["bars"] > 4 * 8
        assert found["axes"][0] == "seconds"
        assert found["legend"] == [*PHASES, *(f"in it: {kind}" for kind in DRAWN_WORK)]
        assert found["hover"] == "driver, start: 2.000 s1.000 to 3.000 sdriver"


# Counts the pixels of a picture by their colour.
_COUNT = """<!doctype html><img id=p src="data:image/png;base64,{picture}"><script>addEventListener("load", () => {{
  const image = document.getElementById("p"), canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d"); context.drawImage(image, 0, 0);
  const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data, counts = {{}};
  for (let i = 0; i < pixels.length; i += 4) {{
    const name = pixels[i] + "," + pixels[i + 1] + "," + pixels[i + 2];
    counts[name] = (counts[name] || 0) + 1 }}
  const most = Object.entries(counts).sort((a, b) => b[1] - a[1]).slice(0, 200);
  document.body.dataset.found = JSON.stringify({{width: canvas.width, counts: Object.fromEntries(most)}}) }})</script>"""


@pytest.mark.parametrize("name", REPORTS)
def test_a_screenshot_has_the_colours_of_the_bars(tmp_path: Path, name: str) -> None:
    from shardferry.pipeline.exports.charts import colour
    from shardferry.pipeline.exports.page import html_page

    file, picture = tmp_path / "page.html", tmp_path / "page.png"
    file.write_text(html_page(REPORTS[name]), encoding="utf-8")
    browse(file, tmp_path, f"--screenshot={picture}")
    file.write_text(_COUNT.format(picture=base64.b64encode(picture.read_bytes()).decode()), encoding="utf-8")
    found = found_in(browse(file, tmp_path, "--dump-dom"))
    assert found["width"] == 1_200
    drawn = {tuple(map(int, pixel.split(","))): count for pixel, count in found["counts"].items()}
    shown = ["read"] if name == "failed" else ["start", "read", "install", "exchange"]
    for phase in shown:
        assert drawn[tuple(bytes.fromhex(colour(phase)[1:]))] > 500, phase
    assert drawn[255, 255, 255] > 0.4 * 1_200 * 900


def test_the_page_s_words() -> None:
    from shardferry.pipeline.exports.page import html_page

    page = html_page(stage_report(4, warnings=["old files"], missing=["layers.3.w"], overwritten=[(0, "lr", "1", "2")]))
    for text in (
        "step-1000",
        "old files",
        "layers.3.w",
        "group 0: lr: 1 → 2",
        "264 x dim 0 in 4",
        "dp_shard=4",
    ):
        assert text in page
    assert "<dd>15.00</dd>" in page
    assert "<dd>1 GB/s</dd>" in page
    assert "reached: 1.20 x" in page
    assert "needed 1.000, read 1.000" in page
    failed = html_page(failed_stage(8))
    assert "<b>RankError</b> loading: the process of rank 3 died: &lt;b&gt;out of memory&lt;/b&gt;" in failed
    assert "3.3 GiB of 7.5 GiB" in failed
    assert "rank 3, 9.5 s, at 0 B" in failed
    assert "<dd>read (8)</dd>" in failed
    unplanned = [RankProgress(rank=rank, bytes_done=0, bytes_needed=0, phase="values", idle_s=2.0) for rank in range(2)]
    failed = html_page(failed_stage(2).model_copy(update={"ranks": unplanned}))
    assert "<dd>nothing: no rank had planned</dd>" in failed
    assert "<dd>values (2)</dd>" in failed
    assert "longest without a byte" not in failed, "no rank stalled before there was anything to read"
    assert "How far each rank came" not in failed


def test_a_dry_run_s_page(shardferry: Command, saved_by: dict[int, Path], tmp_path: Path) -> None:
    spec = f"checkpoint: {{location: {saved_by[2]}}}\ntopology: {{mesh: {{dp: 3}}, default: {{dp: 'Shard(0)'}}}}\n"
    (tmp_path / "stage.yaml").write_text(spec)
    done = shardferry("plan", tmp_path / "stage.yaml", "--html", tmp_path / "page.html")
    assert done.status == 0, done.stderr
    assert done.stderr == f"html: {tmp_path / 'page.html'}\n"
    page = (tmp_path / "page.html").read_text()
    for text in (
        "Dry run",
        "dp=3",
        "rank 2",
        "peak memory of a rank",
        "x whole",
        "__1_0.distcp",
        "balance, most over mean",
        "shardferry plan",
    ):
        assert text in page


def test_without_plotly_the_run_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(SpecError, match=r"--html: needs plotly.*pip install 'shardferry\[html\]'"):
        page_output("page.html")


def write_report(path: Path, report: StageReport | FailedStage) -> Path:
    path.write_text(report.model_dump_json())
    return path


def test_a_report_is_shown_again(shardferry: Command, tmp_path: Path) -> None:
    file = write_report(tmp_path / "report.json", stage_report(2))
    done = shardferry("report", file, "--html", tmp_path / "page.html", "--trace", tmp_path / "trace.json")
    assert done.status == 0, done.stderr
    assert "15.00 s in all" in done.stdout
    assert "rank 1" in (tmp_path / "page.html").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert done.stderr == f"html: {tmp_path / 'page.html'}\ntrace: {tmp_path / 'trace.json'}\n"


def test_two_runs_side_by_side(shardferry: Command, tmp_path: Path) -> None:
    first = write_report(tmp_path / "first.json", stage_report(2))
    second = write_report(tmp_path / "second.json", stage_report(2, total_s=7.5))
    done = shardferry("report", first, "--compare", second, "--html", tmp_path / "page.html")
    assert done.status == 0
    page = (tmp_path / "page.html").read_text()
    for text in (
        "Phases of the first run",
        "Phases of the second run",
        "<td>15.000 s</td><td>7.500 s</td><td>0.500</td>",
    ):
        assert text in page
    assert re.search(r"in all +│ +15\.000 s │ +7\.500 s │ +0\.500", done.stdout)


def test_a_failure_is_shown_again(shardferry: Command, tmp_path: Path) -> None:
    file = write_report(tmp_path / "report.json", failed_stage(4))
    done = shardferry("report", file, "--html", tmp_path / "page.html")
    assert done.status == 0
    assert "rank 3: 0 B of 953.7 MiB, last seen in the phase read" in done.stdout
    assert "RankError: loading: the process of rank 3 died" in done.stdout
    assert "Failed" in (tmp_path / "page.html").read_text()
    for option in ("--trace", "--compare"):
        done = shardferry("report", file, option, file)
        assert (done.status, option in done.stderr) == (2, True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"error": 1}'])
def test_what_is_no_report(shardferry: Command, tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    done = shardferry("report", tmp_path / "report.json")
    assert (done.status, done.stdout) == (2, "")
    assert "not a report of shardferry run --report" in done.stderr
    missing = shardferry("report", tmp_path / "missing.json")
    assert missing.stderr.endswith(
        "missing.json: can't be read: No such file or directory; give what run --report wrote\n"
    )
