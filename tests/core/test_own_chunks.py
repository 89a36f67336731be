"""Live tensors that say themselves which chunks they hold: they are asked before their placements are believed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

import shardferry
from shardferry.dcp import load_sharded_optimizer_state_dict
from shardferry.errors import LayoutError
from shardferry.layout.from_tensor import layout_of_tensor
from tests.support.alone import save_alone
from tests.support.oracle import full_tensor
from tests.support.ranks import RankPool

ROWS, COLUMNS = 8, 4
SHAPE = (ROWS, COLUMNS)
STATES = ("exp_avg", "exp_avg_sq")
Spans = Sequence[tuple[int, int]]  # of rows, in the order of the local tensor
HOLDERS: dict[str, Sequence[Spans]] = {  # by rank
    "five and three": [[(0, 5)], [(5, 8)]],
    "exchanged": [[(4, 8)], [(0, 4)]],
    "all on rank 1": [[], [(0, 8)]],
    "as the placements": [[(0, 4)], [(4, 8)]],
    "front and back": [[(6, 8), (0, 2)], [(2, 4), (4, 6)]],
}


def held(name: str) -> Spans:
    return HOLDERS[name][dist.get_rank()]


def rows_of(whole: torch.Tensor, spans: Spans) -> torch.Tensor:
    return torch.cat([whole[:0], *(whole[start:stop] for start, stop in spans)])


def say_chunks(local: Any, spans: Spans) -> None:
    """Attributes of the object, as Megatron sets them."""
    chunks = [ChunkStorageMetadata(torch.Size((a, 0)), torch.Size((b - a, COLUMNS))) for a, b in spans]

    def shard(index: MetadataIndex) -> torch.Tensor:
        before = sum(b - a for a, b in spans[: index.index])
        return local[before : before + chunks[index.index or 0].sizes[0]]

    local.__create_chunk_list__ = lambda: chunks
    local.__get_tensor_shard__ = shard


def tensor_of(tensor: Any) -> Any:
    """The local tensor itself, which users of this protocol reach for."""
    return tensor._local_tensor


class Net(nn.Module):
    """One parameter of the rows that this rank holds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        local = rows_of(torch.zeros(SHAPE), held(name))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        tensor = DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size(SHAPE), stride=(COLUMNS, 1)
        )
        self.w = nn.Parameter(tensor)
        say_chunks(tensor_of(self.w), held(name))

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        self.w.grad = torch.ones_like(self.w)
        optimizer.step()


def save(path: Path, **more: torch.Tensor) -> str:
    """From one process, plainly."""
    state = {name: full_tensor("w", name, SHAPE) for name in STATES}
    defaults = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    group = {**defaults, "lr": 0.5, "params": ["w"]}
    optim = {"state": {"w": {"step": torch.tensor(3.0), **state, **more}}, "param_groups": [group]}
    save_alone({"optim": optim, "model": {"w": full_tensor("w", "weight", SHAPE)}}, path / "ckpt")
    return str(path / "ckpt")


def load(name: str, path: str, has_stepped: bool) -> None:
    net = Net(name)
    optimizer = torch.optim.AdamW(net.parameters(), foreach=False)
    if has_stepped:
        net.step(optimizer)
    shardferry.load_optimizer_state(net, optimizer, path, model_key="model")
    found: dict[str, Any] = optimizer.state[net.w]
    expected = {key: rows_of(full_tensor("w", key, SHAPE), held(name)) for key in STATES}
    for key in STATES:
        assert isinstance(found[key], DTensor)
        assert found[key].placements == net.w.placements
        assert torch.equal(found[key].to_local(), expected[key]), key
    plain = nn.Parameter(rows_of(full_tensor("w", "weight", SHAPE), held(name)))
    with torch.no_grad():
        assert torch.equal(net.w.to_local(), plain)
    control = torch.optim.AdamW([plain], lr=0.5, foreach=False)
    control.state[plain] = {"step": torch.tensor(3.0), **expected}
    net.step(optimizer)
    plain.grad = torch.ones_like(plain)
    control.step()
    with torch.no_grad():
        assert torch.equal(net.w.to_local(), plain)


@pytest.mark.parametrize("has_stepped", [False, True], ids=["before-a-step", "after-a-step"])
@pytest.mark.parametrize("name", HOLDERS)
def test_a_dtensors_own_chunks_are_believed(ranks: RankPool, tmp_path: Path, name: str, has_stepped: bool) -> None:
    ranks.run(2, load, name, save(tmp_path), has_stepped)


