"""Where reports go: paths, URLs, standard output; what can't be written is refused before the work."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import fsspec
import obstore
import pytest
import yaml
from obstore.store import S3Store

from shardferry.errors import SpecError, StorageError
from shardferry.pipeline.commands.outputs import Output, options_beside, write_all
from tests.support.commands import Command
from tests.support.s3_server import BUCKET, S3Server


@pytest.fixture
def s3() -> Any:
    from tests.support.s3_server import s3_server

    with s3_server() as server:
        yield server


def output(where: object, **storage_options: Any) -> Output:
    found = Output.of("--report", str(where), storage_options=storage_options)
    assert found is not None
    return found


def test_what_was_not_asked_for() -> None:
    assert Output.of("--report", None, storage_options={}) is None


@pytest.mark.parametrize("form", ["path", "relative path", "file://"])
def test_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], form: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a report.json"
    output({"path": path, "relative path": path.name, "file://": path.as_uri()}[form]).write("{}")
    assert path.read_text() == "{}"
    assert tuple(capsys.readouterr()) == ("", f"report: {path}\n")


def test_a_url_of_fsspec(capsys: pytest.CaptureFixture[str]) -> None:
    url = f"memory://{uuid.uuid4()}/report.json"
    output(url).write("{}")
    assert fsspec.filesystem("memory").cat_file(url) == b"{}"
    assert tuple(capsys.readouterr()) == ("", f"report: {url}\n")
    fsspec.filesystem("memory").rm(url)


def test_a_url_of_s3(s3: S3Server) -> None:
    """With obstore, which is what is installed for reading."""
    output(f"s3://{BUCKET}/runs/7/report.json", **s3.options).write("{}")
    store = S3Store(BUCKET, config=s3.options, client_options={"allow_http": True})
    assert bytes(obstore.get(store, "runs/7/report.json").bytes()) == b"{}"
    with pytest.raises(StorageError, match=r"^--report s3://no-bucket/report\.json: can't be written: "):
        output("s3://no-bucket/report.json", **s3.options).write("{}")


def test_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    output("-").write("{}")
    assert tuple(capsys.readouterr()) == ("{}\n", "")


@pytest.mark.parametrize(
    ("where", "says"),
    [
        ("nowhere/report.json", r"^--report nowhere/report\.json: its directory does not exist; make it first"),
        ("file:///nowhere/report.json", r"its directory does not exist; make it first"),
        (".", r"^--report \.: is a directory; give the path of a file"),
        ("warp://host/report.json", r"^--report warp://host/report\.json: can't be opened: .*warp"),
        ("sftp://host/report.json", r"^--report sftp://host/report\.json: can't be opened: .*paramiko"),
    ],
)
def test_places_that_are_refused(where: str, says: str) -> None:
    with pytest.raises(SpecError, match=says):
        output(where)


def test_one_that_fails_keeps_no_other_from_being_written(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    gone, there = output(tmp_path / "gone" / "report.json"), output(tmp_path / "page.html")
    (tmp_path / "gone").rmdir()
    with pytest.raises(StorageError, match=r"gone/report\.json: can't be written: FileNotFoundError"):
        write_all([(gone, lambda: "1"), (None, lambda: "2"), (there, lambda: "3")])
    assert (tmp_path / "page.html").read_text() == "3"


@pytest.mark.parametrize(
    ("location", "where", "given"),
    [
        ("s3://bucket/ckpt", "s3://other/report.json", True),
        ("s3://bucket/ckpt", "gs://other/report.json", False),
        ("s3://bucket/ckpt", "report.json", False),
        ("/ckpt", "report.json", False),
        (None, "s3://other/report.json", False),
    ],
)
def test_the_checkpoint_s_options_are_for_its_own_kind_of_storage(location: str, where: str, given: bool) -> None:
    options = {"endpoint": "http://minio:9000"}
    assert options_beside(location, options, where) == (options if given else {})


@pytest.fixture
def spec(saved_by: dict[int, Path], tmp_path: Path) -> Path:
    values = {
        "checkpoint": {"location": str(saved_by[2])},
        "topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}},
    }
    (tmp_path / "stage.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "stage.yaml"


@pytest.mark.parametrize("option", ["--report", "--trace", "--html"])
def test_a_missing_directory_is_an_error_before_the_work(shardferry: Command, spec: Path, option: str) -> None:
    spec.write_text(spec.read_text().replace("location:", "location: /not/read/yet #"))
    done = shardferry("run", spec, option, "nowhere/file")
    assert (done.status, done.stdout) == (2, "")
    assert done.stderr == f"error: {option} nowhere/file: its directory does not exist; make it first\n"


def test_only_the_report_can_be_printed(shardferry: Command, spec: Path) -> None:
    done = shardferry("run", spec, "--html", "-")
    assert (done.status, done.stderr) == (
        2,
        "error: --html -: only run --report can be printed; give a path or a URL\n",
    )


def test_the_report_in_a_job_s_log(cluster: None, shardferry: Command, spec: Path) -> None:
    """One line on stdout, and nothing else there; also of a run that fails."""
    done = shardferry("run", spec, "--report", "-")
    assert done.status == 0, done.stderr
    [line] = done.stdout.splitlines()
    report = json.loads(line)
    assert (report["world_size"], report["command"]) == (2, f"shardferry run {spec} --report -")
    done = shardferry("run", spec, "--report", "-", "--location", spec.parent / "nowhere")
    assert done.status == 1
    [line] = done.stdout.splitlines()
    assert "nowhere: no such directory" in json.loads(line)["error"]
    assert json.loads(line)["error_type"] == "CheckpointNotFound"
