"""How a saved item's bytes are laid down in its file: one of four ways, as the catalog records it for each item."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class ZipItem:
    """What ``torch.save`` writes: its head says where the raw bytes are, and their strides."""


@dataclass(frozen=True, slots=True)
class RawItem:
    """A tensor's raw bytes and nothing else, row-major: a tensor of a safetensors file."""


@dataclass(frozen=True, slots=True)
class TransformedItem:
    """A zip item whose whole stream was transformed (compressed, say): no range of it means anything by itself."""

    descriptors: tuple[str, ...]  # as the writer noted them: "stream.zstd/1"


@dataclass(frozen=True, slots=True, eq=False)
class KnownValue:
    """No item: a value that was already taken from another file (Megatron's ``common.pt``) when the checkpoint was opened."""

    value: Any


ItemFormat = ZipItem | RawItem | TransformedItem | KnownValue
