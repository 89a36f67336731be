"""Loads of one checkpoint in several topologies on real ranks, compared bit for bit, and what the ranks asked and gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import Replicate, Shard

from shardferry.config import LoadRequest, MessageLimits, ReadOptions, Strategy
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import make_handle
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadJob, load_rank, open_for_all
from shardferry.stats import Counters
from shardferry.storage.open import open_storage
from tests.support.models import STATES, STEP
from tests.support.oracle import full_tensor

SHAPES = {"wide.weight": (640, 768), "tall.weight": (1536, 320), "odd.weight": (509, 701), "small.weight": (7, 3)}
UNIQUE_BYTES = 2 * 4 * sum(torch.Size(shape).numel() for shape in SHAPES.values())

TOPOLOGIES = {
    "rows": lambda n: SpecLayout(Mesh((("dp", n),)), (), {"dp": Shard(0)}),
    "columns": lambda n: SpecLayout(Mesh((("tp", n),)), (), {"tp": Shard(1)}),
    "replicas": lambda n: SpecLayout(Mesh((("copies", 2), ("dp", n // 2))), (), {"dp": Shard(0)}),
    "both": lambda n: SpecLayout(Mesh((("dp", 2), ("tp", n // 2))), (), {"dp": Shard(0), "tp": Shard(1)}),
    "whole": lambda n: SpecLayout(Mesh((("dp", n),)), (), {"dp": Replicate()}),
}


def load(
    path: str,
    topology: str,
    strategy: Strategy,
    nodes: Sequence[str | None],
    storage_options: Mapping[str, Any] | None = None,
    messages: MessageLimits | None = None,
) -> dict[str, int]:
    """Load and compare; what this rank asked of storage, and what it gave and got."""
    rank, size = dist.get_rank(), dist.get_world_size()
    agreement = Agreement(dist.group.WORLD)
    request, counters = LoadRequest("optim"), Counters()
    options = ReadOptions(concurrency=3, load_s=60, strategy=strategy, node=nodes[rank % len(nodes)])
    layout = TOPOLOGIES[topology](size).rank(rank)
    with closing(open_storage(path, storage_options)) as storage:
        catalog, values = open_for_all(storage, agreement, request, options, counters)
        job = LoadJob(catalog, layout, request, torch.device("cpu"), options, messages=messages or MessageLimits())
        loaded = load_rank(job, agreement, counters=counters, values=values, storage=storage)
    with make_handle(loaded.manifest, loaded.arena, "in_process", exclusive=True).open() as shard:
        compared = 0
        for fqn, entries in shard.state_dict()["state"].items():
            assert float(entries["step"]) == STEP
            for name in STATES:
                full = full_tensor(fqn, name, SHAPES[fqn])
                for whole, local in shard.regions(fqn, name):
                    box = full[tuple(map(slice, whole.offsets, whole.ends))]
                    assert torch.equal(entries[name][tuple(map(slice, local.offsets, local.ends))], box), (
                        f"{fqn}.{name}"
                    )
                    compared += box.numel()
    return {
        "compared": 4 * compared,
        "read": loaded.counters.bytes_requested,
        "done": loaded.counters.bytes_done,
        "needed": loaded.plan.bytes_needed,
        "sent": loaded.figures().bytes_sent,
        "received": loaded.figures().bytes_received,
        "forwarded": loaded.figures().bytes_forwarded,
        "shared": int(loaded.strategy.name == "cooperative"),
    }


def total(results: list[dict[str, int]], name: str) -> int:
    return sum(result[name] for result in results)
