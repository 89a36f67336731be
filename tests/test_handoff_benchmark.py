"""benchmarks.handoff and benchmarks.resident on a Ray of their own, in small: every way is measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.handoff import ARRAY, CHUNKS, DICT, SHARED, STORE
from benchmarks.resident import KEPT, THROTTLED, WARM
from tests.support.commands import REPOSITORY


def measured(benchmark: str, *options: str, directory: Path) -> dict[str, Any]:
    """The figures of a benchmark."""
    file = directory / "figures.json"
    command = [sys.executable, "-m", "tests.support.forked_workers", "run", benchmark, *options, "--json", str(file)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr
    assert "Against the limits" in done.stdout
    results: dict[str, Any] = json.loads(file.read_text())
    return results


@pytest.mark.slow
def test_hand_over_is_measured(tmp_path: Path) -> None:
    """In small. Bytes that are not those that were sent would have failed it."""
    results = measured("benchmarks.handoff", "--megabytes", "1,4", "--rounds", "1", directory=tmp_path)
    assert {size: set(ways) for size, ways in results["passages"].items()} == {
        str(size): {SHARED, STORE, ARRAY, CHUNKS, DICT} for size in (2**20, 2**22)
    }
    assert all(one["total_ms"] > 0 for ways in results["passages"].values() for one in ways.values())
    copied, loaded = results["in_process_bytes"]
    assert (copied, loaded) == (0, 2**22), "the state is where it was read to"
    assert [limit["what"] for limit in results["limits"]][-1] == "stage of 2 ranks over 2 bare actors, s"


@pytest.mark.slow
def test_kept_state_is_measured(tmp_path: Path) -> None:
    """In small. State that is not the saved one would have failed it."""
    results = measured("benchmarks.resident", "--quick", directory=tmp_path)
    assert len(results["attach"]) == 2
    assert set(results["restart_s"]) == {KEPT, WARM, THROTTLED}
    assert [set(seconds) for seconds in results["reshard_s"].values()] == [{KEPT, WARM}] * 2
    assert results["storage_bytes"] == 0
