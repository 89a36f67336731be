"""Hold two storages as one: a checkpoint's, and that of another checkpoint which has the weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from shardferry.state_dicts import WEIGHTS
from shardferry.storage.base import RangeReader, StorageTraits

OPTION = "model_location"  # the name among the storage options


@dataclass(frozen=True, slots=True)
class WeightsFrom:
    """Where the weights are: a location and its storage options."""

    location: Any  # as `open_storage` takes it
    options: Mapping[str, Any] = field(repr=False)  # may hold credentials


def with_weights_from(options: Mapping[str, Any], location: Any, model_location: Any) -> Mapping[str, Any]:
    """The storage options of a location whose weights are at another one; both have the options where both are of one kind.

    Args:
        model_location: None: the weights are at the location itself.
    """
    if model_location is None:
        return options
    same_kind = _scheme(location) == _scheme(model_location)
    return {**options, OPTION: WeightsFrom(model_location, dict(options) if same_kind else {})}


def _scheme(location: Any) -> str:
    found, separator, _ = str(location).partition("://") if isinstance(location, str | os.PathLike) else ("", "", "")
    return found if separator and found != "file" else ""


class JoinedReader(RangeReader):
    """The files of two storages; those of the second have `WEIGHTS` before their names.

    Args:
        first: it gives the location.
        weights: of the checkpoint that has the weights.
    """

    def __init__(self, first: RangeReader, weights: RangeReader) -> None:
        elsewhere = WeightsFrom(weights.location, weights.options)
        super().__init__(first.location, _traits(first.traits, weights.traits), {**first.options, OPTION: elsewhere})
        self.first, self.weights = first, weights

    def listing(self) -> dict[str, int | None]:
        return {**self.first.listing(), **{weights_file(n): size for n, size in self.weights.listing().items()}}

    def where(self, path: str) -> str:
        storage, name = self._at(path)
        return storage.where(name)

    def expect(self, versions: Mapping[str, str]) -> None:
        for storage in (self.first, self.weights):
            here = ((self._at(path), version) for path, version in versions.items())
            storage.expect({name: version for (found, name), version in here if found is storage})

    def lacking(self, paths: Iterable[str]) -> list[str]:
        wanted = [(path, *self._at(path)) for path in paths]
        lacked = {id(s): set(s.lacking([n for _, at, n in wanted if at is s])) for s in (self.first, self.weights)}
        return [path for path, at, name in wanted if name in lacked[id(at)]]

    def size(self, path: str) -> int:
        storage, name = self._at(path)
        return storage.size(name)

    def read_into(self, path: str, byte_offset: int, *buffers: memoryview) -> None:
        storage, name = self._at(path)
        storage.read_into(name, byte_offset, *buffers)

    def mapped(self, path: str, start: int, stop: int) -> memoryview:
        storage, name = self._at(path)
        return storage.mapped(name, start, stop)

    def close(self) -> None:
        self.first.close()
        self.weights.close()

    def _at(self, path: str) -> tuple[RangeReader, str]:
        """The storage that has a file, and the file's name there."""
        is_of_weights = path.startswith(f"{WEIGHTS}/")
        return (self.weights, path.removeprefix(f"{WEIGHTS}/")) if is_of_weights else (self.first, path)


def weights_file(name: str) -> str:
    """The name of a file of the checkpoint that has the weights."""
    return f"{WEIGHTS}/{name}"


def _traits(first: StorageTraits, weights: StorageTraits) -> StorageTraits:
    """Those of the storage whose requests take longer, as far as both can be read so."""
    slower = weights if first.is_local else first
    return replace(
        slower,
        maps_files=first.maps_files and weights.maps_files,
        holds_bodies=first.holds_bodies or weights.holds_bodies,
        has_listing=first.has_listing and weights.has_listing,
        tells_sizes=first.tells_sizes and weights.tells_sizes,
    )
