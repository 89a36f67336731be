"""Codes of quantised state and their scales: a rank gets the same part of both, or an error says why it can't be told."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import shardferry
from shardferry.checkpoint.catalog import SavedTensor
from shardferry.layout.tensor_layout import TensorLayout, replicated, single_box
from shardferry.plan.quantised import QuantisedEntries, part_of_scales
from shardferry.plan.state_of_param import StateOfParam
from shardferry.region import Region
from tests.support.ranks import RankPool

Shape = tuple[int, ...]


# --- which scales a part of codes has --------------------------------------------------------------------------------


@st.composite
def quantised(draw: st.DrawFn) -> tuple[Shape, Shape, Region]:
    """Shapes of codes and scales, and a part of the codes, of whole rows or not."""
    blocks = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    counts = draw(st.lists(st.integers(1, 4), min_size=len(blocks), max_size=len(blocks)))
    codes = tuple(block * count for block, count in zip(blocks, counts, strict=True))
    divisors = [n for n in range(1, math.prod(codes) + 1) if math.prod(codes) % n == 0]
    scales = tuple(counts) if draw(st.booleans()) else (draw(st.sampled_from(divisors)),)
    bounds = [sorted(draw(st.tuples(st.integers(0, size), st.integers(0, size)))) for size in codes]
    if draw(st.booleans()):
        bounds[1:] = [[0, size] for size in codes[1:]]
    part = Region(tuple(start for start, _ in bounds), tuple(stop - start for start, stop in bounds))
    return codes, scales, part


def scale_of_each(codes: Shape, scales: Shape) -> torch.Tensor:
    """For every code, the index of its scale, by brute force."""
    if len(scales) != len(codes):
        return (torch.arange(math.prod(codes)) // (math.prod(codes) // scales[0])).view(codes)
    found = torch.arange(math.prod(scales)).view(scales)
    for dim, (size, num) in enumerate(zip(codes, scales, strict=True)):
        found = found.repeat_interleave(size // num, dim=dim)
    return found


def elements(tensor: torch.Tensor, part: Region) -> torch.Tensor:
    return tensor[tuple(slice(start, stop) for start, stop in zip(part.offsets, part.ends, strict=True))]


@given(quantised())
def test_a_part_has_the_scales_of_its_codes_and_they_have_no_other_codes(case: tuple[Shape, Shape, Region]) -> None:
    codes, scales, part = case
    found = part_of_scales(codes, scales, part)
    by_code = scale_of_each(codes, scales)
    if found is None:
        if len(scales) != len(codes) or not part.numel:
            return
        mine = set(elements(by_code, part).flatten().tolist())
        num_codes = sum(int((by_code == scale).sum()) for scale in mine)
        assert num_codes != part.numel, "it could have been told"
        return
    if not part.numel:
        assert not found.numel
        return
    local = elements(torch.arange(math.prod(scales)).view(scales), found)
    # As the rank that has both parts makes its elements: block by block of its own.
    again = local.flatten()[scale_of_each(part.sizes, found.sizes)]
    assert torch.equal(again, elements(by_code, part))


@pytest.mark.parametrize(
    ("codes", "scales", "part", "found"),
    [
        pytest.param((8, 4), (4,), Region((2, 0), (4, 4)), None, id="as many scales as columns"),
        pytest.param((8, 6), (6,), Region((4, 0), (4, 6)), None, id="by column or in blocks"),
        pytest.param((8, 4), (8,), Region((2, 0), (3, 4)), Region((2,), (3,)), id="by row"),
        pytest.param((8, 4), (16,), Region((1, 0), (2, 4)), Region((2,), (4,)), id="two in a row"),
        pytest.param((8, 4), (2,), Region((4, 0), (4, 4)), Region((1,), (1,)), id="four rows"),
        pytest.param((8, 4), (2,), Region((2, 0), (4, 4)), None, id="within a block"),
        pytest.param((8, 4), (8,), Region((0, 2), (8, 2)), None, id="columns"),
        pytest.param((8, 4), (8, 1), Region((0, 2), (8, 2)), Region((0, 0), (8, 1)), id="columns of a scale a row"),
        pytest.param((8, 4), (3,), Region((0, 0), (4, 4)), None, id="blocks that don't divide"),
        pytest.param((8, 4), (16,), Region((0, 0), (0, 0)), Region((0,), (0,)), id="nothing"),
    ],
)
def test_parts_of_scales(codes: Shape, scales: Shape, part: Region, found: Region | None) -> None:
    assert part_of_scales(codes, scales, part) == found


# --- which entries go together ---------------------------------------------------------------------------------------


def saved(shape: Shape, dtype: torch.dtype = torch.float32, num_chunks: int = 1) -> SavedTensor:
    return SavedTensor("key", shape, dtype, range(num_chunks), 0)


def rows(tensor: SavedTensor, chunk: int) -> Region:
    """Chunks of equally many rows."""
    size = tensor.shape[0] // len(tensor.chunks) if tensor.shape else 0
    return Region((size * chunk, *(0,) * (len(tensor.shape) - 1)), (size, *tensor.shape[1:]))


def matrix(entries: dict[str, SavedTensor]) -> StateOfParam:
    return StateOfParam(entries, (8, 4), frozenset())


# Another parameter, by which an entry is told from a table of what codes stand for.
OTHER = StateOfParam(
    {"codes": saved((4,), torch.uint8), "absmax": saved((1,)), "map": saved((256,))}, (4,), frozenset()
)
CODES, SCALES, TABLE = saved((8, 4), torch.uint8), saved((8,)), saved((256,))
WHOLE, HALF, COLUMNS = (
    replicated((8, 4)),
    single_box((8, 4), Region((4, 0), (4, 4))),
    single_box((8, 4), Region((0, 2), (8, 2))),
)


@pytest.mark.parametrize(
    ("entries", "layout", "found"),
    [
        pytest.param({"codes": CODES, "absmax": SCALES}, HALF, None, id="cut between blocks"),
        pytest.param({"codes": CODES, "absmax": SCALES}, COLUMNS, "absmax", id="cut within blocks"),
        pytest.param({"codes": CODES, "absmax": SCALES}, WHOLE, None, id="whole"),
        pytest.param(
            {"codes": saved((8, 4), torch.int8, 2), "absmax": SCALES}, WHOLE, "absmax", id="saved in two parts"
        ),
        pytest.param({"codes": saved((8, 4), torch.int8, 2), "scale": saved(())}, WHOLE, "scale", id="a scale a rank"),
        pytest.param({"codes": CODES, "scale": saved(())}, COLUMNS, None, id="one scale for all"),
        pytest.param({"codes": CODES, "absmax": saved((8,), num_chunks=2)}, HALF, None, id="sharded scales"),
        pytest.param(
            {"codes": saved((8, 4), torch.int8, 4), "absmax": saved((8,), num_chunks=4)}, HALF, None, id="both sharded"
        ),
        pytest.param(
            {"codes": saved((8, 4), torch.int8, 4), "absmax": saved((8,), num_chunks=2)},
            WHOLE,
            "absmax",
            id="sharded differently",
        ),
        pytest.param(
            {"codes": saved((8, 4), torch.int8, 4), "absmax": saved((2,), num_chunks=2)},
            WHOLE,
            "absmax",
            id="saved within blocks",
        ),
        pytest.param({"codes": CODES, "step": saved((8,))}, HALF, None, id="codes alone"),
        pytest.param({"codes": saved((8, 4), torch.bool), "absmax": SCALES}, COLUMNS, None, id="a mask"),
        pytest.param({"codes": saved((8, 4)), "absmax": SCALES}, COLUMNS, None, id="floats beside a factor"),
        pytest.param({"codes": saved((16,), torch.uint8), "absmax": SCALES}, HALF, "codes", id="two codes a byte"),
        pytest.param({"codes": CODES, "map": TABLE}, COLUMNS, None, id="a table that all parameters share"),
        pytest.param({"codes": CODES, "qmap": saved((16,))}, HALF, "qmap", id="a table or scales"),
    ],
)
def test_what_codes_would_be_cut_from(entries: dict[str, SavedTensor], layout: TensorLayout, found: str | None) -> None:
    quantised = QuantisedEntries({"a": matrix(entries), "b": OTHER}, rows)
    is_packed = entries["codes"].shape == (16,)
    assert quantised.scales_apart("a", "codes", layout, is_param_cut=is_packed) == found


# --- whole loads -----------------------------------------------------------------------------------------------------


class BlockCodes(torch.optim.Optimizer):
    """8-bit codes of the parameter's shape, and a scale for each block of a rank's part: a plain tensor of that part, or a DTensor."""

    def __init__(self, params: Any, block: int, *, as_dtensor: bool) -> None:
        super().__init__(params, {"lr": 0.5})
        self._block, self._as_dtensor = block, as_dtensor

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                codes, (first, local) = torch.zeros_like(p, dtype=torch.uint8), part(p)
                own = codes.to_local() if isinstance(codes, DTensor) else codes
                own.copy_((torch.arange(local) + first).view(own.shape))
                scales = (torch.arange(local // self._block) + first // self._block).float().to(p.device)
                if isinstance(p, DTensor) and self._as_dtensor:
                    scales = DTensor.from_local(scales, p.device_mesh, [Shard(0)])
                self.state[p].update(step=torch.tensor(1.0), codes=codes, absmax=scales)


def part(p: torch.Tensor) -> tuple[int, int]:
    """Of a rank's part: its first element, and how many it has; all have equally many."""
    if not isinstance(p, DTensor):
        return 0, p.numel()
    local = p.numel() // dist.get_world_size()
    return dist.get_rank() * local, local


