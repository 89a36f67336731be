"""Measure how loaded state reaches its trainer, on a Ray of this machine's own: each transport against what Ray does by itself.

``python -m benchmarks.handoff`` passes arenas from one actor to another. The ways take turns, with fresh memory each time; a
figure is the median of the rounds. Figures with a limit are ratios in one run, or counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before ray is imported: nothing is written into the home directory
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import ray
import torch
import torch.distributed.checkpoint as dcp

import shardferry
from benchmarks.checkpoint import file_system
from benchmarks.machine import describe
from benchmarks.table import Table, tell
from shardferry.actors.loader import Loader, LoaderSettings
from shardferry.actors.loader_group import completed
from shardferry.arena import HostArena
from shardferry.handoff.handle import ShardHandle
from shardferry.handoff.object_store import CHUNK_BYTES
from shardferry.pipeline import OptimizerLoadStage
from shardferry.plan.load_plan import Manifest
from shardferry.schemas import StageConfig

MAX_OPEN_MS = 5.0  # of a shard in shared memory, of any size
MIN_OF_DICT = 100.0  # time of a dict of torch tensors through the object store, over that of shared_memory
MIN_OF_RAW = 0.8  # time of the best raw mechanism over that of the transport object_store
MAX_OVERHEAD_S = 1.0  # of a stage over bare actors that import torch
MAX_BYTES_COPIED = 0  # by in_process after the read
_NUM_TENSORS = 16  # of the dict
_NUM_RANKS = 2
_SMALL_SHAPE = (64, 16)
_PAUSE_S = 1.0  # for Ray to start the next idle workers
_TIMEOUT_S = 120.0
_OBJECT_STORE_BYTES = 5  # times the largest arena

SHARED, STORE, ARRAY, CHUNKS, DICT = "shared_memory", "object_store", "raw: one array", "raw: arrays", "dict of tensors"
_RAW = (ARRAY, CHUNKS)


class Holder(Loader):
    """A loader with an arena that was not read, but filled."""

    def __init__(self) -> None:
        super().__init__(
            LoaderSettings(
                stage="benchmark",
                log=None,
                world_rank=0,
                world_size=1,
                device="cpu",
                transport="auto",
                one_node=True,
                trainer=None,
                start_timeout_s=_TIMEOUT_S,
                load_timeout_s=_TIMEOUT_S,
            )
        )
        self._tensors: dict[str, torch.Tensor] = {}

    def fill(self, nbytes: int, value: int, as_dict: bool) -> None:
        """Make a new arena, or tensors of their own, of which every byte is ``value``."""
        self._loaded, self._tensors = [], {}
        if as_dict:
            for number in range(_NUM_TENSORS):
                tensor = torch.full((nbytes // _NUM_TENSORS,), value, dtype=torch.uint8)
                self._tensors[str(number)] = tensor.view(torch.float32)
            return
        arena = HostArena(nbytes)
        arena.as_bytes().fill_(value)
        manifest = Manifest(world_rank=0, world_size=1, mesh=None, tensors=(), values=(), param_groups=(), fqns=())
        self._loaded = [SimpleNamespace(manifest=manifest, arena=arena)]  # type: ignore[list-item]

    def array(self) -> np.ndarray:
        return self._loaded[0].arena.as_bytes().numpy()

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors


class Taker:
    """A trainer: it ends up with memory of its own, which it may write."""

    def __init__(self) -> None:
        self._memory: list[torch.Tensor] = []

    def open(self, handle: ShardHandle) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        self._memory = [handle.source.open()]
        return 1e3 * (time.perf_counter() - start)

    def copy(self, *arrays: np.ndarray) -> float:
        """Milliseconds."""
        start = time.perf_counter()
        memory, end = torch.empty(sum(array.nbytes for array in arrays), dtype=torch.uint8), 0
        for array in arrays:
            memory.numpy()[end : end + array.nbytes] = array
            end += array.nbytes
        self._memory = [memory]
        return 1e3 * (time.perf_counter() - start)

    def keep(self, tensors: dict[str, torch.Tensor]) -> float:
        """Ray has copied them."""
        self._memory = list(tensors.values())
        return 0.0

    def check(self, nbytes: int, value: int) -> None:
        """Whether it has the right bytes, one of each page. Frees them."""
        memory, self._memory = self._memory, []
        assert sum(tensor.nbytes for tensor in memory) == nbytes
        for tensor in memory:
            assert (tensor.view(torch.uint8)[::4096] == value).all(), "not what was sent"


class Trainer(shardferry.OptimizerReceiver):
    """A model whose optimizer has taken no step."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.model = make_model(shapes)
        self.optimizer = torch.optim.AdamW(self.model.parameters())

    def copied(self) -> tuple[int, int]:
        """Bytes of its state that are not in the one allocation that was read into, and bytes of its state."""
        tensors = [t for entries in self.optimizer.state.values() for t in entries.values() if t.numel() > 1]
        arena = max((tensor.untyped_storage() for tensor in tensors), key=lambda storage: storage.nbytes())
        outside = [t for t in tensors if t.untyped_storage().data_ptr() != arena.data_ptr()]
        return sum(t.nbytes for t in outside), sum(t.nbytes for t in tensors)


