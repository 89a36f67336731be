"""Decide which byte ranges of a file are fetched in one request. The only place with that rule.

Ranges are coalesced if the gap between them is at most ``max_gap_bytes``, the request stays within ``max_request_bytes``, and its
unwanted bytes stay below ``max_over_read`` times the wanted ones. Gaps below ``free_gap_bytes`` count as wanted::

    file      |head data|head data|head data| ... |head data            ...            |
    requests  [--------- one request -------]     [-- an item that is read in place ---]

The same rule joins small items, the rows of a strided box, and an item's header with its first data.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shardferry.config import ReadLimits


@dataclass(frozen=True, slots=True)
class WantedRange:
    """A byte range of a file, and how much of it is wanted."""

    start: int  # bytes
    stop: int  # bytes, exclusive
    wanted_bytes: int
    path: str = ""
    is_ranged: bool = True  # a part of it can be read without the rest


def is_one_request(
    *, gap_bytes: int, wanted_bytes: int, unwanted_bytes: int, request_bytes: int, limits: ReadLimits
) -> bool:
    """Whether two ranges are fetched in one request: the rule.

    Args:
        gap_bytes: between the two; negative where they overlap, which is never coalesced.
        wanted_bytes: of the whole request.
        unwanted_bytes: of the whole request, counted by `_over_read`.
        request_bytes: from its first byte to its last.
    """
    return (
        0 <= gap_bytes <= limits.max_gap_bytes
        and unwanted_bytes <= limits.max_over_read * wanted_bytes
        and request_bytes <= limits.max_request_bytes
    )


def _over_read(gap_bytes: int, limits: ReadLimits) -> int:
    """How many bytes of a gap count as over-read."""
    return gap_bytes if gap_bytes >= limits.free_gap_bytes else 0


def coalesce(ranges: Sequence[WantedRange], limits: ReadLimits) -> Iterator[slice]:
    """Group whole ranges into requests. A range that is not small is a group by itself.

    Args:
        ranges: of each file in one run, ascending.

    Yields:
        Slices of ``ranges``, in order; each is one request.
    """
    begin = wanted = unwanted = 0
    small = [is_small(one, limits) for one in ranges]
    for index, one in enumerate(ranges):
        unwanted_inside = _over_read(one.stop - one.start - one.wanted_bytes, limits)
        if index:
            gap = one.start - ranges[index - 1].stop
            wanted, unwanted = wanted + one.wanted_bytes, unwanted + _over_read(gap, limits) + unwanted_inside
            if not (small[index - 1] and small[index] and one.path == ranges[index - 1].path) or not is_one_request(
                gap_bytes=gap,
                wanted_bytes=wanted,
                unwanted_bytes=unwanted,
                request_bytes=one.stop - ranges[begin].start,
                limits=limits,
            ):
                yield slice(begin, index)
                begin = index
        if begin == index:
            wanted, unwanted = one.wanted_bytes, unwanted_inside
    if ranges:
        yield slice(begin, len(ranges))


def is_small(one: WantedRange, limits: ReadLimits) -> bool:
    """Whether a range may be fetched whole, together with its neighbours, for what is wanted of it."""
    gap, nbytes = one.stop - one.start - one.wanted_bytes, one.stop - one.start
    return (
        one.is_ranged
        and nbytes <= limits.max_item_bytes
        and is_one_request(
            gap_bytes=gap,
            wanted_bytes=one.wanted_bytes,
            unwanted_bytes=_over_read(gap, limits),
            request_bytes=nbytes,
            limits=limits,
        )
    )


def header_is_one_request(header_bytes: int, start: int, stop: int, wanted_bytes: int, limits: ReadLimits) -> bool:
    """Whether an item's header and the first request for its data are one request.

    Args:
        header_bytes: where the item's data starts.
        start, stop: of the data's request, in the item.
        wanted_bytes: of the data's request.
    """
    gap = start - header_bytes
    return is_one_request(
        gap_bytes=gap,
        wanted_bytes=wanted_bytes,
        unwanted_bytes=_over_read(gap, limits),
        request_bytes=stop,
        limits=limits,
    )


def strided_is_one_request(
    *, run_bytes: int, counts: Sequence[int], byte_strides: Sequence[int], limits: ReadLimits
) -> bool:
    """Whether equal runs at regular distances are better fetched with the gaps between them; its length is not checked.

    Args:
        run_bytes: of one contiguous run.
        counts: runs along each dimension, outermost first.
        byte_strides: from one run to the next along each dimension, descending.
    """
    length, wanted, unwanted = run_bytes, run_bytes, 0
    for count, stride in zip(reversed(counts), reversed(byte_strides), strict=True):
        gap = stride - length
        wanted, unwanted = wanted * count, unwanted * count + (count - 1) * _over_read(gap, limits)
        if count > 1 and not is_one_request(
            gap_bytes=max(gap, 0), wanted_bytes=wanted, unwanted_bytes=unwanted, request_bytes=0, limits=limits
        ):
            return False
        length += (count - 1) * stride
    return True
