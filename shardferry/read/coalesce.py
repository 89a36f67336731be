"""Join small items that lie side by side in a file into extents, each of which is one request.

A small tensor costs two requests, one for its head and one for its data, however few bytes it has. Most checkpoints have
hundreds of them in a row::

    file      |head data|head data|head data| ... |head data            ...            |
    extent    [--------- one request -------------]   an item that is read in place, and its head

What is joined: items of which nearly all is wanted, up to a bound; the gap between two is at most as large as what a
request costs more than its bytes, and all that is read in vain is a bounded part of what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shardferry.checkpoint.catalog import Catalog
from shardferry.read.items import StoredItem, object_item
from shardferry.read.zip_header import HEAD_BYTES
from shardferry.storage.base import StorageTraits, over_read_bytes

_LOCAL_ITEM_BYTES = 64 * 1024  # larger items of local files are better read in place than copied out of an extent


class WantedItem(Protocol):
    """An item, and how much of it is wanted."""

    @property
    def item(self) -> StoredItem: ...

    @property
    def bytes_to_read(self) -> int: ...


W = TypeVar("W", bound=WantedItem)


@dataclass(frozen=True, slots=True)
class Extent(Generic[W]):
    """A range of a file that holds some whole items."""

    path: str
    start: int  # bytes
    stop: int  # bytes, exclusive
    members: tuple[W, ...]

    def place_of(self, member: W) -> slice:
        """Where a member's item is in the extent's bytes."""
        start = member.item.byte_offset - self.start
        return slice(start, start + member.item.byte_length)


@dataclass(frozen=True, slots=True)
class WholeItem:
    """An item of which everything is wanted: a saved Python object."""

    item: StoredItem

    @property
    def bytes_to_read(self) -> int:
        return self.item.byte_length


def whole_items(catalog: Catalog, keys: Iterable[str]) -> list[WholeItem]:
    """The items of some saved objects, in the order in which they are to be read."""
    items = [object_item(catalog, key) for key in keys]
    return [WholeItem(item) for item in sorted(items, key=lambda item: (item.path, item.byte_offset))]


@dataclass(frozen=True, slots=True)
class JoinLimits:
    """How far reads are joined, and where they are split."""

    max_gap_bytes: int  # between two items, between two runs of an item, and of an item that are not wanted
    max_over_read: float  # bytes of a request that nobody wants, over the wanted ones; see `over_read_bytes`
    max_request_bytes: int  # of any request
    max_item_bytes: int  # of an item in an extent
    maps_files: bool  # what is in the gaps of a window isn't read
    free_gap_bytes: int = 4096  # shorter gaps don't count as over-read

    @property
    def max_data_bytes(self) -> int:
        """Of a request for an item's data: with it, the item's head can come along."""
        return (
            self.max_request_bytes - HEAD_BYTES if self.max_request_bytes > 2 * HEAD_BYTES else self.max_request_bytes
        )

    @classmethod
    def of(
        cls,
        traits: StorageTraits,
        *,
        max_gap_bytes: int | None,
        max_request_bytes: int | None,
        max_over_read: float | None = None,
    ) -> JoinLimits:
        """A kind of storage's own limits, where none are given."""
        gap = traits.max_gap_bytes if max_gap_bytes is None else max_gap_bytes
        over_read = traits.max_over_read if max_over_read is None else max_over_read
        request = traits.max_request_bytes if max_request_bytes is None else max_request_bytes
        item = min(request, _LOCAL_ITEM_BYTES) if traits.is_local else request
        return cls(gap, over_read, request, item, traits.maps_files, traits.free_gap_bytes)


@dataclass(frozen=True, slots=True)
class _Small(Generic[W]):
    """An item that may be joined with others."""

    one: W
    path: str
    start: int  # bytes
    stop: int  # bytes, exclusive
    wanted: int  # bytes
    vain: int  # bytes of it that nobody wants, as far as they count


def join(wanted: Sequence[W], limits: JoinLimits) -> tuple[list[Extent[W]], list[W]]:
    """Extents, in ascending order in each file, and the items that are better read one by one, in their order.

    Args:
        wanted: in the order in which they are to be read; those of a file stand together, ascending.
    """
    small = {place: found for place, one in enumerate(wanted) if (found := _small(one, limits)) is not None}
    joined: set[int] = set()
    extents: list[Extent[W]] = []
    for places in _groups(small, limits):
        if len(places) > 1:  # nothing is won by copying what stands alone
            joined.update(places)
            members = [small[place] for place in places]
            ones = tuple(member.one for member in members)
            extents.append(Extent(members[0].path, members[0].start, members[-1].stop, ones))
    return extents, [one for place, one in enumerate(wanted) if place not in joined]


def _small(one: W, limits: JoinLimits) -> _Small[W] | None:
    item = one.item
    if item.byte_length > limits.max_item_bytes or not item.is_ranged:
        return None
    wanted = one.bytes_to_read
    unwanted = item.byte_length - wanted  # its head and its tail among them
    vain = over_read_bytes(unwanted, free_gap_bytes=limits.free_gap_bytes)
    if unwanted > limits.max_gap_bytes or vain > limits.max_over_read * wanted:
        return None
    return _Small(one, item.path, item.byte_offset, item.byte_stop, wanted, vain)


def _groups(small: Mapping[int, _Small[W]], limits: JoinLimits) -> Iterator[list[int]]:
    """Places of items that are read together, in ascending order."""
    places: list[int] = []
    wanted = vain = 0  # bytes of the group
    first = last = None
    for place, one in small.items():
        if first is not None and last is not None:
            gap = one.start - last.stop
            wanted, vain = (
                wanted + one.wanted,
                vain + over_read_bytes(gap, free_gap_bytes=limits.free_gap_bytes) + one.vain,
            )
            near = one.path == last.path and 0 <= gap <= limits.max_gap_bytes
            if not near or one.stop - first.start > limits.max_request_bytes or vain > limits.max_over_read * wanted:
                yield places
                places, first = [], None
        if first is None:
            first, wanted, vain = one, one.wanted, one.vain
        places.append(place)
        last = one
    if places:
        yield places
