"""As a Ray job, on a head node that has nothing of ours installed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

import shardferry.actors
import shardferry.pipeline
import shardferry.schemas
from tests.support import one_identity
from tests.support.bare import bare_environment
from tests.support.commands import REPOSITORY
from tests.support.leftovers import nothing_left


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """The environment of a ``python`` that has Ray and torch, but not us."""
    environment = bare_environment(tmp_path)
    probe = "import ray, importlib.util; assert not any(map(importlib.util.find_spec, ['pipeline', 'shardferry']))"
    subprocess.run(["python", "-c", probe], cwd=tmp_path, env=environment, check=True)
    return environment


@pytest.fixture
def head_node(bare: dict[str, str], tmp_path: Path) -> Iterator[str]:
    """A bare head node with two logical GPUs, started in an empty directory; yields its jobs address."""
    ports = {
        name: _free_port()
        for name in ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")
    }
    temporary = Path(f"/tmp/sf-job-{os.getpid()}")
    command = ["python", "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--temp-dir={temporary}"]
    command += ["--num-gpus=2", "--num-cpus=6", "--include-dashboard=true", "--disable-usage-stats"]
    command += [f"--{name}={port}" for name, port in ports.items()]
    log = (tmp_path / "head.log").open("w")
    with nothing_left():
        process = subprocess.Popen(command, cwd=tmp_path, env=bare, stdout=log, stderr=log)
        try:
            _wait_for_port(ports["dashboard-port"], process)
            yield f"http://127.0.0.1:{ports['dashboard-port']}"
        finally:
            process.terminate()
            process.wait(90)
            log.close()
            shutil.rmtree(temporary, ignore_errors=True)


def _free_port() -> int:
    """Above the ports that Ray gives to its workers."""
    for port in range(20100 + os.getpid() % 2000, 32000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) != 0 and port not in _taken:
                _taken.add(port)
                return port
    raise AssertionError("no free port")


_taken: set[int] = set()


def _wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the head node is not up (exit status {process.poll()})")


def submit(address: str, directory: Path, spec: str, report: Path) -> subprocess.CompletedProcess[str]:
    """A job that first looks whether our classes exist once, then runs the stage."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", f"--address={address}", "--working-dir=."]
    command += ["--", "sh", "-c"]
    command += [f"python one_identity.py && exec python -m pipeline run {spec} --report {report}"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=550)


@pytest.mark.timeout(1200)  # two jobs, on a machine that may be busy
def test_job_on_a_bare_head_node(head_node: str, saved_by: dict[int, Path], tmp_path: Path) -> None:
    """The working directory brings all of our code; good spec and bad spec, exit status and report."""
    directory = tmp_path / "job"
    directory.mkdir()
    for package in ("pipeline", "actors", "schemas", "shardferry"):
        shutil.copytree(
            REPOSITORY / package, directory / package, symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
        )
    assert (directory / "shardferry" / "pipeline").readlink() == Path("../pipeline")
    shutil.copy(REPOSITORY / ".rayignore", directory)
    with (directory / ".rayignore").open("a") as file:
        file.write("!/one_identity.py\n")
    shutil.copy(one_identity.__file__, directory)
    spec = {
        "checkpoint": {"location": str(saved_by[4])},
        "topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}},
    }
    (directory / "stage.yaml").write_text(yaml.safe_dump(spec))
    (directory / "bad.yaml").write_text(yaml.safe_dump({**spec, "topology": {"mesh": {"dp": 3}}}))

    done = submit(head_node, directory, "stage.yaml", tmp_path / "report.json")
    assert done.returncode == 0, done.stdout + done.stderr
    num_names = sum(len(getattr(shardferry, name).__all__) for name in one_identity.FOLDERS)
    assert f"{num_names} names are the same" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["world_size"] == 2
    assert report["storage_bytes_read"] == sum(rank["bytes_read"] for rank in report["ranks"])
    assert sorted(rank["gpu_ids"] for rank in report["ranks"]) == [["0"], ["1"]]

    failed = submit(head_node, directory, "bad.yaml", tmp_path / "none.json")
    assert failed.returncode == 1
    assert "3 ranks need 3 GPUs, the cluster has 2" in failed.stdout + failed.stderr
    assert not (tmp_path / "none.json").exists()
