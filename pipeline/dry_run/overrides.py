"""Apply the options of the command line to a stage's spec: mesh, number of ranks, bandwidth of the storage."""

from __future__ import annotations

import math
from typing import Any

from pydantic import ByteSize, TypeAdapter, ValidationError

from shardferry.errors import SpecError
from shardferry.schemas.stage_config import StageConfig

SCALED_AXIS = "dp_shard"  # resized by --world-size; if the mesh doesn't have it, the outermost axis is


def override(
    config: StageConfig, *, mesh: str | None = None, world_size: int | None = None, storage_bandwidth: str | None = None
) -> StageConfig:
    """The spec with these options applied.

    Args:
        mesh: ``dp_shard=256,tp=8``, outermost first; replaces the spec's mesh.
        world_size: number of ranks; the size of the axis ``dp_shard``, or of the outermost one, is changed to match.
        storage_bandwidth: bytes per second with a unit, ``100GB``.

    Raises:
        SpecError: text that is not a mesh, a world size that the other axes don't divide, or a new spec that is not valid.
    """
    if mesh is None and world_size is None and storage_bandwidth is None:
        return config
    values = config.model_dump()
    if storage_bandwidth is not None:
        values["read"]["storage_bandwidth"] = parse_bandwidth("--storage-bandwidth", storage_bandwidth)
    if mesh is not None or world_size is not None:
        if config.topology is None:
            raise SpecError("topology: missing; --mesh and --world-size change the mesh of a spec that has placements")
        axes = config.topology.mesh if mesh is None else parse_mesh(mesh)
        values["topology"]["mesh"] = (
            axes if world_size is None else _of_size(axes, world_size, is_given=mesh is not None)
        )
    return StageConfig.from_values(values, source="the spec with the options given")


def parse_bandwidth(option: str, text: str) -> int:
    """Bytes per second of ``"100GB"``. Raises SpecError: ``text`` is not a positive number of bytes."""
    try:
        found = TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        raise SpecError(f"{option} {text}: is not a number of bytes; write 10GB, 400MiB, ...") from None
    if found < 1:
        raise SpecError(f"{option} {text}: must be at least 1 byte per second")
    return int(found)


def parse_mesh(text: str) -> dict[str, Any]:
    """Axis names and sizes of ``"dp_shard=256,tp=8"``. Whether placements use these axes is checked with the whole spec.

    Raises:
        SpecError: ``text`` is not written so, or has an axis twice.
    """
    axes: dict[str, Any] = {}
    for part in text.split(","):
        name, equals, size = (piece.strip() for piece in part.partition("="))
        if not (name and equals and size.isdecimal()):
            raise SpecError(
                f"--mesh {text}: {part.strip()!r} is not an axis; write name=size,name=size with the outermost first"
            )
        if name in axes:
            raise SpecError(f"--mesh {text}: the axis {name!r} is given twice")
        axes[name] = int(size)
    return axes


def _of_size(axes: dict[str, int], world_size: int, *, is_given: bool) -> dict[str, int]:
    num_ranks = math.prod(axes.values())
    if is_given:
        if num_ranks != world_size:
            raise SpecError(f"--mesh makes {num_ranks} ranks, --world-size says {world_size}; give only one of them")
        return axes
    scaled = SCALED_AXIS if SCALED_AXIS in axes else next(iter(axes))
    others = num_ranks // axes[scaled]
    if world_size % others:
        rest = " x ".join(f"{name}={size}" for name, size in axes.items() if name != scaled)
        raise SpecError(
            f"--world-size {world_size}: is not a multiple of {others}, the ranks of the other axes ({rest}); only the size of "
            f"{scaled} is changed; give another number, or all axes with --mesh"
        )
    return {**axes, scaled: world_size // others}
