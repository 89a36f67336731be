"""Measure state that stays in the cluster's memory, on a Ray of this machine's own: against reading the checkpoint again.

``python -m benchmarks.resident`` keeps AdamW state of a GPT, attaches to it, and takes it in other topologies. It was kept from a
throttled object store, which counts its bytes: what is read from memory afterwards must not add to them. The ways take turns; a
figure is the median of the rounds. Figures with a limit are ratios in one run, or counts.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # before ray is imported: nothing is written into the home directory
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
import torch

import shardferry
from benchmarks.cases import CASES, Case
from benchmarks.checkpoint import adamw, disk_directory, file_system, make_model, save_checkpoint
from benchmarks.handoff import cluster
from benchmarks.machine import describe
from benchmarks.models import STATES, Shapes, fill_box, gpt_of, state_bytes
from benchmarks.ranks import RankPool
from benchmarks.stores import Store, StoreKind, object_store, warm_page_cache
from benchmarks.table import Table, tell
from shardferry.actors.resident.kept import drop
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.load import LoadJob, load_rank
from shardferry.pipeline import OptimizerLoadStage
from shardferry.region import Region
from shardferry.schemas import StageConfig

MAX_OPEN_MS = 5.0  # of an attached shard
MAX_OPEN_APART_MS = 1.0  # between the smallest and the largest one
MIN_OF_WARM = 1.5  # speed of a reshard from memory over that of the same load from the page cache
MAX_BYTES_READ = 0  # of storage, while memory is the source
_SAVING_RANKS = 4
_RESHARDS = ("4-3", "rows-columns-4")  # of `CASES`
_TIMEOUT_S = 600.0

KEPT, WARM, THROTTLED = "kept state", "page cache warm", "throttled store"
_SCHEME = "shardferry+memory://"


class Trainer:
    """A trainer of one rank, which holds the whole model."""

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes

    def restart(self, way: str, where: str) -> float:
        """Seconds until an optimizer that has taken no step has the state; a part of it is compared afterwards."""
        model = make_model(self._shapes).to_empty(device="cpu")
        optimizer = adamw(dict(model.named_parameters()))
        start = time.perf_counter()
        if way == KEPT:
            with shardferry.attach(where, 0).open() as shard:
                shard.load_into(model, optimizer)
        else:
            shardferry.load_optimizer_state(model, optimizer, where)
        seconds = time.perf_counter() - start
        for fqn, parameter in model.named_parameters():
            for name in STATES:
                found = optimizer.state[parameter][name]
                check_first(found, fqn, name, found.shape, Region((0,) * found.ndim, tuple(found.shape)))
        del model, optimizer, parameter, found
        gc.collect()
        return seconds

    def attach(self, name: str) -> tuple[float, float]:
        """Milliseconds until there is a handle, and until it is open."""
        start = time.perf_counter()
        handle = shardferry.attach(name, 0)
        attached = time.perf_counter()
        with handle.open():
            opened = time.perf_counter()
        return 1e3 * (attached - start), 1e3 * (opened - attached)


class Reader:
    """A rank that loads its share of a topology into fresh memory."""

    def load(self, location: str, case: Case, rank: int) -> None:
        """Keep what was loaded for `check`."""
        torch.set_num_threads(1)
        catalog, layout = shardferry.open_checkpoint(location), case.spec().rank(rank)
        job = LoadJob(catalog, layout, LoadRequest(), torch.device("cpu"), ReadOptions())
        self._loaded = load_rank(job, Agreement(None))

    def check(self) -> None:
        """Compare a part of each tensor, and free the memory."""
        state = self._loaded.state()
        for tensor in self._loaded.plan.tensors:
            if tensor.name in STATES:
                (box,) = tensor.layout.boxes or (None,)
                if box is not None:
                    local = state.local_tensor(tensor)
                    check_first(local, tensor.fqn, tensor.name, tensor.layout.global_shape, box.region)
        del self._loaded


def check_first(found: torch.Tensor, fqn: str, name: str, shape: Sequence[int], region: Region) -> None:
    """Compare the first row of a rank's region with what was saved."""
    first = Region(region.offsets, (1, *region.sizes[1:]))
    expected = torch.empty(first.sizes)
    fill_box(expected, fqn, name, shape, first)
    assert torch.equal(found[:1].reshape(first.sizes), expected), f"{fqn}.{name}: not what was saved"


