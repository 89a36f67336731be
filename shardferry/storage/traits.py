"""What kinds of storage are like: how far to join requests, how to split them, what a request waits for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum

KIB, MIB = 1024, 1024 * 1024


class Latency(Enum):
    """How long a request waits before its first byte comes."""

    MICROSECONDS = "microseconds"  # a system call, then memory or a disk of this machine
    MILLISECONDS = "milliseconds"  # a network and somebody else's queue


@dataclass(frozen=True, slots=True)
class StorageTraits:
    """The defaults for reading one kind of storage; whoever reads may be told otherwise."""

    max_gap_bytes: int  # between two runs: fewer bytes than this cost less than another request
    max_request_bytes: int  # more than this is asked for in several requests
    latency: Latency
    is_local: bool  # its windows fetch nothing before it is looked at
    has_listing: bool = True


LOCAL_FILES = StorageTraits(
    max_gap_bytes=16 * KIB, max_request_bytes=4 * MIB, latency=Latency.MICROSECONDS, is_local=True
)
OBJECT_STORE = StorageTraits(
    max_gap_bytes=64 * KIB, max_request_bytes=16 * MIB, latency=Latency.MILLISECONDS, is_local=False
)
WEB_SERVER = dataclasses.replace(OBJECT_STORE, has_listing=False)
