"""Measure what the metadata of a large model costs: stock torch's unpickling, a catalog made of it, and one from the cache.

``python -m benchmarks.metadata`` writes a synthetic ``.metadata`` (torch's own objects, 1,134 parameters × 3 states in a million
chunks of 1,024 files) and opens it in processes of their own, one after another.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.synthetic_save import SyntheticSave

SAVES = {
    "rows": SyntheticSave(1134, (294,), 1024),
    "boxes": SyntheticSave(1134, (42, 7), 1024),
    "tensors of 1 chunk": SyntheticSave(333_334, (1,), 1024),
}
LIMITS = {"anew": (8.0, 2048), "cached": (0.5, 2048)}  # seconds; peak of the process, MiB
MAX_CATALOG_MIB = 200


def stock(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """As torch's file-system reader does on every rank, and in a load twice."""
    from torch.distributed.checkpoint import FileSystemReader

    return _timed(lambda: FileSystemReader(checkpoint).read_metadata())[1]


def anew(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """Without a cached catalog; what is made is kept."""
    return _opened(checkpoint, cache)


def cached(checkpoint: Path, cache: Path) -> dict[str, Any]:
    """From the catalog that was kept."""
    return _opened(checkpoint, cache)


WAYS = {way.__name__: way for way in (stock, anew, cached)}


def _opened(checkpoint: Path, cache: Path) -> dict[str, Any]:
    import pickle

    import shardferry

    catalog, figures = _timed(lambda: shardferry.open_checkpoint(checkpoint, cache=cache))
    buffers: list[pickle.PickleBuffer] = []
    by_value = len(pickle.dumps(catalog, protocol=5, buffer_callback=buffers.append))
    shared = sum(buffer.raw().nbytes for buffer in buffers)
    return {**figures, "chunks": catalog.num_chunks, "shared": shared, "by_value": by_value}


def _timed(work: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    figures = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return result, {**figures, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def measure(way: str, checkpoint: Path, cache: Path) -> dict[str, Any]:
    """Call one way in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.metadata", "--way", way, str(checkpoint), str(cache)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def rows_of(name: str, save: SyntheticSave, directory: Path, repeats: int) -> Iterator[list[str]]:
    """One row a way; the ways take turns."""
    checkpoint, cache = directory / "ckpt", directory / "catalogs"
    with ProcessPoolExecutor(1) as pool:  # what it takes to write a million objects is gone with its process
        num_bytes = pool.submit(save.write, checkpoint).result()
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(repeats):
        for file in cache.glob("*"):
            file.unlink()
        for way, figures in found.items():
            figures.append(measure(way, checkpoint, cache))
    for way, figures in found.items():
        middle = {key: statistics.median(one[key] for one in figures) for key in figures[0]}
        yield [
            f"{name}: {save.num_chunks:,} chunks, {_mib(num_bytes)} MiB" if way == "stock" else "",
            way,
            f"{middle['wall']:.2f}",
            f"{middle['cpu']:.2f}",
            _mib(middle["peak"]),
            _mib(middle["shared"]) if "shared" in middle else "",
            f"{middle['by_value'] / 2**20:.1f}" if "shared" in middle else "",
            _verdict(way, middle),
        ]


def _verdict(way: str, figures: dict[str, Any]) -> str:
    if way not in LIMITS:
        return ""
    max_s, max_mib = LIMITS[way]
    catalog_mib = (figures["shared"] + figures["by_value"]) / 2**20
    fits = figures["wall"] <= max_s and figures["peak"] <= max_mib * 2**20 and catalog_mib <= MAX_CATALOG_MIB
    return f"{'ok' if fits else 'missed'} (<= {max_s:g} s, {max_mib:,} MiB)"


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:,.0f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="of each way; figures are medians")
    parser.add_argument("--saves", default="rows,boxes", help=f"comma-separated, of: {', '.join(SAVES)}")
    parser.add_argument("--way", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        way, checkpoint, cache = options.way
        print(json.dumps(WAYS[way](Path(checkpoint), Path(cache))))
        return
    from benchmarks.checkpoint import file_system  # here: those who are measured need none of it
    from benchmarks.table import Table, plain

    with tempfile.TemporaryDirectory(prefix="shardferry-metadata-") as name:
        directory = Path(name)
        print(", ".join(f"{what} {value}" for what, value in describe(file_system(name)).items()))
        saves = options.saves.split(",")
        rows = [row for save in saves for row in rows_of(save, SAVES[save], directory, options.repeats)]
    header = ["metadata", "way", "wall s", "CPU s", "peak MiB", "columns MiB", "by value MiB", "limit"]
    print(plain(Table(f"Opening metadata; medians of {options.repeats}", header, rows)))


if __name__ == "__main__":
    main()
