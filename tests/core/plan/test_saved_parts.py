"""State that no rank can be given a part of: one rank's moments under the whole's name, and codes apart from their scales."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardferry
from shardferry.checkpoint.catalog import SavedTensor
from shardferry.plan.saved_parts import StateOfParam, local_part_names, scales_apart
from tests.support.ranks import RankPool

Shape = tuple[int, ...]
BLOCK = 4  # elements of one scale


def saved(shape: Shape, dtype: torch.dtype = torch.float32, num_chunks: int = 1) -> SavedTensor:
    return SavedTensor("key", shape, dtype, range(num_chunks), 0)


def matrix(entries: dict[str, SavedTensor], *parts: Shape) -> StateOfParam:
    return StateOfParam(entries, (8, 4), frozenset(parts))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        pytest.param({"a": matrix({"m": saved((4, 4)), "v": saved((4, 4))}, (4, 4))}, {"m", "v"}, id="one rank's part"),
        pytest.param({"a": matrix({"m": saved((8, 4), num_chunks=2)}, (4, 4))}, set(), id="the whole"),
        pytest.param({"a": matrix({"m": saved((4, 4), num_chunks=2)}, (4, 4))}, set(), id="a sharded factor"),
        pytest.param({"a": matrix({"m": saved((2, 4))}, (4, 4))}, set(), id="a factor of another shape"),
        pytest.param({"a": matrix({"m": saved((4, 4))})}, set(), id="not sharded"),
        pytest.param({"a": matrix({"step": saved((4, 4))}, (4, 4))}, set(), id="step"),
        pytest.param(
            {
                "a": matrix({"m": saved((4, 4))}, (4, 4)),
                "b": StateOfParam({"m": saved((4,), num_chunks=2)}, (4,), frozenset({(2,)})),
            },
            set(),
            id="a factor that happens to have a part's shape",
        ),
        pytest.param(
            {"a": matrix({"m": saved((4, 4))}, (4, 4)), "b": StateOfParam({"m": saved((4,))}, (4,), frozenset())},
            {"m"},
            id="beside a parameter that is not sharded",
        ),
    ],
)
def test_names_of_local_parts(params: dict[str, StateOfParam], names: set[str]) -> None:
    assert local_part_names(params) == names


CODES, SCALES, TABLE = saved((8, 4), torch.uint8), saved((8,)), saved((256,))


@pytest.mark.parametrize(
    ("entries", "is_cut", "found"),
    [
        pytest.param({"codes": CODES, "absmax": SCALES}, True, "absmax", id="cut"),
        pytest.param({"codes": CODES, "absmax": SCALES}, False, None, id="whole"),
        pytest.param(
            {"codes": saved((8, 4), torch.int8, 2), "absmax": SCALES}, False, "absmax", id="saved in two parts"
        ),
        pytest.param({"codes": saved((8, 4), torch.int8, 2), "scale": saved(())}, False, "scale", id="a scale a rank"),
        pytest.param({"codes": CODES, "scale": saved(())}, True, None, id="one scale for all"),
        pytest.param({"codes": CODES, "absmax": saved((8,), num_chunks=2)}, True, None, id="sharded scales"),
        pytest.param({"codes": CODES, "step": saved((8,))}, True, None, id="codes alone"),
        pytest.param({"codes": saved((8, 4), torch.bool), "absmax": SCALES}, True, None, id="a mask"),
        pytest.param({"codes": saved((8, 4)), "absmax": SCALES}, True, None, id="floats beside a factor"),
        pytest.param({"codes": saved((16,), torch.uint8), "absmax": SCALES}, False, "codes", id="two codes a byte"),
    ],
)
def test_codes_apart_from_their_scales(entries: dict[str, SavedTensor], is_cut: bool, found: str | None) -> None:
    params = {"a": matrix(entries)}
    is_packed = entries["codes"].shape == (16,)
    assert scales_apart(params, "a", "codes", is_cut=is_cut, is_param_cut=is_packed) == found


def test_a_table_that_all_parameters_share_is_no_scale() -> None:
    other = StateOfParam({"codes": saved((4,), torch.uint8), "map": TABLE}, (4,), frozenset())
    params = {"a": matrix({"codes": CODES, "map": TABLE}), "b": other}
    assert scales_apart(params, "a", "codes", is_cut=True, is_param_cut=True) is None


# --- whole loads -----------------------------------------------------------------------------------------------------


class BlockCodes(torch.optim.Optimizer):
    """8-bit codes, and a plain scale for each block of a rank's part."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if not self.state[p]:
                    local = p.to_local() if isinstance(p, DTensor) else p
                    codes = torch.zeros_like(p, dtype=torch.uint8)
                    (codes.to_local() if isinstance(codes, DTensor) else codes).copy_(
                        torch.arange(local.numel()).view(local.shape)
                    )
                    scales = torch.arange(local.numel() // BLOCK, dtype=torch.float32, device=p.device)
                    self.state[p].update(step=torch.tensor(1.0), codes=codes, absmax=scales)


class LocalMoments(torch.optim.Optimizer):
    """A plain moment for each rank's part."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                local = p.to_local() if isinstance(p, DTensor) else p
                self.state[p].update(step=torch.tensor(1.0), exp_avg=torch.ones_like(local, requires_grad=False))


def network(*, sharded: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12, bias=False), nn.Linear(12, 12, bias=False))
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),))) if sharded else model


def save(path: str, kind: type[torch.optim.Optimizer], *, sharded: bool, with_weights: bool = False) -> None:
    model = network(sharded=sharded)
    optimizer = kind(model.parameters(), {"lr": 0.5})
    optimizer.step()
    state = {name: optimizer.state[p] for name, p in model.named_parameters()}
    groups = [{"lr": 0.5, "params": list(state)}]
    weights = {"model": model.state_dict()} if with_weights else {}
    dcp.save({"optim": {"state": state, "param_groups": groups}, **weights}, checkpoint_id=path)


def load(path: str, kind: type[torch.optim.Optimizer], *, sharded: bool) -> str:
    """What the load says, and that it has changed nothing; empty where it is right."""
    model = network(sharded=sharded)
    optimizer = kind(model.parameters(), {"lr": 0.5}) if kind is not torch.optim.Adam else kind(model.parameters())
    try:
        shardferry.load_optimizer_state(model, optimizer, path)
    except shardferry.ShardferryError as error:
        assert not optimizer.state
        return str(error)
    for p in model.parameters():
        assert torch.equal(optimizer.state[p]["codes"].flatten(), torch.arange(p.numel(), dtype=torch.uint8))
        assert torch.equal(optimizer.state[p]["absmax"], torch.arange(p.numel() // BLOCK, dtype=torch.float32))
    return ""


def save_codes(path: str, sharded: bool) -> None:
    save(path, BlockCodes, sharded=sharded)


def load_codes(path: str, sharded: bool) -> str:
    return load(path, BlockCodes, sharded=sharded)


@pytest.mark.parametrize(
    ("saved_sharded", "sharded", "is_right"),
    [
        pytest.param(False, False, True, id="whole"),
        pytest.param(False, True, False, id="cut by the load"),
        pytest.param(True, True, False, id="cut by the save"),
        pytest.param(True, False, False, id="joined by the load"),
    ],
)
def test_codes_load_whole_or_not_at_all(
    saved_sharded: bool, sharded: bool, is_right: bool, ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2 if saved_sharded else 1, save_codes, str(tmp_path / "ckpt"), saved_sharded)
    for message in ranks.run(2 if sharded else 1, load_codes, str(tmp_path / "ckpt"), sharded):
        if is_right:
            assert message == ""
        else:
            for part in ("0.weight", "quantised state", "'codes'", "'absmax'", "exclude"):
                assert part in message


def save_moments(path: str, with_weights: bool) -> None:
    save(path, LocalMoments, sharded=True, with_weights=with_weights)


def load_moments(path: str, own: bool, sharded: bool) -> str:
    return load(path, LocalMoments if own else torch.optim.Adam, sharded=sharded)


@pytest.mark.parametrize("own", [pytest.param(True, id="local moments"), pytest.param(False, id="DTensors")])
@pytest.mark.parametrize("with_weights", [True, False])
def test_one_ranks_moments_are_refused_with_both_shapes(
    own: bool, with_weights: bool, ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(2, save_moments, str(tmp_path / "ckpt"), with_weights)
    for size in (1, 2, 3):
        for message in ranks.run(size, load_moments, str(tmp_path / "ckpt"), own, size > 1):
            assert "0.weight" in message
            assert "(6, 8)" in message
            assert "(12, 8)" in message
            if with_weights or size == 2:
                assert "one rank's part" in message
