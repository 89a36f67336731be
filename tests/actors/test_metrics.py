"""What loaders tell while they load: metrics, as a real head exports them, and log lines."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from tests.support.commands import REPOSITORY
from tests.support.leftovers import nothing_left

_PROGRAM = """
import sys, time, urllib.request, ray
from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
port, location = int(sys.argv[1]), sys.argv[2]
ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, _metrics_export_port=port)
topology = {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}}
result = OptimizerLoadStage(StageConfig.model_validate({"checkpoint": {"location": location}, "topology": topology})).run()
needed = sum(rank.bytes_needed for rank in result.report.ranks)
deadline = time.monotonic() + 60
while time.monotonic() < deadline:  # Ray exports with some seconds of delay
    time.sleep(1)
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = [line for line in answer.read().decode().splitlines() if line.startswith("ray_shardferry_")]
    done = sum(float(line.split()[-1]) for line in lines if line.startswith("ray_shardferry_bytes_done{"))
    if done == needed:
        break
result.close()
print(needed)
print("\\n".join(lines))
ray.shutdown()
"""


def test_a_head_exports_them(saved_by: dict[int, Path]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SHARDFERRY_LOG": "json", "RAY_DEDUP_LOGS": "0"}
    with nothing_left():
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(port), str(saved_by[4])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=250,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("ray_shardferry_")]
    needed = int(next(line for line in done.stdout.splitlines() if line.isdigit()))

    def told(name: str) -> dict[str, float]:
        found = [line for line in lines if line.startswith(f"ray_shardferry_{name}{{")]
        return {line.partition('rank="')[2].partition('"')[0]: float(line.split()[-1]) for line in found}

    assert sum(told("bytes_done").values()) == sum(told("bytes_wanted").values()) == needed
    assert set(told("bytes_done")) == {"0", "1"}
    assert sum(told("bytes_read_total").values()) >= needed
    assert all(count >= 1 for count in told("requests_total").values())
    assert all(seconds > 0 for seconds in told("ready_seconds").values())
    phases = {
        part
        for line in lines
        if line.startswith("ray_shardferry_phase{") and line.endswith(" 1.0")
        for part in line.split('"')
        if part == "done"
    }
    assert phases == {"done"}
    assert all('stage="' in line and 'node="' in line for line in lines)
    logged = [
        json.loads(line[line.index("{") :])
        for line in done.stderr.splitlines() + done.stdout.splitlines()
        if '"phase"' in line
    ]
    assert {(event["rank"], event["phase"]) for event in logged} >= {(0, "read"), (1, "read"), (0, "join"), (1, "plan")}
    assert sum(event["bytes"] for event in logged if event["phase"] == "read") == needed


def test_the_dashboard_shows_metrics_that_there_are() -> None:
    dashboard = json.loads((REPOSITORY / "deploy" / "grafana.json").read_text())
    source = (REPOSITORY / "actors" / "metrics.py").read_text()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = {
                word.partition("{")[0] for word in target["expr"].replace("(", " ").split() if "ray_shardferry" in word
            }
            assert names
            for name in names:
                assert f'"{name.removeprefix("ray_").removesuffix("_total")}"' in source, name
