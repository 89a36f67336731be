"""Turn a URL and ``storage_options`` into what obstore's stores are made with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

from shardferry.errors import SpecError

Kind = Literal["s3", "gcs", "azure", "http"]

_KINDS: Mapping[str, Kind] = {
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
    "http": "http",
    "https": "http",
}

# obstore's `ClientConfig`: of the connections, alike for all kinds.
_CLIENT_OPTIONS = frozenset(
    {
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
    }
)
# What s3fs calls them.
_S3_NAMES = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "anon": "skip_signature",
    "endpoint_url": "endpoint",
    "region_name": "region",
}


@dataclass(frozen=True, slots=True)
class StorePlace:
    """A directory of a store."""

    kind: Kind
    container: str  # a bucket, an Azure container; of a web server the whole URL
    prefix: str = ""
    account: str | None = None  # Azure's, where the URL names it


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What obstore calls ``config`` and ``client_options``."""

    config: dict[str, Any]
    client_options: dict[str, Any]


def place_of(url: str) -> StorePlace | None:
    """Where a URL points; None where obstore has no such storage."""
    scheme, _, rest = url.partition("://")
    kind = _KINDS.get(scheme)
    if kind is None:
        return None
    if kind == "http":
        return StorePlace(kind, url.rstrip("/"))
    # Keys of object stores are taken as they stand: "%20" is three characters there.
    container, _, prefix = rest.partition("/")
    container, _, host = container.partition("@")  # abfss://container@account.dfs.core.windows.net/...
    return StorePlace(kind, container, prefix.strip("/"), host.partition(".")[0] or None)


def split_options(place: StorePlace, storage_options: Mapping[str, Any]) -> StoreOptions:
    """Sort options by whom they are for. Raises SpecError for one that would be ignored."""
    given = dict(storage_options)
    client_options = {**_mapping(given, "client_options")}
    config = {**_mapping(given, "config")}
    if place.kind == "s3":
        config |= {_S3_NAMES.get(name, name): value for name, value in _mapping(given, "client_kwargs").items()}
    if "retry_config" in given:
        raise SpecError("storage_options: retry_config is ours to set; how often is tried is read.max_attempts")
    for name, value in given.items():
        if name in _CLIENT_OPTIONS:
            client_options[name] = value
        else:
            config[_S3_NAMES.get(name, name) if place.kind == "s3" else name] = value
    if place.account is not None:
        config.setdefault("account_name", place.account)
    if place.kind == "http" and config:
        raise SpecError(f"storage_options: a web server has no option {min(config)!r}; see docs/storage.md")
    if _is_plain_http(place, config):  # whoever writes http:// means it
        client_options.setdefault("allow_http", True)
    return StoreOptions(config, client_options)


def _mapping(options: dict[str, Any], name: str) -> Mapping[str, Any]:
    found = options.pop(name, None) or {}
    if not isinstance(found, Mapping):
        raise SpecError(f"storage_options: {name} is a {type(found).__name__}, not a mapping of options")
    return found


def _is_plain_http(place: StorePlace, config: Mapping[str, Any]) -> bool:
    url = place.container if place.kind == "http" else str(config.get("endpoint", ""))
    return urlsplit(unquote(url)).scheme == "http"
