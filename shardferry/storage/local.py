"""Read byte ranges of local files: positioned reads in place, memory-mapped windows for strided ones."""

from __future__ import annotations

import mmap
import os
import threading
from pathlib import Path

from shardferry.errors import CheckpointNotFound, StorageError
from shardferry.storage.base import Window
from shardferry.storage.runs import Runs


class LocalReader:
    """Files of a directory. Each file is opened once and stays open until ``close``."""

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            what = "is a file, not a directory" if directory.exists() else "no such directory"
            raise CheckpointNotFound(f"{directory}: {what}; give the directory that holds the checkpoint's .metadata")
        self.location = str(directory)
        self._directory = directory
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def listing(self) -> dict[str, int | None]:
        with os.scandir(self._directory) as entries:
            files = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        return dict(sorted(files.items()))

    def size(self, path: str) -> int:
        return os.fstat(self._descriptor(path)).st_size

    def read_into(self, path: str, byte_offset: int, buffer: memoryview) -> None:
        descriptor = self._descriptor(path)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], byte_offset + done)
            except OSError as error:
                raise StorageError(
                    f"{self.location}/{path}: reading at byte {byte_offset + done} failed: {error}"
                ) from error
            if count == 0:
                raise StorageError(
                    f"{self.location}/{path}: ends at byte {self.size(path)}, "
                    f"but bytes {byte_offset} to {byte_offset + len(buffer)} are needed; the file is cut"
                )
            done += count

    def window(self, path: str, runs: Runs) -> Window:
        # A page beyond the file's end would kill the process (SIGBUS): look at the size first.
        start, stop, size = runs.start, runs.stop, self.size(path)
        if stop > size:
            raise StorageError(f"{self.location}/{path}: has {size} bytes, but bytes {start} to {stop} are needed")
        first_page = start - start % mmap.ALLOCATIONGRANULARITY
        # The mapping goes with its last view: closing it by hand would fail while an array still looks at it.
        pages = mmap.mmap(self._descriptor(path), stop - first_page, mmap.MAP_SHARED, mmap.PROT_READ, offset=first_page)
        # Only the pages that are looked at are read, once each.
        return Window(memoryview(pages)[start - first_page :], num_requests=1, bytes_requested=runs.nbytes)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    def _descriptor(self, path: str) -> int:
        with self._lock:
            descriptor = self._files.get(path)
            if descriptor is None:
                descriptor = self._files[path] = self._open(path)
            return descriptor

    def _open(self, path: str) -> int:
        try:
            return os.open(self._directory / path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise StorageError(
                f"{self.location}/{path}: the file is missing, but the metadata says that it holds saved data; "
                "restore it or use another checkpoint"
            ) from None
        except OSError as error:
            raise StorageError(f"{self.location}/{path}: can't be opened: {error}") from error
