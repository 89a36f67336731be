"""Join small items that lie side by side in a file into extents, each of which is one request.

A small tensor costs two requests, one for its head and one for its data, however few bytes it has. Most checkpoints have
hundreds of them in a row::

    file      |head data|head data|head data| ... |head data            ...            |
    extent    [--------- one request -------------]   an item that is read in place, and its head

What is joined: items of which nearly all is wanted, up to a bound; the gap between two is at most as large as what a
request costs more than its bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shardferry.items import StoredItem
from shardferry.storage.traits import StorageTraits

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


@dataclass(frozen=True, slots=True)
class JoinLimits:
    """How far reads are joined."""

    max_gap_bytes: int  # between two items, and of an item that are not wanted
    max_request_bytes: int  # of an extent
    max_item_bytes: int  # of an item in an extent

    @classmethod
    def of(cls, traits: StorageTraits, *, max_gap_bytes: int | None, max_request_bytes: int | None) -> JoinLimits:
        """A kind of storage's own limits, where none are given."""
        gap = traits.max_gap_bytes if max_gap_bytes is None else max_gap_bytes
        request = traits.max_request_bytes if max_request_bytes is None else max_request_bytes
        return cls(gap, request, min(request, _LOCAL_ITEM_BYTES) if traits.is_local else request)


def join(wanted: Sequence[W], limits: JoinLimits) -> tuple[list[Extent[W]], list[W]]:
    """Extents, in ascending order in each file, and the items that are better read one by one, in their order.

    Args:
        wanted: in the order in which they are to be read; those of a file stand together, ascending.
    """
    alone = [one for one in wanted if not _is_small(one, limits)]
    extents = list(_runs((one for one in wanted if _is_small(one, limits)), limits))
    lonely = {id(extent.members[0]) for extent in extents if len(extent.members) == 1}
    if lonely:  # nothing is won by copying what stands alone
        extents = [extent for extent in extents if len(extent.members) > 1]
        alone = [one for one in wanted if id(one) in lonely or not _is_small(one, limits)]
    return extents, alone


def _is_small(one: WantedItem, limits: JoinLimits) -> bool:
    item = one.item
    unwanted = item.byte_length - one.bytes_to_read
    return item.is_ranged and item.byte_length <= limits.max_item_bytes and unwanted <= limits.max_gap_bytes


def _runs(small: Iterable[W], limits: JoinLimits) -> Iterator[Extent[W]]:
    members: list[W] = []
    for one in small:
        if members and not _fits(members, one, limits):
            yield _extent(members)
            members = []
        members.append(one)
    if members:
        yield _extent(members)


def _fits(members: Sequence[WantedItem], one: WantedItem, limits: JoinLimits) -> bool:
    first, last, item = members[0].item, members[-1].item, one.item
    gap = item.byte_offset - last.byte_stop
    near = item.path == last.path and 0 <= gap <= limits.max_gap_bytes
    return near and item.byte_stop - first.byte_offset <= limits.max_request_bytes


def _extent(members: Sequence[W]) -> Extent[W]:
    first, last = members[0].item, members[-1].item
    return Extent(first.path, first.byte_offset, last.byte_stop, tuple(members))
