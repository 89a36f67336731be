"""Live trainers as a source: what they hold is copied into arenas of their processes, and read from there."""

from __future__ import annotations

from typing import Any

from shardferry.arena import HostArena
from shardferry.config import PartRequests
from shardferry.handoff.loader_file import LoaderFile
from shardferry.hold_live import hold
from shardferry.optimizer.parts import live_parts
from shardferry.plan.load_plan import Manifest

_ARENAS: dict[str, list[HostArena]] = {}  # of this process, by the stage's name


def hold_state(trainer: Any, stage: str, rank: int, world_size: int, requests: PartRequests) -> list[Manifest]:
    """Copy what the trainer's method ``shardferry_target`` returns; one manifest for each part. Raises InstallError, LayoutError."""
    held = [
        hold(part.live, requests.of(part.key, with_weights=part.with_weights), world_rank=rank, world_size=world_size)
        for part in live_parts(*trainer.shardferry_target())
    ]
    _ARENAS[stage] = [arena for _, arena in held]
    for arena in _ARENAS[stage]:
        arena.freeze()
    return [manifest for manifest, _ in held]


def memory_file(_trainer: Any, stage: str, part: int) -> tuple[LoaderFile, int]:
    """As `shardferry.actors.loader.Loader.memory_file`."""
    arena = _ARENAS[stage][part]
    return LoaderFile.of(arena), arena.nbytes


def read(_trainer: Any, stage: str, part: int, byte_offset: int, nbytes: int) -> Any:
    """As `shardferry.actors.loader.Loader.read`."""
    return _ARENAS[stage][part].as_bytes().numpy()[byte_offset : byte_offset + nbytes]


def release(_trainer: Any, stage: str) -> None:
    """Give the memory back."""
    _ARENAS.pop(stage, None)


SERVED = {"memory_file": memory_file, "read": read}
