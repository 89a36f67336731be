"""Every way in which stock torch lays a checkpoint down: saved on some ranks, loaded on others, bit for bit."""

from __future__ import annotations

import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

import shardferry
from shardferry.errors import CatalogError, PlanError, UnsafeMetadata
from tests.support.alone import save_alone
from tests.support.damage import edit_metadata
from tests.support.models import (
    SHAPES,
    Model,
    adamw,
    fill_state,
    fsdp2,
    load_fsdp2,
    load_plain,
)
from tests.support.ranks import RankPool

NUM_ELEMENTS = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())


def state_of_fsdp2() -> dict[str, Any]:
    model = fsdp2(Model())
    optimizer = adamw(model)
    fill_state(model, optimizer)
    return {"optim": get_optimizer_state_dict(model, optimizer)}


def save_with(path: str, options: dict[str, Any], saving: dict[str, Any]) -> None:
    dcp.save(state_of_fsdp2(), storage_writer=dcp.FileSystemWriter(path, **options), **saving)


def save_async(path: str) -> None:
    """The save goes on in the background while the optimizer's state changes under it."""
    state = state_of_fsdp2()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of the group that it saves with
        saving = dcp.async_save(state, storage_writer=dcp.FileSystemWriter(path), process_group=dist.new_group())
        for values in state["optim"]["state"].values():
            values["exp_avg"].zero_()
        saving.result()


@pytest.mark.parametrize(
    ("options", "saving", "files"),
    [
        pytest.param({"thread_count": 3}, {}, 3 * 3, id="several files a rank", marks=pytest.mark.conformance(14)),
        pytest.param({"single_file_per_rank": False}, {}, None, id="one file a tensor"),
        pytest.param({}, {"use_collectives": False}, 3, id="metadata of each rank", marks=pytest.mark.conformance(16)),
        pytest.param({"thread_count": 2}, {"use_collectives": False}, 3 * 2, id="both"),
        pytest.param({}, {"planner": dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)}, 3, id="deduplicated"),
    ],
)
def test_each_option_of_the_writer(
    ranks: RankPool, tmp_path: Path, options: dict[str, Any], saving: dict[str, Any], files: int | None
) -> None:
    ranks.run(3, save_with, str(tmp_path), options, saving)
    catalog = shardferry.open_checkpoint(tmp_path)
    assert catalog.problems == ()
    assert len(catalog.files) == len(list(tmp_path.glob("*.distcp")))
    expected = catalog.num_chunks + len(catalog.objects) if files is None else files
    assert len(catalog.files) == expected
    assert sum(ranks.run(2, load_fsdp2, str(tmp_path))) == NUM_ELEMENTS


def test_async_save(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save_async, str(tmp_path))
    assert sum(ranks.run(3, load_fsdp2, str(tmp_path))) == NUM_ELEMENTS


@pytest.fixture
def of_each_rank(ranks: RankPool, tmp_path: Path) -> Path:
    """Three ranks' saves without collectives."""
    ranks.run(3, save_with, str(tmp_path), {}, {"use_collectives": False})
    assert sorted(path.name for path in tmp_path.glob("*.metadata")) == [f"__{rank}.metadata" for rank in range(3)]
    return tmp_path


@pytest.mark.conformance(16)
def test_metadata_of_a_rank_is_missing(of_each_rank: Path) -> None:
    """A gap is seen at once; after the last rank nothing tells, but the plan finds the hole."""
    shutil.copytree(of_each_rank, of_each_rank / "gap")
    (of_each_rank / "gap" / "__1.metadata").unlink()
    says = r"2 ranks wrote metadata of their own, up to __2\.metadata, but that of rank 1 is missing \(1 of 3 are\)"
    with pytest.raises(CatalogError, match=says):
        shardferry.open_checkpoint(of_each_rank / "gap")
    (of_each_rank / "__2.metadata").unlink()
    with pytest.raises(PlanError, match="elements are in no saved chunk"):
        load_plain(of_each_rank)


def of_rank(path: Path, rank: int, edit: Callable[[Metadata], Any]) -> None:
    file = path / f"__{rank}.metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


@pytest.mark.conformance(16)
def test_a_replica_that_one_rank_did_not_store(of_each_rank: Path) -> None:
    """Every rank saved `step` for itself: whichever is stored is taken, and none is a problem."""
    key = "optim.state.even.weight.step"

    def forget(metadata: Metadata) -> None:
        for index in [index for index in metadata.storage_data if index.fqn == key]:
            del metadata.storage_data[index]

    of_rank(of_each_rank, 0, forget)
    catalog = shardferry.open_checkpoint(of_each_rank)
    assert catalog.problems == ()
    (chunk,) = catalog.tensors[key].chunks
    assert catalog.files[catalog.chunk_file[chunk]].startswith("__1_")
    assert load_plain(of_each_rank) == NUM_ELEMENTS


STEP_KEY = "optim.state.even.weight.step"


def another_shape(metadata: Metadata) -> None:
    metadata.state_dict_metadata["optim.state.even.weight.exp_avg"].size = torch.Size((49, 6))


def an_object(metadata: Metadata) -> None:
    objects = [key for key in metadata.state_dict_metadata if "param_groups" in key]
    metadata.state_dict_metadata[STEP_KEY] = metadata.state_dict_metadata[objects[0]]


