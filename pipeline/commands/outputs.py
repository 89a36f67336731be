"""Where a command writes its reports: a path, any URL, or standard output. What can't be written is refused before the work."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from shardferry.errors import SpecError, StorageError
from shardferry.storage.obstore import open_store, taken_place
from shardferry.storage.retry import error_text

STDOUT = "-"


@dataclass(frozen=True, slots=True)
class Output:
    """One file to write."""

    option: str  # of the command line: "--report"
    where: str  # as it was given: a path, a URL, or `STDOUT`
    storage_options: Mapping[str, Any]  # of a URL

    @classmethod
    def of(cls, option: str, where: str | None, *, storage_options: Mapping[str, Any]) -> Output | None:
        """Check an option's value; None where the option was not given.

        Args:
            storage_options: of a URL; see docs/storage.md.

        Raises:
            SpecError: the directory of a path is missing, or no client for the URL is installed.
        """
        if where is None:
            return None
        output = cls(option, where, storage_options)
        if where != STDOUT:
            output._check()
        return output

    @property
    def is_stdout(self) -> bool:
        """Whether it goes to standard output."""
        return self.where == STDOUT

    def refuse_stdout(self) -> None:
        """Raises SpecError: it goes to standard output."""
        if self.is_stdout:
            raise SpecError(f"{self.option} -: only run --report can be printed; give a path or a URL")

    def write(self, text: str) -> None:
        """Write the text, and print on stderr where it is. Standard output gets one line.

        Raises:
            StorageError: it can't be written.
        """
        if self.is_stdout:
            print(text)
            return
        path = _local(self.where)
        try:
            if path is None:
                self._upload(text.encode())
            else:
                path.write_text(text, encoding="utf-8")
        except Exception as error:  # each client has its own
            raise StorageError(f"{self.option} {self.where}: can't be written: {error_text(error)}") from error
        print(f"{self.option.removeprefix('--')}: {self.where if path is None else path.absolute()}", file=sys.stderr)

    def _check(self) -> None:
        path = _local(self.where)
        if path is not None:
            if not path.absolute().parent.is_dir():
                raise SpecError(f"{self.option} {self.where}: its directory does not exist; make it first")
            if path.is_dir():
                raise SpecError(f"{self.option} {self.where}: is a directory; give the path of a file")
        elif self._store() is None:
            self._filesystem()

    def _upload(self, data: bytes) -> None:
        store = self._store()
        if store is None:
            filesystem, path = self._filesystem()
            filesystem.pipe_file(path, data)
        else:
            import obstore

            obstore.put(store, self.where.rpartition("/")[2], data)

    def _store(self) -> Any:
        """The store of the URL's directory, where obstore writes it; else None."""
        directory = self.where.rpartition("/")[0]
        options = dict(self.storage_options)
        place = taken_place(directory, options.pop("client", None))
        return None if place is None else open_store(directory, place, options)

    def _filesystem(self) -> tuple[Any, str]:
        options = {name: value for name, value in self.storage_options.items() if name != "client"}
        try:
            from fsspec.core import url_to_fs

            filesystem, path = url_to_fs(self.where, **options)
        except Exception as error:  # each backend has its own
            raise SpecError(f"{self.option} {self.where}: can't be opened: {error_text(error)}") from error
        return filesystem, str(path)


def page_output(where: str | None, storage_options: Mapping[str, Any] | None = None) -> Output | None:
    """Where an HTML page goes; None where ``--html`` was not given.

    Raises:
        SpecError: as `Output.of`; standard output is asked for; plotly, which draws the page, is not installed.
    """
    output = Output.of("--html", where, storage_options=storage_options or {})
    if output is not None:
        output.refuse_stdout()
        if importlib.util.find_spec("plotly") is None:
            raise SpecError("--html: needs plotly, which is not installed: pip install 'shardferry[html]'")
    return output


def options_beside(location: str | None, storage_options: Mapping[str, Any], where: str | None) -> Mapping[str, Any]:
    """The storage options of a checkpoint where an output goes to the same kind of storage; else none."""
    kinds = [(url or "").partition("://")[:2] for url in (location, where)]
    return storage_options if kinds[0] == kinds[1] and kinds[0][1] else {}


def write_all(outputs: Sequence[tuple[Output | None, Callable[[], str]]]) -> None:
    """Write several outputs; one that fails doesn't keep the others from being written.

    Args:
        outputs: where, and what; None: not asked for.

    Raises:
        StorageError: the first failure.
    """
    failures: list[StorageError] = []
    for output, text in outputs:
        if output is not None:
            try:
                output.write(text())
            except StorageError as error:
                failures.append(error)
    if failures:
        raise failures[0]


def _local(where: str) -> Path | None:
    """The path of a local file; None for the URL of another storage."""
    scheme, separator, _ = where.partition("://")
    if not separator:
        return Path(where)
    return Path(unquote(urlsplit(where).path)) if scheme == "file" else None
