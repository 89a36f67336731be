"""Read byte ranges of object stores and web servers through obstore, a native client (Rust's ``object_store``).

Response bodies arrive outside of Python and are copied once, into their destination. obstore sends each request once: only
`shardferry.storage.retry` tries again, so that the attempts of two layers do not multiply.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

from shardferry.errors import CheckpointNotFound, MissingFile, SpecError, StorageError
from shardferry.storage.base import (
    MIB,
    OBJECT_STORE,
    RangeReader,
    StorageTraits,
    cut_answer,
    missing_file,
    spread,
    without_first,
    written_again,
)
from shardferry.storage.retry import TransientStorageError, is_transient_status

T = TypeVar("T")

_PIECE_BYTES = MIB  # of a response body: a piece is copied while the next ones arrive


@dataclass(frozen=True, slots=True)
class _FileInfo:
    """What an answer tells about its file."""

    size: int  # bytes
    version: str | None  # an etag that a request can be made conditional on

    @classmethod
    def parse(cls, meta: Mapping[str, Any]) -> _FileInfo:
        """Convert obstore's ``ObjectMeta``. A weak etag (``W/...``) never matches, so it is not a version."""
        etag = meta["e_tag"]
        return cls(meta["size"], None if etag is None or etag.startswith("W/") else etag)

    def __str__(self) -> str:
        return f"{self.size} bytes" + (f", {self.version}" if self.version else "")


class ObstoreReader(RangeReader):
    """Files of a directory of an object store or a web server. Its connections are closed with the store.

    Args:
        store: one of ``obstore.store``, whose root is the directory.
        location: the directory's URL.
        traits: how this kind of store is best read.
    """

    def __init__(self, store: Any, location: str, traits: StorageTraits) -> None:
        super().__init__(location, traits)
        self._store = store
        self._known: dict[str, _FileInfo] = {}  # from a listing, a HEAD, or the first answer with bytes of the file
        self._answered: dict[str, str | None] = {}  # version, from the first answer with bytes of the file

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
        self._known = {meta["path"].rsplit("/", 1)[-1]: _FileInfo.parse(meta) for meta in found}
        self._times = {meta["path"].rsplit("/", 1)[-1]: meta["last_modified"].timestamp() for meta in found}
        return {name: info.size for name, info in sorted(self._known.items())}

    def versions(self) -> dict[str, str]:
        return {name: info.version for name, info in self._known.items() if info.version is not None}

    def size(self, path: str) -> int:
        import obstore

        if path not in self._known:
            meta = self._call(lambda: obstore.head(self._store, path), path, "its size can't be found")
            self._known.setdefault(path, _FileInfo.parse(meta))
        return self._known[path].size

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        if nbytes := sum(map(len, buffers)):
            what = f"reading bytes {byte_offset} to {byte_offset + nbytes} failed"
            self._call(lambda: self._fill(path, byte_offset, buffers, nbytes), path, what)

    def _fill(self, path: str, byte_offset: int, buffers: Sequence[memoryview], nbytes: int) -> None:
        import obstore

        stop = byte_offset + nbytes
        options: Any = {"range": (byte_offset, stop)}
        if (version := self._version_to_read(path)) is not None:
            options["if_match"] = version
        result = obstore.get(self._store, path, options=options)
        self._check_unchanged(path, _FileInfo.parse(result.meta))
        done = 0
        for body in result.stream(min_chunk_size=_PIECE_BYTES):
            piece = memoryview(body)
            spread(piece, without_first(buffers, done))
            done += len(piece)
            if done > nbytes:
                break
        if done != nbytes:
            raise cut_answer(f"{self.location}/{path}", byte_offset, stop, num_bytes=done)

    def _check_unchanged(self, path: str, now: _FileInfo) -> None:
        """Raise StorageError if the size differs from the known one, or the version from that of the first answer.

        The version in a listing is not compared: Azure's has no quotation marks there.
        """
        before = _FileInfo(self._known.setdefault(path, now).size, self._answered.setdefault(path, now.version))
        if now != before:
            raise written_again(f"{self.location}/{path}", now=str(now), before=str(before))

    def _version_to_read(self, path: str) -> str | None:
        """The version that the catalog was made from, otherwise the one that was there when the size was found."""
        known = self._known.get(path)
        return self._expected.get(path, None if known is None else known.version)

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
            raise _storage_error(error, f"{where}: {what}") from error


