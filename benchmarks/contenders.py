"""Who loads: Shardferry, stock ``dcp.load`` and ``load_sharded_optimizer_state_dict``, and the floor under all.

Each is made on every rank of a case. A load goes ``prepare``, ``load``, ``check``, ``release``; only ``load`` is timed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from benchmarks.cases import Case
from benchmarks.checkpoint import OPTIMIZER_KEY, adamw, data_files
from benchmarks.gpt import LEARNING_RATE, STATES, STEP, expected_state
from benchmarks.meter import Spent
from shardferry.agreement import Agreement
from shardferry.arena import HostArena
from shardferry.checkpoint import METADATA_FILE, open_checkpoint
from shardferry.load import LoadJob, PhaseClock, arena_for, catalog_of_all, load_rank
from shardferry.param_groups import ParamGroup
from shardferry.plan import LoadPlan, plan_load
from shardferry.reader import Counters, ReadOptions, Strategy
from shardferry.request import LoadRequest

_FLOOR_BYTES = 8 * 1024 * 1024  # that one call reads
_REQUEST = LoadRequest(OPTIMIZER_KEY)
_POISON = -1.0  # in no checkpoint


class WrongResult(AssertionError):
    """A loaded value is not the one that was saved."""


@dataclass(frozen=True)
class Task:
    """One rank's part of a case."""

    case: Case
    path: str  # of the checkpoint
    shapes: Mapping[str, tuple[int, ...]]  # of the parameters, by FQN
    needed_bytes: int  # of the whole job, each byte once
    rank: int
    mesh: DeviceMesh
    expected: Mapping[tuple[str, str], torch.Tensor]  # by FQN and state name

    @classmethod
    def of_this_rank(cls, case: Case, path: str, shapes: Mapping[str, tuple[int, ...]]) -> Task:
        """Made on each rank of a case's process group."""
        rank = dist.get_rank()
        layouts = {fqn: case.tensor_layout(shape, rank) for fqn, shape in shapes.items()}
        boxes = {fqn: (shapes[fqn], layout.boxes[0].region) for fqn, layout in layouts.items()}
        needed = 4 * len(STATES) * sum(math.prod(shape) for shape in shapes.values())
        return cls(case, path, shapes, needed, rank, init_device_mesh("cpu", case.mesh_shape), expected_state(boxes))

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


class Contender(Protocol):
    name: str

    def __init__(self, task: Task) -> None: ...

    def prepare(self) -> None:
        """Allocate the destination, and write to all of it. Not called where the load is to allocate itself."""

    def load(self) -> None:
        """Load; into what was prepared, where something was."""

    def check(self) -> None:
        """Raises WrongResult."""

    def release(self) -> None:
        """Give the destination back."""

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        """Bytes and requests of the last load."""

    def phases(self) -> Mapping[str, float]:
        """Seconds of the parts of the last load, where it says them."""


