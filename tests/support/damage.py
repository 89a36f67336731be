"""Ways in which a checkpoint can be wrong. Each takes a whole checkpoint's directory and spoils it in place."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

KEY = "optim.state.even.weight.exp_avg"


def edit_metadata(path: Path, edit: Callable[[Metadata], Any]) -> None:
    """Change the metadata as torch's own classes."""
    file = path / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    edit(metadata)
    file.write_bytes(pickle.dumps(metadata))


def index_of(metadata: Metadata, key: str = KEY, chunk: int = 0) -> MetadataIndex:
    """Where the storage table has a chunk."""
    offsets = metadata.state_dict_metadata[key].chunks[chunk].offsets
    return next(index for index in metadata.storage_data if index.fqn == key and index.offset == offsets)


def replace_info(path: Path, **changes: Any) -> None:
    """Change what the storage table says of one chunk."""

    def edit(metadata: Metadata) -> None:
        index = index_of(metadata)
        metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)

    edit_metadata(path, edit)


def file_of(path: Path) -> Path:
    """The file that holds the chunk."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    return path / metadata.storage_data[index_of(metadata)].relative_path


def no_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def cut_metadata(path: Path) -> None:
    data = (path / ".metadata").read_bytes()
    (path / ".metadata").write_bytes(data[: len(data) // 2])


def random_metadata(path: Path) -> None:
    (path / ".metadata").write_bytes(os.urandom(4096))


class _Command:
    """A pickle that runs a command when a careless reader opens it."""

    def __init__(self, command: str) -> None:
        self._command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self._command,)


def forbidden_global(path: Path) -> None:
    """Opening the metadata carelessly makes the file `executed`."""

    def edit(metadata: Metadata) -> None:
        metadata.planner_data["x"] = _Command(f"touch {path / 'executed'}")

    edit_metadata(path, edit)


def missing_file(path: Path) -> None:
    file_of(path).unlink()


def short_file(path: Path) -> None:
    file = file_of(path)
    os.truncate(file, file.stat().st_size // 2)


def hole(path: Path) -> None:
    edit_metadata(path, lambda metadata: metadata.state_dict_metadata[KEY].chunks.pop(1))


def outside_file(path: Path) -> None:
    replace_info(path, offset=10**9)


def escaping_path(path: Path) -> None:
    replace_info(path, relative_path="../elsewhere/__0_0.distcp")


def header_outside_item(path: Path) -> None:
    """The item's own description claims more elements than the item has bytes."""
    metadata = pickle.loads((path / ".metadata").read_bytes())
    info = metadata.storage_data[index_of(metadata)]
    with (path / info.relative_path).open("r+b") as file:
        file.seek(info.offset)
        item = file.read(info.length)
        with zipfile.ZipFile(io.BytesIO(item)) as archive:
            description = archive.read("archive/data.pkl")
        rows, columns = metadata.state_dict_metadata[KEY].chunks[0].sizes
        # BININT1 rows, BININT1 columns, TUPLE2; BININT1 columns: the strides follow the sizes.
        sizes = bytes([ord("K"), rows, ord("K"), columns, 0x86])
        where = description.index(sizes) + len(sizes)
        start = item.index(description)
        at = description.index(bytes([ord("K"), columns]), where)
        file.seek(info.offset + start + at)
        file.write(bytes([ord("K"), 255]))


def too_big(path: Path) -> None:
    """A tensor of 8 TiB in a sparse file: whole, as far as the metadata tells."""
    rows, columns = 1 << 20, 1 << 21

    def edit(metadata: Metadata) -> None:
        index = index_of(metadata)
        saved = metadata.state_dict_metadata[KEY]
        saved.size = torch.Size((rows, columns))
        del saved.chunks[1:]
        saved.chunks[0].offsets, saved.chunks[0].sizes = torch.Size((0, 0)), torch.Size((rows, columns))
        info = metadata.storage_data.pop(index)
        metadata.storage_data[MetadataIndex(KEY, torch.Size((0, 0)))] = dataclasses.replace(
            info, length=rows * columns * 4 + 4096
        )
        other = metadata.state_dict_metadata[KEY.replace("exp_avg", "exp_avg_sq")]
        other.size, other.chunks = saved.size, saved.chunks
        second = MetadataIndex(KEY.replace("exp_avg", "exp_avg_sq"), torch.Size((0, 0)))
        metadata.storage_data[second] = metadata.storage_data[MetadataIndex(KEY, torch.Size((0, 0)))]
        os.truncate(path / info.relative_path, info.offset + rows * columns * 4 + 4096)

    edit_metadata(path, edit)
