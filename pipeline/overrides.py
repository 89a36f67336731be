"""Change a stage's spec by what the command line says: another mesh, another number of ranks, a storage's bandwidth."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from shardferry.errors import SpecError
from shardferry.schemas.stage_config import StageConfig

SCALED_AXIS = "dp_shard"  # by --world-size, where the mesh has it; else the outermost


def override(
    config: StageConfig, *, mesh: str | None = None, world_size: int | None = None, storage_bandwidth: str | None = None
) -> StageConfig:
    """The spec with these changes.

    Args:
        mesh: ``dp_shard=256,tp=8``, outermost first, instead of the spec's.
        world_size: as many ranks: the axis ``dp_shard``, or the outermost one where there is none, gets as long as it takes.
        storage_bandwidth: bytes a second with a unit, ``100GB``.

    Raises:
        SpecError: text that is no mesh, a world size that the other axes don't divide, or whatever is wrong with the new spec.
    """
    if mesh is None and world_size is None and storage_bandwidth is None:
        return config
    values = config.model_dump()
    if storage_bandwidth is not None:
        values["read"]["storage_bandwidth"] = bytes_a_second("--storage-bandwidth", storage_bandwidth)
    if mesh is not None or world_size is not None:
        if config.topology is None:
            raise SpecError("topology: missing; --mesh and --world-size change the mesh of a spec that has placements")
        axes = config.topology.mesh if mesh is None else parse_mesh(mesh)
        values["topology"]["mesh"] = (
            axes if world_size is None else _of_size(axes, world_size, is_given=mesh is not None)
        )
    return StageConfig.from_values(values, source="the spec with the options given")


def bytes_a_second(option: str, text: str | None) -> int | None:
    """``"100GB"``. Raises SpecError."""
    if text is None:
        return None
    try:
        found = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise SpecError(f"{option} {text}: is no number of bytes; write 10GB, 400MiB, ...") from None
    if found < 1:
        raise SpecError(f"{option} {text}: is nothing")
    return int(found)


def parse_mesh(text: str) -> dict[str, Any]:
    """``"dp_shard=256,tp=8"``. Raises SpecError; whether the axes are those of the placements is for the spec to say."""
    axes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not (name and equals and size.isdecimal()):
            raise SpecError(
                f"--mesh {text}: {part.strip()!r} is no axis; write name=size,name=size with the outermost first"
            )
        if name in axes:
            raise SpecError(f"--mesh {text}: the axis {name!r} stands twice")
        axes[name] = int(size)
    return axes


def _of_size(axes: dict[str, int], world_size: int, *, is_given: bool) -> dict[str, int]:
    num_ranks = math.prod(axes.values())
    if is_given:
        if num_ranks != world_size:
            raise SpecError(f"--mesh makes {num_ranks} ranks, --world-size says {world_size}; give one of them")
        return axes
    scaled = SCALED_AXIS if SCALED_AXIS in axes else next(iter(axes))
    others = num_ranks // axes[scaled]
    if world_size % others:
        rest = " x ".join(f"{name}={size}" for name, size in axes.items() if name != scaled)
        raise SpecError(
            f"--world-size {world_size}: is no multiple of {others}, the ranks of the axes that stay ({rest}) while {scaled} is "
            "made longer or shorter; give another number, or all axes with --mesh"
        )
    return {**axes, scaled: world_size // others}
