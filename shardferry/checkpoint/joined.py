"""Join two catalogs: that of a checkpoint, and that of another one which has the weights. Everything after plans and reads one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from shardferry.checkpoint.catalog import NO_FILE, Catalog
from shardferry.state_dicts import WEIGHTS
from shardferry.storage.joined import weights_file

T = TypeVar("T")


def join_catalogs(catalog: Catalog, weights: Catalog) -> Catalog:
    """One catalog of both checkpoints; keys, paths and files of the second begin with `WEIGHTS`.

    ::

        ckpt/optimizer   optim.state.w.exp_avg   __0_0.distcp
        ckpt/model       model.w                 __0_0.distcp     <model_location>.model.w   <model_location>/__0_0.distcp
    """
    num_files, num_chunks = len(catalog.files), catalog.num_chunks
    tensors = {
        _key(key): replace(
            tensor,
            key=_key(key),
            chunks=range(tensor.chunks.start + num_chunks, tensor.chunks.stop + num_chunks),
            boxes_start=tensor.boxes_start + len(catalog.box_sizes),
        )
        for key, tensor in weights.tensors.items()
    }
    objects = {_key(key): replace(o, key=_key(key), file=o.file + num_files) for key, o in weights.objects.items()}
    paths = None
    if catalog.paths is not None:
        keys = [*weights.tensors, *weights.objects] if weights.paths is None else weights.paths
        paths = {**catalog.paths, **{_key(key): (WEIGHTS, *weights.path(key)) for key in keys}}
    chunk_file = np.where(weights.chunk_file == NO_FILE, NO_FILE, weights.chunk_file + num_files)
    return replace(
        catalog,
        files=(*catalog.files, *map(weights_file, weights.files)),
        tensors={**catalog.tensors, **tensors},
        objects={**catalog.objects, **objects},
        paths=paths,
        chunk_file=np.concatenate([catalog.chunk_file, chunk_file.astype(catalog.chunk_file.dtype)]),
        chunk_byte_offset=np.concatenate([catalog.chunk_byte_offset, weights.chunk_byte_offset]),
        chunk_byte_length=np.concatenate([catalog.chunk_byte_length, weights.chunk_byte_length]),
        box_offsets=np.concatenate([catalog.box_offsets, weights.box_offsets]),
        box_sizes=np.concatenate([catalog.box_sizes, weights.box_sizes]),
        chunk_format=np.concatenate([catalog.chunk_format, weights.chunk_format + np.int16(len(catalog.formats))]),
        formats=(*catalog.formats, *weights.formats),
        file_bytes={**catalog.file_bytes, **_of_files(weights.file_bytes)},
        file_versions={**catalog.file_versions, **_of_files(weights.file_versions)},
        stale="; ".join(filter(None, (catalog.stale, weights.stale))),
        problems=(*catalog.problems, *(f"{weights.location}: {problem}" for problem in weights.problems)),
        model_location=weights.location,
    )


def _key(key: str) -> str:
    return f"{WEIGHTS}.{key}"


def _of_files(facts: Mapping[str, T]) -> dict[str, T]:
    return {weights_file(name): fact for name, fact in facts.items()}
