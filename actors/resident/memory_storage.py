"""Kept state as a storage: ``shardferry+memory://NAME``. Its files are the arenas of the loaders; see `shardferry.checkpoint.kept`."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from shardferry.actors.guard import KeptRecord
from shardferry.actors.resident.kept import find, loader_of
from shardferry.actors.resident.live_source import SERVED
from shardferry.actors.resident.reread import lost
from shardferry.arena import host_identity
from shardferry.checkpoint.kept import INDEX_FILE
from shardferry.errors import CheckpointNotFound, HandoffError, SpecError, StorageError
from shardferry.handoff.loader_file import LoaderFile
from shardferry.storage.base import KIB, MIB, RangeReader, StorageTraits, copy_bytes, cut_answer, missing_file, spread
from shardferry.storage.local import LocalReader

SCHEME = "shardferry+memory://"
RECORD = "record"  # the storage option that has the record, so that a catalog brings it: of live trainers, or as it was found
_ANSWER_S = 60.0  # of a loader
_MESSAGE_BYTES = 8 * MIB  # largest answer of a loader of another node
# Of arenas of this node alone: strided boxes are copied out of the mapped arenas, and nothing else is looked at.
_HERE = StorageTraits(
    max_gap_bytes=0, max_over_read=0.0, max_request_bytes=_MESSAGE_BYTES, is_local=True, maps_files=True
)
# Of arenas of other nodes too: a question to a loader takes as long as some tens of KiB.
_AWAY = StorageTraits(max_gap_bytes=64 * KIB, max_over_read=8.0, max_request_bytes=_MESSAGE_BYTES, is_local=True)


def open_location(location: str, options: Mapping[str, Any]) -> RangeReader:
    """The storage of kept state, or of what a record tells of (`RECORD`). Raises CheckpointNotFound, SpecError."""
    if RECORD in options:
        return MemoryReader(location, options[RECORD])
    if options:
        raise SpecError(f"storage_options: {SCHEME} takes none (found {', '.join(options)})")
    name = location.removeprefix(SCHEME).strip("/")
    try:
        record, guard = find(name)
        files = ray.get(guard.files.remote(), timeout=_ANSWER_S)
    except (HandoffError, ray.exceptions.RayActorError) as error:
        raise CheckpointNotFound(f"{location}: {error}") from None
    return MemoryReader(location, replace(record, files=files))


def is_live(options: Mapping[str, Any]) -> bool:
    """Whether the options of a storage are of what live trainers hold, who go on."""
    return RECORD in options and options[RECORD].holders is not None


class MemoryReader(RangeReader):
    """Reads arenas: those of this node as files, those of other nodes through their loaders."""

    def __init__(self, location: str, record: KeptRecord) -> None:
        here = str(ray.util.get_node_ip_address())
        later = replace(record, files={name: data for name, data in record.files.items() if name != INDEX_FILE})
        traits = _HERE if set(record.nodes) == {here} else _AWAY
        super().__init__(location, traits, options={RECORD: later})
        self._record = record
        self._lock = threading.Lock()
        self._arenas: dict[str, tuple[int | None, int]] = {}  # by file: a descriptor, if it is on this node; its bytes
        self._opened = LocalReader(Path("/proc/self/fd"))  # whose files are these descriptors

    def listing(self) -> dict[str, int | None]:
        self._versions = dict.fromkeys(self._record.files, self._record.stage)
        return {name: len(data) for name, data in sorted(self._record.files.items())}

    def size(self, path: str) -> int:
        if path in self._record.files:
            return len(self._record.files[path])
        return self._arena(path)[1]

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        nbytes = sum(map(len, buffers))
        if path in self._record.files:
            data = memoryview(self._record.files[path])[byte_offset : byte_offset + nbytes]
        else:
            descriptor = self._arena_with(path, byte_offset, byte_offset + nbytes)
            if descriptor is not None:
                self._opened.read_into(str(descriptor), byte_offset, *buffers)
                return
            data = self._fetch(path, byte_offset, nbytes)
        if len(data) != nbytes:
            raise cut_answer(f"{self.location}/{path}", byte_offset, byte_offset + nbytes, num_bytes=len(data))
        if len(buffers) == 1:
            copy_bytes(buffers[0], data)
        else:
            spread(data, buffers)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        descriptor = self._arena_with(path, start, stop)
        if descriptor is not None:
            return self._opened.mapped(str(descriptor), start, stop)
        window = memoryview(bytearray(stop - start))  # it is on this node, but in another container
        for at in range(start, stop, _MESSAGE_BYTES):
            part = self._fetch(path, at, min(_MESSAGE_BYTES, stop - at))
            copy_bytes(window[at - start : at - start + len(part)], part)
        return window

    def close(self) -> None:
        self._opened.close()
        with self._lock:
            for descriptor, _ in self._arenas.values():
                if descriptor is not None:
                    os.close(descriptor)
            self._arenas.clear()

    def _arena_with(self, path: str, start: int, stop: int) -> int | None:
        """The descriptor of an arena that has these bytes, if it is on this node. Raises StorageError."""
        descriptor, size = self._arena(path)
        if stop > size:
            raise cut_answer(f"{self.location}/{path}", start, stop, num_bytes=size - start)
        return descriptor

    def _arena(self, path: str) -> tuple[int | None, int]:
        """Raises StorageError: its loader has died."""
        with self._lock:
            if path not in self._arenas:
                file, nbytes = self._ask(path, "memory_file")
                self._arenas[path] = (_descriptor(file), nbytes)
            return self._arenas[path]

    def _fetch(self, path: str, byte_offset: int, nbytes: int) -> memoryview:
        return memoryview(self._ask(path, "read", byte_offset, nbytes))

    def _ask(self, path: str, method: str, *arguments: int) -> Any:
        """The answer of the loader that has an arena. Raises StorageError."""
        rank, part = _rank_and_part(path, self.location)
        try:
            if self._record.holders is not None:
                call = self._record.holders[rank].__ray_call__
                asked = call.remote(SERVED[method], self._record.stage, part, *arguments)
            else:
                asked = getattr(loader_of(self._record, rank), method).remote(part, *arguments)
            return ray.get(asked, timeout=_ANSWER_S)
        except HandoffError as error:
            raise StorageError(str(error)) from None
        except ray.exceptions.RayActorError:
            raise StorageError(str(lost(self._record, rank))) from None


def _rank_and_part(path: str, location: str) -> tuple[int, int]:
    kind, _, numbers = path.partition("-")
    rank, _, part = numbers.partition("-")
    if kind != "arena" or not (rank.isdigit() and part.isdigit()):
        raise missing_file(f"{location}/{path}")
    return int(rank), int(part)


def _descriptor(file: LoaderFile) -> int | None:
    """Of an arena, if it is on this node."""
    if file.host != host_identity():
        return None
    with file.opened() as descriptor:
        return os.dup(descriptor)