def load_as_torch_does(name: str, path: str) -> None:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

    for planner in ({}, {"planner": DefaultLoadPlanner()}):
        found = load_sharded_optimizer_state_dict(
            {"w": Net(name).w}, optimizer_key="optim", storage_reader=FileSystemReader(path), **planner
        )
        expected = rows_of(full_tensor("w", "exp_avg", SHAPE), held(name))
        moment = found["optim"]["state"]["w"]["exp_avg"]
        local = moment.to_local() if isinstance(moment, DTensor) else moment.local_tensor()
        assert torch.equal(local, expected), planner


def test_the_replacement_of_torchs_module_believes_them_too(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, load_as_torch_does, "exchanged", save(tmp_path))


class Factored(torch.optim.AdamW):
    """Has one number a row beside its moments, sharded as the rows are."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        done = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("row", self._per_row(p))
        return done

    @staticmethod
    def _per_row(p: DTensor) -> DTensor:
        local = torch.zeros(p.to_local().shape[0])
        return DTensor.from_local(
            local, p.device_mesh, p.placements, run_check=False, shape=torch.Size((ROWS,)), stride=(1,)
        )


def load_factors(name: str, path: str) -> str:
    net = Net(name)
    optimizer = Factored(net.parameters(), foreach=False)
    net.step(optimizer)
    before = {key: value.clone() for key, value in optimizer.state[net.w].items()}
    try:
        shardferry.load_optimizer_state(net, optimizer, path)
    except LayoutError as error:
        assert all(torch.equal(before[k].to_local(), optimizer.state[net.w][k].to_local()) for k in (*STATES, "row"))
        return str(error)
    found = optimizer.state[net.w]["row"].to_local()
    assert torch.equal(found, rows_of(torch.arange(ROWS).float(), held(name)))
    return ""


def test_factors_of_such_a_parameter_are_refused_unless_its_placements_are_right(
    ranks: RankPool, tmp_path: Path
) -> None:
    path = save(tmp_path, row=torch.arange(ROWS).float())
    assert ranks.run(2, load_factors, "as the placements", path) == ["", ""]
    for message in ranks.run(2, load_factors, "exchanged", path):
        assert "w: 'row': the parameter's own __create_chunk_list__ contradicts its placements" in message


class Rows(torch.Tensor):
    """A plain tensor of some rows of a whole one."""

    spans: Spans
    whole: tuple[int, ...] = SHAPE

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size((a, 0)), torch.Size((b - a, COLUMNS))) for a, b in self.spans]

    def __create_write_items__(self, fqn: str, _: Any) -> list[Any]:
        from torch.distributed.checkpoint.metadata import TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties(), torch.Size(self.whole)),
            )
            for chunk in self.__create_chunk_list__()
        ]


def rows(number: int, spans: Spans) -> Rows:
    tensor = torch.zeros(number, COLUMNS).as_subclass(Rows)
    tensor.spans = spans
    return tensor


def test_a_plain_tensor_subclass_is_asked() -> None:
    layout = layout_of_tensor(rows(3, [(5, 8)]), name="w")
    assert (layout.global_shape, layout.local_shape) == (SHAPE, (3, COLUMNS))
    assert [box.region.offsets for box in layout.boxes] == [(5, 0)]


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        pytest.param(rows(3, [(6, 9)]), r"w: .*has the chunk \[6:9, 0:4\], which is not in \(8, 4\)", id="outside"),
        pytest.param(
            rows(4, [(0, 3)]), r"w: .*chunk \[0:3, 0:4\], and the local tensor has the shape \(4, 4\)", id="part"
        ),
        pytest.param(rows(4, [(0, 2), (6, 8)]), r"w: .*must be told by __get_tensor_shard__", id="unplaced"),
        pytest.param(rows(4, [(0, 0)]), r"w: .*has 0 elements in 0 chunks, but the local tensor", id="none"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(tensor: Rows, message: str) -> None:
    with pytest.raises(LayoutError, match=message):
        layout_of_tensor(tensor, name="w")


def layouts_of_plain_dtensors() -> None:
    """DTensor always has the method: it counts for nothing."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    kinds: list[list[Placement]] = [[Shard(0)], [Shard(1)], [Replicate()]]
    for placements in kinds:
        tensor = torch.distributed.tensor.distribute_tensor(torch.zeros(SHAPE), mesh, placements)
        assert layout_of_tensor(tensor, name="w").placements == tuple(placements)


def test_a_dtensor_without_own_chunks_has_its_placements(ranks: RankPool) -> None:
    ranks.run(2, layouts_of_plain_dtensors)
