"""The command line on the demo's checkpoint: what the design promises to others."""

from __future__ import annotations

import json
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import ray

from tests.support.commands import REPOSITORY, Command, Finished, run_process, without_numbers
from tests.support.leftovers import nothing_left

SPEC = """
checkpoint: {{location: {location}, optimizer_key: optim}}
topology:
  mesh: {{dp: 2, tp: 2}}
  rules:
    - {{match: "*.weight", placements: {{dp: "Shard(0)"}}}}
  default: {{}}
read: {{storage_bandwidth: 1GiB}}
"""


FURTHER_STEPS = 3
SHORT_DEMO = f"""
import sys
from shardferry.pipeline.cli import main
from shardferry.pipeline.demo import story
from tests.support.forked_workers import forked_workers

story.PRETRAINED_STEPS, story.FURTHER_STEPS = 4, {FURTHER_STEPS}
with forked_workers():
    sys.exit(main())
"""

pytestmark = pytest.mark.usefixtures("quick_workers")


@pytest.fixture(scope="module")
def told(quick_workers: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """The demo in fewer steps, run once, in a process of its own: its output, and the checkpoint it kept."""
    directory = tmp_path_factory.mktemp("demo")
    with nothing_left():
        done = run_process("demo", "--directory", directory, python=("-c", SHORT_DEMO), timeout_s=500)
    return done, directory / "checkpoint"


@pytest.fixture(scope="module")
def checkpoint(told: tuple[Finished, Path]) -> Path:
    return told[1]


@pytest.fixture
def spec(checkpoint: Path, tmp_path: Path) -> Path:
    (tmp_path / "stage.yaml").write_text(SPEC.format(location=checkpoint))
    return tmp_path / "stage.yaml"


def json_of(done: Finished) -> dict[str, Any]:
    assert done.status == 0, done.stderr
    return json.loads(done.stdout)


def test_demo_goes_on_with_equal_losses(told: tuple[Finished, Path]) -> None:
    done, _ = told
    assert done.status == 0, done.stdout + done.stderr
    rows = re.findall(r"│ (\d+) +│ +([\d.]+) │ +([\d.]+) │ (\w+) │", done.stdout)
    assert len(rows) == FURTHER_STEPS
    assert all(ours == control and verdict == "equal" for _, ours, control, verdict in rows)
    for line in ("bytes needed", "bytes read", "read amplification", "seconds, read", "losses are equal, bit for bit"):
        assert line in done.stdout


def test_demo_prints_what_its_document_shows(told: tuple[Finished, Path]) -> None:
    """Whatever the numbers are, and but for the borders of tables, which are as wide as the numbers."""
    text = (REPOSITORY / "docs" / "demo.md").read_text(encoding="utf-8")
    shown = text.partition("$ scripts/demo\n")[2].partition("$ scripts/test\n")[0]
    printed = [without_numbers(line) for line in told[0].stdout.splitlines() if line[:1] not in "┏┡└"]
    assert {without_numbers(line) for line in shown.splitlines() if line[:1] not in "┏┡└"} == set(printed)


def test_demo_does_not_overwrite(shardferry: Command, told: tuple[Finished, Path]) -> None:
    done = shardferry("demo", "--directory", told[1].parent)
    assert (done.status, "exists already" in done.stderr) == (2, True)


def test_inspect(shardferry: Command, checkpoint: Path) -> None:
    report = json_of(shardferry("inspect", checkpoint, "--json"))
    assert {"location", "torch_metadata_version", "num_tensors", "num_chunks", "num_files", "total_bytes"} <= set(
        report
    )
    assert report["location"] == str(checkpoint)
    assert report["num_files"] == 4
    assert report["problems"] == []
    assert report["num_tensors"] == len(report["tensors"])
    assert report["num_chunks"] == sum(tensor["num_chunks"] for tensor in report["tensors"])
    assert report["total_bytes"] == sum(tensor["nbytes"] for tensor in report["tensors"])
    (head,) = [t for t in report["tensors"] if t["fqn"] == "optim.state.head.weight.exp_avg"]
    assert {name: head[name] for name in ("shape", "dtype", "num_chunks", "nbytes")} == {
        "shape": [256, 256],
        "dtype": "float32",
        "num_chunks": 4,
        "nbytes": 256 * 256 * 4,
    }
    assert "saved as: " in shardferry("inspect", checkpoint).stdout


def test_plan_and_run_agree_on_the_bytes(spec: Path, tmp_path: Path) -> None:
    """Each in a process of its own, the run on a Ray of its own."""
    plan = json_of(run_process("plan", spec, "--json"))
    with nothing_left():
        options = [f"--{name}={tmp_path / name}" for name in ("report", "trace", "html")]
        done = run_process("run", spec, *options)
    assert done.status == 0, done.stderr
    report = json.loads((tmp_path / "report").read_text())
    for name in ("world_size", "unique_bytes_needed", "read_amplification", "num_requests"):
        assert report[name] == plan[name], name
    assert report["storage_bytes_read"] == plan["storage_bytes_planned"]
    shared = ("rank", "bytes_needed", "bytes_read", "bytes_sent", "bytes_received", "num_requests", "arena_bytes")
    assert [[r[name] for name in shared] for r in report["ranks"]] == [[r[n] for n in shared] for r in plan["ranks"]]
    assert report["lower_bound_s"] > plan["lower_bound_s"] == plan["unique_bytes_needed"] / 2**30
    assert report["ratio_to_lower_bound"] >= 1
    assert set(report["phases"]) >= {"start", "plan", "allocate", "read"}
    events = json.loads((tmp_path / "trace").read_text())["traceEvents"]
    assert {(event["tid"], event["name"]) for event in events} >= {(1_000 * rank, "read") for rank in range(4)}
    assert "rank 3" in (tmp_path / "html").read_text()
    assert "report: " + str(tmp_path / "report") in done.stderr
    assert report["total_s"] > report["phases"]["read"] > 0
    assert re.search(r" at [\d.]+ [kMG]?B/s; [\d.]+ s in all", done.stdout)


def test_plan_of_the_needed_bytes_by_hand(shardferry: Command, spec: Path) -> None:
    """FSDP rows over dp, replicated over tp: each rank of dp needs half of every matrix, and every vector whole.

    Rank 0 reads the hyperparameters too, for all.
    """
    text = spec.read_text()
    spec.write_text(text.replace("read: {", "read: {strategy: cooperative, "))
    plan = json_of(shardferry("plan", spec, "--json"))
    assert plan["world_size"] == 4
    needed = [rank["bytes_needed"] for rank in plan["ranks"]]
    assert needed[0] > needed[1] == needed[2] == needed[3]
    assert plan["unique_bytes_needed"] < plan["storage_bytes_planned"] <= 1.05 * plan["unique_bytes_needed"]
    assert (
        sum(rank["bytes_sent"] for rank in plan["ranks"]) == sum(rank["bytes_received"] for rank in plan["ranks"]) > 0
    )
    spec.write_text(text.replace("read: {", "read: {strategy: direct, "))
    direct = json_of(shardferry("plan", spec, "--json"))
    assert direct["unique_bytes_needed"] == plan["unique_bytes_needed"]
    assert 1.9 * plan["unique_bytes_needed"] <= direct["storage_bytes_planned"] <= 2.1 * plan["unique_bytes_needed"]


def test_verify_reads_everything(shardferry: Command, checkpoint: Path) -> None:
    done = shardferry("verify", checkpoint)
    assert (done.status, "0 problems" in done.stdout) == (0, True)
    report = json_of(shardferry("verify", checkpoint, "--json"))
    assert report["problems"] == []
    assert report["bytes_read"] == sum(path.stat().st_size for path in checkpoint.glob("*.distcp"))


@pytest.mark.conformance(20)
def test_verify_finds_one_flipped_bit(shardferry: Command, checkpoint: Path, tmp_path: Path) -> None:
    spoilt = Path(shutil.copytree(checkpoint, tmp_path / "ckpt"))
    file = spoilt / "__2_0.distcp"
    data = bytearray(file.read_bytes())
    before = zlib.crc32(data)
    data[len(data) * 2 // 3] ^= 1
    assert zlib.crc32(data) != before
    file.write_bytes(data)
    done = shardferry("verify", spoilt)
    assert (done.status, "1 problems" in done.stdout) == (1, True)
    assert re.search(r"item at byte \d+ of __2_0.distcp: .*checksum", done.stdout)


def test_an_address_where_nobody_is(shardferry: Command, spec: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # whatever other tests have started
    done = shardferry("run", spec, "--address", "127.0.0.1:9")
    assert done.status == 2
    assert done.stderr.startswith("error: address '127.0.0.1:9': no Ray cluster answers there")
    assert "Traceback" not in done.stderr


def test_an_embedded_ray_that_does_not_start(
    shardferry: Command, spec: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")  # noqa: TRY002 - as Ray raises it

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", late)
    done = shardferry("run", spec, "--report", tmp_path / "report.json")
    assert done.status == 1
    says = "an embedded Ray did not start: Exception: The current node timed out"
    assert f"error: {says}" in done.stderr
    assert "Traceback" not in done.stderr
    assert says in json.loads((tmp_path / "report.json").read_text())["error"]


COMMANDS = ["inspect", "init", "diff", "plan", "run", "report", "verify", "kept", "demo"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_two_examples_and_the_exit_statuses(shardferry: Command, command: str) -> None:
    done = shardferry(command, "--help")
    assert done.status == 0
    examples = done.stdout.partition("Examples:\n")[2].partition("\n\n")[0].splitlines()
    assert len(examples) == 2
    for example in examples:
        assert f" {command} " in f"{example} "
    assert re.search(r"Exit status: 0 \w+.*; 1 .*; 2 the\s+command", done.stdout, re.DOTALL)


def test_the_help_lists_all_commands(shardferry: Command) -> None:
    done = shardferry("--help")
    assert re.findall(r"^  (\w+)  +[A-Z]", done.stdout, re.MULTILINE) == COMMANDS
    assert "Exit status: 0 done; 1 the work failed" in done.stdout


def test_shell_completion(shardferry: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = shardferry("--show-completion", "bash")
    assert done.status == 0
    assert "complete -o default" in done.stdout


@pytest.mark.parametrize("arguments", [["plan"], ["bogus"], ["run", "stage.yaml", "--bogus"]], ids=" ".join)
def test_wrong_usage(shardferry: Command, arguments: list[str]) -> None:
    done = shardferry(*arguments)
    assert done.status == 2
    assert "Traceback" not in done.stderr
    assert "Usage:" in done.stderr
