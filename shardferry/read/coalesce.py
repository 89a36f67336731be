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


def over_read(gap_bytes: int, limits: ReadLimits) -> int:
    """How many bytes of a gap count as over-read."""
    return gap_bytes if gap_bytes >= limits.free_gap_bytes else 0


def is_one_request(
    *, gap_bytes: int, wanted_bytes: int, unwanted_bytes: int, request_bytes: int, limits: ReadLimits
) -> bool:
    """Whether two ranges are fetched in one request: the rule.

    Args:
        gap_bytes: between the two; negative where they overlap, which is never coalesced.
        wanted_bytes: of the whole request.
        unwanted_bytes: of the whole request, counted by `over_read`.
        request_bytes: from its first byte to its last.
    """
    return (
        0 <= gap_bytes <= limits.max_gap_bytes
        and unwanted_bytes <= limits.max_over_read * wanted_bytes
        and request_bytes <= limits.max_request_bytes
    )


def coalesce(ranges: Sequence[WantedRange], limits: ReadLimits) -> Iterator[slice]:
    """Group ranges of one file into requests.

    Args:
        ranges: ascending.

    Yields:
        Slices of ``ranges``, in order; each is one request.
    """
    if not ranges:
        return
    begin, start = 0, ranges[0].start
    wanted, unwanted = ranges[0].wanted_bytes, _unwanted(ranges[0], limits)
    for index in range(1, len(ranges)):
        one, gap = ranges[index], ranges[index].start - ranges[index - 1].stop
        wanted += one.wanted_bytes
        unwanted += over_read(gap, limits) + _unwanted(one, limits)
        if not is_one_request(
            gap_bytes=gap,
            wanted_bytes=wanted,
            unwanted_bytes=unwanted,
            request_bytes=one.stop - start,
            limits=limits,
        ):
            yield slice(begin, index)
            begin, start = index, one.start
            wanted, unwanted = one.wanted_bytes, _unwanted(one, limits)
    yield slice(begin, len(ranges))


def is_mostly_wanted(wanted: WantedRange, limits: ReadLimits) -> bool:
    """Whether a whole range may be fetched for what is wanted of it: the rule, for a range by itself."""
    return is_one_request(
        gap_bytes=wanted.stop - wanted.start - wanted.wanted_bytes,
        wanted_bytes=wanted.wanted_bytes,
        unwanted_bytes=_unwanted(wanted, limits),
        request_bytes=wanted.stop - wanted.start,
        limits=limits,
    )


def _unwanted(one: WantedRange, limits: ReadLimits) -> int:
    return over_read(one.stop - one.start - one.wanted_bytes, limits)


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
        wanted, unwanted = wanted * count, unwanted * count + (count - 1) * over_read(gap, limits)
        if count > 1 and not is_one_request(
            gap_bytes=max(gap, 0), wanted_bytes=wanted, unwanted_bytes=unwanted, request_bytes=0, limits=limits
        ):
            return False
        length += (count - 1) * stride
    return True
