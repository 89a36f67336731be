"""Unpickle a DCP ``.metadata`` file into plain Python values, without executing anything that it names.

The unpickler knows the few globals that torch 2.1 to 2.15, OLMo-core and Megatron-Core write, and maps each to a plain
class or function of ours. It refuses any other global by name. Format: torch/distributed/checkpoint/metadata.py,
filesystem.py and planner.py.
"""

from __future__ import annotations

import io
import pickle
import reprlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from shardferry.errors import CatalogError, UnsafeMetadata

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxtuple, _SHORT.maxlist, _SHORT.maxstring = 2, 16, 16, 300
_BUFFER_BYTES = 1024 * 1024  # that the unpickler reads at a time


class _Sealed(type):
    """The class of classes that a pickle can't change: a pickle can name a class and then try to set its state."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise CatalogError(f"metadata: sets {name} of the class {cls.__name__}")


class Record(metaclass=_Sealed):
    """Stands in for a torch dataclass: the pickled state becomes attributes.

    It has no ``__setstate__``, so unpickling runs no Python code of it.
    """


class Row(list[Any], metaclass=_Sealed):
    """Stands in for a torch dataclass with one instance per chunk: a list whose only entry is the pickled state, a dict.

    As ``__setstate__`` is ``list.append``, a chunk costs neither a call of Python code nor a second dict: a fifth less time and
    memory than a `Record`. `build_catalog` refuses anything else in the list. Rows are compared by identity.
    """

    __slots__ = ()
    __setstate__ = list.append
    __hash__ = object.__hash__  # type: ignore[assignment]  # a list has none
    __eq__ = object.__eq__


class Metadata(Record):
    """torch.distributed.checkpoint.metadata.Metadata"""

    state_dict_metadata: dict[str, Any]
    planner_data: Any = None
    storage_data: Any = None
    version: str | None = None
    mcore_data: Any = None  # Megatron-Core up to 0.15: its own data of each tensor, by key


class TensorStorageMetadata(Record):
    """One tensor: its properties, global size and saved chunks."""

    properties: TensorProperties
    size: tuple[int, ...]
    chunks: list[ChunkStorageMetadata]


class ChunkStorageMetadata(Row):
    """One saved box of a tensor: ``offsets`` and ``sizes``."""

    __slots__ = ()


class BytesStorageMetadata(Record):
    """One saved Python object."""


class MetadataIndex(Row):
    """The key of a stored item: ``fqn`` and, except for objects, the ``offset`` of its box in elements. ``index`` is only a hint."""

    __slots__ = ()


class StorageInfo(Row):
    """Where one item is stored: ``relative_path``, ``offset`` and ``length`` in bytes, perhaps ``transform_descriptors``.

    ``is_raw``: the item is a `RawItem`. No pickle has this field; the safetensors reader sets it.
    """

    __slots__ = ()


class Remark(Record):
    """What is not used: the writer's remarks, layouts, memory formats, parts of the save plans that Megatron-Core leaves."""

    def __init__(self, *_values: Any) -> None: ...


class TensorProperties(Record):
    """A tensor's dtype. The pickled state is a tuple of 5; since torch 2.15 of 6, with strides, which the item itself has too."""

    dtype: torch.dtype

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) in (5, 6) and isinstance(state[0], torch.dtype):
            self.dtype = state[0]
        elif isinstance(state, dict):
            self.__dict__.update(state)
        else:
            what = f"{len(state)} values" if isinstance(state, tuple) else f"a {type(state).__name__}"
            raise CatalogError(
                f"metadata: TensorProperties holds {what}, where torch 2.1 to 2.15 write 5 or 6 values of which the first "
                "is the dtype; a newer torch may have written it"
            )


def shown(value: Any) -> str:
    """A value out of a pickle, for an error message: a few of its entries, however often and deeply they hold one another."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of thousands of digits
        return f"a {type(value).__name__} with very large integers"


def states_of(rows: Collection[Any], kind: type[Row]) -> list[dict[str, Any]]:
    """The states of rows. Raises TypeError where one is not of this kind, IndexError where one has no state."""
    for other in set(map(type, rows)) - {kind}:
        raise TypeError(f"a {other.__name__} is in the place of a {kind.__name__}")
    return [row[0] for row in rows]


def _path(*parts: str) -> str:
    return "/".join(parts)


_OF_TORCH: dict[str, Callable[..., Any]] = {
    "Metadata": Metadata,
    "TensorStorageMetadata": TensorStorageMetadata,
    "TensorProperties": TensorProperties,
    "ChunkStorageMetadata": ChunkStorageMetadata,
    "BytesStorageMetadata": BytesStorageMetadata,
    "MetadataIndex": MetadataIndex,
    "StorageMeta": Remark,
    "_MEM_FORMAT_ENCODING": Remark,
}
_ALLOWED: dict[str, Mapping[str, Callable[..., Any]]] = {
    "torch.distributed.checkpoint.metadata": _OF_TORCH,
    # torch 2.1 and 2.2
    "torch.distributed._shard.sharded_tensor.metadata": {
        "TensorProperties": TensorProperties,
        "MEM_FORMAT_ENCODING": Remark,
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo": StorageInfo, "_StoragePrefix": Remark},
    "olmo_core.distributed.checkpoint.filesystem": {"_StorageInfo": StorageInfo},
    # Megatron-Core adds the ranks' save plans to a plain Metadata, and up to 0.15 has subclasses of both.
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata": Metadata, "MCoreSavePlan": Remark},
    "torch.distributed.checkpoint.planner": dict.fromkeys(
        ["SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData", "WriteItemType"], Remark
    ),
    "torch": {"Size": tuple},
    "torch.serialization": {"_get_layout": Remark},
    "pathlib": dict.fromkeys(["PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"], _path),
    "collections": {"OrderedDict": dict},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        allowed = _ALLOWED.get(module, {}).get(name)
        if allowed is not None:
            return allowed
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise UnsafeMetadata(
            f"metadata names the global {module}.{name}, which no known writer of checkpoints needs; nothing was executed. "
            "Don't load this checkpoint unless you know who wrote it. If you do: where it was written, unpickle the metadata, "
            "replace the values of this class by plain ones (a planner_data of its own by None), and write it again."
        )


class _ByteView(io.RawIOBase):
    """Bytes in memory as a file. `io.BytesIO` would copy them."""

    def __init__(self, data: bytes | memoryview) -> None:
        self._left = memoryview(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), len(self._left))
        buffer[:count], self._left = self._left[:count], self._left[count:]
        return count


def parse_metadata(data: bytes | memoryview, *, source: str) -> Metadata:
    """Parse the bytes of one ``.metadata`` file.

    Args:
        source: the file's name, for error messages.

    Raises:
        UnsafeMetadata: the pickle names a global that is not in the allow-list.
        CatalogError: the bytes are not a complete pickle of a ``Metadata``.
    """
    try:
        metadata = _MetadataUnpickler(io.BufferedReader(_ByteView(data), _BUFFER_BYTES)).load()
    except CatalogError as error:
        raise type(error)(f"{source}: {error}") from None
    except Exception as error:  # damaged pickles raise nearly any type
        raise CatalogError(
            f"{source}: not readable as checkpoint metadata ({len(data)} bytes, {type(error).__name__}: {error}). "
            "The file is cut or damaged; use another checkpoint."
        ) from error
    if not isinstance(metadata, Metadata) or not isinstance(getattr(metadata, "state_dict_metadata", None), dict):
        raise CatalogError(f"{source}: holds a {type(metadata).__name__}, not the Metadata of a checkpoint")
    return metadata
