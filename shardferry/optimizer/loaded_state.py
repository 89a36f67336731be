"""Views on the state that one rank has loaded: a manifest and the memory that it describes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DeviceMesh, DTensor

from shardferry.arena import view_bytes
from shardferry.config import LoadRequest
from shardferry.errors import HandoffError, InstallError
from shardferry.layout.from_tensor import dtensor_placements
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.load_plan import Entry, Manifest, PlannedTensor, PlannedValue
from shardferry.region import Region, row_major_strides
from shardferry.state_dicts import ParamGroup, nest


class LoadedState:
    """One rank's loaded optimizer state, and weights where they were loaded too.

    Args:
        manifest: of the arena.
        memory: the arena's bytes, one dimension of uint8. Each tensor that is taken from here keeps them alive. None: they
            have not been read yet.
    """

    def __init__(self, manifest: Manifest, memory: torch.Tensor | None) -> None:
        self._manifest = manifest
        self._memory = memory

    def release(self) -> None:
        """Forget the memory; tensors that were taken before keep it alive."""
        self._memory = None

    @property
    def world_rank(self) -> int:
        """The rank whose state this is."""
        return self._manifest.world_rank

    @property
    def request(self) -> LoadRequest:
        """What was asked for."""
        return self._manifest.request

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The saved param groups; ``"params"`` lists FQNs."""
        return self._manifest.param_groups

    @property
    def extras(self) -> Mapping[str, Any]:
        """What the saved optimizer's ``state_dict()`` had beside state and param groups."""
        return self._manifest.extras

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
        """A parameter's state entries by name.

        Args:
            fqns: all names of the parameter; the first one that has state counts.

        Returns:
            Empty where none has.
        """
        return next((self._manifest.by_fqn[fqn] for fqn in fqns if fqn in self._manifest.by_fqn), {})

    def weight(self, *fqns: str) -> Entry | None:
        """A parameter, a buffer or an extra state itself.

        Args:
            fqns: all its names; the first one that was loaded counts.
        """
        return next((self._manifest.weights[fqn] for fqn in fqns if fqn in self._manifest.weights), None)

    def local_tensor(self, tensor: PlannedTensor) -> torch.Tensor:
        """A view on the memory, of the local shape; a copy where the load was asked to convert the dtype.

        Of a class of its own: the tensor that was read.

        Raises:
            HandoffError: the memory was released.
        """
        if self._memory is None:
            raise HandoffError("the shard was closed; use it inside its `with`")
        view = tensor.value
        if view is None:
            view = view_bytes(self._memory, tensor.arena_offset, tensor.layout.local_shape, tensor.dtype)
        return view if tensor.cast is None else view.to(tensor.cast)

    def value_of(self, entry: Entry, mesh: DeviceMesh | None = None) -> Any:
        """An entry as a local tensor, as a DTensor on a mesh, or as the Python value that was saved.

        Raises:
            HandoffError: the memory was released.
        """
        if not isinstance(entry, PlannedTensor):
            return entry.value
        local = self.local_tensor(entry)
        if mesh is None or entry.layout.placements is None:
            return local
        shape = entry.layout.global_shape
        return DTensor.from_local(
            local,
            mesh,
            dtensor_placements(entry.layout, mesh),
            run_check=False,
            shape=torch.Size(shape),
            stride=row_major_strides(shape),
        )

    def state_dict(self, mesh: DeviceMesh | None = None) -> dict[str, Any]:
        """The optimizer's state, keyed by FQN: ``{"state": {fqn: {name: tensor}}, "param_groups": [...]}``.

        Args:
            mesh: gives DTensors on this mesh instead of local tensors, for state that is sharded as its parameter.

        Raises:
            HandoffError: the mesh has other sizes than the one that the state was loaded for, or the memory was released.
        """
        if mesh is not None:
            self._check_mesh(mesh)
        state = {
            fqn: nest({entry.path: self.value_of(entry, mesh) for entry in entries.values()})
            for fqn, entries in self._manifest.by_fqn.items()
        }
        return {"state": state, "param_groups": [dict(group) for group in self.param_groups]}

    def model_state_dict(self, mesh: DeviceMesh | None = None) -> dict[str, Any]:
        """The weights, buffers and extra states that were loaded, keyed by FQN; empty unless ``model_key`` asked for them.

        Args:
            mesh: gives DTensors on this mesh instead of local tensors.

        Raises:
            HandoffError: the mesh has other sizes than the one that the weights were loaded for, or the memory was released.
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
        """The regions that the local tensor holds: ``[(region of the whole tensor, region of the local one), ...]``.

        Raises:
            KeyError: there is no such state tensor here.
        """
        return [(box.region, box.local) for box in self._tensor(fqn, name).layout.boxes]

    def global_shape(self, fqn: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor, elements. Raises KeyError: there is no such state tensor here."""
        return self._tensor(fqn, name).layout.global_shape

    def _tensor(self, fqn: str, name: str) -> PlannedTensor:
        entry = self.entries(fqn).get(name)
        if not isinstance(entry, PlannedTensor):
            raise KeyError(f"{fqn}: no state tensor {name!r} in this shard; it has {sorted(self.entries(fqn))}")
        return entry


def checked_tensor(fqn: str, entry: Entry, wanted: TensorLayout) -> PlannedTensor:
    """The entry, proven to hold the same regions as a live tensor.

    Raises:
        InstallError: it holds others, or was not saved as a tensor.
    """
    if isinstance(entry, PlannedValue):
        raise InstallError(f"{fqn}: {entry.name!r} was saved as a {type(entry.value).__name__}, not as a tensor")
    loaded = entry.layout
    if (wanted.global_shape, wanted.local_numel, wanted.boxes) != (
        loaded.global_shape,
        loaded.local_numel,
        loaded.boxes,
    ):
        what = repr(entry.name) if entry.name else "the weight"
        raise InstallError(
            f"{fqn}: {what} was loaded for {_regions(loaded)}, but the model's parameter holds {_regions(wanted)} of the "
            f"shape {wanted.global_shape} on this rank; load with the trainer's own topology"
        )
    return entry


def _regions(layout: TensorLayout) -> str:
    return " and ".join(str(box.region) for box in layout.boxes) or "nothing"
