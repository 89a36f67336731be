"""One model that every topology wraps, whose weights say which element of which parameter they are.

A weight is the number of its element, so that whatever a wrapper does to a model (cuts it, flattens it, pads it), each
element found in a rank's memory tells where it comes from, and which state belongs to it. No layout has to be trusted.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Mapping
from functools import cache

import torch
from torch import nn

from tests.support.oracle import full_tensor

NUM_LAYERS = 3
NUM_EXPERTS = 5  # two or four ranks can't share them evenly
STEP = 7.0
STATES = ("exp_avg", "exp_avg_sq")
HYPERPARAMETERS = ({"lr": 0.125, "weight_decay": 0.5}, {"lr": 0.25, "weight_decay": 0.0})
OTHERS = ({"lr": 9.0, "weight_decay": 9.0}, {"lr": 8.0, "weight_decay": 8.0})


class Bundle(nn.Module):
    """A module that is only parameters, by name and shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype)))


class Block(nn.Module):
    """A layer with a perceptron, a norm, experts in one stack, and experts that are modules of their own."""

    def __init__(self, experts: Iterable[int] = range(NUM_EXPERTS)) -> None:
        super().__init__()
        self.up = nn.Linear(6, 14)
        self.down = nn.Linear(14, 6)
        self.norm = nn.LayerNorm(6)
        self.stack = Bundle({"w1": (NUM_EXPERTS, 3, 4)})
        self.expert = nn.ModuleDict({str(number): nn.Linear(3, 5, bias=False) for number in experts})


class Network(nn.Module):
    """Three layers, and parameters that are hard to cut.

    Args:
        layers: those that are here; a pipeline's stage has some. The embedding is with the first, the rest with the last.
        experts: those that are here, of each layer.
        without: FQNs to leave out, of parameters that a wrapper or a checkpoint can't have.
    """

    def __init__(
        self,
        layers: Collection[int] = range(NUM_LAYERS),
        experts: Iterable[int] = range(NUM_EXPERTS),
        without: Collection[str] = (),
    ) -> None:
        super().__init__()
        if 0 in layers:
            self.embed = nn.Embedding(13, 6)
        self.layers = nn.ModuleDict({str(layer): Block(experts) for layer in layers})
        if NUM_LAYERS - 1 in layers:
            self.norm = nn.LayerNorm(6)
            self.odds = Bundle({"five": (5, 3), "one": (1,), "none": (0, 4), "seven": (7, 11), "cube": (3, 4, 5)})
            self.bf16 = Bundle({"weight": (7, 5)}, torch.bfloat16)
            self.scale = Bundle({"weight": ()})
        for fqn in without:
            owner, _, name = fqn.rpartition(".")
            if owner in dict(self.named_modules()):
                delattr(self.get_submodule(owner), name)


def numbered(network: Network) -> Network:
    """The same network; each weight is the number of its element."""
    with torch.no_grad():
        for fqn, parameter in network.named_parameters():
            parameter.copy_(numbers_of(fqn))
    return network


@cache
def parameters() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of all parameters by FQN; the bf16 one first, whose numbers must be small."""
    with torch.device("meta"):
        found = [(fqn, (tuple(p.shape), p.dtype)) for fqn, p in Network().named_parameters()]
    return dict(sorted(found, key=lambda item: item[1][1] != torch.bfloat16))


@cache
def numbers_of(fqn: str) -> torch.Tensor:
    """The numbers of a parameter's elements. They count on from parameter to parameter; 0 is none's, it is padding."""
    shapes = {name: shape for name, (shape, _) in parameters().items()}
    first = 1 + sum(math.prod(shapes[name]) for name in itertools.takewhile(lambda name: name != fqn, shapes))
    return torch.arange(first, first + math.prod(shapes[fqn])).view(shapes[fqn])


@cache
def _values(state: str) -> torch.Tensor:
    """What the oracle says of each element, by its number."""
    wholes = [full_tensor(fqn, state, shape, dtype).view(-1).double() for fqn, (shape, dtype) in parameters().items()]
    return torch.cat([torch.zeros(1, dtype=torch.float64), *wholes])


def state_of(weights: torch.Tensor, state: str) -> torch.Tensor:
    """The state that belongs to a rank's local weights, element by element."""
    return _values(state)[weights.detach().long()].to(weights.dtype)


def group_of(fqn: str) -> int:
    """Which param group has a parameter: whole modules, so that none is flattened together with one of the other."""
    return int(any(part in ("norm", "embed", "odds", "scale") for part in fqn.split(".")))
