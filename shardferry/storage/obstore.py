"""Read byte ranges of object stores and web servers through obstore, a native client (Rust's ``object_store``).

Its bodies arrive outside of Python, and are copied once, into the memory that they are for. Each request is sent once:
trying again is for `shardferry.storage.retry` alone, so that the attempts of two don't multiply.
"""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from shardferry.errors import CheckpointNotFound, MissingFile, SpecError, StorageError
from shardferry.storage.base import copy_bytes, missing_file, not_mapped, written_again
from shardferry.storage.obstore_errors import storage_error
from shardferry.storage.obstore_options import StoreOptions, StorePlace, place_of, split_options
from shardferry.storage.traits import OBJECT_STORE, WEB_SERVER, StorageTraits

if TYPE_CHECKING:
    from obstore import GetOptions, GetResult, ObjectMeta
    from obstore.store import ObjectStore

T = TypeVar("T")

_PIECE_BYTES = 1024 * 1024  # of a body, copied while the rest is on its way


class NativeReader:
    """Files of a directory of an object store or a web server."""

    def __init__(self, store: ObjectStore, location: str, traits: StorageTraits) -> None:
        self.location = location
        self.traits = traits
        self._store = store
        self._found: dict[str, ObjectMeta] = {}
        self._answered: dict[str, str | None] = {}  # versions, as the first answer with bytes of the file had it
        self._expected: Mapping[str, str] = {}
        self._lock = threading.Lock()

    def listing(self) -> dict[str, int | None]:
        import obstore

        if not self.traits.has_listing:
            raise StorageError(f"{self.location}: a web server doesn't list its files")
        try:
            found = self._call(lambda: obstore.list_with_delimiter(self._store)["objects"], "", "can't be listed")
        except MissingFile:
            raise CheckpointNotFound(f"{self.location}: no such bucket, or it may not be seen") from None
        if not found:
            raise CheckpointNotFound(f"{self.location}: no such directory, or nothing in it")
        with self._lock:
            self._found = {meta["path"].rsplit("/", 1)[-1]: meta for meta in found}
            return {name: self._found[name]["size"] for name in sorted(self._found)}

    def versions(self) -> dict[str, str]:
        with self._lock:
            return {name: version for name, meta in self._found.items() if (version := _version(meta)) is not None}

    def expect(self, versions: Mapping[str, str]) -> None:
        self._expected = dict(versions)

    def size(self, path: str) -> int:
        import obstore

        with self._lock:
            known = self._found.get(path)
        if known is None:
            known = self._call(lambda: obstore.head(self._store, path), path, "its size can't be found")
            with self._lock:
                known = self._found.setdefault(path, known)
        return known["size"]

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        if nbytes := sum(map(len, buffers)):
            what = f"reading bytes {byte_offset} to {byte_offset + nbytes} failed"
            self._call(lambda: self._fill(path, byte_offset, buffers, nbytes), path, what)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        raise not_mapped(self.location)

    def close(self) -> None:
        """Connections go with the store, when nobody holds it."""

    def _fill(self, path: str, byte_offset: int, buffers: Sequence[memoryview], nbytes: int) -> None:
        import obstore

        stop = byte_offset + nbytes
        options: GetOptions = {"range": (byte_offset, stop)}
        if (version := self._version_to_read(path)) is not None:
            options["if_match"] = version
        result = obstore.get(self._store, path, options=options)
        self._check_same(path, result.meta)
        done = _copied(result, buffers, nbytes)
        if done != nbytes:
            raise StorageError(
                f"{self.location}/{path}: bytes {byte_offset} to {stop} were asked for, {done} bytes came; "
                "the file is cut, or the storage doesn't serve ranges"
            )

    def _check_same(self, path: str, meta: ObjectMeta) -> None:
        """Hold what an answer says of its file against the first one, and against the size that is known.

        Not against a listing's version: Azure's has no quotation marks there.
        """
        with self._lock:
            size = self._found.setdefault(path, meta)["size"]
            version = self._answered.setdefault(path, _version(meta))
        now, before = (meta["size"], _version(meta)), (size, version)
        if now != before:
            raise written_again(f"{self.location}/{path}", now=_words(*now), before=_words(*before))

    def _version_to_read(self, path: str) -> str | None:
        """What the catalog was made of; where it doesn't know, what was there when the size was asked for."""
        expected = self._expected.get(path)
        if expected is not None:
            return expected
        with self._lock:
            found = self._found.get(path)
        return None if found is None else _version(found)

    def _call(self, request: Callable[[], T], path: str, what: str) -> T:
        from obstore.exceptions import BaseError, PreconditionError

        where = f"{self.location}/{path}" if path else self.location
        try:
            return request()
        except StorageError:
            raise
        except FileNotFoundError:
            raise missing_file(where) from None
        except PreconditionError as error:
            raise written_again(where, now="another", before=str(self._version_to_read(path))) from error
        except BaseError as error:
            raise storage_error(error, f"{where}: {what}") from error