def keep(stores: Mapping[str, tuple[str, int]]) -> None:
    """Load and keep, all at once.

    Args:
        stores: by the name to be kept under, the location and the number of ranks.
    """
    loadings = [
        OptimizerLoadStage(
            StageConfig.model_validate(
                {
                    "checkpoint": {"location": location},
                    "topology": {"mesh": {"dp": ranks}, "default": {"dp": "Shard(0)"}},
                    "handoff": {"keep": {"name": name}},
                }
            )
        ).submit()
        for name, (location, ranks) in stores.items()
    ]
    for loading in loadings:
        loading.wait(_TIMEOUT_S)


def in_turns(ways: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """What each way returns, by round; a first round of each is not counted, and another one begins each round."""
    found: dict[str, list[Any]] = {name: [] for name in ways}
    order = list(ways)
    for turn in range(rounds + 1):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            found[name].append(ways[name]())
    return {name: values[1:] for name, values in found.items()}


class Bench:
    """Kept state, the checkpoint that it came from, and who takes it.

    Args:
        directory: of the checkpoints, warm in the page cache: one for each of the sizes, by bytes.
        url: of the directory in the throttled store.
    """

    def __init__(self, directory: str, url: str, shapes: Mapping[int, Shapes], rounds: int) -> None:
        self._directory, self._url, self._rounds = directory, url, rounds
        self._sizes, largest = sorted(shapes), max(shapes)
        self._path, self._far = f"{directory}/{largest}", f"{url}/{largest}"
        keep({**{f"whole-{size}": (f"{url}/{size}", 1) for size in shapes}, "rows": (self._far, _SAVING_RANKS)})
        self._store = Store(StoreKind.THROTTLED, self._path, self._far)
        self._trainer: Any = ray.remote(num_cpus=1)(Trainer).remote(shapes[largest])
        self._read = 0  # bytes of the store, while memory was the source

    def close(self) -> None:
        """Give the memory back."""
        for state in shardferry.kept():
            drop(state.name)

    def attach(self) -> dict[str, dict[str, float]]:
        """Milliseconds, by bytes of state."""
        ways = {
            str(size): lambda size=size: ray.get(self._trainer.attach.remote(f"whole-{size}")) for size in self._sizes
        }
        return {
            size: {
                "attach_ms": statistics.median(one for one, _ in measured),
                "open_ms": statistics.median(one for _, one in measured),
            }
            for size, measured in in_turns(ways, self._rounds).items()
        }

    def restart_s(self) -> dict[str, float]:
        """Seconds of each way."""

        def restart(way: str, where: str) -> float:
            seconds: float = ray.get(self._trainer.restart.remote(way, where))
            return seconds

        ways = {
            KEPT: lambda: self._uncounted(lambda: restart(KEPT, f"whole-{self._sizes[-1]}")),
            WARM: lambda: restart(WARM, self._path),
            THROTTLED: lambda: restart(THROTTLED, self._far),
        }
        return {way: statistics.median(seconds) for way, seconds in in_turns(ways, self._rounds).items()}

    def reshard_s(self) -> dict[str, dict[str, float]]:
        """Seconds from memory and from the page cache, by case; from the first rank's start to the last one's end."""
        cases = [case for case in CASES if case.name in _RESHARDS]
        readers: list[Any] = [ray.remote(num_cpus=1)(Reader).remote() for _ in range(max(case.ranks for case in cases))]

        def load(location: str, case: Case) -> float:
            start = time.perf_counter()
            ray.get([reader.load.remote(location, case, rank) for rank, reader in enumerate(readers[: case.ranks])])
            seconds = time.perf_counter() - start
            ray.get([reader.check.remote() for reader in readers[: case.ranks]])
            return seconds

        found = {}
        for case in cases:
            ways = {
                KEPT: lambda case=case: self._uncounted(lambda: load(f"{_SCHEME}rows", case)),
                WARM: lambda case=case: load(self._path, case),
            }
            measured = in_turns(ways, self._rounds)
            found[case.title] = {way: statistics.median(seconds) for way, seconds in measured.items()}
        return found

    def _uncounted(self, work: Callable[[], float]) -> float:
        """Do what must read nothing of the store; what it reads is counted all the same."""
        before = self._store.asked()
        seconds, after = work(), self._store.asked()
        assert before is not None
        assert after is not None
        self._read += after[0] - before[0]
        return seconds

    @property
    def storage_bytes(self) -> int:
        """Bytes that the store has served while memory was the source."""
        return self._read


def limits(results: Mapping[str, Any]) -> list[tuple[str, str, str, bool]]:
    """Of each figure with a limit: what it is, the limit, the figure, and whether it is met."""
    opened = {int(size): one["open_ms"] for size, one in results["attach"].items()}
    found = [
        (f"attach, {_mb(size)}: open, ms", f"<= {MAX_OPEN_MS:g}", f"{ms:.2f}", ms <= MAX_OPEN_MS)
        for size, ms in opened.items()
    ]
    apart = opened[max(opened)] - opened[min(opened)]
    words = f"attach: open of {_mb(max(opened))} over {_mb(min(opened))}, ms"
    found.append((words, f"<= {MAX_OPEN_APART_MS:g}", f"{apart:.2f}", apart <= MAX_OPEN_APART_MS))
    for case, seconds in results["reshard_s"].items():
        times = seconds[WARM] / seconds[KEPT]
        found.append((f"{case} from memory: x {WARM}", f">= {MIN_OF_WARM:g}", f"{times:.2f}", times >= MIN_OF_WARM))
    read = results["storage_bytes"]
    found.append(
        ("bytes read of storage while memory is the source", f"{MAX_BYTES_READ}", f"{read:,}", read <= MAX_BYTES_READ)
    )
    return found


def tables(results: Mapping[str, Any]) -> Iterator[Table]:
    """Times, and figures with their limits."""
    rounds, size = results["rounds"], _mb(max(map(int, results["attach"])))
    rows = [[_mb(int(n)), f"{one['attach_ms']:.2f}", f"{one['open_ms']:.2f}"] for n, one in results["attach"].items()]
    yield Table(f"Attach to kept state; medians of {rounds}", ["state", "handle, ms", "open, ms"], rows)
    restart = results["restart_s"]
    rows = [[way, f"{1e3 * seconds:.1f}", f"{seconds / restart[KEPT]:.1f}"] for way, seconds in restart.items()]
    yield Table(f"Restart of a trainer, {size}; medians of {rounds}", ["from", "ms", f"x {KEPT}"], rows)
    rows = [
        [case, f"{1e3 * seconds[KEPT]:.0f}", f"{1e3 * seconds[WARM]:.0f}", f"{seconds[WARM] / seconds[KEPT]:.2f}"]
        for case, seconds in results["reshard_s"].items()
    ]
    yield Table(
        f"Another topology, {size}; medians of {rounds}", ["case", f"{KEPT}, ms", f"{WARM}, ms", "warm / kept"], rows
    )
    verdicts = [[what, wanted, found, "ok" if met else "missed"] for what, wanted, found, met in limits(results)]
    yield Table("Against the limits", ["what", "limit", "found", ""], verdicts)


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e6:,.0f} MB"