def make_model(shapes: Mapping[str, tuple[int, ...]]) -> torch.nn.Module:
    """A module of parameters that are zero."""
    model = torch.nn.Module()
    for name, shape in shapes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    return model


class Bare:
    """An actor that imports torch and does nothing."""

    def __init__(self) -> None:
        import torch  # noqa: F401

    def ready(self) -> None: ...


@dataclass(frozen=True)
class Passage:
    """One arena that went from one actor to the other."""

    total_ms: float  # from the driver's first call to its last answer
    open_ms: float  # of it, in the trainer


class Pair:
    """A holder and a taker, and the ways from the one to the other."""

    def __init__(self) -> None:
        self._holder: Any = ray.remote(num_cpus=1)(Holder).remote()
        self._taker: Any = ray.remote(num_cpus=1)(Taker).remote()
        self._ways: dict[str, Callable[[int], Any]] = {
            SHARED: self._by_transport(SHARED),
            STORE: self._by_transport(STORE),
            ARRAY: lambda nbytes: self._taker.copy.remote(self._holder.array.remote()),
            CHUNKS: self._by_chunks,
            DICT: lambda nbytes: self._taker.keep.remote(self._holder.tensors.remote()),
        }

    def pass_on(self, way: str, nbytes: int, value: int) -> Passage:
        """Pass a new arena on, and compare what has arrived once the clock has stopped."""
        ray.get(self._holder.fill.remote(nbytes, value, way == DICT))
        start = time.perf_counter()
        opened = ray.get(self._ways[way](nbytes))
        total_ms = 1e3 * (time.perf_counter() - start)
        ray.get(self._taker.check.remote(nbytes, value))
        return Passage(total_ms, opened)

    def _by_transport(self, transport: str) -> Callable[[int], Any]:
        def pass_on(_: int) -> Any:
            handle = ray.get(self._holder.handle.remote(SimpleNamespace(transport=transport), True))
            return self._taker.open.remote(completed(handle, self._holder, "this node", _TIMEOUT_S))

        return pass_on

    def _by_chunks(self, nbytes: int) -> Any:
        count = len(range(0, nbytes, CHUNK_BYTES))
        refs = self._holder.chunks.options(num_returns=count).remote(0)
        return self._taker.copy.remote(*([refs] if count == 1 else refs))


def passages(sizes: Sequence[int], rounds: int) -> dict[int, dict[str, dict[str, float]]]:
    """Medians of each way, by size; a first round of each is not counted."""
    pair = Pair()
    ways = (SHARED, STORE, ARRAY, CHUNKS, DICT)
    found: dict[int, dict[str, list[Passage]]] = {nbytes: {way: [] for way in ways} for nbytes in sizes}
    for number in range(rounds + 1):
        for nbytes, by_way in found.items():
            for way, measured in by_way.items():
                measured.append(pair.pass_on(way, nbytes, number + 1))
    return {
        nbytes: {
            way: {
                "total_ms": statistics.median(one.total_ms for one in measured[1:]),
                "open_ms": statistics.median(one.open_ms for one in measured[1:]),
            }
            for way, measured in by_way.items()
        }
        for nbytes, by_way in found.items()
    }


