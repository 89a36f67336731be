"""Decode saved Python objects: numbers, strings, lists, dicts, NumPy scalars and arrays, tensors. Nothing is executed."""

from __future__ import annotations

import importlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.tensor import DTensor

from shardferry.errors import DecodeError, SpecError, without_terminal_codes
from shardferry.read.zip_header import first_record_start

# What the pickle of a NumPy scalar or array names: constructors that take a dtype and bytes. NumPy 1 wrote numpy.core.
_NUMPY_DTYPES = [dtype for dtype in vars(np.dtypes).values() if isinstance(dtype, type)]
_NUMPY: list[Any] = [
    np.dtype,
    np.ndarray,
    *_NUMPY_DTYPES,
    *(
        (function, f"{package}.multiarray.{name}")
        for name, function in (("scalar", np.float64().__reduce__()[0]), ("_reconstruct", np.zeros(1).__reduce__()[0]))
        for package in ("numpy.core", "numpy._core")
    ),
]


class ForeignClass(DecodeError):
    """A saved object names classes or functions that are not plain data; they were not imported."""

    def __init__(self, message: str, names: tuple[str, ...]) -> None:
        super().__init__(message)
        self.names = names

    def __reduce__(self) -> Any:
        return type(self), (str(self), self.names)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, lists and dicts; refuses every global. Twenty times as fast as `torch.load`."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(str(pid))


def decode_object(data: bytes) -> Any:
    """The Python value of a saved object.

    Args:
        data: as ``torch.save`` wrote it.

    Raises:
        ForeignClass: it holds a type that is neither plain data nor allowed by ``torch.serialization.add_safe_globals``.
        DecodeError: the bytes are damaged, or hold one rank's part of a sharded tensor.
    """
    with suppress(Exception):  # not plain: torch's own loader decides
        return _PlainUnpickler(io.BytesIO(data[first_record_start(data) :])).load()
    try:
        with torch.serialization.safe_globals(_NUMPY):
            value = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # damaged items raise nearly any type
        if names := _foreign_names(data):
            raise ForeignClass(_foreign(names), names) from error
        raise DecodeError(f"the saved object of {len(data)} bytes is damaged ({_reason(error)})") from error
    if any(isinstance(leaf, DTensor | ShardedTensor) for leaf in _leaves(value)):
        raise DecodeError(
            "the saved object holds a sharded tensor, of which a Python object keeps one rank's part alone; the rest was not "
            "saved. Save it as an entry of its own, in a dict or a list"
        )
    return value


def _reason(error: Exception) -> str:
    """The words of torch's error that are of the bytes: around them, it asks for an issue and for trust."""
    _, _, words = without_terminal_codes(str(error)).rpartition("WeightsUnpickler error:")
    return next((line.strip() for line in words.splitlines() if line.strip()), type(error).__name__)


def _foreign_names(data: bytes) -> tuple[str, ...]:
    with suppress(Exception), torch.serialization.safe_globals(_NUMPY):
        return tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data))))
    return ()


def _foreign(names: tuple[str, ...]) -> str:
    return (
        f"the saved object is of {', '.join(names)}, which is not plain data and was not imported. If you trust it, allow it "
        "with torch.serialization.add_safe_globals or checkpoint.safe_globals; with keys: allow_missing the live value stays"
    )


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for value in tree.values():
            yield from _leaves(value)
    elif isinstance(tree, list | tuple | set):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree


def allowed_classes(names: Sequence[str]) -> list[Any]:
    """The classes of dotted names, for ``torch.serialization.safe_globals``. Raises SpecError."""
    try:
        return [getattr(importlib.import_module(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
    except (ImportError, AttributeError, ValueError) as error:
        raise SpecError(f"safe_globals: {list(names)}: {error}; give dotted names such as collections.deque") from error