# obstore has one class for nearly everything that a server answers, and says the rest in the text. Only this section looks
# into that text; tests/core/storage/test_retry.py provokes each case with a real server.

_STATUS = re.compile(r"status code: (\d{3})")
_TRANSIENT_KIND = re.compile(r"kind: (Timeout|Connect|Interrupted|Request)\b")  # of `HttpError`, in the details
_OTHER_RANGE = re.compile(r"Requested \d+\.\.\d+, got (\d+)\.\.(\d+)")
_QUERY = re.compile(r"\?[^\s)]*")  # of a URL: it may hold a signature
_NOT_FOUND, _RANGE_NOT_SATISFIABLE = 404, 416


def _storage_error(error: Exception, what: str) -> StorageError:
    """Turn an error of obstore into one that says what went wrong, and whether another attempt may succeed."""
    from obstore.exceptions import NotSupportedError, PermissionDeniedError, UnauthenticatedError

    text, _, details = str(error).partition("\n")
    text = _QUERY.sub("?...", text)
    if isinstance(error, NotSupportedError):
        return StorageError(f"{what}: the storage doesn't serve ranges ({text})")
    if isinstance(error, PermissionDeniedError | UnauthenticatedError):
        return StorageError(f"{what}: access is refused; check the credentials (docs/storage.md): {text}")
    status = int(found[1]) if (found := _STATUS.search(text)) else None
    if status == _NOT_FOUND:  # of a bucket; a file's is a FileNotFoundError
        return MissingFile(f"{what}: {text}")
    if status == _RANGE_NOT_SATISFIABLE:
        return StorageError(f"{what}: the file ends before them; it is cut")
    if found := _OTHER_RANGE.search(text):
        return StorageError(f"{what}: bytes {found[1]} to {found[2]} came; the file is cut")
    transient = _TRANSIENT_KIND.search(details) if status is None else is_transient_status(status)
    return (TransientStorageError if transient else StorageError)(f"{what}: {text}")


def open_location(location: str, storage_options: Mapping[str, Any]) -> ObstoreReader | None:
    """The storage of an object store's or a web server's URL; None where fsspec reads it.

    Args:
        storage_options: ``client`` is ``"obstore"``, ``"fsspec"``, or left out to take obstore where it is installed. All
            others are obstore's; for S3, also s3fs's names of them.

    Raises:
        CheckpointNotFound: obstore is asked for and is not installed.
        SpecError: an option is unknown or wrong, or obstore is asked for and can't read this location.
    """
    options = dict(storage_options)
    place = taken_place(location, options.pop("client", None))
    if place is None:
        return None
    traits = replace(OBJECT_STORE, has_listing=place.kind != "http", tells_sizes=True)
    return ObstoreReader(open_store(location, place, options), location.rstrip("/"), traits)


def open_store(location: str, place: StorePlace, storage_options: Mapping[str, Any]) -> Any:
    """One of ``obstore.store``, whose root is the directory.

    Args:
        location: the directory's URL, for messages.
        storage_options: as for `open_location`, without ``client``.

    Raises:
        SpecError: an option is unknown or wrong.
    """
    config, client_options = split_options(place, storage_options)
    try:
        return _store(place, config, client_options)
    except Exception as error:  # obstore's own, and ValueError and TypeError for values of another type
        reason = str(error).partition("\n")[0]
        raise SpecError(f"{location}: can't be opened with these storage_options: {reason}") from error


def taken_place(location: str, client: object) -> StorePlace | None:
    """The directory of a URL that obstore reads: of an object store or a web server, where obstore is installed.

    Args:
        client: ``storage_options["client"]``: ``"obstore"``, ``"fsspec"`` or None.

    Raises:
        CheckpointNotFound: obstore is asked for and is not installed.
        SpecError: another client is asked for, or obstore can't read this location.
    """
    if client not in (None, "obstore", "fsspec"):
        raise SpecError(f"storage_options: client is {client!r}; it is obstore or fsspec")
    place = None if client == "fsspec" else place_of(location)
    if client == "obstore" and place is None:
        raise SpecError(f"{location}: obstore has no such storage; leave storage_options.client out")
    if importlib.util.find_spec("obstore") is not None:
        return place
    if client == "obstore":
        raise CheckpointNotFound(
            f"{location}: obstore is asked for and not installed: pip install 'shardferry[object-stores]'"
        )
    return None


