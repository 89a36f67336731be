"""Bad input: one clear error, exit status 1 or 2, no process and no shared memory left."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

from shardferry.pipeline.commands.interrupts import Interrupts
from tests.support import damage
from tests.support.commands import Command, Finished
from tests.support.leftovers import nothing_held, nothing_left
from tests.support.sparse import write_sparse_checkpoint

SPEC: dict[str, Any] = {
    "checkpoint": {"optimizer_key": "optim"},
    "topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}},
}


@pytest.fixture
def checkpoint(saved_by: dict[int, Path], tmp_path: Path) -> Path:
    """A copy that may be spoilt."""
    return Path(shutil.copytree(saved_by[2], tmp_path / "ckpt"))


@pytest.fixture
def run_stage(cluster: None, shardferry: Command, tmp_path: Path) -> Callable[..., Finished]:
    """``shardferry run`` on the tests' cluster, which has all of its resources back afterwards."""

    def run(checkpoint: Path, spec: dict[str, Any] = SPEC) -> Finished:
        with nothing_held():
            return shardferry("run", write_spec(checkpoint, tmp_path, spec), "--report", tmp_path / "report.json")

    return run


def write_spec(checkpoint: Path, tmp_path: Path, spec: dict[str, Any] = SPEC) -> Path:
    """The spec as a file."""
    values = {**spec, "checkpoint": {"location": str(checkpoint), **spec["checkpoint"]}}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "stage.yaml"


