"""What every contender is made for, one rank's part of a case, and what is asked of a contender.

A load goes ``prepare``, ``load``, ``check``, ``release``; only ``load`` is timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from benchmarks.cases import Case
from benchmarks.meter import Spent
from benchmarks.models import LEARNING_RATE, STEP, Shapes, expected_state, state_bytes
from benchmarks.stores import Store, StoreKind

POISON = -1.0  # in no checkpoint


class WrongResult(AssertionError):
    """A loaded value is not the one that was saved."""


@dataclass(frozen=True)
class Task:
    """One rank's part of a case."""

    case: Case
    store: Store
    shapes: Shapes
    needed_bytes: int  # of the whole job, each byte once
    rank: int
    mesh: DeviceMesh
    expected: Mapping[tuple[str, str], torch.Tensor]  # by FQN and state name

    @classmethod
    def of_this_rank(cls, case: Case, store: Store, shapes: Shapes) -> Task:
        """Made on each rank of a case's process group."""
        rank = dist.get_rank()
        layouts = {fqn: case.tensor_layout(shape, rank) for fqn, shape in shapes.items()}
        boxes = {fqn: (shapes[fqn], layout.boxes[0].region) for fqn, layout in layouts.items()}
        return cls(case, store, shapes, state_bytes(shapes), rank, _mesh(case), expected_state(boxes))

    @property
    def shard_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.expected.values())

    def check(self, what: str, fqn: str, name: str, found: torch.Tensor) -> None:
        """Compare one tensor with what was saved, bit for bit. Raises WrongResult."""
        expected = self.expected[fqn, name]
        same = found.shape == expected.shape and found.dtype == expected.dtype
        if not same or not torch.equal(found.contiguous().view(torch.int32), expected.view(torch.int32)):
            raise WrongResult(f"{what}, {self.case.name}, rank {self.rank}: {fqn}.{name} is not what was saved")

    def check_step(self, what: str, fqn: str, step: Any) -> None:
        """Raises WrongResult."""
        if float(step) != STEP:
            raise WrongResult(f"{what}, {self.case.name}, rank {self.rank}: {fqn}.step is {step}, {STEP} was saved")

    def check_groups(self, what: str, groups: Sequence[Mapping[str, Any]]) -> None:
        """Raises WrongResult."""
        learning_rates = [group["lr"] for group in groups]
        if learning_rates != [LEARNING_RATE] * 2:
            raise WrongResult(f"{what}, {self.case.name}, rank {self.rank}: the param groups have lr {learning_rates}")


def _mesh(case: Case) -> DeviceMesh:
    """With an axis of copies where there are some."""
    copies, ranks = case.mesh_shape
    return init_device_mesh("cpu", (ranks,) if copies == 1 else (copies, ranks))


class Contender(ABC):
    """Somebody who loads, made on every rank of a case."""

    name: ClassVar[str]
    allocates: ClassVar[bool] = False  # its destinations are fresh ones, whether prepared or not

    @classmethod
    def why_not(cls, case: Case, kind: StoreKind) -> str:
        """Why it doesn't load this case from this kind of storage; empty where it does."""
        return ""

    def __init__(self, task: Task) -> None:
        self._task = task

    @abstractmethod
    def prepare(self) -> None:
        """Allocate the destination, and write to all of it. Not called where the load is to allocate itself."""

    @abstractmethod
    def load(self) -> None:
        """Load; into what was prepared, where something was."""

    @abstractmethod
    def check(self) -> None:
        """Raises WrongResult."""

    @abstractmethod
    def release(self) -> None:
        """Give the destination back."""

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        """Bytes and requests of the last load on this rank, where no server counts them: by default the kernel's."""
        return spent.bytes_read, spent.read_calls

    def phases(self) -> Mapping[str, float]:
        """Seconds of the parts of the last load, where it says them."""
        return {}


class OwnFormat(Contender):
    """Somebody who doesn't read what stock torch saves: a checkpoint of the same state lies beside that, by the contender's name."""

    @classmethod
    @abstractmethod
    def save(cls, directory: str, shapes: Shapes) -> None:
        """On each saving rank: write the checkpoint."""
