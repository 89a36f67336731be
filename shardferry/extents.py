"""Join small items that lie side by side in a file into extents, each of which is one request.

A small tensor costs two requests, one for its head and one for its data, however few bytes it has. Most checkpoints have
hundreds of them in a row::

    file      |head data|head data|head data| ... |head data            ...            |
    extent    [--------- one request -------------]   an item that is read in place, and its head

What is joined: items of which nearly all is wanted, up to a bound; the gap between two is at most as large as what a
request costs more than its bytes, and all that is read in vain is a bounded part of what is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from shardferry.decode import HEAD_BYTES
from shardferry.items import StoredItem
from shardferry.storage.runs import in_vain
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
    """How far reads are joined, and where they are split."""

    max_gap_bytes: int  # between two items, between two runs of an item, and of an item that are not wanted
    max_over_read: float  # bytes of a request that nobody wants, over the wanted ones; see `in_vain`
    max_request_bytes: int  # of any request
    max_item_bytes: int  # of an item in an extent
    maps_files: bool  # what is in the gaps of a window isn't read

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
        return cls(gap, over_read, request, item, traits.maps_files)


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
    if not item.is_ranged or item.byte_length > limits.max_item_bytes:
        return False
    unwanted = _unwanted(one)
    return unwanted <= limits.max_gap_bytes and in_vain(unwanted) <= limits.max_over_read * one.bytes_to_read


def _unwanted(one: WantedItem) -> int:
    """Bytes of the item that nobody asks for, its head and its tail among them."""
    return one.item.byte_length - one.bytes_to_read


def _runs(small: Iterable[W], limits: JoinLimits) -> Iterator[Extent[W]]:
    members: list[W] = []
    wanted = vain = 0  # bytes of the members
    for one in small:
        gap = one.item.byte_offset - members[-1].item.byte_stop if members else 0
        more_vain = in_vain(gap) + in_vain(_unwanted(one))
        within = vain + more_vain <= limits.max_over_read * (wanted + one.bytes_to_read)
        if members and not (within and _fits(members, one, gap, limits)):
            yield _extent(members)
            members, wanted, vain, more_vain = [], 0, 0, in_vain(_unwanted(one))
        members.append(one)
        wanted, vain = wanted + one.bytes_to_read, vain + more_vain
    if members:
        yield _extent(members)


def _fits(members: Sequence[WantedItem], one: WantedItem, gap: int, limits: JoinLimits) -> bool:
    first, last, item = members[0].item, members[-1].item, one.item
    near = item.path == last.path and 0 <= gap <= limits.max_gap_bytes
    return near and item.byte_stop - first.byte_offset <= limits.max_request_bytes


def _extent(members: Sequence[W]) -> Extent[W]:
    first, last = members[0].item, members[-1].item
    return Extent(first.path, first.byte_offset, last.byte_stop, tuple(members))
