"""Take a part of a plan that stands for all of it: to foretell what it will cost, before more than that part is worked out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from shardferry.plan.load_plan import LoadPlan, ReadItem

_MOST_WHOLE = (
    2048  # reads of a plan whose shared reads are worked out whole: doing it twice would cost more than a sample saves
)
_READS = 512
_BLOCKS = 4  # of reads that stand together, as neighbours in a file are joined into one request


@dataclass(frozen=True, slots=True)
class PlanSample:
    """Some reads of a plan, and how many times as much all of them are."""

    plan: LoadPlan
    times_reads: float = 1.0
    times_bytes: float = 1.0
    is_whole: bool = True

    @classmethod
    def of(cls, plan: LoadPlan) -> Self:
        """Of a small plan all reads; of a large one some blocks, spread evenly over it."""
        return cls(plan) if len(plan.reads) <= _MOST_WHOLE else cls.of_reads(plan, _READS)

    @classmethod
    def of_reads(cls, plan: LoadPlan, num_reads: int) -> Self:
        """The same with at most so many reads."""
        if len(plan.reads) <= num_reads:
            return cls(plan)
        length = num_reads // _BLOCKS
        starts = np.linspace(0, len(plan.reads) - length, _BLOCKS, dtype=np.int64).tolist()
        reads = tuple(read for start in starts for read in plan.reads[start : start + length])
        times_bytes = _nbytes(plan, plan.reads) / max(_nbytes(plan, reads), 1)
        return cls(replace(plan, reads=reads), len(plan.reads) / len(reads), times_bytes, is_whole=False)


def _nbytes(plan: LoadPlan, reads: Sequence[ReadItem]) -> int:
    return sum(read.source.numel * plan.tensors[read.tensor].dtype.itemsize for read in reads)