def measure(megabytes: Sequence[int], rounds: int, directory: str | None) -> dict[str, Any]:
    """All figures.

    Args:
        megabytes: of AdamW state, two sizes.
        directory: on a disk; default: one that has room.
    """
    models = [gpt_of(size) for size in megabytes]
    shapes = {state_bytes(each): each for each in models}
    place = disk_directory(directory, 2 * sum(shapes))
    with tempfile.TemporaryDirectory(prefix="shardferry-resident-", dir=place) as name:
        with RankPool() as pool:
            for size, each in shapes.items():
                pool.run(_SAVING_RANKS, save_checkpoint, f"{name}/{size}", each)
        warm_page_cache(name)
        with object_store(name) as url, cluster(256 * 2**20):
            bench = Bench(name, url, shapes, rounds)
            try:
                return {
                    "machine": describe(file_system(name)),
                    "rounds": rounds,
                    "attach": bench.attach(),
                    "restart_s": bench.restart_s(),
                    "reshard_s": bench.reshard_s(),
                    "storage_bytes": bench.storage_bytes,
                }
            finally:
                bench.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--megabytes", default="67,1074", help="MB (10**6 bytes) of AdamW state, about; two, separated by a comma"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each way, after one that is not counted")
    parser.add_argument("--quick", action="store_true", help="small state and one round")
    parser.add_argument("--directory", help="for the checkpoints, on a disk; default: one with room")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    options = parser.parse_args(arguments)
    sizes = [8, 32] if options.quick else [int(size) for size in options.megabytes.split(",")]
    results = measure(sizes, 1 if options.quick else options.rounds, options.directory)
    tell(results, limits(results), tables, options.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
