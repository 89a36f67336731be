"""Carry out the reads of a load plan: ranged, concurrent, straight into the arena.

Small items that lie side by side are read in one request. Of the others each has its head and its first data in one: the head
says whether the data is where it was looked for. What isn't as it was guessed, and what can't be, is read in a second turn,
heads first. An item that can't be read in ranges is read whole, by one thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeVar

from shardferry._gc import paused_gc
from shardferry.arena import Arena, HostArena
from shardferry.checkpoint.catalog import Catalog
from shardferry.errors import DecodeError, SpecError, StorageError
from shardferry.plan.cooperative import SharedPlan
from shardferry.plan.planner import LoadPlan
from shardferry.read.buffers import Budget
from shardferry.read.carrier import Carrier
from shardferry.read.coalesce import Extent, JoinLimits, WholeItem, join, whole_items
from shardferry.read.destinations import Ways
from shardferry.read.items import ItemReader, StoredItem, items_of, object_item
from shardferry.read.schedule import SmallChunks, Work, chunks_in_reading_order
from shardferry.read.source import Counters as Counters
from shardferry.read.source import StorageSource
from shardferry.read.threads import Crew, cores
from shardferry.storage.base import RangeReader, StorageTraits
from shardferry.storage.retry import TransientStorageError

T = TypeVar("T")
Strategy = Literal["auto", "direct", "cooperative"]  # direct: every rank reads for itself
_BATCH_BYTES = 8 * 1024 * 1024  # of requests that one thread carries out in one go
_BATCH_HEADS = 64
_FIRST_REMOTE = 8  # requests in flight, before it is known whether more bring more


def read_strategy(name: str) -> Strategy:
    """From its name. Raises SpecError."""
    known: dict[str, Strategy] = {"auto": "auto", "cooperative": "cooperative", "direct": "direct"}
    if name not in known:
        raise SpecError(f"strategy: {name!r} is none; there are {', '.join(known)}")
    return known[name]


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """Knobs of reading. Their defaults for users stand in the stage's spec."""

    concurrency: int = 16  # requests in flight of this rank
    timeout_s: float | None = None  # for all reads of this rank
    strategy: Strategy = "auto"
    max_gap_bytes: int | None = None  # that may be read in vain between two items; None: as the storage likes it
    max_request_bytes: int | None = None  # of any request; None: as the storage likes it
    max_attempts: int = 5  # of a request that fails in passing
    node: str | None = None  # ranks with the same name share memory; None: found out
    max_over_read: float | None = None  # bytes read in vain over wanted ones; None: as the storage likes it
    memory_budget_bytes: int = 1 << 30  # of buffers of this rank, beside the arena


@dataclass(frozen=True)
class Sharing:
    """What a rank reads for other ranks, and how that reaches them."""

    plan: SharedPlan
    rows: Mapping[str, int]  # of the catalog's tensors, by key
    ways: Ways
    reserved_bytes: int  # of the memory budget, for messages


def read_plan(
    plan: LoadPlan,
    catalog: Catalog,
    storage: RangeReader,
    arena: Arena,
    options: ReadOptions,
    counters: Counters,
    sharing: Sharing | None = None,
) -> None:
    """Fill the arena as planned.

    Args:
        sharing: ranks read for each other; the arena is filled when all of them are done. Default: alone.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged or not what the metadata says.
    """
    with paused_gc():
        chunks = chunks_in_reading_order(
            plan, catalog, None if sharing is None else sharing.plan, {} if sharing is None else sharing.rows
        )
    limits = join_limits_of(storage.traits, options)
    reserved_bytes = 0 if sharing is None else sharing.reserved_bytes
    budget = Budget(options.memory_budget_bytes - reserved_bytes, timeout_s=options.timeout_s)
    ways = None if sharing is None else sharing.ways
    carrier = Carrier(storage, arena, limits, budget, counters, ways)
    batches = _batches if storage.traits.is_local else _one_by_one
    # A GPU's arena is filled through staging buffers, whose copies want another thread's reads beside them.
    alone = isinstance(arena, HostArena) and cores() < 2 * plan.world_size
    try:
        with (
            _crew(storage, options, alone=alone) as crew,
            _checked_ends([chunk.item for chunk in chunks], catalog, storage, crew),
        ):
            with paused_gc():
                extents, alone_chunks = join(chunks, limits)
                works: list[Work] = [SmallChunks(extent) for extent in extents]
                works += carrier.guess(alone_chunks)
                if not storage.traits.is_local:
                    works = _mixed(works)
            crew.run(carrier.carry_out, works, batches, _nbytes)
            works, unknown = carrier.left()
            works += [work for part in crew.run(carrier.look, unknown, _groups) for work in part]
            crew.run(carrier.carry_out, works, batches, _nbytes)
    finally:
        counters.held(budget.most_held_bytes)


