"""What the arenas of loaders hold, as the index of a checkpoint; see `shardferry.checkpoint.kept`."""

from __future__ import annotations

from collections.abc import Sequence

from shardferry.checkpoint.kept import KeptBox, KeptIndex, arena_file
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.load_plan import Entry, Manifest, PlannedTensor
from shardferry.state_dicts import ParamGroup


def index_of(ranks: Sequence[Sequence[Manifest]]) -> KeptIndex:
    """The index of what ranks have loaded.

    Args:
        ranks: each rank's manifests, one for each of its parts.
    """
    index = KeptIndex()
    for part, manifests in enumerate(zip(*ranks, strict=True)):
        for manifest in manifests:
            _add(index, manifest, arena_file(manifest.world_rank, part))
        optimizer = _path(manifests[0].request.optimizer_key)
        if manifests[0].request.optimizer_key is not None:
            index.add_value([*optimizer, "param_groups"], _joined([m.param_groups for m in manifests]))
        for manifest in manifests:
            for name, value in manifest.extras.items():
                index.add_value([*optimizer, name], value)
    return index


def _path(key: str | None) -> list[str]:
    return key.split(".") if key else []


def _add(index: KeptIndex, manifest: Manifest, file: str) -> None:
    request = manifest.request
    entries: list[Entry] = [*manifest.tensors, *manifest.values]
    for entry in entries:
        if entry.section == "model":
            path: list[str | int] = [*_path(request.model_key), entry.fqn]
        else:
            path = [*_path(request.optimizer_key), "state", entry.fqn, *entry.path]
        if isinstance(entry, PlannedTensor):
            if (
                entry.chunk is not None
            ):  # each rank attaches to its own; another topology could not cut it, and lacks it
                continue
            boxes = _boxes(entry.layout, file, entry.arena_offset, entry.dtype.itemsize)
            index.add_tensor(path, entry.dtype, entry.layout.global_shape, boxes)
        else:
            index.add_value(path, entry.value)


def _boxes(layout: TensorLayout, file: str, arena_offset: int, itemsize: int) -> list[KeptBox]:
    found = []
    for box in layout.boxes:
        offset, strides = layout.destination(box)
        found.append(KeptBox(box.region, file, arena_offset + offset * itemsize, strides))
    return found


def _joined(ranks: Sequence[Sequence[ParamGroup]]) -> list[dict[str, object]]:
    """The param groups of all ranks: each lists the FQNs of its own parameters."""
    joined: list[dict[str, object]] = []
    for place in range(max(map(len, ranks))):
        groups = [rank[place] for rank in ranks if place < len(rank)]
        names = dict.fromkeys(fqn for group in groups for fqn in group.get("params", ()))
        joined.append({**groups[0], "params": list(names)})
    return joined
