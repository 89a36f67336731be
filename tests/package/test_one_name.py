"""The package under its one name, beside packages that are called as folders of ours are."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from textwrap import dedent

import pytest
import ray

import shardferry.actors
import shardferry.pipeline
import shardferry.schemas
from tests.support import one_identity
from tests.support.bare import bare_environment
from tests.support.commands import REPOSITORY

PACKAGES = {
    "pipeline": "STEPS = ['load', 'train']",
    "schemas": "VERSION = 7",
    "actors": """
        import sys

        import pipeline
        import schemas
        import shardferry


        class Reader:
            def where(self):
                named = (shardferry, pipeline, schemas, sys.modules["actors"])
                return {module.__name__: module.__file__ for module in named}

            def rows(self, handle):
                with handle.open() as shard:
                    return shard.state_dict()["state"]["weight"]["exp_avg"].clone()
    """,
}
DRIVER = """
    import json
    import sys

    import ray
    import torch
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    import actors
    import one_identity
    import pipeline
    import schemas
    from shardferry.pipeline import OptimizerLoadStage
    from shardferry.schemas import StageConfig

    address, path, checkpoint, report = sys.argv[1:]
    model = torch.nn.Linear(6, 10, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    dcp.save({"optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=checkpoint, no_dist=True)

    spec = {
        "checkpoint": {"location": checkpoint},
        "topology": {"mesh": {"dp": 2}, "default": {"dp": "Shard(0)"}},
        "actors": {"device": "cpu", "gpus_per_actor": 0},
    }
    environment = {"working_dir": ".", "env_vars": {"PYTHONPATH": path}}
    ray.init(address=address, runtime_env=environment, log_to_driver=False)
    reader = ray.remote(num_cpus=0)(actors.Reader).remote()
    with OptimizerLoadStage(StageConfig.from_values(spec, source="driver.py")).run() as result:
        rows = torch.cat([ray.get(reader.rows.remote(handle)) for handle in result.handles])
    found = {
        "identity": one_identity.check(),
        "where": ray.get(reader.where.remote()),
        "steps": pipeline.STEPS,
        "version": schemas.VERSION,
        "equal": torch.equal(rows, optimizer.state[model.weight]["exp_avg"]),
        "world_size": result.report.world_size,
    }
    with open(report, "w") as file:
        json.dump(found, file)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Somebody's folder: a driver, and packages of the names ``pipeline``, ``schemas`` and ``actors``."""
    folder = tmp_path / "project"
    for name, text in PACKAGES.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(dedent(text))
    (folder / "driver.py").write_text(dedent(DRIVER))
    (folder / "one_identity.py").write_text(Path(one_identity.__file__).read_text())
    return folder


@pytest.mark.usefixtures("cluster")
def test_beside_packages_of_the_same_names(project: Path, installed: Path, tmp_path: Path) -> None:
    """The stage runs in their driver, and their classes in its workers; nobody gets the other's package."""
    address = ray.get_runtime_context().gcs_address
    environment = bare_environment(tmp_path, installed)
    command = ["python", "driver.py", address, environment["PYTHONPATH"]]
    command += [str(tmp_path / "checkpoint"), str(tmp_path / "found.json")]
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr

    found = json.loads((tmp_path / "found.json").read_text())
    where = {name: Path(file) for name, file in found.pop("where").items()}
    assert where.pop("shardferry") == installed / "shardferry" / "__init__.py"
    for name, file in where.items():
        assert file.parts[-2:] == (name, "__init__.py")
        assert file.parent.parent.name.startswith("_ray_pkg_"), "in the working directory that Ray has unpacked"
    num_names = sum(len(getattr(shardferry, name).__all__) for name in one_identity.FOLDERS)
    assert found == {
        "identity": f"{num_names} names are ours alone",
        "steps": ["load", "train"],
        "version": 7,
        "equal": True,
        "world_size": 2,
    }


def test_one_identity_in_the_repository() -> None:
    """Here ``pipeline``, ``schemas`` and ``actors`` are our own folders, by their short names."""
    import actors
    import pipeline
    import schemas

    assert Path(pipeline.__file__).parent == REPOSITORY / "pipeline"
    assert pipeline.OptimizerLoadStage is shardferry.pipeline.OptimizerLoadStage
    assert schemas.StageConfig is shardferry.schemas.StageConfig
    assert actors.LoaderGroup is shardferry.actors.LoaderGroup
    num_names = sum(len(getattr(shardferry, name).__all__) for name in one_identity.FOLDERS)
    assert one_identity.check() == f"{num_names} names are the same"
