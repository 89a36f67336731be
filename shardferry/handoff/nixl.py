"""Hand an arena over through NIXL: the trainer reads the loader's memory, over RDMA, NVLink, shared memory or TCP, as UCX finds.

The package ``nixl`` is NVIDIA's Inference Xfer Library, by which Ray's direct transport moves tensors too. It is optional.
Each arena has an agent of its own in the loader; each opening has one in the trainer, which ends with it.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch

from shardferry.arena import Arena, gpu_identity
from shardferry.errors import HandoffError
from shardferry.handoff.transport import Recipient, Route, Transport

_POLL_S = 0.0005
_SERVING: dict[str, tuple[Any, torch.Tensor]] = {}  # by agent's name: what lives as long as the arena


@dataclass(frozen=True, slots=True)
class Nixl(Transport):
    """What a trainer needs to read the arena. Each opener gets a copy: on its own GPU where the arena is on one, else on the host."""

    pid: int  # of the loader
    agent: bytes = field(repr=False)  # metadata: how to reach it
    place: bytes = field(repr=False)  # of the arena in its memory
    nbytes: int
    gpu: str | None  # of the arena, see `shardferry.arena.gpu_identity`
    route: Route = field(default_factory=Route)

    @classmethod
    def can_carry(cls, arena: Arena, recipient: Recipient) -> bool:
        return True

    @classmethod
    def require(cls) -> None:
        _package()

    @classmethod
    def from_arena(cls, arena: Arena, *, exclusive: bool) -> Self:
        """Register the arena's memory until the arena is gone. This process must live until it was opened."""
        memory = arena.as_bytes()
        agent = _new_agent()
        descriptors = agent.register_memory([memory])
        _SERVING[agent.name] = agent, memory
        weakref.finalize(arena, _SERVING.pop, agent.name, None).atexit = False
        return cls(
            os.getpid(),
            agent.get_agent_metadata(),
            agent.get_serialized_descs(descriptors.trim()),
            arena.nbytes,
            gpu_identity(arena.device),
        )

    def along(self, route: Route) -> Self:
        return replace(self, route=route)

    def open(self) -> torch.Tensor:
        on_gpu = self.gpu is not None and torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        memory = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        agent = _new_agent()
        try:
            self._read_into(memory, agent)
        except HandoffError:
            raise
        except Exception as error:  # NIXL's have no class in common
            raise self.route.ended(self.pid, f"NIXL: {error or type(error).__name__}") from error
        return memory

    def _read_into(self, memory: torch.Tensor, agent: Any) -> None:
        deadline = time.monotonic() + self.route.trainers_s
        here = agent.register_memory([memory])
        loader = agent.add_remote_agent(self.agent)
        reading = agent.initialize_xfer("READ", here.trim(), agent.deserialize_descs(self.place), loader.decode())
        try:
            state = agent.transfer(reading)
            while state == "PROC":
                if time.monotonic() >= deadline:
                    raise self.route.late(self.pid)
                time.sleep(_POLL_S)
                state = agent.check_xfer_state(reading)
            if state != "DONE":
                raise ConnectionError(f"the transfer has failed: {state}")
        finally:
            agent.release_xfer_handle(reading)
            agent.deregister_memory(here)


def _package() -> Any:
    """The optional package. Raises HandoffError: it is not installed in this process."""
    try:
        from nixl import _api
    except ImportError as error:
        raise HandoffError(
            f"handoff.transport nixl needs the package nixl on loaders and trainers; process {os.getpid()} on "
            f"{os.uname().nodename} has none ({error}): pip install nixl, or choose another transport"
        ) from error
    return _api


def _new_agent() -> Any:
    api = _package()
    if "NIXL_LOG_LEVEL" not in os.environ:
        logging.getLogger("nixl").setLevel(logging.WARNING)  # else it writes two lines for each agent to the output
    return api.nixl_agent(f"shardferry-{uuid.uuid4()}", api.nixl_agent_config(backends=["UCX"]))