class Shardferry:
    """What a job does: rank 0 opens the checkpoint, all get its catalog; each plans, then reads into its arena."""

    name = "Shardferry"
    strategy: Strategy = "auto"

    def __init__(self, task: Task) -> None:
        self._task = task
        self._layout = task.case.spec().rank(task.rank)
        self._plan: LoadPlan | None = None
        self._arena: HostArena | None = None
        self._param_groups: Sequence[ParamGroup] = ()

    def prepare(self) -> None:
        plan = plan_load(open_checkpoint(self._task.path), self._layout, _REQUEST)
        arena = arena_for(plan, open_checkpoint(self._task.path))
        arena.allocate()
        arena.tensor(0, (plan.arena_bytes // 4,), torch.float32).fill_(_POISON)
        self._arena = arena

    def load(self) -> None:
        agreement = Agreement(dist.group.WORLD)
        self._counters, self._clock = Counters(), PhaseClock()
        with self._clock.phase("open"):
            catalog = catalog_of_all(self._task.path, agreement)
        job = LoadJob(catalog, self._layout, _REQUEST, torch.device("cpu"), ReadOptions(strategy=self.strategy))
        loaded = load_rank(job, agreement, counters=self._counters, arena=self._arena)
        assert isinstance(loaded.arena, HostArena)
        self._plan, self._arena = loaded.plan, loaded.arena
        self._param_groups = loaded.manifest.param_groups
        self._clock.seconds.update(loaded.seconds)

    def check(self) -> None:
        assert self._plan is not None
        assert self._arena is not None
        for planned in self._plan.tensors:
            tensor = self._arena.tensor(planned.arena_offset, planned.layout.local_shape, planned.dtype)
            if planned.name == "step":
                self._task.check_step(self.name, planned.fqn, tensor)
            else:
                self._task.check(self.name, planned.fqn, planned.name, tensor)
        if len(self._plan.tensors) != len(self._task.expected) + len(self._task.shapes):
            raise WrongResult(f"{self.name}, {self._task.case.name}: {len(self._plan.tensors)} tensors were planned")
        self._task.check_groups(self.name, self._param_groups)

    def release(self) -> None:
        if self._arena is not None:
            self._arena.close()
        self._plan, self._arena, self._param_groups = None, None, ()

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        """As its own counters have it, since reads through a mapping are in none of the kernel's; and the metadata."""
        metadata = Path(self._task.path, METADATA_FILE).stat().st_size if self._task.rank == 0 else 0
        return self._counters.bytes_requested + metadata, self._counters.num_requests + (1 if metadata else 0)

    def phases(self) -> Mapping[str, float]:
        return self._clock.seconds


class Direct(Shardferry):
    """Every rank reads for itself."""

    name = "Shardferry, direct"
    strategy: Strategy = "direct"


class Cooperative(Shardferry):
    """The ranks of a node read for each other."""

    name = "Shardferry, cooperative"
    strategy: Strategy = "cooperative"


class StockLoad:
    """``torch.distributed.checkpoint.load`` into a state dict of DTensors that lie as wanted."""

    name = "stock dcp.load"

    def __init__(self, task: Task) -> None:
        self._task = task
        self._state_dict: dict[str, Any] | None = None

    def prepare(self) -> None:
        self._state_dict = self._empty_state_dict()
        for state in self._state_dict[OPTIMIZER_KEY]["state"].values():
            for tensor in state.values():
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(_POISON)

    def load(self) -> None:
        if self._state_dict is None:
            self._state_dict = self._empty_state_dict()
        dcp.load(self._state_dict, checkpoint_id=self._task.path)

    def _empty_state_dict(self) -> dict[str, Any]:
        state = {
            fqn: {"step": torch.tensor(0.0), **{name: self._empty(fqn, name, shape) for name in STATES}}
            for fqn, shape in self._task.shapes.items()
        }
        groups = adamw(
            {fqn: torch.empty(shape, device="meta") for fqn, shape in self._task.shapes.items()}
        ).param_groups
        groups = [{**group, "params": [], "lr": 0.0} for group in groups]
        return {OPTIMIZER_KEY: {"state": state, "param_groups": groups}}

    def _empty(self, fqn: str, name: str, shape: tuple[int, ...]) -> DTensor:
        dim = self._task.case.shard_dim(shape)
        placement = Replicate() if dim is None else Shard(dim)
        local = torch.empty_like(self._task.expected[fqn, name])
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self._task.mesh, [Replicate(), placement], run_check=False, shape=torch.Size(shape), stride=strides
        )

    def check(self) -> None:
        assert self._state_dict is not None
        loaded = self._state_dict[OPTIMIZER_KEY]
        for fqn in self._task.shapes:
            self._task.check_step(self.name, fqn, loaded["state"][fqn]["step"])
            for name in STATES:
                self._task.check(self.name, fqn, name, loaded["state"][fqn][name].to_local())
        self._task.check_groups(self.name, loaded["param_groups"])

    def release(self) -> None:
        self._state_dict = None

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        return spent.bytes_read, spent.read_calls

    def phases(self) -> Mapping[str, float]:
        return {}


class StockShardedLoad:
    """``load_sharded_optimizer_state_dict``. It allocates what it gives back, and cuts by rows only."""

    name = "stock load_sharded_optimizer_state_dict"

    def __init__(self, task: Task) -> None:
        self._task = task
        self._loaded: dict[str, Any] | None = None
        self._model = {
            fqn: torch.empty(task.expected[fqn, STATES[0]].shape, device="meta") for fqn in task.shapes
        }  # it only looks for ShardedTensors here, to learn of a second axis

    def prepare(self) -> None:
        """Nothing: its destinations are always fresh."""

    def load(self) -> None:
        reader = dcp.FileSystemReader(self._task.path)
        self._loaded = load_sharded_optimizer_state_dict(self._model, OPTIMIZER_KEY, reader)

    def check(self) -> None:
        assert self._loaded is not None
        loaded = self._loaded[OPTIMIZER_KEY]
        for fqn in self._task.shapes:
            self._task.check_step(self.name, fqn, loaded["state"][fqn]["step"])
            for name in STATES:
                tensor = loaded["state"][fqn][name]
                assert isinstance(tensor, ShardedTensor)
                self._task.check(self.name, fqn, name, tensor.local_shards()[0].tensor)
        self._task.check_groups(self.name, loaded["param_groups"])

    def release(self) -> None:
        self._loaded = None

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        return spent.bytes_read, spent.read_calls

    def phases(self) -> Mapping[str, float]:
        return {}


class Floor:
    """As many bytes as are needed, from the same files, in equal contiguous shares, read into memory; nothing else."""

    name = "floor"

    def __init__(self, task: Task) -> None:
        self._task = task
        start, stop = (task.needed_bytes * rank // task.case.ranks for rank in (task.rank, task.rank + 1))
        self._share = stop - start
        self._ranges: list[tuple[Path, int, int]] = []  # file, first byte, number of bytes
        position = 0  # of a file's first byte, in all files one after another
        for file in data_files(task.path):
            nbytes = file.stat().st_size
            first, last = max(start, position), min(stop, position + nbytes)
            if first < last:
                self._ranges.append((file, first - position, last - first))
            position += nbytes
        self._memory: torch.Tensor | None = None
        self._done = 0

    def prepare(self) -> None:
        self._memory = torch.zeros(self._share, dtype=torch.uint8).fill_(1)

    def load(self) -> None:
        if self._memory is None:
            self._memory = torch.empty(self._share, dtype=torch.uint8)
        memory = memoryview(self._memory.numpy().data)
        done = 0
        for file, first, nbytes in self._ranges:
            descriptor = os.open(file, os.O_RDONLY)
            end = done + nbytes
            while done < end:
                place = memory[done : min(done + _FLOOR_BYTES, end)]
                count = os.preadv(descriptor, [place], first + nbytes - (end - done))
                if not count:
                    break
                done += count
            os.close(descriptor)
        self._done = done

    def check(self) -> None:
        if self._done != self._share:
            raise WrongResult(f"{self.name}, {self._task.case.name}: {self._done} of {self._share} bytes were read")

    def release(self) -> None:
        self._memory = None

    def asked_of_storage(self, spent: Spent) -> tuple[int, int]:
        return spent.bytes_read, spent.read_calls

    def phases(self) -> Mapping[str, float]:
        return {}


def contenders_of(case: Case) -> list[type[Contender]]:
    """Those that can do a case."""
    rows_only: list[type[Contender]] = [StockShardedLoad] if case.cut == "rows" and case.copies == 1 else []
    return [Floor, Shardferry, Direct, Cooperative, StockLoad, *rows_only]
