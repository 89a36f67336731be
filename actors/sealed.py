"""Objects on their way through a process that has not imported their classes."""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle


class Sealed:
    """A pickled object.

    Ray must see the ObjectRefs and actor handles within, as it counts them: they are kept beside the bytes.
    """

    def __init__(self, data: bytes, references: Sequence[Any]) -> None:
        self._data = data
        self._references = list(references)

    @classmethod
    def of(cls, value: Any) -> Sealed:
        """Seal an object."""
        buffer = io.BytesIO()
        pickler = _Pickler(buffer)
        pickler.dump(value)
        return cls(buffer.getvalue(), pickler.references)

    def opened_on_arrival(self) -> Any:
        """For a result of a Ray method: the caller gets the object itself."""
        return _OpenedOnArrival(self._data, self._references)


class _OpenedOnArrival:
    def __init__(self, data: bytes, references: Sequence[Any]) -> None:
        self._parts = data, references

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, self._parts


def _open(data: bytes, references: Sequence[Any]) -> Any:
    unpickler = _Unpickler(io.BytesIO(data))
    unpickler.references = references
    return unpickler.load()


class _Pickler(pickle.Pickler):
    def __init__(self, buffer: io.BytesIO) -> None:
        super().__init__(buffer, protocol=pickle.HIGHEST_PROTOCOL)
        self.references: list[Any] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, ObjectRef | ActorHandle):
            return None
        self.references.append(value)
        return len(self.references) - 1


class _Unpickler(pickle.Unpickler):
    references: Sequence[Any] = ()

    def persistent_load(self, place: int) -> Any:
        return self.references[place]