def read_objects(
    keys: Sequence[str], catalog: Catalog, storage: RangeReader, options: ReadOptions, counters: Counters
) -> dict[str, Any]:
    """Some saved Python objects, by key; those that lie side by side are read in one request.

    Raises:
        StorageError: a file is missing, short, or not the one that the catalog was made of.
        DecodeError: an item is damaged.
    """
    budget = Budget(options.memory_budget_bytes, timeout_s=options.timeout_s)
    source = StorageSource(storage, counters, budget)
    items = ItemReader(source)

    def values_of(units: Sequence[Extent[WholeItem] | WholeItem]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for unit in units:
            if isinstance(unit, WholeItem):
                with budget.claim(2 * unit.item.byte_length):
                    found[unit.item.key] = items.value(unit.item)
                counters.done(unit.item.byte_length)
                continue
            with budget.lease(unit.stop - unit.start) as data:
                source.read_into(unit.path, unit.start, data)
                for member in unit.members:
                    found[member.item.key] = items.value_in(data[unit.place_of(member)], member.item)
                    counters.done(member.item.byte_length)
        return found

    extents, alone = join(whole_items(catalog, keys), join_limits_of(storage.traits, options))
    items_to_read = [object_item(catalog, key) for key in keys]
    with _crew(storage, options, alone=True) as crew, _checked_ends(items_to_read, catalog, storage, crew):
        units: list[Extent[WholeItem] | WholeItem] = [*extents, *alone]
        parts = crew.run(values_of, units, _one_by_one)
    return {key: value for part in parts for key, value in part.items()}


def read_object(catalog: Catalog, key: str, storage: RangeReader, counters: Counters) -> Any:
    """One saved Python object. Raises StorageError, DecodeError."""
    item = object_item(catalog, key)
    _check_inside(item, catalog, storage)
    budget = Budget(item.byte_length, timeout_s=None)
    value = ItemReader(StorageSource(storage, counters, budget)).value(item)
    counters.done(item.byte_length)
    return value


def check_files(catalog: Catalog, keys: Iterable[str], storage: RangeReader) -> None:
    """Before anything is started or read: every file that holds something of ``keys`` is there, and as long as it was.

    Raises:
        StorageError: names the key, the file, and both lengths.
    """
    with _crew(storage, ReadOptions(), alone=True) as crew:
        _check_ends([item for key in keys for item in items_of(catalog, key)], catalog, storage, crew)


@contextmanager
def _checked_ends(items: Sequence[StoredItem], catalog: Catalog, storage: RangeReader, crew: Crew) -> Iterator[None]:
    """Check the last item of each file before it is read, or where answers tell how long files are, with these.

    Raises:
        StorageError: see `_check_ends`; where reading fails, what it finds says more than a range that isn't there.
    """
    if not storage.traits.tells_sizes:
        _check_ends(items, catalog, storage, crew)
        yield
        return
    try:
        yield
    except (StorageError, DecodeError) as error:
        if not isinstance(error.__cause__, TransientStorageError):  # who has not answered is not asked again
            _check_ends(items, catalog, storage, crew)
        raise
    _check_ends(items, catalog, storage, crew)


def _check_ends(items: Iterable[StoredItem], catalog: Catalog, storage: RangeReader, crew: Crew) -> None:
    """Check the last item of each file."""
    last: dict[str, StoredItem] = {}
    for item in items:
        if item.path not in last or item.byte_stop > last[item.path].byte_stop:
            last[item.path] = item

    def check(some: Sequence[StoredItem]) -> None:
        for item in some:
            _check_inside(item, catalog, storage)

    crew.run(check, list(last.values()), _one_by_one)


def _check_inside(item: StoredItem, catalog: Catalog, storage: RangeReader) -> None:
    try:
        size = storage.size(item.path)
    except StorageError as error:
        raise StorageError(f"{item.key}: {error}") from error
    if item.byte_stop > size:
        raise StorageError(
            f"{item.key}: its item is bytes {item.byte_offset} to {item.byte_stop} of {storage.location}/{item.path}, "
            f"which has {size} bytes; the file is cut, or the metadata is not of this checkpoint"
        )
    before = catalog.file_bytes.get(item.path, size)
    if size != before:
        raise StorageError(
            f"{item.key}: {storage.location}/{item.path} has {size} bytes, it had {before} when the catalog was read: it was "
            "written again since. Open the checkpoint again."
        )


def _groups(units: Sequence[T]) -> list[Sequence[T]]:
    return [units[start : start + _BATCH_HEADS] for start in range(0, len(units), _BATCH_HEADS)]


def _crew(storage: RangeReader, options: ReadOptions, *, alone: bool) -> Crew:
    """Args: alone: there are few cores for many ranks; where a read may be no more than a copy, one thread begins."""
    is_local = storage.traits.is_local
    # The kernel reads ahead of one thread; two that take turns in a file are in the way of that, and of other ranks' cores.
    first = (1 if alone else cores()) if is_local else _FIRST_REMOTE
    return Crew(options.concurrency, first_threads=first, timeout_s=options.timeout_s, alone=alone and is_local)


def _nbytes(works: Sequence[Work]) -> int:
    return sum(work.nbytes for work in works)


def _mixed(works: Sequence[Work]) -> list[Work]:
    """Long and short ones in turn, so that the line is full while short ones wait for their first bytes."""
    ordered = sorted(works, key=lambda work: -work.nbytes)
    half = len(ordered) // 2
    pairs = zip_longest(ordered[: len(ordered) - half], reversed(ordered[len(ordered) - half :]))
    return [work for pair in pairs for work in pair if work is not None]


def join_limits_of(traits: StorageTraits, options: ReadOptions) -> JoinLimits:
    """As the options have them, or else the kind of storage."""
    return JoinLimits.of(
        traits,
        max_gap_bytes=options.max_gap_bytes,
        max_over_read=options.max_over_read,
        max_request_bytes=options.max_request_bytes,
    )


def _one_by_one(units: Sequence[T]) -> list[Sequence[T]]:
    return [units[place : place + 1] for place in range(len(units))]


def _batches(works: Sequence[Work]) -> Iterator[list[Work]]:
    batch: list[Work] = []
    nbytes = 0
    for work in works:
        batch.append(work)
        nbytes += work.nbytes
        if nbytes >= _BATCH_BYTES:
            yield batch
            batch, nbytes = [], 0
    if batch:
        yield batch
