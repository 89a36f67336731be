"""Tell from the times of a checkpoint's files whether data files were written again after the metadata that describes them.

A save that was killed over an older step leaves that step's metadata beside data files of the later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

_MIN_GAP_S = 1.0  # clocks of nodes differ, and many storages tell whole seconds
_COPY_BYTES_PER_S = 10e6  # a file copied no slower than this explains a gap of its length


@dataclass(frozen=True, slots=True)
class StaleMetadata:
    """Data files that are younger than their metadata by more than the save took."""

    files: tuple[str, ...]  # sorted
    gap_s: float  # from the save's end to the first of them
    save_s: float  # from the save's first file to its last


def stale_metadata(
    metadata_s: float, data_s: Mapping[str, float], *, largest_file_bytes: int = 0
) -> StaleMetadata | None:
    """Find data files of a later save than their metadata is of.

    The files are told apart at the longest gap that begins with the metadata or after it. A copy has such gaps too, for its
    files come in any order; but each is as long as one file takes, and so no longer than all the others together::

        killed save  ddddM                  dd     the gap is longer than what is before it, and than what is after it
        copy         d  d  M  d  d  d  d  d        it isn't

    Args:
        metadata_s: when the metadata file was written, in seconds since any epoch.
        data_s: when each data file was written, by name.
        largest_file_bytes: of the data files.

    Returns:
        None where nothing speaks against one save, or one copy.
    """
    later = sorted({metadata_s, *(t for t in data_s.values() if t > metadata_s)})
    if len(later) < 2:
        return None
    end, begin = max(pairwise(later), key=lambda pair: pair[1] - pair[0])
    gap = begin - end
    save = end - min(metadata_s, *data_s.values())
    rewritten = later[-1] - begin
    if gap <= max(_MIN_GAP_S, save, rewritten, largest_file_bytes / _COPY_BYTES_PER_S):
        return None
    return StaleMetadata(tuple(sorted(name for name, t in data_s.items() if t >= begin)), gap, save)


def stale_warning(where: str, metadata_file: str, num_files: int, found: StaleMetadata) -> str:
    """The warning in words.

    Args:
        where: the checkpoint's location.
        num_files: data files in all.
    """
    names = ", ".join(found.files[:3]) + (", ..." if len(found.files) > 3 else "")
    return (
        f"{where}: {len(found.files)} of {num_files} data files ({names}) are younger than {metadata_file} by {found.gap_s:.1f} s, "
        f"the save itself took {found.save_s:.1f} s: they may be of a later save that was killed, and hold another step than the "
        "metadata says. Use another checkpoint, or make sure that the files belong together; checkpoint.stale: error refuses them"
    )
