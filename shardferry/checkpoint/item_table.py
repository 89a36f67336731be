"""Turn a metadata file's table of stored items into columns: which box of which FQN, and where its bytes are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, repeat
from operator import is_
from typing import Any

import numpy as np

from shardferry.checkpoint.item_format import ItemFormat, RawItem, TransformedItem, ZipItem
from shardferry.checkpoint.metadata import Metadata, MetadataIndex, StorageInfo
from shardferry.checkpoint.ragged import Ragged
from shardferry.errors import CatalogError

# What values of a pickle can raise where integers, strings and dicts are expected.
UNFIT = (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError)
NO_KEY = -1

_PLAIN_FIELDS = 3  # of an item's place: file, offset, length; more say how it was written


class Names:
    """The paths and formats that the items of all metadata files of a checkpoint name, by the numbers in the columns."""

    def __init__(self) -> None:
        self._paths: dict[str, int] = {}
        self._formats: dict[ItemFormat, int] = {ZipItem(): 0}

    @property
    def paths(self) -> list[str]:
        """As the metadata writes them."""
        return list(self._paths)

    @property
    def formats(self) -> list[ItemFormat]:
        return list(self._formats)

    def of_paths(self, paths: Sequence[Any]) -> np.ndarray:
        """The number of each path, ``int64``."""
        numbers = {path: self._paths.setdefault(str(path), len(self._paths)) for path in dict.fromkeys(paths)}
        return np.fromiter(map(numbers.__getitem__, paths), np.int64, len(paths))

    def of_formats(self, states: Sequence[dict[str, Any]]) -> np.ndarray:
        """The number of each item's format, ``int16``. Raises TypeError where the descriptors are no list."""
        formats = np.zeros(len(states), dtype=np.int16)
        for row in [row for row, num_fields in enumerate(map(len, states)) if num_fields != _PLAIN_FIELDS]:
            formats[row] = self._formats.setdefault(_format_of(states[row]), len(self._formats))
        return formats


@dataclass(frozen=True, slots=True)
class ItemTable:
    """One row an item."""

    key: np.ndarray  # int64, a number for each key; NO_KEY where the metadata knows none of this name
    is_object: np.ndarray  # bool: it has no box
    offsets: Ragged  # of its box, elements
    path: np.ndarray  # int64, see Names
    byte_offset: np.ndarray  # int64
    byte_length: np.ndarray  # int64
    format: np.ndarray  # int16, see Names

    @classmethod
    def taken_from(cls, source: str, metadata: Metadata, names: Names) -> ItemTable:
        """The table of a metadata file, whose keys are numbered as they stand there.

        It is taken out of the metadata: most of what was unpickled belongs to it, and is given back before more is made.

        Raises CatalogError: it is no table that a file-system writer leaves.
        """
        table, metadata.storage_data = metadata.storage_data, None
        if not isinstance(table, dict):
            raise CatalogError(f"{source}: holds no table of stored items; it was not written by a file-system writer")
        for kind in set(map(type, table)) - {MetadataIndex}:
            raise CatalogError(f"{source}: the storage table is keyed by {kind.__name__}, not MetadataIndex")
        try:
            key_numbers = {key: number for number, key in enumerate(metadata.state_dict_metadata)}
            items = cls._of(list(table), list(table.values()), names, key_numbers)
        except UNFIT as error:
            raise CatalogError(f"{source}: an incomplete entry in the storage table ({error})") from error
        if len(negative := np.flatnonzero((items.byte_offset < 0) | (items.byte_length < 0))):
            row = int(negative[0])
            fqn = next(islice(table, row, None))[0]["fqn"]
            raise CatalogError(
                f"{source}: {fqn}: item at byte {items.byte_offset[row]} with {items.byte_length[row]} bytes"
            )
        return items

    @classmethod
    def _of(
        cls, indices: Sequence[MetadataIndex], infos: Sequence[StorageInfo], names: Names, key_numbers: dict[Any, int]
    ) -> ItemTable:
        for kind in set(map(type, infos)) - {StorageInfo}:
            raise TypeError(f"it is a {kind.__name__}")
        num_items = len(infos)
        boxes, places = [index[0] for index in indices], [info[0] for info in infos]
        fqns, offsets = [box["fqn"] for box in boxes], [box.get("offset") for box in boxes]
        is_object = np.fromiter(map(is_, offsets, repeat(None)), np.bool_, num_items)
        return cls(
            key=np.fromiter(map(key_numbers.get, fqns, repeat(NO_KEY)), np.int64, num_items),
            is_object=is_object,
            offsets=Ragged.of([() if box is None else box for box in offsets] if is_object.any() else offsets),
            path=names.of_paths([place["relative_path"] for place in places]),
            byte_offset=np.fromiter([place["offset"] for place in places], np.int64, num_items),
            byte_length=np.fromiter([place["length"] for place in places], np.int64, num_items),
            format=names.of_formats(places),
        )

    def of_objects(self) -> dict[int, int]:
        """Rows without a box, by the number of the key."""
        rows = np.flatnonzero(self.is_object)
        return dict(zip(self.key[rows].tolist(), rows.tolist(), strict=True))


def _format_of(state: dict[str, Any]) -> ItemFormat:
    """Raises TypeError where the descriptors are no list."""
    if state.get("is_raw"):
        return RawItem()
    descriptors = state.get("transform_descriptors")
    return TransformedItem(tuple(map(str, descriptors))) if descriptors else ZipItem()
