"""An optimizer of nobody's library: moments in every kind of dtype, statistics that are square, values that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tests.support.oracle import full_tensor

# State with its parameter's shape, by dtype.
MOMENTS = {
    "exp_avg": torch.float32,
    "master": torch.float64,
    "half": torch.float16,
    "brain": torch.bfloat16,
    "count": torch.int64,
    "mask": torch.bool,
    "small": torch.float8_e4m3fn,
}


def moment(fqn: str, name: str, shape: torch.Size) -> torch.Tensor:
    """The whole tensor of one moment."""
    dtype = MOMENTS[name]
    if dtype is torch.bool:
        return full_tensor(fqn, name, shape, torch.int64) % 2 == 0
    if dtype is torch.float8_e4m3fn:
        return (full_tensor(fqn, name, shape, torch.int64) % 15 + 1).to(torch.float32).to(dtype)
    return full_tensor(fqn, name, shape, dtype)


def statistics(fqn: str, shape: torch.Size) -> list[torch.Tensor]:
    """One square matrix a dimension: of a square parameter they have its own shape."""
    return [full_tensor(fqn, f"statistics{dim}", (size, size)) for dim, size in enumerate(shape)]


class ShampooLike(torch.optim.Optimizer):
    """Makes all of its state in the first step, from the oracle."""

    def __init__(self, named: list[tuple[str, torch.Tensor]], lr: float = 0.5) -> None:
        self._names = {id(parameter): name for name, parameter in named}
        super().__init__([parameter for _, parameter in named], {"lr": lr})

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = self._new_state(self._names[id(parameter)], parameter)

    def _new_state(self, fqn: str, parameter: torch.Tensor) -> dict[str, Any]:
        def like(whole: torch.Tensor) -> torch.Tensor:
            if not isinstance(parameter, DTensor):
                return whole
            # Not every dtype can be scattered; bytes can.
            wide = whole.view(torch.uint8).view(*whole.shape, whole.element_size())
            local = distribute_tensor(wide, parameter.device_mesh, parameter.placements).to_local()
            local = local.contiguous().view(-1).view(whole.dtype).view(parameter.to_local().shape)
            return DTensor.from_local(
                local,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=whole.shape,
                stride=whole.stride(),
            )

        def whole_everywhere(value: torch.Tensor) -> torch.Tensor:
            if not isinstance(parameter, DTensor):
                return value
            mesh = parameter.device_mesh
            return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)

        shape = parameter.shape
        return {
            "step": 3,
            "rank_of_update": "full",
            "statistics": [whole_everywhere(s) for s in statistics(fqn, shape)],
            **{name: like(moment(fqn, name, shape)) for name in MOMENTS},
        }


def check_shampoo(fqn: str, parameter: torch.Tensor, state: dict[str, Any]) -> int:
    """Every element of this rank's state against the oracle; returns how many."""
    assert (state["step"], state["rank_of_update"]) == (3, "full")
    compared = 0
    wanted = ShampooLike([(fqn, parameter)])._new_state(fqn, parameter)
    pairs = [(state[name], wanted[name]) for name in MOMENTS]
    pairs += list(zip(state["statistics"], wanted["statistics"], strict=True))
    for found, expected in pairs:
        assert type(found) is type(expected)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if isinstance(found, DTensor) and isinstance(expected, DTensor):
            assert found.placements == expected.placements
            found, expected = found.to_local(), expected.to_local()
        assert torch.equal(
            found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8)
        )
        compared += found.numel()
    return compared
