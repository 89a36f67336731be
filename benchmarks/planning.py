"""Measure planning at scale, each in a fresh process: one rank's plan, its part of shared reads, and a dry run of all ranks.

Llama 3.1 405B with three states a parameter, saved by 1,024 ranks, wanted by HSDP 8 x FSDP 256 x TP 8. There is no checkpoint:
the catalog is made as columns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial

from torch.distributed.tensor import Shard

from benchmarks.large import LLAMA_405B, synthetic_catalog, tp_fsdp
from shardferry.checkpoint.catalog import Catalog
from shardferry.config import LoadRequest, SplitLimits
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.dry_run.forecast import plan_report
from shardferry.plan.cooperative import assign_reads
from shardferry.plan.planner import plan_load
from shardferry.plan.rank_layouts import LayoutsFromSpec
from shardferry.schemas.stage_config import StageConfig

SAVED = {
    "rows of 1024": SpecLayout(Mesh((("dp_shard", 1024),)), (), {"dp_shard": Shard(0)}),
    "FSDP 128 x TP 8": tp_fsdp(Mesh((("dp_shard", 128), ("tp", 8)))),
}
_MESHES = {16: (1, 2, 8), 2048: (1, 256, 8), 16384: (8, 256, 8)}  # HSDP, FSDP, TP
_ROWS, _COLUMNS = {"dp_shard": "Shard(0)", "tp": "Shard(0)"}, {"dp_shard": "Shard(0)", "tp": "Shard(1)"}
_RULES = [
    {"match": glob, "placements": placements}
    for glob, placements in (
        ("*.w[qkv13].weight", _ROWS),
        ("*.w[o2].weight", _COLUMNS),
        ("tok_embeddings.weight", _COLUMNS),
        ("output.weight", _ROWS),
    )
]
_RANKS = {"dry run": (16384,)}  # all of them else
# for the largest mesh: seconds, and MiB of the whole process; with fewer ranks the answer itself is larger
LIMITS: dict[str, tuple[float, int] | None] = {
    "plan": (1.0, 1024),
    "share": None,
    "dry run": (60.0, 2048),
}


def _spec(world_size: int) -> SpecLayout:
    replicas, shards, tp = _MESHES[world_size]
    return tp_fsdp(Mesh((("dp_replicate", replicas), ("dp_shard", shards), ("tp", tp))))


def _plan(catalog: Catalog, world_size: int) -> None:
    plan_load(catalog, _spec(world_size).rank(world_size - 5), LoadRequest("optim"))


def _share(catalog: Catalog, world_size: int) -> Callable[[], None]:
    spec = _spec(world_size)
    plan = plan_load(catalog, spec.rank(world_size - 5), LoadRequest("optim"))
    memory_groups = {rank: str(rank // 8) for rank in range(world_size)}

    def share() -> None:
        layouts = LayoutsFromSpec(spec, range(world_size))
        assign_reads(plan, catalog, layouts, limits=SplitLimits(max_part_bytes=1 << 20), memory_groups=memory_groups)

    return share


def _dry_run(catalog: Catalog, world_size: int) -> None:
    replicas, shards, tp = _MESHES[world_size]
    mesh = {"dp_replicate": replicas, "dp_shard": shards, "tp": tp}
    topology = {"mesh": mesh, "rules": _RULES, "default": {"dp_shard": "Shard(0)"}}
    config = StageConfig.from_values(
        {"checkpoint": {"cache": False}, "topology": topology, "read": {"storage_bandwidth": "100GB"}},
        source="benchmark",
    )
    plan_report(config, catalog)


def _prepared(what: str, catalog: Catalog, world_size: int) -> Callable[[], None]:
    """What is to be measured; all that comes before is done."""
    if what == "share":
        return _share(catalog, world_size)
    return partial(_plan if what == "plan" else _dry_run, catalog, world_size)


def measure(saved: str, what: str, world_size: int) -> dict[str, float]:
    """Seconds, CPU seconds and MiB of this process at its peak, the catalog among them."""
    with tempfile.TemporaryDirectory() as directory:
        catalog = synthetic_catalog(LLAMA_405B, SAVED[saved])
        catalog = dataclasses.replace(catalog, location=directory)
        work = _prepared(what, catalog, world_size)
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        taken = {"s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    return {**taken, "MiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, "chunks": catalog.num_chunks}


def main() -> None:
    """Print the table; with arguments, what one process measures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planning", description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("SAVED", "WHAT", "RANKS"), help="measure in this process, as JSON")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measure(given.one[0], given.one[1], int(given.one[2]))))
        return
    print(f"{'saved by':<16} {'chunks':>9} {'what':<10} {'ranks':>6} {'s':>7} {'CPU s':>7} {'MiB':>6}  limit")
    for saved in SAVED:
        for what in LIMITS:
            for ranks in _RANKS.get(what, _MESHES):
                _print_row(saved, what, ranks)


def _print_row(saved: str, what: str, ranks: int) -> None:
    command = [sys.executable, "-m", "benchmarks.planning", "--one", saved, what, str(ranks)]
    found = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    limit = LIMITS[what] if ranks == max(_MESHES) else None
    words = "-"
    if limit is not None:
        kept = found["s"] <= limit[0] and found["MiB"] <= limit[1]
        words = f"{limit[0]:.0f} s, {limit[1]} MiB: {'kept' if kept else 'missed'}"
    print(
        f"{saved:<16} {found['chunks']:>9.0f} {what:<10} {ranks:>6} {found['s']:>7.2f} {found['cpu_s']:>7.2f} "
        f"{found['MiB']:>6.0f}  {words}",
        flush=True,
    )


if __name__ == "__main__":
    main()
