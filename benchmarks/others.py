"""Other systems as contenders, where they are installed: each loads the same state from its own format.

They are no dependency of anything here; ``benchmarks/README.md`` says how to install the versions that were tried.
"""

from __future__ import annotations

import importlib.util
import logging
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor, ShardedTensorMetadata, TensorProperties
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from benchmarks.cases import Case
from benchmarks.checkpoint import OPTIMIZER_KEY, sharded_state
from benchmarks.models import STATES, Shapes
from benchmarks.stock import empty_state_dict, poison
from benchmarks.stores import StoreKind
from benchmarks.task import OwnFormat, Task

_CASES = ("4-4", "4-3", "rows-columns-4", "hsdp-2x2")


class _Other(OwnFormat):
    """Loads into DTensors that lie as wanted, or into what is made of them. Its name is its package's."""

    rows_only: ClassVar[bool] = False

    @classmethod
    def why_not(cls, case: Case, kind: StoreKind) -> str:
        if kind is StoreKind.THROTTLED:
            return "reads files"
        if case.name not in _CASES:
            return "left out for its time"
        if cls.rows_only and (case.cut != "rows" or case.copies != 1):
            return "cuts by rows only, without copies"
        return "" if importlib.util.find_spec(cls.name) else "not installed"

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        logging.getLogger(self.name).setLevel(logging.ERROR)
        self._directory = task.store.sibling(self.name).directory
        self._state: dict[str, Any] | None = None

    def prepare(self) -> None:
        self._state = self._empty()
        poison(self._state)

    def load(self) -> None:
        self._state = self._filled(self._empty() if self._state is None else self._state)

    def _empty(self) -> dict[str, Any]:
        state: dict[str, Any] = empty_state_dict(self._task)[OPTIMIZER_KEY]
        return state

    @abstractmethod
    def _filled(self, state: dict[str, Any]) -> dict[str, Any]:
        """Load into a state, and give back the one that was loaded."""

    def check(self) -> None:
        assert self._state is not None
        for fqn in self._task.shapes:
            entries = self._state["state"][fqn]
            self._task.check_step(self.name, fqn, entries["step"])
            for name in STATES:
                self._task.check(self.name, fqn, name, _local(entries[name]))

    def release(self) -> None:
        self._state = None


def _saved_state(shapes: Shapes) -> dict[str, Any]:
    model, optimizer = sharded_state(shapes)
    return dict(get_optimizer_state_dict(model, optimizer))


def _local(tensor: torch.Tensor | ShardedTensor) -> torch.Tensor:
    if isinstance(tensor, ShardedTensor):
        return tensor.local_shards()[0].tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class TorchCheckpointing(_Other):
    """meta-pytorch's successor of DCP, with its resharder."""

    name = "torch_checkpointing"

    @classmethod
    def save(cls, directory: str, shapes: Shapes) -> None:
        from torch_checkpointing.metadata_manager import DefaultMetadataManager

        DefaultMetadataManager._all_gather_pickled_data = _gathered  # its own needs a GPU, when saving
        cls._manager().save(directory, {OPTIMIZER_KEY: _saved_state(shapes)})

    def _filled(self, state: dict[str, Any]) -> dict[str, Any]:
        loaded: dict[str, Any] = self._manager().load(self._directory, into={OPTIMIZER_KEY: state})[OPTIMIZER_KEY]
        return loaded

    @staticmethod
    def _manager() -> Any:
        from torch_checkpointing import CheckpointManager, ItemSpec
        from torch_checkpointing.config import SyncCheckpointSaverConfig
        from torch_checkpointing.default_resharder import DefaultResharder
        from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

        files = LocalFileSystemStorageConfig(use_direct_io=False)  # it writes what isn't aligned, which ext4 refuses
        items = {OPTIMIZER_KEY: ItemSpec(requires_copy=False, resharder=DefaultResharder())}
        return CheckpointManager.Config(items=items, save=SyncCheckpointSaverConfig(), storage_config=files).build()