Kind = Literal["s3", "gcs", "azure", "http"]

_SCHEMES: Mapping[Kind, Sequence[str]] = {
    "s3": ("s3", "s3a"),
    "gcs": ("gs", "gcs"),
    "azure": ("az", "abfs", "abfss"),
    "http": ("http", "https"),
}


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A directory of a store."""

    kind: Kind
    container: str  # a bucket, or an Azure container; of a web server the whole URL
    prefix: str = ""  # of the directory's keys, without slashes at both ends
    account: str | None = None  # Azure's, where the URL names it


def place_of(url: str) -> StorePlace | None:
    """The directory that a URL names; None where obstore has no such storage."""
    scheme, _, rest = url.partition("://")
    kind = next((kind for kind, schemes in _SCHEMES.items() if scheme in schemes), None)
    if kind is None:
        return None
    if kind == "http":
        return StorePlace(kind, url.rstrip("/"))
    # Keys of object stores are not URL-encoded: "%20" in one is three characters.
    container, _, prefix = rest.partition("/")
    container, _, host = container.partition("@")  # abfss://container@account.dfs.core.windows.net/...
    return StorePlace(kind, container, prefix.strip("/"), host.partition(".")[0] or None)


# obstore's `ClientConfig`: the options of connections, the same for all kinds of store.
_CLIENT_OPTIONS = frozenset(
    [
        "allow_http",
        "allow_invalid_certificates",
        "connect_timeout",
        "default_content_type",
        "default_headers",
        "http1_only",
        "http2_keep_alive_interval",
        "http2_keep_alive_timeout",
        "http2_keep_alive_while_idle",
        "http2_only",
        "pool_idle_timeout",
        "pool_max_idle_per_host",
        "proxy_ca_certificate",
        "proxy_excludes",
        "proxy_url",
        "randomize_addresses",
        "read_timeout",
        "root_certificate",
        "timeout",
        "user_agent",
    ]
)
# The name of an option in s3fs or pyarrow: obstore's name.
_OTHER_S3_NAMES = {
    "key": "access_key_id",
    "access_key": "access_key_id",
    "secret": "secret_access_key",
    "secret_key": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "anonymous": "skip_signature",
    "endpoint_url": "endpoint",
    "endpoint_override": "endpoint",
    "region_name": "region",
}


def split_options(place: StorePlace, storage_options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sort options into obstore's two groups, ``config`` and ``client_options``.

    Raises:
        SpecError: an option that obstore would ignore or that we set.
    """
    given = dict(storage_options)
    names = ("client_options", "config", *(["client_kwargs"] if place.kind == "s3" else []))
    groups = {name: given.pop(name, None) or {} for name in names}
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise SpecError(f"storage_options: {name} is a {type(group).__name__}, not a mapping of options")
    if "retry_config" in given:
        raise SpecError(
            "storage_options: retry_config is ours to set; read.max_attempts says how often a request is tried"
        )
    client_options = groups["client_options"] | {name: given.pop(name) for name in _CLIENT_OPTIONS & given.keys()}
    if place.kind == "s3":
        given = {_OTHER_S3_NAMES.get(name, name): value for name, value in (groups["client_kwargs"] | given).items()}
        scheme, endpoint = given.pop("scheme", "https"), given.get("endpoint")
        if isinstance(endpoint, str) and "://" not in endpoint:  # pyarrow's is a host and a port
            given["endpoint"] = f"{scheme}://{endpoint}"
    config = groups["config"] | given
    if place.account is not None:
        config.setdefault("account_name", place.account)
    if place.kind == "http" and config:
        raise SpecError(f"storage_options: a web server has no option {min(config)!r}; see docs/storage.md")
    url = place.container if place.kind == "http" else str(config.get("endpoint", ""))
    if urlsplit(unquote(url)).scheme == "http":  # a user who writes http:// means it
        client_options.setdefault("allow_http", True)
    return config, client_options


def _store(place: StorePlace, config: Any, client_options: Any) -> Any:
    from obstore.store import AzureStore, GCSStore, HTTPStore, S3Store

    common: Any = {"client_options": client_options, "retry_config": {"max_retries": 0}}
    if place.kind == "http":
        return HTTPStore(place.container, **common)
    make: Any = {"s3": S3Store, "gcs": GCSStore, "azure": AzureStore}[place.kind]
    return make(place.container, prefix=place.prefix or None, config=config, **common)
