"""A loader: the process that loads one rank's shard and keeps it until its trainer has it.

`Loader` is a plain class; `actors/loader_group.py` starts it as a Ray actor.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import ray
import torch
import torch.distributed as dist

from shardferry.actors.process_group import Rendezvous, join_process_group, open_rendezvous, use_interface_of
from shardferry.actors.progress import Progress
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import CacheDirectory, open_checkpoint
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import ShardHandle, make_handle
from shardferry.handoff.receiver import Reception
from shardferry.handoff.transport import Recipient
from shardferry.handoff.transports import choose_transport, needs_host_arena
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadedShard, LoadJob, load_rank
from shardferry.plan.load_plan import LoadPlan
from shardferry.schemas.stage_report import RankReport, Span
from shardferry.stats import Counters


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """Settings that each loader of a group gets at its start."""

    world_rank: int
    world_size: int
    device: Literal["auto", "cpu", "cuda"]
    transport: str  # "auto", or the name of a transport that crosses processes
    one_node: bool  # the cluster has one node: the trainers run on the loaders' node
    start_timeout_s: float
    load_timeout_s: float


class Loader:
    """Loads one rank's shard.

    The methods are called in this order: `open_rendezvous` (rank 0), `join`, `open_catalog` (rank 0, where the driver has not
    opened the checkpoint), `load`, `handle`. `progress` may be called at any time.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        self._settings = settings
        self._store: dist.TCPStore | None = None
        self._agreement = Agreement(None)
        self._counters = Counters()
        self._bytes_total = 0
        self._loaded: LoadedShard | None = None
        self._spans: list[Span] = []
        self._device = self._choose_device()

    def open_rendezvous(self, generation: str) -> Rendezvous:
        """On rank 0: open the store where the other ranks join.

        Args:
            generation: a name that no other stage has.
        """
        ip = ray.util.get_node_ip_address()
        use_interface_of(ip)
        rendezvous, self._store = open_rendezvous(ip, generation, self._settings.start_timeout_s)
        return rendezvous

    def join(self, rendezvous: Rendezvous) -> int:
        """Join the process group. Returns the id of this process."""
        with self._span("join"):
            use_interface_of(ray.util.get_node_ip_address())
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            self._store = join_process_group(
                rendezvous,
                own_store=self._store,
                world_rank=self._settings.world_rank,
                world_size=self._settings.world_size,
                device=self._device,
                join_timeout_s=self._settings.start_timeout_s,
                collective_timeout_s=self._settings.load_timeout_s,
            )
            self._agreement = Agreement(dist.group.WORLD)
        return os.getpid()

    def open_catalog(self, location: str, storage_options: Mapping[str, Any], cache: CacheDirectory) -> Catalog:
        """On rank 0: read the checkpoint's metadata for all ranks.

        Raises:
            CatalogError, StorageError: as `shardferry.open_checkpoint` does.
        """
        with self._span("catalog"):
            return open_checkpoint(location, storage_options=storage_options, cache=cache)

    def load(
        self, catalog: Catalog, target: SpecLayout | Reception, request: LoadRequest, read: ReadOptions, _joined: int
    ) -> RankReport:
        """Plan, agree with the other ranks, allocate the arena, read into it, and seal it.

        Args:
            target: the topology of the spec, or the answer of this rank's trainer.
            _joined: the result of `join`, so that Ray calls this method after it.

        Raises:
            ShardferryError: as `load_rank` does; the same failure is raised on all ranks.
        """
        layout: RankLayout = target.layout if isinstance(target, Reception) else target.rank(self._settings.world_rank)
        job = LoadJob(catalog, layout, request, self._device, read)
        with self._span("load"):
            loaded = load_rank(job, self._agreement, counters=self._counters, announce=self._announce)
        self._loaded = loaded
        transport = choose_transport(self._settings.transport, loaded.arena, self._recipient(target))
        return self._report(loaded, transport.name)

    def handle(self, report: RankReport, exclusive: bool) -> ShardHandle:
        """The handle of the loaded shard; with the transport ``object_store`` it holds the shard's bytes.

        Args:
            report: the result of `load`, which names the transport.
            exclusive: one trainer alone opens the shard, and may write to it.
        """
        assert self._loaded is not None, "load comes before handle"
        return make_handle(self._loaded.manifest, self._loaded.arena, report.transport, exclusive=exclusive)

    def progress(self) -> Progress:
        """How many bytes are read so far. Ray answers it while the other methods run."""
        return Progress(self._counters.bytes_done, self._bytes_total)

    def _announce(self, plan: LoadPlan) -> None:
        self._bytes_total = plan.bytes_needed

    def _choose_device(self) -> torch.device:
        has_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        if self._settings.device == "cuda" and not has_gpu:
            raise RuntimeError(
                f"rank {self._settings.world_rank}: actors.device is cuda, but this actor sees no GPU "
                f"(Ray gave it {ray.get_gpu_ids()}, torch {torch.__version__} sees {torch.cuda.device_count()}); use device: cpu"
            )
        needs_host = self._settings.device == "cpu" or needs_host_arena(self._settings.transport)
        return torch.device("cpu") if needs_host or not has_gpu else torch.device("cuda", torch.cuda.current_device())

    def _recipient(self, target: SpecLayout | Reception) -> Recipient:
        """Where the process that will open the shard runs, as far as it is known."""
        if isinstance(target, Reception):
            return target.recipient()
        return Recipient(same_host=self._settings.one_node)

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self._spans.append(Span(name=name, start=start, end=time.time()))

    def _report(self, loaded: LoadedShard, transport: str) -> RankReport:
        load = next(span for span in self._spans if span.name == "load")
        spans, start = list(self._spans), load.start
        for name, seconds in loaded.seconds.items():
            spans.append(Span(name=name, start=start, end=start + seconds))
            start += seconds
        phases: dict[str, Any] = {span.name: span.end - span.start for span in self._spans if span.name != "load"}
        return RankReport(
            rank=self._settings.world_rank,
            node=ray.util.get_node_ip_address(),
            device=str(self._device),
            gpu_ids=[str(gpu) for gpu in ray.get_gpu_ids()],
            bytes_needed=loaded.plan.bytes_needed,
            bytes_read=loaded.counters.bytes_requested,
            bytes_sent=loaded.bytes_sent,
            bytes_received=loaded.bytes_received,
            num_requests=loaded.counters.num_requests,
            arena_bytes=loaded.arena.nbytes,
            peak_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            transport=transport,
            strategy=loaded.strategy.name,
            strategy_reason=loaded.strategy.reason,
            host_copy_bandwidth=copy_bandwidth(torch.device("cpu")),
            device_copy_bandwidth=copy_bandwidth(self._device) if self._device.type == "cuda" else None,
            bytes_forwarded=loaded.bytes_forwarded,
            busy=dict(loaded.counters.busy.seconds),
            missing=list(loaded.plan.missing),
            unexpected=list(loaded.unexpected),
            phases=phases | loaded.seconds,
            spans=spans,
        )


def copy_bandwidth(device: torch.device, nbytes: int = 16 * 1024 * 1024) -> float:
    """Bytes per second of a copy from host memory to a device, measured now: the best of three copies.

    Args:
        device: a GPU, or ``cpu`` for copies within host memory.
        nbytes: of each copy.
    """
    on_gpu = device.type == "cuda"
    source = torch.ones(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
    target = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        target.copy_(source)  # a copy to a GPU, too, is complete when this returns
        best = max(best, nbytes / (time.perf_counter() - start))
    return best
