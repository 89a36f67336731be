"""What kinds of storage are like: how far requests are coalesced and how they are split."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from shardferry.config import ReadLimits, ReadOptions, SplitLimits

KIB, MIB = 1024, 1024 * 1024
_LOCAL_ITEM_BYTES = 64 * KIB  # larger items of local files are better read in place than copied out of a buffer
_LOCAL_PART_BYTES = 1 * MIB  # fits a core's cache, so that a part is copied to its ranks out of the cache


@dataclass(frozen=True, slots=True)
class StorageTraits:
    """The defaults for reading one kind of storage; `ReadOptions` override some."""

    max_gap_bytes: int  # between two ranges: fewer bytes than this cost less than another request
    max_over_read: float  # unwanted bytes of a request over the wanted ones
    max_request_bytes: int
    is_local: bool
    maps_files: bool = False  # bytes can be looked at in place; nothing is fetched before
    holds_bodies: bool = False  # the bytes of a request are in memory twice until it is done
    has_listing: bool = True
    tells_sizes: bool = False  # with each answer; else a size is a request of its own, or a look at an open file

    def read_limits(self, options: ReadOptions) -> ReadLimits:
        """The limits of one load: the options', or else the storage's own."""
        request = self.max_request_bytes if options.max_request is None else options.max_request
        return ReadLimits(
            max_gap_bytes=self.max_gap_bytes if options.max_gap is None else options.max_gap,
            max_over_read=self.max_over_read,
            max_request_bytes=request,
            max_item_bytes=min(request, _LOCAL_ITEM_BYTES) if self.is_local else request,
            maps_files=self.maps_files,
            opens_with_data=not self.is_local,
        )

    def split_limits(self, limits: ReadLimits) -> SplitLimits:
        """How chunks are split among ranks that read for each other."""
        if self.is_local:
            return SplitLimits(max_part_bytes=_LOCAL_PART_BYTES)
        # A part that begins in a window ends within two.
        return SplitLimits(max_part_bytes=limits.max_request_bytes, window_bytes=limits.max_request_bytes // 2)


LOCAL_FILES = StorageTraits(
    max_gap_bytes=16 * KIB,
    max_over_read=0.25,
    max_request_bytes=8 * MIB,
    is_local=True,
    maps_files=True,
)
OBJECT_STORE = StorageTraits(max_gap_bytes=64 * KIB, max_over_read=8.0, max_request_bytes=8 * MIB, is_local=False)
WEB_SERVER = dataclasses.replace(OBJECT_STORE, has_listing=False)
