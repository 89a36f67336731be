"""A stage whose location is a directory of a pyarrow filesystem, as a ``ray.train.Checkpoint`` is one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import ray
import torch

from shardferry.pipeline import OptimizerLoadStage
from shardferry.schemas import StageConfig
from tests.support.models import SHAPES, STATES
from tests.support.oracle import full_tensor
from tests.support.s3_server import BUCKET, S3Server, s3_server

fs = pytest.importorskip("pyarrow.fs")
pytestmark = pytest.mark.usefixtures("cluster")


class Placed(NamedTuple):
    """The two attributes of Ray Train's class."""

    path: str
    filesystem: Any


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="module")
def on_s3(saved_by: dict[int, Path], s3: S3Server) -> Placed:
    s3.put("run/step-1", {file.name: file.read_bytes() for file in saved_by[2].iterdir()})
    return Placed("run/step-1", fs.SubTreeFileSystem(BUCKET, s3.filesystem()))


@ray.remote(num_cpus=0)
def newest(placed: Placed) -> Placed:
    return placed


@pytest.mark.parametrize("where", ["as it is", "from an upstream task", "local"])
def test_loaders_read_through_its_filesystem(on_s3: Placed, saved_by: dict[int, Path], where: str) -> None:
    """The catalog takes it to the loaders, which are other processes."""
    topology = {"mesh": {"dp": 3}, "default": {"dp": "Shard(0)"}}
    stage = OptimizerLoadStage(StageConfig.model_validate({"topology": topology}))
    local = Placed(saved_by[2].name, fs.SubTreeFileSystem(str(saved_by[2].parent), fs.LocalFileSystem()))
    location: Any = {"as it is": on_s3, "from an upstream task": newest.remote(on_s3), "local": local}[where]
    with stage.run(location=location) as result:
        report = result.report
        assert report.location == (str(saved_by[2]) if where == "local" else f"s3://{BUCKET}/run/step-1")
        assert report.strategy == ("direct" if where == "local" else "cooperative")
        compared = 0
        for handle in result.handles:
            with handle.open() as shard:
                state = shard.state_dict()["state"]
                for fqn, shape in SHAPES.items():
                    for name in STATES:
                        full = full_tensor(fqn, name, shape)
                        for whole, inside in shard.regions(fqn, name):
                            expected = full[tuple(slice(o, e) for o, e in zip(whole.offsets, whole.ends, strict=True))]
                            own = tuple(slice(o, e) for o, e in zip(inside.offsets, inside.ends, strict=True))
                            assert torch.equal(state[fqn][name][own], expected)
                            compared += expected.numel()
    assert compared == 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
