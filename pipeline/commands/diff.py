"""``shardferry diff``: compare the keys, shapes and dtypes of two checkpoints, and with values each tensor by its norm."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterator, Sequence

import torch

from shardferry.arena import HostArena
from shardferry.checkpoint.catalog import Catalog, SavedTensor
from shardferry.checkpoint.open import opened_storage
from shardferry.config import ReadOptions
from shardferry.layout.tensor_layout import replicated
from shardferry.pipeline.display import print_table
from shardferry.plan.planner import plan_tensors
from shardferry.read.execute import read_objects, read_plan
from shardferry.schemas.diff_report import DiffReport, ObjectDiff, TensorDiff
from shardferry.stats import Counters
from shardferry.storage.base import RangeReader

_BATCH_BYTES = 256 * 1024 * 1024  # of tensors of one checkpoint that are held at a time; one tensor may be larger
_MAX_SHOWN = 40  # differences of each kind on the terminal; JSON has all


def diff_report(
    first: Catalog,
    second: Catalog,
    *,
    with_values: bool,
    selects: Callable[[str], bool] = lambda _: True,
    on_bytes: Callable[[int, int], None] = lambda _done, _total: None,
) -> DiffReport:
    """Compare two checkpoints.

    Args:
        with_values: read both, and compare all elements and Python values too; else nothing but metadata is read.
        selects: whether a key is compared.
        on_bytes: called with the bytes of the first one that are compared so far, and with all of them.

    Raises:
        StorageError, DecodeError, PlanError: a value can't be read.
    """
    keys = [{key: None for key in (*c.tensors, *c.objects) if selects(key)} for c in (first, second)]
    both = [key for key in keys[0] if key in keys[1]]
    tensors = [key for key in both if key in first.tensors and key in second.tensors]
    of_another_kind = [key for key in both if (key in first.tensors) != (key in second.tensors)]
    found = {key: _metadata(first.tensors[key], second.tensors[key]) for key in tensors}
    objects = [ObjectDiff(fqn=key, values=[_kind(c, key) for c in (first, second)]) for key in of_another_kind]
    if with_values:
        alike = [key for key in tensors if first.tensors[key].shape == second.tensors[key].shape]
        for diff in _values(first, second, alike, on_bytes):
            found[diff.fqn] = (found[diff.fqn] or diff).model_copy(update=diff.model_dump(exclude_none=True))
        objects += _objects(first, second, [key for key in both if key in first.objects and key in second.objects])
    return DiffReport(
        locations=[first.location, second.location],
        only_in_first=[key for key in keys[0] if key not in keys[1]],
        only_in_second=[key for key in keys[1] if key not in keys[0]],
        num_compared=len(tensors),
        with_values=with_values,
        tensors=[diff for diff in found.values() if diff is not None],
        objects=objects,
    )


def _metadata(first: SavedTensor, second: SavedTensor) -> TensorDiff | None:
    if (first.shape, first.dtype) == (second.shape, second.dtype):
        return None
    both = (first, second)
    return TensorDiff(
        fqn=first.key,
        shapes=None if first.shape == second.shape else [list(saved.shape) for saved in both],
        dtypes=None if first.dtype == second.dtype else [_dtype(saved) for saved in both],
    )


def _values(
    first: Catalog, second: Catalog, keys: Sequence[str], on_bytes: Callable[[int, int], None]
) -> Iterator[TensorDiff]:
    """Read tensors of one shape in batches, and yield those whose elements differ."""
    done, total = 0, sum(first.tensors[key].nbytes for key in keys)
    with opened_storage(first) as one, opened_storage(second) as other:
        for batch in _batches(first, keys):
            loaded = [_load(catalog, batch, storage) for catalog, storage in ((first, one), (second, other))]
            for key, a, b in zip(batch, *loaded, strict=True):
                if (diff := compare(key, a, b)) is not None:
                    yield diff
            done += sum(first.tensors[key].nbytes for key in batch)
            on_bytes(done, total)


def _batches(catalog: Catalog, keys: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    nbytes = 0
    for key in keys:
        if batch and nbytes + catalog.tensors[key].nbytes > _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
        batch.append(key)
        nbytes += catalog.tensors[key].nbytes
    if batch:
        yield batch


def _load(catalog: Catalog, keys: Sequence[str], storage: RangeReader) -> list[torch.Tensor]:
    """Whole tensors, as views of one arena."""
    wanted = [(key, replicated(catalog.tensors[key].shape)) for key in keys]
    plan = plan_tensors(catalog, wanted, world_rank=0, world_size=1)
    arena = HostArena(plan.arena_bytes, is_shareable=False)
    read_plan(plan, catalog, storage, arena, options=ReadOptions(), counters=Counters())
    return [arena.tensor(t.arena_offset, t.layout.local_shape, t.dtype) for t in plan.tensors]


def compare(key: str, first: torch.Tensor, second: torch.Tensor) -> TensorDiff | None:
    """How two tensors of one shape differ; None where all elements are equal. NaN equals NaN.

    Dtypes that differ are compared as float64 (complex ones as complex128).
    """
    if first.dtype != second.dtype or (first.dtype.itemsize == 1 and first.dtype.is_floating_point):
        wide = torch.complex128 if first.is_complex() or second.is_complex() else torch.float64
        first, second = first.to(wide), second.to(wide)
    differs = ~((first == second) | ((first != first) & (second != second)))
    num_differing = int(differs.sum())
    if not num_differing:
        return None
    a, b = (_wide(tensor[differs]) for tensor in (first, second))
    difference, norm_of_first = (a - b).abs(), float(torch.linalg.vector_norm(_wide(first).abs()))
    norm = float(torch.linalg.vector_norm(difference))
    return TensorDiff(
        fqn=key,
        num_differing=num_differing,
        norm=norm,
        relative_norm=norm / norm_of_first if norm_of_first else None,
        max_abs=float(difference.max()),
    )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _objects(first: Catalog, second: Catalog, keys: Sequence[str]) -> list[ObjectDiff]:
    """Python values that differ, by their text: equal values of any class have the same."""
    read = []
    for catalog in (first, second):
        with opened_storage(catalog) as storage:
            read.append(read_objects(keys, catalog, storage, ReadOptions(), Counters()))
    texts = [{key: repr(values[key]) for key in keys} for values in read]
    return [
        ObjectDiff(fqn=key, values=[_SHORT.repr(values[key]) for values in read])
        for key in keys
        if texts[0][key] != texts[1][key]
    ]


_SHORT = reprlib.Repr()  # a value of a few bytes may have a representation of gigabytes
_SHORT.maxstring = _SHORT.maxother = 200


def _kind(catalog: Catalog, key: str) -> str:
    return f"a tensor of {_dtype(catalog.tensors[key])}" if key in catalog.tensors else "a Python value"


def _dtype(saved: SavedTensor) -> str:
    return str(saved.dtype).removeprefix("torch.")


def print_diff(report: DiffReport) -> None:
    """Print the differences on stdout."""
    first, second = report.locations
    for location, keys in ((first, report.only_in_first), (second, report.only_in_second)):
        if keys:
            print(f"only in {location}: {len(keys)} keys")
            print("".join(f"  {key}\n" for key in keys[:_MAX_SHOWN]), end="")
            _print_more(len(keys))
    if report.tensors:
        ordered = sorted(report.tensors, key=lambda diff: -(diff.relative_norm or math.inf))
        print_table(
            f"{first} and {second}: tensors that differ",
            ("tensor", "shapes", "dtypes", "elements", "norm", "of the first's", "largest"),
            [_row(diff) for diff in ordered[:_MAX_SHOWN]],
        )
        _print_more(len(ordered))
    for diff in report.objects[:_MAX_SHOWN]:
        print(f"{diff.fqn}: {diff.values[0]} and {diff.values[1]}")
    _print_more(len(report.objects))
    compared = "keys, shapes, dtypes and values" if report.with_values else "keys, shapes and dtypes"
    verdict = "are the same" if report.is_same else "differ"
    print(f"{report.num_compared} tensors in both; {compared} {verdict}")


def _row(diff: TensorDiff) -> tuple[str, ...]:
    return (
        diff.fqn,
        " and ".join(map(str, diff.shapes or ())),
        " and ".join(diff.dtypes or ()),
        "" if diff.num_differing is None else str(diff.num_differing),
        *("" if number is None else f"{number:.3g}" for number in (diff.norm, diff.relative_norm, diff.max_abs)),
    )


def _print_more(count: int) -> None:
    if count > _MAX_SHOWN:
        print(f"  ... and {count - _MAX_SHOWN} more; --json lists all")
