"""What crosses from a loader to a trainer, and what a trainer does with it.

A `ShardHandle` says where a sealed arena is; opening it in the trainer's process gives a `Shard`: views on the arena.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DeviceMesh, DTensor
from torch.nn import Module
from torch.optim import Optimizer

from shardferry.arena import Arena, HostArena, open_memory_file, view_bytes
from shardferry.checkpoint.optimizer_state import ParamGroup
from shardferry.errors import HandoffError
from shardferry.layout.placing import torch_placements
from shardferry.optimizer import install
from shardferry.optimizer.live import LiveModel
from shardferry.plan.manifest import Entry, Manifest, StateTensor
from shardferry.region import Region, row_major_strides
from shardferry.state_dicts import nest

_F_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; not in the fcntl module


def node_identity() -> str:
    """Names this machine and process namespace: where it is equal, ``/proc/<pid>`` means the same process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{Path('/proc/self/ns/pid').stat().st_ino}"


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """An arena that another process of this node holds as an anonymous memory file."""

    node: str
    pid: int
    descriptor: int
    inode: int
    nbytes: int
    exclusive: bool  # one trainer only, which gets the arena itself; else private copies, made page by page on write

    transport = "shared_memory"

    @classmethod
    def of(cls, arena: HostArena, *, exclusive: bool) -> SharedMemory:
        """The source of an arena of this process."""
        inode = os.fstat(arena.descriptor).st_ino
        return cls(node_identity(), os.getpid(), arena.descriptor, inode, arena.nbytes, exclusive)

    def open(self) -> torch.Tensor:
        """Map the arena: O(1), no copy."""
        if self.node != node_identity():
            raise HandoffError(
                "this shard is in the shared memory of another node or container than the trainer's; "
                "place the trainer on the loader's node, or use handoff.transport: object_store"
            )
        descriptor = self._open_descriptor()
        try:
            taken = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _F_SEAL_FUTURE_WRITE
            if taken:
                raise HandoffError("this shard was handed over already, and its taker may have changed it; load again")
            flags = mmap.MAP_SHARED if self.exclusive else mmap.MAP_PRIVATE
            pages = mmap.mmap(descriptor, self.nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
            if self.exclusive:
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, _F_SEAL_FUTURE_WRITE)
        finally:
            os.close(descriptor)
        return torch.frombuffer(pages, dtype=torch.uint8)

    def _open_descriptor(self) -> int:
        gone = (
            f"the loader (process {self.pid}) that held this shard has ended before the shard was opened; "
            "keep the stage's result until all trainers have opened their handles"
        )
        try:
            return open_memory_file(self.pid, self.descriptor, self.inode)
        except OSError as error:
            raise HandoffError(f"{gone} ({error})") from error


@dataclass(frozen=True, slots=True)
class Payload:
    """The arena's bytes themselves, on their way through an object store: pickled out of band, without a copy."""

    data: np.ndarray  # uint8

    transport = "object_store"

    def open(self) -> torch.Tensor:
        """A copy of the bytes: what came out of an object store is shared with others, and read-only."""
        return torch.from_numpy(self.data.copy())


@dataclass(frozen=True, slots=True)
class InProcess:
    """The arena of this very process."""

    arena: Arena
    nbytes: int

    transport = "in_process"

    def open(self) -> torch.Tensor:
        """The arena's bytes."""
        return self.arena.tensor(0, (self.nbytes,), torch.uint8)

    def __reduce__(self) -> Any:
        raise HandoffError(
            "an in-process shard can't leave its process; use handoff.transport: shared_memory or object_store"
        )


Source = SharedMemory | Payload | InProcess


@dataclass(frozen=True)
class ShardHandle:
    """One rank's loaded optimizer state, to be opened where its trainer runs."""

    manifest: Manifest
    source: Source = field(repr=False)

    @property
    def world_rank(self) -> int:
        return self.manifest.world_rank

    @property
    def transport(self) -> str:
        return self.source.transport

    def open(self) -> Shard:
        """Map the arena into this process; use it as a context manager.

        Raises:
            HandoffError: the arena is on another node, its loader has ended, or another trainer has taken it.
        """
        return Shard(self.manifest, self.source.open())