def check_one_error(done: Finished, status: int, message: str) -> None:
    assert done.status == status, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.search(message, errors[0]), errors[0]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.conformance(20)
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        pytest.param(shutil.rmtree, r"ckpt: no such directory", id="no-directory"),
        pytest.param(damage.no_metadata, r"no \.metadata file among 2 files \(2 of them \.distcp\)", id="no-metadata"),
        pytest.param(damage.cut_metadata, r"\.metadata: not readable as checkpoint metadata \(\d+ bytes", id="cut"),
        pytest.param(
            damage.random_metadata, r"\.metadata: .*(not readable as checkpoint metadata|names the global)", id="random"
        ),
        pytest.param(damage.forbidden_global, r"names the global posix\.system.*nothing was executed", id="forbidden"),
        pytest.param(damage.missing_file, r"__\d_0\.distcp: the file is missing", id="missing-file"),
        pytest.param(
            damage.short_file, r"its item is bytes \d+ to \d+ of .*distcp, which has \d+ bytes", id="short-file"
        ),
        pytest.param(
            damage.hole,
            rf"{re.escape(damage.KEY)}: 144 of 288 wanted elements are in no saved chunk, first at \[24:48, 0:6\]",
            id="hole",
        ),
        pytest.param(
            damage.outside_file, rf"{re.escape(damage.KEY)}: its item is bytes 1000000000 to", id="outside-file"
        ),
        pytest.param(damage.header_outside_item, r"its data ends at byte \d+ of an item of \d+ bytes", id="header"),
        pytest.param(
            damage.escaping_path, r"relative_path '\.\./elsewhere/__0_0\.distcp' leaves the checkpoint", id="path"
        ),
        pytest.param(
            damage.too_big, r"arena\(s\) need \d+ bytes, \d+ are available: \d+ bytes are missing", id="no-room"
        ),
    ],
)
def test_spoilt_checkpoint(
    run_stage: Callable[..., Finished],
    checkpoint: Path,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    message: str,
) -> None:
    spoil(checkpoint)
    check_one_error(run_stage(checkpoint), 1, message)
    report = json.loads((tmp_path / "report.json").read_text())
    assert re.search(message, report["error"])
    assert (report["location"], report["world_size"]) == (str(checkpoint), 2)
    assert not (checkpoint / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        pytest.param(
            {"checkpoint": {"optimizer_key": "opt"}},
            1,
            r"optimizer_key 'opt'; top-level keys are 'model', 'optim'",
            id="key",
        ),
        pytest.param({"reads": {}}, 2, r"reads: unknown field .* known are checkpoint", id="field"),
        pytest.param(
            {"topology": {"mesh": {"dp": 2}, "default": {"tp": "Shard(0)"}}},
            2,
            r"axis 'tp' is not in the mesh, which has dp",
            id="axis",
        ),
        pytest.param(
            {"topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(5)"}}},
            2,
            r"even\.weight: Shard\(5\) asks for dimension 5 of a tensor with 2 dimensions \(48, 6\)",
            id="dimension",
        ),
    ],
)
def test_wrong_spec(
    run_stage: Callable[..., Finished],
    saved_by: dict[int, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    status: int,
    message: str,
) -> None:
    check_one_error(run_stage(saved_by[2], {**SPEC, **changes}), status, message)
    assert (tmp_path / "report.json").exists() == (status == 1), "of a run that did not begin there is none"


def test_more_ranks_than_gpus(
    shardferry: Command, saved_by: dict[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    done = shardferry("run", write_spec(saved_by[2], tmp_path), "--num-gpus", "1")
    check_one_error(done, 2, r"2 ranks need 2 GPUs, there are 1")


@pytest.mark.alone
@pytest.mark.parametrize(
    ("killed", "with_signal", "status", "words"),
    [
        ("loader", signal.SIGKILL, 1, r"the loader of rank [01] on [0-9.]+ died"),
        ("driver", signal.SIGINT, 130, "^error: interrupted$"),
    ],
)
def test_killed_in_mid_load(tmp_path: Path, killed: str, with_signal: int, status: int, words: str) -> None:
    """A checkpoint of some GB (sparse: its zeros cost no disk) takes seconds to load; a rank dies once it reads, or Ctrl-C is pressed.

    The run takes down its own Ray, and with it the loaders that are reading.
    """
    write_sparse_checkpoint(tmp_path / "ckpt", num_tensors=24, rows=1 << 13, columns=1 << 12)
    spec = {**SPEC, "checkpoint": {"optimizer_key": "optim", "location": str(tmp_path / "ckpt")}}
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(spec))
    with nothing_left():
        command = [sys.executable, "-m", "pipeline", "run", str(tmp_path / "stage.yaml")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            reader = _first_reader(process.pid)
            os.kill(reader if killed == "loader" else process.pid, with_signal)
            killed_at = time.monotonic()
            stdout, stderr = process.communicate(timeout=60)
    took = time.monotonic() - killed_at
    assert stdout == "" or stdout.count("(raylet)") == 1, "only Ray's own remark on the dead worker may stand there"
    check_one_error(Finished(process.returncode, "", stderr), status, words)
    assert took < 10 + 5, f"{took} s from the kill to the end of the command, 5 of them for taking Ray down"


def _first_reader(driver: int) -> int:
    """Wait until a loader has filled some of its arena; its process id."""
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        for process in psutil.Process(driver).children(recursive=True):
            if _arena_kib(process.pid) > 64 * 1024:
                return process.pid
        time.sleep(0.02)
    pytest.fail("no loader filled an arena within 400 s")


def _arena_kib(pid: int) -> int:
    """Resident KiB of a process's arena."""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return 0
    for number, line in enumerate(lines):
        if "memfd:shardferry-arena" in line:
            return next(int(later.split()[1]) for later in lines[number:] if later.startswith("Rss:"))
    return 0


def test_json_errors_leave_stdout_empty(shardferry: Command, tmp_path: Path) -> None:
    done = shardferry("inspect", tmp_path / "nowhere", "--json")
    check_one_error(done, 1, "no such directory")
    with pytest.raises(json.JSONDecodeError):
        json.loads(done.stdout)


def test_debug_shows_the_traceback(shardferry: Command, tmp_path: Path) -> None:
    done = shardferry("--debug", "inspect", tmp_path / "nowhere")
    assert done.status == 1
    assert "Traceback" in done.stderr


class _Drops:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs here, and Python drops what a destructor raises


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_that_was_dropped_is_noticed() -> None:
    before, interrupts = signal.getsignal(signal.SIGINT), Interrupts()
    with interrupts.noticed():
        interrupts.check()
        _Drops()
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is before
