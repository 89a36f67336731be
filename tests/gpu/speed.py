"""Measure a GPU's hand-over and load, each against what the same machine does at best in the same run; scripts/gpu prints it.

``python3 -m tests.gpu.speed [GiB]``: of the arena that is handed over; a quarter of it is loaded.
"""

from __future__ import annotations

import multiprocessing
import pickle
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.distributed.tensor import Shard

from shardferry.arena import DeviceArena
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.cuda_ipc import CudaIpc
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadJob, load_rank
from shardferry.read.threads import num_read_threads
from tests.support.alone import save_alone
from tests.support.transport_contract import Other

GPU = torch.device("cuda", 0)
MAX_OPEN_MS = 20.0  # of an arena of any size
MIN_OF_BEST = 0.9  # the rate of a load over that of the slower of its two copies
ROUNDS = 5
_CHUNK_BYTES = 8 * 2**20


def main(gib: float = 8.0) -> None:
    """Print figures with their limits."""
    free, _ = torch.cuda.mem_get_info(GPU)
    nbytes = int(min(gib * 2**30, free / 2.5))
    for words, exclusive in (("the loader's memory", True), ("a copy", False)):
        opened = statistics.median(open_ms(nbytes, exclusive=exclusive))
        print(f"cuda_ipc, {nbytes / 2**30:.2f} GiB, {words}: open {_at_most(opened, MAX_OPEN_MS)} ms")
    rates = load_rates(nbytes // 4)
    ours, cache, link = (statistics.median(values) for values in zip(*rates, strict=True))
    print(
        f"storage to device, {nbytes / 2**32:.2f} GiB: {ours / 1e9:.2f} GB/s; page cache {cache / 1e9:.2f}, "
        f"pinned host to device {link / 1e9:.2f}; of the slower one {_at_least(ours / min(cache, link), MIN_OF_BEST)}"
    )


def _at_most(value: float, limit: float) -> str:
    return f"{value:.2f} (<= {limit:g}: {'ok' if value <= limit else 'missed'})"


def _at_least(value: float, limit: float) -> str:
    return f"{value:.2f} (>= {limit:g}: {'ok' if value >= limit else 'missed'})"


def open_ms(nbytes: int, *, exclusive: bool) -> list[float]:
    """Milliseconds until an arena of another process can be used here, of several arenas one after another."""
    other = Other(multiprocessing.get_context("spawn"), _exports)
    try:
        pickle.loads(other.call(2**20, exclusive)).open()  # starts CUDA on both sides
        found = []
        for _ in range(ROUNDS):
            sent: CudaIpc = pickle.loads(other.call(nbytes, exclusive))
            start = time.perf_counter()
            memory = sent.open()
            torch.cuda.synchronize(GPU)
            found.append(1e3 * (time.perf_counter() - start))
            assert memory.numel() == nbytes
            del memory
        return found
    finally:
        other.kill()


def _exports() -> Callable[[int, bool], bytes]:
    held: list[DeviceArena] = []

    def send(nbytes: int, exclusive: bool) -> bytes:
        if held:
            held.pop().close()
        held.append(DeviceArena(nbytes, GPU))
        return pickle.dumps(CudaIpc.from_arena(held[0], exclusive=exclusive))

    return send


def load_rates(nbytes: int) -> list[tuple[float, float, float]]:
    """Bytes per second of a load into the GPU, of reads from the page cache alone, and of pinned copies alone, interleaved."""
    with tempfile.TemporaryDirectory(prefix="shardferry-speed-") as directory:
        state = {name: {"exp_avg": torch.rand(nbytes // 4 // 4)} for name in ("a", "b", "c", "d")}
        save_alone({"optim": {"state": state}}, Path(directory) / "ckpt")
        (data,) = (Path(directory) / "ckpt").glob("*.distcp")
        catalog, options = open_checkpoint(Path(directory) / "ckpt"), ReadOptions()
        rank = SpecLayout(Mesh((("dp", 1),)), (), {"dp": Shard(0)}).rank(0)
        num_threads = max(2, num_read_threads(concurrency=options.concurrency, is_local=True, ranks_on_node=1))

        def load() -> float:
            loaded = load_rank(LoadJob(catalog, rank, LoadRequest("optim"), GPU, options), Agreement(None))
            loaded.arena.close()
            return nbytes / loaded.seconds["read"]

        load()
        return [(load(), _cache_rate(data, nbytes, num_threads), _link_rate(nbytes)) for _ in range(ROUNDS)]


def _cache_rate(path: Path, nbytes: int, num_threads: int) -> float:
    """Of the same threads and sizes as a load has, into buffers that are used again."""

    def read(number: int) -> None:
        buffer = memoryview(bytearray(_CHUNK_BYTES))
        with path.open("rb", buffering=0) as file:
            for start in range(number * _CHUNK_BYTES, nbytes, num_threads * _CHUNK_BYTES):
                file.seek(start)
                file.readinto(buffer)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(num_threads)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return nbytes / (time.perf_counter() - start)


def _link_rate(nbytes: int) -> float:
    pinned = [torch.ones(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    target = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, device=GPU)
    torch.cuda.synchronize(GPU)
    start = time.perf_counter()
    for number in range(nbytes // _CHUNK_BYTES):
        target.copy_(pinned[number % 2], non_blocking=True)
    torch.cuda.synchronize(GPU)
    return nbytes / (time.perf_counter() - start)


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