class Shard:
    """Views on one rank's loaded optimizer state. The memory lives as long as a tensor uses it, also after ``with``."""

    def __init__(self, manifest: Manifest, memory: torch.Tensor) -> None:
        self._manifest = manifest
        self._memory: torch.Tensor | None = memory

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self._memory = None

    @property
    def world_rank(self) -> int:
        return self._manifest.world_rank

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The saved param groups; ``"params"`` lists FQNs."""
        return self._manifest.param_groups

    @property
    def fqns(self) -> tuple[str, ...]:
        """Parameters that have state here."""
        return tuple(self._manifest.by_fqn)

    @property
    def covered(self) -> frozenset[str]:
        """Parameters that the load was for, with or without state."""
        return self._manifest.covered

    @property
    def grouped(self) -> frozenset[str]:
        """Parameters that the saved param groups name."""
        return self._manifest.grouped

    @property
    def has_weights(self) -> bool:
        """Whether the model's weights were loaded too."""
        return self._manifest.request.model_key is not None

    def may_lack(self, fqn: str) -> bool:
        """Whether the load was asked to leave a parameter as it is: missing and allowed, or not selected."""
        request = self._manifest.request
        return request.keys.allow_missing or not request.selection.selects(fqn)

    def entries(self, *fqns: str) -> Mapping[str, Entry]:
        """What is known of a parameter's state, by name; of the first of its names that has some."""
        return next((self._manifest.by_fqn[fqn] for fqn in fqns if fqn in self._manifest.by_fqn), {})

    def weight(self, *fqns: str) -> Entry | None:
        """A parameter, a buffer or an extra state itself; of the first of its names that is here."""
        return next((self._manifest.weights[fqn] for fqn in fqns if fqn in self._manifest.weights), None)

    def local_tensor(self, entry: Entry) -> torch.Tensor:
        """A view on the arena; a copy where the load was asked to cast it."""
        if self._memory is None:
            raise HandoffError("the shard was closed; use it inside its `with`")
        assert isinstance(entry, StateTensor)
        view = view_bytes(self._memory, entry.arena_offset, entry.layout.local_shape, entry.dtype)
        return view if entry.cast is None else view.to(entry.cast)

    def value_of(self, entry: Entry, mesh: DeviceMesh | None = None) -> Any:
        """An entry as a local tensor, a DTensor on a mesh, or the Python value that was saved."""
        if not isinstance(entry, StateTensor):
            return entry.value
        local = self.local_tensor(entry)
        if mesh is None or entry.layout.placements is None:
            return local
        shape = torch.Size(entry.layout.global_shape)
        placements = torch_placements(entry.layout, mesh)
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=row_major_strides(entry.layout.global_shape)
        )

    def state_dict(self, mesh: DeviceMesh | None = None) -> dict[str, Any]:
        """The optimizer's state, keyed by FQN: ``{"state": {fqn: {name: tensor}}, "param_groups": [...]}``.

        Args:
            mesh: gives DTensors on this mesh instead of local tensors, for state that is cut as its parameter.

        Raises:
            HandoffError: the mesh is not the one that the state was loaded for.
        """
        if mesh is not None:
            self._check_mesh(mesh)
        state = {
            fqn: nest({entry.place: self.value_of(entry, mesh) for entry in entries.values()})
            for fqn, entries in self._manifest.by_fqn.items()
        }
        return {"state": state, "param_groups": [dict(group) for group in self.param_groups]}

    def model_state_dict(self, mesh: DeviceMesh | None = None) -> dict[str, Any]:
        """The weights, buffers and extra states that were loaded, keyed by FQN; empty unless ``model_key`` asked for them.

        Args:
            mesh: gives DTensors on this mesh instead of local tensors.

        Raises:
            HandoffError: the mesh is not the one that the weights were loaded for.
        """
        if mesh is not None:
            self._check_mesh(mesh)
        return {fqn: self.value_of(entry, mesh) for fqn, entry in self._manifest.weights.items()}

    def _check_mesh(self, mesh: DeviceMesh) -> None:
        wanted = self._manifest.mesh
        sizes = tuple(mesh.size(axis) for axis in range(mesh.ndim))
        if wanted is None:
            raise HandoffError(
                "this shard was loaded for a live model, not for a mesh; use load_into(model, optimizer)"
            )
        if sizes != tuple(size for _, size in wanted.axes):
            raise HandoffError(f"the mesh given has the sizes {sizes}, the shard was loaded for {wanted}")

    def regions(self, fqn: str, name: str) -> list[tuple[Region, Region]]:
        """Where each box of the local tensor lies: ``[(region of the whole tensor, region of the local one), ...]``."""
        return [(box.region, box.local) for box in self._tensor(fqn, name).layout.boxes]

    def global_shape(self, fqn: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, elements."""
        return self._tensor(fqn, name).layout.global_shape

    def _tensor(self, fqn: str, name: str) -> StateTensor:
        entry = self.entries(fqn).get(name)
        if not isinstance(entry, StateTensor):
            raise KeyError(f"{fqn}: no state tensor {name!r} in this shard; it has {sorted(self.entries(fqn))}")
        return entry

    def load_into(self, model: Module | Sequence[Module], optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Replace state, hyperparameters and, where they were loaded, weights; see `shardferry.optimizer.install.load_into`.

        Args:
            model, optimizer: one, or several where a rank has several.

        Raises:
            InstallError: the shard lies otherwise than the model's parameters, or lacks one of them.
        """
        install.load_into(self, LiveModel.of(model, optimizer))