def save(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """AdamW state of one process, by stock torch."""
    model = make_model(shapes)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = dict(zip(shapes, optimizer.state.values(), strict=True))
    groups = [{**group, "params": list(shapes)} for group in optimizer.param_groups]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
        dcp.save({"optim": {"state": state, "param_groups": groups}}, checkpoint_id=path, no_dist=True)


def in_process_bytes(directory: Path, nbytes: int) -> tuple[int, int]:
    """Bytes that a load inside the trainer copies after the read, and bytes that it loads."""
    shapes = {f"w{number}": (nbytes // 8 // 4 // 256, 256) for number in range(4)}
    save(directory / "in-process", shapes)
    trainer: Any = ray.remote(num_cpus=1)(Trainer).remote(shapes)
    config = StageConfig.model_validate(
        {"checkpoint": {"location": str(directory / "in-process")}, "handoff": {"transport": "in_process"}}
    )
    OptimizerLoadStage(config).run([trainer])
    copied, loaded = ray.get(trainer.copied.remote())
    ray.kill(trainer)
    return copied, loaded


def start_up_s(directory: Path, rounds: int) -> dict[str, float]:
    """Seconds of a stage from the call to its shards, and of as many bare actors from the call to their first answer."""
    save(directory / "small", {"w": _SMALL_SHAPE})
    config = StageConfig.model_validate(
        {
            "checkpoint": {"location": str(directory / "small")},
            "topology": {"mesh": {"dp": _NUM_RANKS}, "default": {"dp": "Shard(0)"}},
        }
    )

    def stage() -> None:
        loading = OptimizerLoadStage(config).submit()
        ray.get(loading.refs)
        ended.append(loading.close)

    def bare() -> None:
        actors: list[Any] = [ray.remote(num_cpus=1, num_gpus=1)(Bare).remote() for _ in range(_NUM_RANKS)]
        ray.get([actor.ready.remote() for actor in actors])
        ended.append(lambda: [ray.kill(actor) for actor in actors])

    ended: list[Callable[[], Any]] = []
    found: dict[str, list[float]] = {"stage": [], "bare actors": []}
    for _ in range(rounds + 1):
        for name, start_all in zip(found, (stage, bare), strict=True):
            start = time.perf_counter()
            start_all()
            found[name].append(time.perf_counter() - start)
            ended.pop()()
            _wait_until_free()
    return {name: statistics.median(seconds[1:]) for name, seconds in found.items()}


def _wait_until_free() -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while ray.available_resources().get("GPU") != ray.cluster_resources()["GPU"] and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(_PAUSE_S)


def limits(results: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Of each figure with a limit: what it is, the limit, the figure, and whether it is met."""
    by_size = {int(size): ways for size, ways in results["passages"].items()}
    largest = max(by_size)
    ways = by_size[largest]
    found = []
    for nbytes, these in by_size.items():
        opened = these[SHARED]["open_ms"]
        found.append(
            (f"{SHARED}, {_mib(nbytes)}: open, ms", f"<= {MAX_OPEN_MS:g}", f"{opened:.2f}", opened <= MAX_OPEN_MS)
        )
    times = ways[DICT]["total_ms"] / ways[SHARED]["total_ms"]
    found.append((f"{SHARED}, {_mib(largest)}: x {DICT}", f">= {MIN_OF_DICT:g}", f"{times:.0f}", times >= MIN_OF_DICT))
    share = min(ways[raw]["total_ms"] for raw in _RAW) / ways[STORE]["total_ms"]
    found.append(
        (f"{STORE}, {_mib(largest)}: of the best raw one", f">= {MIN_OF_RAW:g}", f"{share:.2f}", share >= MIN_OF_RAW)
    )
    copied, loaded = results["in_process_bytes"]
    words = f"in_process: bytes of {loaded:,} copied after the read"
    found.append((words, f"{MAX_BYTES_COPIED}", f"{copied:,}", copied <= MAX_BYTES_COPIED))
    overhead = results["start_up_s"]["stage"] - results["start_up_s"]["bare actors"]
    words = f"stage of {_NUM_RANKS} ranks over {_NUM_RANKS} bare actors, s"
    found.append((words, f"<= {MAX_OVERHEAD_S:g}", f"{overhead:.2f}", overhead <= MAX_OVERHEAD_S))
    return found


def tables(results: Mapping[str, Any], rounds: int) -> Iterator[Table]:
    """Times, and figures with their limits."""
    rows = [
        [_mib(int(size)) if way == SHARED else "", way, f"{one['total_ms']:.1f}", f"{one['open_ms']:.2f}"]
        for size, ways in results["passages"].items()
        for way, one in ways.items()
    ]
    rows += [["", name, f"{1e3 * seconds:.0f}", ""] for name, seconds in results["start_up_s"].items()]
    yield Table(f"Hand-over; medians of {rounds}", ["arena", "way", "in all, ms", "in the trainer, ms"], rows)
    verdicts = [[what, wanted, found, "ok" if met else "missed"] for what, wanted, found, met in limits(results)]
    yield Table("Against the limits", ["what", "limit", "found", ""], verdicts)


def _mib(nbytes: int) -> str:
    return f"{nbytes / 2**20:,.0f} MiB"


@contextmanager
def cluster(object_store_bytes: int) -> Iterator[None]:
    """A Ray of this process's own, with logical GPUs."""
    with tempfile.TemporaryDirectory(prefix="sf-ray-") as directory:
        folders = [str(Path.cwd()), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))  # of Ray's workers
        ray.init(
            address="local",
            num_cpus=8,
            num_gpus=_NUM_RANKS,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=object_store_bytes,
            _temp_dir=directory,
        )
        try:
            yield
        finally:
            ray.shutdown()


def measure(sizes: Sequence[int], rounds: int) -> dict[str, Any]:
    """All figures."""
    with tempfile.TemporaryDirectory(prefix="shardferry-handoff-") as name:
        machine = describe(file_system(name))
        with cluster(max(256 * 2**20, _OBJECT_STORE_BYTES * max(sizes))):
            return {
                "machine": machine,
                "rounds": rounds,
                "passages": {str(size): ways for size, ways in passages(sizes, rounds).items()},
                "in_process_bytes": in_process_bytes(Path(name), max(sizes)),
                "start_up_s": start_up_s(Path(name), rounds),
            }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", default="64,1024", help="MiB of the arenas, separated by commas")
    parser.add_argument("--rounds", type=int, default=5, help="of each way, after one that is not counted")
    parser.add_argument("--quick", action="store_true", help="small arenas and two rounds: within a minute")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    sizes = [16 * 2**20, 64 * 2**20] if options.quick else [int(size) * 2**20 for size in options.megabytes.split(",")]
    rounds = 2 if options.quick else options.rounds
    results = measure(sizes, rounds)
    tell(results, limits(results), lambda results: tables(results, rounds), options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
