"""A catalog given to several actors of a node lies in its memory once."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from benchmarks.synthetic_save import SyntheticSave
from shardferry.checkpoint.build import build_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.metadata import parse_metadata

pytestmark = pytest.mark.usefixtures("cluster")

SAVE = SyntheticSave(
    num_parameters=20, grid=(30, 5), num_files=16
)  # 9,000 chunks, each of the 6 columns of 18 kB or more


def place_in_memory(column: np.ndarray) -> tuple[str, str, int]:
    """Device and inode of the file that is mapped where the column lies, and the column's offset in it."""
    address = column.__array_interface__["data"][0]
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, _, offset, device, inode = line.split()[:5]
        start, end = (int(text, 16) for text in addresses.split("-"))
        if start <= address < end:
            return device, inode, address - start + int(offset, 16)
    raise AssertionError("the column lies nowhere")


@ray.remote(num_cpus=0)
class Reader:
    """Takes a catalog as a loader does: Ray resolves the reference."""

    def look(self, catalog: Catalog) -> dict[str, Any]:
        found = {name: value for name, value in vars(catalog).items() if isinstance(value, np.ndarray)}
        return {
            name: (column.flags.owndata, column.flags.writeable, place_in_memory(column), int(column.sum()))
            for name, column in found.items()
        }


def test_actors_see_the_same_pages() -> None:
    metadata = parse_metadata(pickle.dumps(SAVE.metadata()), source="x")
    catalog = build_catalog([("x", metadata)], location="ckpt")
    reference = ray.put(catalog)
    readers = [Reader.remote() for _ in range(3)]
    first, second, third = ray.get([reader.look.remote(reference) for reader in readers])
    for reader in readers:
        ray.kill(reader)
    assert first == second == third
    assert len(first) == 6
    for name, (owns, writes, (_, inode, _), total) in first.items():
        assert (owns, writes) == (False, False), name
        assert inode != "0", name  # a file's pages, not a process's own
        assert total == int(getattr(catalog, name).sum()), name