def is_taken(location: str, client: object) -> bool:
    """Whether a URL is read by this module: object stores and web servers are, where obstore is installed.

    Args:
        client: ``storage_options["client"]``: ``"obstore"``, ``"fsspec"`` or None, which leaves the choice to us.

    Raises:
        SpecError: another client than these, or one that can't open the location.
        CheckpointNotFound: obstore is asked for and not installed.
    """
    if client not in (None, "obstore", "fsspec"):
        raise SpecError(f"storage_options: client is {client!r}; it is obstore or fsspec")
    place = None if client == "fsspec" else place_of(location)
    is_installed = importlib.util.find_spec("obstore") is not None
    if client == "obstore" and place is None:
        raise SpecError(f"{location}: obstore has no such storage; leave storage_options.client out")
    if client == "obstore" and not is_installed:
        raise CheckpointNotFound(
            f"{location}: obstore is asked for and not installed: pip install 'shardferry[object-stores]'"
        )
    return place is not None and is_installed


def open_url(location: str, storage_options: Mapping[str, Any]) -> NativeReader:
    """The storage that a URL names. Raises SpecError where an option is unknown or wrong."""
    place = place_of(location)
    assert place is not None, location
    options = split_options(place, storage_options)
    try:
        store = _store(place, options)
    except Exception as error:  # obstore's own, and ValueError and TypeError for values of another type
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{location}: can't be opened with these storage_options: {reason}") from error
    traits = WEB_SERVER if place.kind == "http" else OBJECT_STORE
    return NativeReader(store, location.rstrip("/"), replace(traits, tells_sizes=True))


def _store(place: StorePlace, options: StoreOptions) -> ObjectStore:
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    client: Any = options.client_options
    common: Any = {"client_options": client, "retry_config": {"max_retries": 0}}
    if place.kind == "http":
        return HTTPStore(place.container, **common)
    make: Any = {"s3": S3Store, "gcs": GCSStore, "azure": AzureStore}[place.kind]
    store: ObjectStore = make(place.container, prefix=place.prefix or None, config=options.config, **common)
    return store


def _copied(result: GetResult, buffers: Sequence[memoryview], nbytes: int) -> int:
    """Bytes of a body, put where they belong. More than were asked for are counted as far as they fit, and one more."""
    done, left = 0, list(reversed(buffers))
    for body in result.stream(min_chunk_size=_PIECE_BYTES):
        piece = memoryview(body)
        if done + len(piece) > nbytes:
            return done + len(piece)
        done += len(piece)
        while piece:
            buffer = left.pop()
            count = min(len(buffer), len(piece))
            copy_bytes(buffer[:count], piece[:count])
            piece = piece[count:]
            if count < len(buffer):
                left.append(buffer[count:])
    return done


def _words(num_bytes: int, version: str | None) -> str:
    return f"{num_bytes} bytes" + (f", {version}" if version else "")


def _version(meta: ObjectMeta) -> str | None:
    """The etag, where a request can be made to depend on it: a weak one never matches."""
    etag = meta["e_tag"]
    return None if etag is None or etag.startswith("W/") else etag