def another_path(metadata: Metadata) -> None:
    metadata.planner_data[STEP_KEY] = ("optim", "state", "odd.weight", "step")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            another_shape,
            r"__1\.metadata: optim\.state\.even\.weight\.exp_avg: saved as torch\.float32 of shape \(49, 6\)",
        ),
        (an_object, r"__1\.metadata: optim\.state\.even\.weight\.step: saved as an object, by another .* as a tensor"),
        (another_path, r"__1\.metadata: optim\.state\.even\.weight\.step: stood at .*odd\.weight.*even\.weight"),
    ],
)
def test_ranks_that_contradict_each_other(of_each_rank: Path, edit: Callable[[Metadata], Any], says: str) -> None:
    of_rank(of_each_rank, 1, edit)
    with pytest.raises(CatalogError, match=says):
        shardferry.open_checkpoint(of_each_rank)


@pytest.fixture
def saved(saved_by: dict[int, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_by[2], tmp_path / "ckpt"))


@pytest.mark.conformance(9)
def test_without_planner_data(saved: Path) -> None:
    """The paths are then taken from the keys."""
    edit_metadata(saved, lambda metadata: setattr(metadata, "planner_data", None))
    catalog = shardferry.open_checkpoint(saved)
    assert (catalog.paths, catalog.problems) == (None, ())
    assert load_plain(saved) == NUM_ELEMENTS


def unflattened(*, flat: bool) -> dict[str, Any]:
    model = Model()
    optimizer = adamw(model)
    fill_state(model, optimizer)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    return {f"optim.{key}": value for key, value in state.items()} if flat else {"optim": state}


@pytest.mark.conformance(9)
def test_a_planner_that_does_not_flatten(tmp_path: Path) -> None:
    """Tensors are found where the state dict was flat before; else all of it is one pickled object."""
    planner = dcp.DefaultSavePlanner(flatten_state_dict=False)
    save_alone(unflattened(flat=True), tmp_path / "flat", planner=planner)
    assert shardferry.open_checkpoint(tmp_path / "flat").paths is None
    assert load_plain(tmp_path / "flat") == NUM_ELEMENTS
    save_alone(unflattened(flat=False), tmp_path / "nested", planner=planner)
    with pytest.raises(
        PlanError, match=r"'optim' is one Python object, its tensors in it: .* flatten_state_dict=False"
    ):
        load_plain(tmp_path / "nested")


class PlannerData:
    """A class of somebody's own planner."""


def an_array(metadata: Metadata) -> None:
    import numpy as np

    metadata.planner_data["optim"] = np.arange(3)


@pytest.mark.parametrize(
    ("edit", "error", "says"),
    [
        pytest.param(
            lambda m: setattr(m, "planner_data", PlannerData()),
            UnsafeMetadata,
            r"global tests\.core\.checkpoint\.test_writers\.PlannerData, which no known writer .*planner_data of its own by None",
            id="own class",
        ),
        pytest.param(an_array, UnsafeMetadata, r"global numpy\..*nothing was executed", id="numpy"),
        pytest.param(
            lambda m: m.planner_data.update({STEP_KEY: ("optim", 0.5)}),
            CatalogError,
            r"the path \('optim', 0\.5\) for the key .*set planner_data to None",
            id="a path of floats",
        ),
        pytest.param(
            lambda m: m.planner_data.update({7: ("optim",)}),
            CatalogError,
            r"the path \('optim',\) for the key 7, which torch's planners don't write",
            id="integer key",
        ),
        pytest.param(
            lambda m: m.planner_data.update({STEP_KEY: ()}), CatalogError, r"the path \(\) for the key", id="no path"
        ),
        pytest.param(
            lambda m: m.state_dict_metadata.update({7: m.state_dict_metadata[STEP_KEY]}),
            CatalogError,
            r"the key 7 is a int, not a string; save with flatten_state_dict=True",
            id="integer key of a tensor",
        ),
    ],
)
def test_metadata_that_no_known_writer_makes(
    saved: Path, edit: Callable[[Metadata], Any], error: type[Exception], says: str
) -> None:
    edit_metadata(saved, edit)
    with pytest.raises(error, match=re.escape(str(saved)) + r"/\.metadata: .*" + says):
        shardferry.open_checkpoint(saved)


def test_metadata_of_olmo_core(saved: Path) -> None:
    """OLMo-core writes the storage table with a class of its own, by whose name it is known and never imported."""
    data = pickle.dumps(pickle.loads((saved / ".metadata").read_bytes()), protocol=2)  # names in plain text
    name = b"ctorch.distributed.checkpoint.filesystem\n_StorageInfo\n"
    assert name in data
    (saved / ".metadata").write_bytes(
        data.replace(name, b"colmo_core.distributed.checkpoint.filesystem\n_StorageInfo\n")
    )
    assert load_plain(saved) == NUM_ELEMENTS


def test_a_chunk_that_two_ranks_stored(saved_by: dict[int, Path], tmp_path: Path) -> None:
    """Two whole saves in one directory, each with metadata of its own: of equal boxes the first is used."""
    for rank in range(2):
        for file in saved_by[1].glob("*.distcp"):
            (tmp_path / str(rank)).mkdir(exist_ok=True)
            shutil.copy(file, tmp_path / str(rank) / file.name)
        metadata = pickle.loads((saved_by[1] / ".metadata").read_bytes())
        for info in metadata.storage_data.values():
            info.relative_path = f"{rank}/{info.relative_path}"
        (tmp_path / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))
    catalog = shardferry.open_checkpoint(tmp_path)
    assert catalog.problems == ()
    assert {Path(file).parent.name for file in catalog.files} == {"0"}
    assert load_plain(tmp_path) == NUM_ELEMENTS