def live(block: int, *, as_dtensor: bool) -> tuple[nn.Module, BlockCodes]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 12, bias=False))
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, BlockCodes(model.parameters(), block, as_dtensor=as_dtensor)


def save(path: str, block: int, as_dtensor: bool) -> None:
    model, optimizer = live(block, as_dtensor=as_dtensor)
    optimizer.step()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    dcp.save({"optim": {"state": state, "param_groups": [{"lr": 0.5, "params": list(state)}]}}, checkpoint_id=path)


def load(path: str, block: int, as_dtensor: bool, has_stepped: bool) -> str:
    """What the load says, and that it has changed nothing; empty where each rank has its part of both, and says so."""
    model, optimizer = live(block, as_dtensor=as_dtensor)
    if has_stepped:
        optimizer.step()
        for state in optimizer.state.values():
            for name in ("codes", "absmax"):
                state[name].zero_()
    try:
        shardferry.load_optimizer_state(model, optimizer, path)
    except shardferry.ShardferryError as error:
        assert len(optimizer.state) == (2 if has_stepped else 0)
        assert all(not state["codes"].count_nonzero() for state in optimizer.state.values())
        return str(error)
    for p in model.parameters():
        first, local = part(p)
        codes, scales = optimizer.state[p]["codes"], optimizer.state[p]["absmax"]
        assert isinstance(codes, DTensor) == isinstance(p, DTensor)
        own = codes.to_local() if isinstance(codes, DTensor) else codes
        assert torch.equal(own.flatten(), (torch.arange(local) + first).to(torch.uint8))
        assert isinstance(scales, DTensor) == (as_dtensor and isinstance(p, DTensor))
        scales = scales.to_local() if isinstance(scales, DTensor) else scales
        assert torch.equal(scales, (torch.arange(local // block) + first // block).float())
    return ""


@pytest.mark.parametrize("has_stepped", [False, True], ids=["new", "stepped"])
@pytest.mark.parametrize(
    ("saving", "loading", "block", "as_dtensor", "is_right"),
    [
        pytest.param(1, 1, 4, False, True, id="whole"),
        pytest.param(1, 2, 4, False, True, id="cut by the load, plain scales"),
        pytest.param(1, 2, 4, True, True, id="cut by the load, DTensors"),
        pytest.param(1, 3, 16, False, True, id="cut by the load, two rows a block"),
        pytest.param(1, 2, 32, False, False, id="cut by the load, within a block"),
        pytest.param(2, 2, 4, False, False, id="cut by the save, plain scales of one rank"),
        pytest.param(2, 1, 4, False, False, id="joined by the load, plain scales of one rank"),
        pytest.param(2, 2, 4, True, True, id="cut by the save, DTensors"),
        pytest.param(4, 3, 4, True, True, id="cut anew, DTensors"),
        pytest.param(3, 1, 4, True, True, id="joined by the load, DTensors"),
        pytest.param(4, 3, 12, True, False, id="cut anew within a block"),
        pytest.param(4, 3, 24, True, False, id="as many scales for parameters of several sizes"),
    ],
)
def test_codes_and_scales_load_together_or_not_at_all(
    saving: int,
    loading: int,
    block: int,
    as_dtensor: bool,
    is_right: bool,
    has_stepped: bool,
    ranks: RankPool,
    tmp_path: Path,
) -> None:
    ranks.run(saving, partial(save, str(tmp_path / "ckpt"), block, as_dtensor))
    for message in ranks.run(loading, partial(load, str(tmp_path / "ckpt"), block, as_dtensor, has_stepped)):
        if is_right:
            assert message == ""
        else:
            for word in ("weight", "quantised state", "'codes'", "'absmax'", "exclude"):
                assert word in message
