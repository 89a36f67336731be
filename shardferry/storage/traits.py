"""What kinds of storage are like: how far to join requests and how to split them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

KIB, MIB = 1024, 1024 * 1024


@dataclass(frozen=True, slots=True)
class StorageTraits:
    """The defaults for reading one kind of storage; whoever reads may be told otherwise."""

    max_gap_bytes: int  # between two runs: fewer bytes than this cost less than another request
    max_over_read: float  # bytes of a request that nobody wants, over the wanted ones
    max_request_bytes: int  # more than this is asked for in several requests
    is_local: bool
    maps_files: bool = False  # their bytes can be looked at in place: nothing is fetched before
    holds_bodies: bool = False  # the bytes of a request are in memory twice until it is done
    has_listing: bool = True
    tells_sizes: bool = False  # with each answer; else a size is a request of its own, or a look at an open file


LOCAL_FILES = StorageTraits(
    max_gap_bytes=16 * KIB,
    max_over_read=0.25,
    max_request_bytes=8 * MIB,
    is_local=True,
    maps_files=True,
)
OBJECT_STORE = StorageTraits(max_gap_bytes=64 * KIB, max_over_read=8.0, max_request_bytes=8 * MIB, is_local=False)
WEB_SERVER = dataclasses.replace(OBJECT_STORE, has_listing=False)
