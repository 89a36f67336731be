"""Hand an arena on a GPU over to a process that uses the same GPU, which maps the loader's memory."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Self

import torch

from shardferry.arena import Arena, DeviceArena, gpu_identity
from shardferry.errors import HandoffError
from shardferry.handoff.loader_file import LoaderFile, take
from shardferry.handoff.transport import Recipient, Transport


@dataclass(frozen=True, slots=True)
class CudaIpc(Transport):
    """One IPC handle for the whole arena. Opening it takes O(1) time and copies nothing, if the arena is exclusive.

    The trainer of an exclusive arena uses the loader's own memory: the loader must live until the trainer has let it go.
    Openers of any other arena get a copy on the GPU, and need the loader no more.

    torch's handle names an interprocess event, recorded when the handle was made; the opener's stream waits for it. torch also
    counts openers in a file in ``/dev/shm``, which stays there if the loader is killed.
    """

    gpu: str  # see `shardferry.arena.gpu_identity`
    ticket: LoaderFile  # of the arena's ticket
    exported: tuple[Any, ...]  # see `_export`
    exclusive: bool

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        gpu = gpu_identity(arena.device)
        return recipient.same_host and isinstance(arena, DeviceArena) and gpu is not None and gpu == recipient.gpu

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        """Export the arena. This process must live until it was opened, and while the trainer of an exclusive one uses it."""
        gpu = gpu_identity(arena.device)
        if gpu is None or not isinstance(arena, DeviceArena):
            raise HandoffError(
                "cuda_ipc needs an arena on the trainer's GPU, this one is in host memory; "
                "use device: cuda and a loader on that GPU, or handoff.transport: auto"
            )
        return cls(gpu, LoaderFile.of(arena.ticket), _export(arena.as_bytes()), exclusive)

    def open(self) -> torch.Tensor:
        with self.ticket.opened() as descriptor:
            if self.ticket.pid == os.getpid():
                raise HandoffError("CUDA maps no memory of a process into itself; use in_process")
            device = _visible(self.gpu)
            if self.exclusive:
                take(descriptor)
                return _import(self.exported, device)
            own = _import(self.exported, device).clone()
            torch.cuda.current_stream(device).synchronize()  # from here on the loader may end
            return own


def _visible(gpu: str) -> torch.device:
    """The device in this process that is a GPU. Raises HandoffError."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    found = next((device for device in devices if gpu_identity(device) == gpu), None)
    if found is None:
        raise HandoffError(
            f"this shard is on the GPU {gpu}, which is none of the {len(devices)} GPUs that the trainer sees; "
            "start the trainer on the loader's GPU, or use handoff.transport: object_store"
        )
    return found


# torch has no public way to export memory without a queue of its own. Its private one is used here alone.


def _export(memory: torch.Tensor) -> tuple[Any, ...]:
    """What `_import` needs: device index, handle, bytes, byte offset, two of the counter, two of the event. Raises HandoffError."""
    try:
        exported: tuple[Any, ...] = memory.untyped_storage()._share_cuda_()
    except RuntimeError as error:
        raise HandoffError(f"CUDA can't export this arena ({error}); use handoff.transport: object_store") from error
    return exported


def _import(exported: tuple[Any, ...], device: torch.device) -> torch.Tensor:
    """The exported memory as one dimension of uint8; the current stream waits for the exporter's. Raises HandoffError."""
    try:
        with torch.cuda.device(device):
            storage = torch.UntypedStorage._new_shared_cuda(device.index, *exported[1:])
            return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
    except RuntimeError as error:
        raise HandoffError(
            f"CUDA can't map the memory of this shard's loader ({error}); use handoff.transport: object_store"
        ) from error
