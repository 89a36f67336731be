"""Stock torch as a contender: ``dcp.load`` and ``load_sharded_optimizer_state_dict``; over HTTP through fsspec."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from benchmarks.cases import Case
from benchmarks.checkpoint import OPTIMIZER_KEY, adamw
from benchmarks.models import STATES
from benchmarks.stores import Store, StoreKind
from benchmarks.task import POISON, Contender, Task


def reader_of(store: Store) -> dcp.FileSystemReader:
    """Stock's own for the kind of storage."""
    return FsspecReader(store.location) if store.is_remote else dcp.FileSystemReader(store.location)


def empty_state_dict(task: Task) -> dict[str, Any]:
    """What a rank loads into: DTensors that lie as the case wants them, in memory that nobody has touched."""
    state = {
        fqn: {"step": torch.tensor(0.0), **{name: _empty(task, fqn, name, shape) for name in STATES}}
        for fqn, shape in task.shapes.items()
    }
    groups = adamw({fqn: torch.empty(shape, device="meta") for fqn, shape in task.shapes.items()}).param_groups
    return {OPTIMIZER_KEY: {"state": state, "param_groups": [{**group, "params": [], "lr": 0.0} for group in groups]}}


def _empty(task: Task, fqn: str, name: str, shape: tuple[int, ...]) -> DTensor:
    dim = task.case.shard_dim(shape)
    placements: list[Placement] = [Replicate() if dim is None else Shard(dim)]
    if task.mesh.ndim == 2:
        placements.insert(0, Replicate())
    return DTensor.from_local(
        torch.empty_like(task.expected[fqn, name]),
        task.mesh,
        placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=torch.empty(shape, device="meta").stride(),
    )


def poison(state: dict[str, Any]) -> None:
    """Write to all of an optimizer's state what no checkpoint holds."""
    for entries in state["state"].values():
        for tensor in entries.values():
            if isinstance(tensor, ShardedTensor):
                tensor.local_shards()[0].tensor.fill_(POISON)
            else:
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).fill_(POISON)


class StockLoad(Contender):
    """``torch.distributed.checkpoint.load`` into a state dict of DTensors that lie as wanted."""

    name = "stock dcp.load"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._state_dict: dict[str, Any] | None = None

    def prepare(self) -> None:
        self._state_dict = empty_state_dict(self._task)
        poison(self._state_dict[OPTIMIZER_KEY])

    def load(self) -> None:
        if self._state_dict is None:
            self._state_dict = empty_state_dict(self._task)
        dcp.load(self._state_dict, storage_reader=reader_of(self._task.store))

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


class StockShardedLoad(Contender):
    """``load_sharded_optimizer_state_dict``. It allocates what it gives back, and cuts by rows only."""

    name = "stock load_sharded_optimizer_state_dict"
    allocates = True

    @classmethod
    def why_not(cls, case: Case, kind: StoreKind) -> str:
        if case.cut != "rows" or case.copies != 1:
            return "cuts by rows only, without copies"
        wanted = ("4-4",) if kind is StoreKind.THROTTLED else ("4-4", "4-3", "4-8")
        return "" if case.name in wanted else "left out for its time: it reads as dcp.load does"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._loaded: dict[str, Any] | None = None
        self._model = {
            fqn: torch.empty(task.expected[fqn, STATES[0]].shape, device="meta") for fqn in task.shapes
        }  # it only looks for ShardedTensors here, to learn of a second axis

    def prepare(self) -> None:
        """Nothing: its destinations are always fresh."""

    def load(self) -> None:
        reader = reader_of(self._task.store)
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
