"""What a catalog of many chunks costs: memory while it is opened, bytes of its own, bytes that travel by value."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.synthetic_save import SyntheticSave
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint

SAVE = SyntheticSave(num_parameters=113, grid=(42, 7), num_files=128)  # 99,666 chunks, a tenth of a large model's

# The tenth of 2 GiB, less what a process takes that has imported torch.
MAX_BYTES_TO_OPEN = 200 * 2**20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "ckpt"
    SAVE.write(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "catalogs"


PROGRAM = """
import sys
from pathlib import Path
from shardferry.checkpoint.open import open_checkpoint  # and torch: its memory is not counted

def peak_bytes():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

before = peak_bytes()
catalog = open_checkpoint(sys.argv[1], cache=sys.argv[2])
print(catalog.num_chunks, peak_bytes() - before)
"""


def opened_alone(checkpoint: Path, cache: Path) -> tuple[int, int]:
    """Number of chunks, and the bytes that opening took beyond what the imports had."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(checkpoint), str(cache)], capture_output=True, text=True, check=True
    )
    num_chunks, num_bytes = map(int, done.stdout.split())
    return num_chunks, num_bytes


def test_memory_to_open(checkpoint: Path, cache: Path) -> None:
    num_chunks, built = opened_alone(checkpoint, cache)
    assert num_chunks == SAVE.num_chunks == 99_666
    assert built < MAX_BYTES_TO_OPEN
    (file,) = cache.iterdir()
    _, again = opened_alone(checkpoint, cache)
    # Not much more than the metadata, which is digested, and the catalog.
    assert again < 2 * ((checkpoint / ".metadata").stat().st_size + file.stat().st_size)


def columns(catalog: Catalog) -> dict[str, np.ndarray]:
    return {name: value for name, value in vars(catalog).items() if isinstance(value, np.ndarray)}


@pytest.mark.parametrize("from_cache", [False, True])
def test_bytes_of_a_catalog(checkpoint: Path, cache: Path, from_cache: bool) -> None:
    """200 MiB for a million chunks are 209 bytes each; nearly none of them is anything but a column."""
    open_checkpoint(checkpoint, cache=cache)
    catalog = open_checkpoint(checkpoint, cache=cache if from_cache else None)
    buffers: list[pickle.PickleBuffer] = []
    by_value = pickle.dumps(catalog, protocol=5, buffer_callback=buffers.append)
    in_columns = sum(column.nbytes for column in columns(catalog).values())
    assert sum(buffer.raw().nbytes for buffer in buffers) == in_columns == SAVE.num_chunks * (4 + 8 + 8 + 2 + 2 * 8 * 2)
    assert len(by_value) < 300 * len(catalog.tensors)
    assert in_columns + len(by_value) < 209 * SAVE.num_chunks
    copy = pickle.loads(by_value, buffers=buffers)
    for name, column in columns(copy).items():
        assert np.shares_memory(column, columns(catalog)[name]), name
    assert copy.tensors == catalog.tensors
