"""Tensors of classes of their own, shorter than their elements: whole ones load where their class is allowed, parts are refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import shardferry
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.hold_live import hold
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadJob, load_rank
from shardferry.optimizer.parts import live_parts
from shardferry.plan.planner import plan_load
from tests.support.ranks import RankPool

CLASS = f"{__name__}.LowBit"


class LowBit(torch.Tensor):
    """Codes and a scale a row, as torchao's optimizers keep their moments."""

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> LowBit:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=dtype, device=codes.device)

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
        return ["codes", "scale"], []

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], context: Any, size: Any, stride: Any) -> LowBit:
        return cls(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any, kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default):  # of the same shape
            return cls(args[0].codes, args[0].scale)
        if func is torch.ops.aten._to_copy.default:
            device, dtype = kwargs.get("device"), kwargs.get("dtype") or args[0].dtype
            return cls(args[0].codes.to(device), args[0].scale.to(device), dtype)
        if func is torch.ops.aten.copy_.default:
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        if func is torch.ops.aten.is_pinned.default:
            return False
        raise NotImplementedError(func)  # no clone and no equal, as torchao's


class LowBitMomentum(torch.optim.Optimizer):
    """Its moments are of the class, DTensors of it where the parameters are DTensors; their codes tell where they belong.

    Args:
        rows: that share a scale.
        plain: parts with so many rows are plain tensors.
    """

    def __init__(self, params: Any, rows: int = 1, plain: int = 0) -> None:
        super().__init__(params, {"lr": 0.5})
        self.rows, self.plain = rows, plain

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            if self.state[p]:
                continue
            local = p.to_local() if isinstance(p, DTensor) else p
            codes, scale = torch.zeros(local.shape, dtype=torch.int8), torch.zeros(local.shape[0] // self.rows)
            moment = torch.zeros(local.shape) if len(local) == self.plain else LowBit(codes, scale, p.dtype)
            if isinstance(p, DTensor):
                moment = DTensor.from_local(
                    moment, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
            self.state[p].update(step=torch.tensor(0.0), exp_avg=moment)


def live(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[nn.Module, LowBitMomentum]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96, bias=False), nn.Linear(96, 64, bias=False)).to(dtype)
    if dist.get_world_size() > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model, LowBitMomentum(model.parameters(), **options)


def inner(moment: torch.Tensor) -> LowBit:
    local = moment.to_local() if isinstance(moment, DTensor) else moment
    assert isinstance(local, LowBit)
    return local


def content(shape: torch.Size, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of one rank's part of the parameter at a position."""
    generator = torch.Generator().manual_seed(100 * position + dist.get_rank())
    return torch.randint(-128, 128, shape, generator=generator).to(torch.int8), torch.rand(
        shape[0], generator=generator
    )


def save(path: str, dtype: torch.dtype = torch.float32) -> None:
    model, optimizer = live(dtype)
    optimizer.step()
    for position, state in enumerate(optimizer.state.values()):
        low_bit = inner(state["exp_avg"])
        codes, scale = content(low_bit.shape, position)
        low_bit.codes.copy_(codes)
        low_bit.scale.copy_(scale)
        state["step"].fill_(7)
    state_of = {name: optimizer.state[p] for name, p in model.named_parameters()}
    dcp.save(
        {"optim": {"state": state_of, "param_groups": [{"lr": 0.25, "params": list(state_of)}]}}, checkpoint_id=path
    )


def load(
    path: str,
    has_stepped: bool,
    allowed: bool,
    keys: str = "strict",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> str:
    """What the load says, and that it has changed nothing; empty where each rank has what it saved."""
    model, optimizer = live(dtype, **options)
    if has_stepped:
        optimizer.step()
    before = {p: state["exp_avg"] for p, state in optimizer.state.items()}
    try:
        shardferry.load_optimizer_state(
            model,
            optimizer,
            path,
            keys=keys,
            safe_globals=[CLASS] if allowed else [],  # type: ignore[arg-type]
        )
    except shardferry.ShardferryError as error:
        assert len(optimizer.state) == len(before)
        assert not any(inner(moment).codes.count_nonzero() for moment in before.values() if not options)
        assert optimizer.param_groups[0]["lr"] == 0.5
        return str(error)
    for position, p in enumerate(model.parameters()):
        moment = optimizer.state[p]["exp_avg"]
        assert isinstance(moment, DTensor) == isinstance(p, DTensor)
        codes, scale = content(inner(moment).shape, position)
        assert torch.equal(inner(moment).codes, codes)
        assert torch.equal(inner(moment).scale, scale)
        assert not has_stepped or options or moment is before[p], "filled in place"
        assert float(optimizer.state[p]["step"]) == 7
    assert optimizer.param_groups[0]["lr"] == 0.25
    return ""


@pytest.mark.parametrize("has_stepped", [False, True], ids=["new", "stepped"])
@pytest.mark.parametrize("world_size", [1, 2])
def test_whole_ones_load_in_the_topology_of_the_save(
    world_size: int, has_stepped: bool, ranks: RankPool, tmp_path: Path
) -> None:
    ranks.run(world_size, save, str(tmp_path / "ckpt"))
    assert set(ranks.run(world_size, partial(load, str(tmp_path / "ckpt"), has_stepped, True))) == {""}


@pytest.mark.parametrize("has_stepped", [False, True], ids=["new", "stepped"])
def test_parameters_of_another_dtype_change_no_codes(has_stepped: bool, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, partial(save, dtype=torch.bfloat16), str(tmp_path / "ckpt"))
    assert ranks.run(1, partial(load, str(tmp_path / "ckpt"), has_stepped, True, dtype=torch.bfloat16)) == [""]


def test_live_state_with_other_blocks_is_replaced(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path / "ckpt"))
    assert set(ranks.run(2, partial(load, str(tmp_path / "ckpt"), True, True, rows=2))) == {""}


@pytest.mark.parametrize("has_stepped", [False, True], ids=["new", "stepped"])
def test_plain_state_does_not_take_codes(has_stepped: bool, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path / "ckpt"))
    for message in ranks.run(2, partial(load_into_plain, str(tmp_path / "ckpt"), has_stepped)):
        for word in ("0.weight", "quantised state", "'exp_avg'", "LowBit", "Tensor", "nothing was changed"):
            assert word in message


def load_into_plain(path: str, has_stepped: bool) -> str:
    model, optimizer = live(plain=48)  # all rows of the first parameter's parts
    if has_stepped:
        optimizer.step()
    with pytest.raises(shardferry.ShardferryError) as caught:
        shardferry.load_optimizer_state(model, optimizer, path, safe_globals=[CLASS])
    assert bool(optimizer.state) == has_stepped
    assert optimizer.param_groups[0]["lr"] == 0.5
    return str(caught.value)


def save_uneven(path: str, plain: int) -> str:
    """Save parts of 49 and 48 rows, of which one is plain, and load them again."""
    torch.manual_seed(0)
    optimizers = []
    for _ in range(2):
        model = nn.Sequential(nn.Linear(64, 97, bias=False))
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        optimizers.append((model, LowBitMomentum(model.parameters(), plain=plain)))
    (_, saved), (other, loaded) = optimizers
    saved.step()
    (state,) = saved.state.values()
    moment = state["exp_avg"].to_local()
    (moment.codes if isinstance(moment, LowBit) else moment).fill_(3 + dist.get_rank())
    dcp.save(
        {"optim": {"state": {"0.weight": state}, "param_groups": [{"lr": 0.25, "params": ["0.weight"]}]}},
        checkpoint_id=path,
    )
    shardferry.load_optimizer_state(other, loaded, path, safe_globals=[CLASS])
    (state,) = loaded.state.values()
    there = state["exp_avg"].to_local()
    assert type(there) is type(moment)
    assert torch.equal(*(one.codes if isinstance(one, LowBit) else one for one in (there, moment)))
    return type(there).__name__


@pytest.mark.parametrize(("plain", "names"), [(49, ["Tensor", "LowBit"]), (48, ["LowBit", "Tensor"])])
def test_parts_that_a_class_leaves_plain_load_beside_others(
    plain: int, names: list[str], ranks: RankPool, tmp_path: Path
) -> None:
    assert ranks.run(2, save_uneven, str(tmp_path / "ckpt"), plain) == names


def hold_it() -> str:
    model, optimizer = live()
    optimizer.step()
    (part,) = live_parts(model, optimizer)
    with pytest.raises(shardferry.ShardferryError) as caught:
        hold(part.live, LoadRequest(), world_rank=dist.get_rank(), world_size=dist.get_world_size())
    return str(caught.value)


def test_live_trainers_are_no_source_of_it(ranks: RankPool) -> None:
    for message in ranks.run(2, hold_it):
        for word in ("0.weight", "quantised state", "exp_avg", "LowBit"):
            assert word in message


def test_state_dicts_have_it_sharded_as_its_parameter(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path / "ckpt"))
    assert ranks.run(2, in_state_dict, str(tmp_path / "ckpt")) == [True, True]