def _gathered(_: object, data: object, process_group: dist.ProcessGroup | None = None) -> dict[int, object]:
    """What every rank has, by rank."""
    gathered: list[object] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(gathered, data, group=process_group)
    return dict(enumerate(gathered))


class ByteCheckpoint(_Other):
    """ByteDance's, for FSDP2: the half of its ``load`` that is about the optimizer, with parallel reads."""

    name = "bytecheckpoint"

    @classmethod
    def save(cls, directory: str, shapes: Shapes) -> None:
        checkpointer = cls._checkpointer()
        from bytecheckpoint.planner.fsdp.fsdp_planner import FSDPSavePlanner
        from bytecheckpoint.storage import CKPTCounter

        Path(directory).mkdir(parents=True, exist_ok=True)
        checkpointer._save_optimizer(
            optimizer_path=directory,
            optimizer_state=_saved_state(shapes),
            framework_name=checkpointer._framework_name,
            role=None,
            save_planner=FSDPSavePlanner(),
            ckpt_path=directory,
            save_ckpt_start_time=0.0,
            ckpt_counter=CKPTCounter(1, False),
            global_steps=None,
            fast_saving=False,
            callback=None,
        )

    def _filled(self, state: dict[str, Any]) -> dict[str, Any]:
        checkpointer = self._checkpointer()
        from bytecheckpoint.planner.fsdp.fsdp_planner import FSDPLoadPlanner

        loaded: dict[str, Any] = checkpointer._load_optimizer(
            optimizer_path=self._directory,
            optimizer_state=state,
            framework_name=checkpointer._framework_name,
            role=None,
            load_planner=FSDPLoadPlanner(strict=True),
            fast_loading=True,
        )
        return loaded

    @staticmethod
    def _checkpointer() -> Any:
        from bytecheckpoint.checkpointer.fsdp2_checkpointer import FSDP2Checkpointer
        from bytecheckpoint.utilities.logger import get_bytecheckpoint_logger

        get_bytecheckpoint_logger().setLevel(logging.ERROR)
        return FSDP2Checkpointer


class TorchSnapshot(_Other):
    """meta-pytorch's of 2022, which knows no DTensors but ShardedTensors."""

    name = "torchsnapshot"
    rows_only = True

    @classmethod
    def save(cls, directory: str, shapes: Shapes) -> None:
        from torchsnapshot import Snapshot, StateDict

        case = Case("save", dist.get_world_size(), dist.get_world_size(), "rows")
        state = _saved_state(shapes)
        state["state"] = {fqn: _sharded(entries, case) for fqn, entries in state["state"].items()}
        Snapshot.take(directory, {OPTIMIZER_KEY: StateDict(**state)})

    def _empty(self) -> dict[str, Any]:
        state = super()._empty()
        return {**state, "state": {fqn: _sharded(entries, self._task.case) for fqn, entries in state["state"].items()}}

    def _filled(self, state: dict[str, Any]) -> dict[str, Any]:
        from torchsnapshot import Snapshot, StateDict

        app_state = {OPTIMIZER_KEY: StateDict(**state)}
        Snapshot(self._directory).restore(app_state)
        return dict(app_state[OPTIMIZER_KEY])


def _sharded(entries: dict[str, Any], case: Case) -> dict[str, Any]:
    """DTensors as ShardedTensors over the same memory."""
    return {name: _as_sharded(v, case) if isinstance(v, DTensor) else v for name, v in entries.items()}


def _as_sharded(tensor: DTensor, case: Case) -> ShardedTensor:
    local = tensor.to_local()
    shards = []
    for rank in range(case.ranks):
        region = case.tensor_layout(tuple(tensor.shape), rank).boxes[0].region
        shards.append(ShardMetadata(list(region.offsets), list(region.sizes), f"rank:{rank}/cpu"))
    properties = TensorProperties(dtype=local.dtype, requires_grad=False)
    return ShardedTensor._init_from_local_shards_and_global_metadata(
        [Shard(local, shards[dist.get_rank()])], ShardedTensorMetadata(shards, tensor.shape, properties)
    )
