"""Keep the parts that ranks have in shared reads on disk, by all that these were worked out from.

What a rank reads for itself alone is planned anew at each load, which is as quick as reading it from a file would be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shardferry.checkpoint.cache_directory import MAX_BYTES, CacheChoice, CacheDirectory, directory_of
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.column_file import FileKind, decode_file, encode_file
from shardferry.layout.tensor_layout import NumberedLayouts
from shardferry.plan.cooperative import Islands, SharedPlan, share_reads
from shardferry.plan.load_plan import LoadPlan, PlannedTensor
from shardferry.plan.plan_check import check_columns
from shardferry.plan.plan_columns import COLUMNS, PlanColumns
from shardferry.plan.rank_layouts import Wants
from shardferry.plan.split import SlabLimits

PLAN_FILE = FileKind(
    noun="plan",
    magic=b"SHFYPLAN",
    version=1,  # to be raised whenever the bytes, or what is planned of the same wants, become other ones
    columns=COLUMNS,
)


@dataclass(frozen=True, slots=True)
class PlanCache:
    """A directory of plans; or none, and then each is worked out anew."""

    directory: Path | None
    min_reads: int = 20_000  # of a plan; a smaller one is worked out in half a second
    max_bytes: int = MAX_BYTES  # of all that the directory keeps

    @classmethod
    def of(cls, choice: CacheChoice) -> PlanCache:
        """What a caller chose for catalogs: a directory, the user's own (True), or none."""
        return cls(directory_of(choice))

    def share_reads(
        self, plan: LoadPlan, catalog: Catalog, wants: Wants, *, slabs: SlabLimits, islands: Islands | None = None
    ) -> SharedPlan:
        """As `shardferry.plan.cooperative.share_reads`, from the file where that is kept and right.

        Nothing is kept of a checkpoint whose catalog isn't.
        """
        if self.directory is None or not catalog.metadata_digest or len(plan.reads) < self.min_reads:
            return share_reads(plan, catalog, wants, slabs=slabs, islands=islands)

        def build(header: Mapping[str, Any], flat: Mapping[str, Any]) -> SharedPlan:
            columns = PlanColumns.from_flat(header, flat)
            check_columns(columns, plan, catalog, wants, islands)
            return columns.plan(plan.tensors)

        files = CacheDirectory(self.directory, self.max_bytes)
        digest = _digest(plan, catalog, wants, slabs, islands)
        shared = files.get(PLAN_FILE, digest, lambda data: decode_file(PLAN_FILE, data, build))
        if shared is None:
            shared = share_reads(plan, catalog, wants, slabs=slabs, islands=islands)
            files.put(PLAN_FILE, digest, encode_plan(shared))
        return shared


def encode_plan(plan: SharedPlan) -> list[bytes | memoryview]:
    """The bytes of a plan's file, one piece after another."""
    columns = PlanColumns.of(plan)
    return encode_file(PLAN_FILE, columns.header, columns.flat)


def _digest(plan: LoadPlan, catalog: Catalog, wants: Wants, slabs: SlabLimits, islands: Islands | None) -> bytes:
    """Of all that `share_reads` looks at. The catalog has what its metadata has, and where items lie (safetensors files say so)."""
    words = [
        catalog.metadata_digest.hex(),
        plan.world_rank,
        _words_of_tensors(plan.tensors),
        wants.words(),
        [slabs.max_bytes, slabs.window_bytes, _places(catalog) if slabs.window_bytes else ""],
        None if islands is None else _words_of_islands(islands),
    ]
    text = json.dumps(words, separators=(",", ":"), default=int)  # live layouts may have integers of NumPy
    return hashlib.sha256(text.encode()).digest()


def _places(catalog: Catalog) -> str:
    """A digest of where the items lie in the files."""
    whole = hashlib.sha256()
    for column in (catalog.chunk_file, catalog.chunk_byte_offset):
        whole.update(np.ascontiguousarray(column).data)
    return whole.hexdigest()


def _words_of_tensors(tensors: Sequence[PlannedTensor]) -> object:
    layouts = NumberedLayouts()
    words = [
        (
            *(tensor.key, tensor.fqn, tensor.name, tensor.section, tensor.sharded_like_param),
            *(str(tensor.dtype), tensor.arena_offset, layouts.number(tensor.layout)),
        )
        for tensor in tensors
    ]
    return [words, layouts.words()]


def _words_of_islands(islands: Islands) -> list[tuple[int, int]]:
    """By rank the lowest of its island: names are of a host's last start, and only say who is on which."""
    lowest: dict[str, int] = {}
    return [(rank, lowest.setdefault(island, rank)) for rank, island in sorted(islands.items())]