def in_state_dict(path: str) -> bool:
    rank, mesh = dist.get_rank(), Mesh((("dp", 2),))
    catalog = shardferry.open_checkpoint(path)
    job = LoadJob(
        catalog,
        SpecLayout(mesh, (), {"dp": Shard(0)}).rank(rank),
        LoadRequest(safe_globals=(CLASS,)),
        torch.device("cpu"),
        ReadOptions(),
    )
    loaded = load_rank(job, Agreement(dist.group.WORLD)).state()
    moment = loaded.state_dict(init_device_mesh("cpu", (2,), mesh_dim_names=("dp",)))["state"]["0.weight"]["exp_avg"]
    codes, _ = content(torch.Size((48, 64)), 0)
    assert loaded.global_shape("0.weight", "exp_avg") == (96, 64)
    return tuple(moment.shape) == (96, 64) and torch.equal(inner(moment).codes, codes)


@pytest.mark.parametrize(("saving", "loading"), [(1, 2), (2, 1), (2, 3)])
def test_parts_are_refused_before_anything_is_read(saving: int, loading: int, ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(saving, save, str(tmp_path / "ckpt"))
    for message in ranks.run(loading, partial(load, str(tmp_path / "ckpt"), True, True)):
        for word in ("0.weight", "quantised state", "'exp_avg'", f"in {saving} chunks", "(96, 64)", "exclude"):
            assert word in message


def test_a_class_that_is_not_allowed_is_named(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(1, save, str(tmp_path / "ckpt"))
    (message,) = ranks.run(1, partial(load, str(tmp_path / "ckpt"), False, False))
    for word in ("0.weight", "quantised state", "'exp_avg'", CLASS, "safe_globals", "exclude", "dequantised"):
        assert word in message
    assert "damaged" not in message


def test_each_rank_plans_the_chunk_that_is_its_own(ranks: RankPool, tmp_path: Path) -> None:
    ranks.run(2, save, str(tmp_path / "ckpt"))
    catalog, spec = shardferry.open_checkpoint(tmp_path / "ckpt"), SpecLayout(Mesh((("dp", 2),)), (), {"dp": Shard(0)})
    plan = plan_load(catalog, spec.rank(1), LoadRequest())
    chunks = [tensor.chunk for tensor in plan.tensors if tensor.name == "exp_avg"]
    assert len(chunks) == 2
    assert None not in chunks
