"""A loader: the process that loads one rank's shard and keeps it until its trainer has it.

`Loader` is a plain class; `actors/loader_actor.py` is its actor, which `actors/loader_group.py` starts.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import ray
import torch
import torch.distributed as dist
from ray.actor import ActorHandle

from shardferry.actors.guard import NAMESPACE
from shardferry.actors.logs import log_fault, log_phases, show_logs
from shardferry.actors.metrics import LoadMetrics, Who, tell_kept
from shardferry.actors.process_group import Rendezvous, join_process_group, open_rendezvous, use_interface_of
from shardferry.actors.progress import Progress
from shardferry.actors.rank_report import measures_of_this_process, rank_report, requests_kept
from shardferry.actors.resident.digest import digest_of
from shardferry.arena import HostArena, gpu_identity, host_identity
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest, PartRequests, ReadOptions
from shardferry.errors import HandoffError, RankError
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import ShardHandle, make_handle
from shardferry.handoff.loader_file import LoaderFile
from shardferry.handoff.object_store import ObjectStore, chunks_of
from shardferry.handoff.transport import Recipient
from shardferry.handoff.transports import AUTO, choose_transport, transport_named, wants_device_arena
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadedShard, LoadFigures, LoadJob, combined, load_rank
from shardferry.plan.load_plan import LoadPlan, Manifest
from shardferry.receiver import Reception, TrainerProcess
from shardferry.schemas.stage_report import RankReport, Span
from shardferry.stats import Counters

_STACK_CALLS = 8  # shown of a stack
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class Joined:
    """A loader that has joined the process group."""

    pid: int
    node_id: str  # Ray's
    ip: str


@dataclass(frozen=True, slots=True)
class LoaderSettings:
    """Settings that each loader of a group gets at its start."""

    stage: str  # its name
    log: str | None  # see `shardferry.actors.logs.asked_format`
    world_rank: int
    world_size: int
    device: Literal["auto", "cpu", "cuda"]
    transport: str  # "auto", or the name of a transport that crosses processes
    one_node: bool  # the cluster has one node: the trainers run on the loaders' node
    trainer: TrainerProcess | None  # the process that the shard is for; None: not known
    start_timeout_s: float
    load_timeout_s: float
    memory_fraction: float = 1.0  # of the node's available memory that all its arenas may take
    guard: str | None = (
        None  # the name of the guard of kept state, with which this loader ends; None: it ends with its last user
    )


@dataclass(frozen=True)
class Reread:
    """What a loader needs to load one rank's part of kept state again."""

    settings: LoaderSettings
    location: str
    storage_options: Mapping[str, Any] = field(repr=False)  # may hold credentials
    cache: str | None
    digest: str  # of the checkpoint
    target: SpecLayout | Reception
    requests: PartRequests
    read: ReadOptions


class Loader:
    """Loads one rank's shard.

    The methods are called in this order: `open_rendezvous` (rank 0), `join`, `load`, `handle`, `chunks`. `progress` may be
    called at any time.
    """

    def __init__(self, settings: LoaderSettings) -> None:
        self._settings = settings
        self._store: dist.TCPStore | None = None
        self._agreement = Agreement(None)
        self._counters = Counters()  # of all parts
        self._bytes_total = 0
        self._loaded: list[LoadedShard] = []
        self._spans: list[Span] = []
        self._thread = 0
        self._is_kept = False
        show_logs(settings.log)
        if settings.guard is not None:
            threading.Thread(target=_end_with, args=(settings.guard,), daemon=True, name="shardferry-kept").start()
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

    def join(self, rendezvous: Rendezvous) -> Joined:
        """Join the process group. Raises HandoffError: the spec's transport needs a package that is not here."""
        if self._settings.transport != AUTO:
            transport_named(self._settings.transport).load().require()
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
        return Joined(os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    def load(
        self,
        catalog: Catalog,
        target: SpecLayout | Reception,
        requests: PartRequests,
        read: ReadOptions,
        trainer: ActorHandle[Any] | None = None,
    ) -> RankReport:
        """Plan, agree with the other ranks, allocate the arena, read into it, and seal it; once for each part of the target.

        Args:
            target: the topology of the spec, or the answer of this rank's trainer.
            trainer: is asked whether what is planned fits, before anything is read.

        Raises:
            ShardferryError: as `load_rank` does, or as the trainer does; the same failure is raised on all ranks.
        """
        self._thread = threading.get_ident()
        start, who = time.monotonic(), self._who()
        metrics = LoadMetrics(self._counters, **who)
        try:
            with self._span("load"), metrics.told():
                for layout, request in _parts_of(target, requests, self._settings.world_rank):
                    fraction = self._settings.memory_fraction
                    job = LoadJob(catalog, layout, request, self._device, read, memory_fraction=fraction)
                    self._loaded.append(self._load_part(job, metrics, trainer))
        except BaseException as error:
            log_fault(**who, error=error)
            raise
        metrics.ready(time.monotonic() - start)
        transport = choose_transport(self._settings.transport, self._loaded[0].arena, self._recipient())
        report = self._report(combined([loaded.figures() for loaded in self._loaded]), transport.name)
        log_phases(**who, phases=report.phases, nbytes=report.bytes_needed)
        return report

    def _who(self) -> Who:
        return Who(stage=self._settings.stage, rank=self._settings.world_rank, node=ray.util.get_node_ip_address())

    def _load_part(self, job: LoadJob, metrics: LoadMetrics, trainer: Any) -> LoadedShard:
        def announce(plan: LoadPlan) -> None:
            self._bytes_total += plan.bytes_needed
            metrics.want(self._bytes_total)

        return load_rank(
            job,
            self._agreement,
            counters=Counters(self._counters, requests_kept=requests_kept(self._settings.world_size)),
            announce=announce,
            check_plan=lambda plan: self._ask(trainer, plan),
        )

    def _ask(self, trainer: Any, plan: LoadPlan) -> None:
        """Ask the trainer whether a plan fits. Raises what it raises."""
        if trainer is None:
            return
        try:
            ray.get(
                trainer.shardferry_check.remote(len(self._loaded), plan.manifest()),
                timeout=self._settings.start_timeout_s,
            )
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except ray.exceptions.GetTimeoutError as error:
            raise RankError(
                f"the trainer of rank {self._settings.world_rank} did not say within timeouts.start_s = "
                f"{self._settings.start_timeout_s:g} s whether the plan fits; is it busy in another method?",
                [self._settings.world_rank],
            ) from error

    def handle(self, report: RankReport, exclusive: bool) -> ShardHandle:
        """The handle of the loaded shard; with the transport ``object_store`` without its bytes, see `chunks`.

        Args:
            report: the result of `load`, which names the transport.
            exclusive: one trainer alone opens the shard, and may write to it.
        """
        assert self._loaded, "load comes before handle"
        handles = [self._handle_of(loaded, report.transport, exclusive) for loaded in self._loaded]
        return replace(handles[0], others=tuple(handles[1:]))

    def _handle_of(self, loaded: LoadedShard, transport: str, exclusive: bool) -> ShardHandle:
        if transport_named(transport).outlives_loader:
            return ShardHandle(loaded.manifest, transport, ObjectStore((), loaded.arena.nbytes))
        return make_handle(loaded.manifest, loaded.arena, transport, exclusive=exclusive)

    def chunks(self, part: int) -> Any:
        """The bytes of a part's arena, as one result for each chunk."""
        found = chunks_of(self._loaded[part].arena)
        return found[0] if len(found) == 1 else found

    def keep(self) -> None:
        """Freeze the arenas. From now on others attach."""
        for loaded in self._loaded:
            if isinstance(loaded.arena, HostArena):
                loaded.arena.freeze()
        self._is_kept = True
        tell_kept(sum(loaded.arena.nbytes for loaded in self._loaded), **self._who())

    def restore(self, reread: Reread) -> str:
        """Load one rank's part of kept state again, without the other ranks, and keep it; nothing where that is done.

        Returns:
            The node's address.

        Raises:
            HandoffError: the checkpoint is not the same any more.
            ShardferryError: as `load` does.
        """
        if not self._is_kept:
            self._loaded = []
            catalog = open_checkpoint(reread.location, storage_options=reread.storage_options, cache=reread.cache)
            if (digest := digest_of(catalog)) != reread.digest:
                raise HandoffError(
                    f"the checkpoint was saved again: its digest is {digest[:12]}, that of the kept state is {reread.digest[:12]}"
                )
            request = reread.requests.request
            alone = replace(request, keys=replace(request.keys, ignore_unexpected=True))  # what other ranks take
            self.load(catalog, reread.target, replace(reread.requests, request=alone), reread.read)
            for loaded in self._loaded:
                asked = replace(loaded.manifest.request, keys=request.keys)
                loaded.manifest = replace(loaded.manifest, request=asked)
            self.keep()
        return str(ray.util.get_node_ip_address())

    def handle_for(self, host: str) -> ShardHandle | None:
        """A handle of what is kept, see `chunks` where its bytes are not here. None: it is not there yet, see `restore`.

        Args:
            host: of the process that opens it, see `shardferry.arena.host_identity`.
        """
        if not self._is_kept:
            return None
        recipient = Recipient(same_host=host == host_identity())
        transport = choose_transport(AUTO, self._loaded[0].arena, recipient).name
        handles = [self._handle_of(loaded, transport, exclusive=False) for loaded in self._loaded]
        return replace(handles[0], others=tuple(handles[1:]))

    def manifests(self) -> list[Manifest]:
        """Of each part."""
        return [loaded.manifest for loaded in self._loaded]

    def step(self) -> float | None:
        """How many steps the optimizer has taken; None: no parameter of this rank tells."""
        for loaded in self._loaded:
            for entries in loaded.manifest.by_fqn.values():
                if (entry := entries.get("step")) is not None:
                    with suppress(TypeError, ValueError, RuntimeError):  # something else of this name
                        return float(loaded.state().value_of(entry))
        return None

    def memory_file(self, part: int) -> tuple[LoaderFile, int]:
        """Where a part's kept arena is, for processes of this node, and its bytes."""
        arena = self._loaded[part].arena
        assert isinstance(arena, HostArena), "kept arenas are on the host"
        return LoaderFile.of(arena), arena.nbytes

    def read(self, part: int, byte_offset: int, nbytes: int) -> np.ndarray:
        """Bytes of a part's kept arena, for processes of other nodes."""
        return self._loaded[part].arena.as_bytes().numpy()[byte_offset : byte_offset + nbytes]

    def progress(self) -> Progress:
        """How many bytes are read so far, and in which phase. Ray answers it while the other methods run."""
        return Progress(self._counters.bytes_done, self._bytes_total, self._counters.phase)

    def stack(self) -> str:
        """Where the thread of `load` stands. Ray answers it while the other methods run."""
        frame = sys._current_frames().get(self._thread)
        return "no load" if frame is None else " < ".join(_places(frame))

    def _choose_device(self) -> torch.device:
        has_gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
        if self._settings.device == "cuda" and not has_gpu:
            raise RuntimeError(
                f"rank {self._settings.world_rank}: actors.device is cuda, but this actor sees no GPU "
                f"(Ray gave it {ray.get_gpu_ids()}, torch {torch.__version__} sees {torch.cuda.device_count()}); use device: cpu"
            )
        gpu = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
        if self._settings.device != "auto":
            return torch.device("cpu") if self._settings.device == "cpu" else gpu
        wants_gpu = wants_device_arena(self._settings.transport, self._recipient(), gpu_identity(gpu))
        return gpu if wants_gpu else torch.device("cpu")

    def _recipient(self) -> Recipient:
        """Where the process that will open the shard runs, as far as it is known."""
        trainer = self._settings.trainer
        return Recipient(same_host=self._settings.one_node) if trainer is None else trainer.recipient()

    @contextmanager
    def _span(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self._spans.append(Span(name=name, start=start, end=time.time()))

    def _report(self, figures: LoadFigures, transport: str) -> RankReport:
        load = next(span for span in self._spans if span.name == "load")
        return rank_report(
            figures,
            measures_of_this_process(figures.device),
            rank=self._settings.world_rank,
            transport=transport,
            before=[span for span in self._spans if span is not load],
            load_start=load.start,
        )


def _end_with(guard: str) -> None:
    """End this process when an actor has ended."""
    while True:
        time.sleep(_POLL_S)
        with suppress(ray.exceptions.RayError):
            try:
                ray.get_actor(guard, NAMESPACE)
            except ValueError:
                os._exit(0)


def _places(frame: FrameType) -> list[str]:
    """The innermost calls of a stack, innermost first."""
    calls = reversed(traceback.extract_stack(frame))
    return [f"{call.name} ({Path(call.filename).name}:{call.lineno})" for call in itertools.islice(calls, _STACK_CALLS)]


def _parts_of(
    target: SpecLayout | Reception, requests: PartRequests, world_rank: int
) -> list[tuple[RankLayout, LoadRequest]]:
    """What is loaded one after the other."""
    if isinstance(target, SpecLayout):
        return [(target.rank(world_rank), requests.request)]
    return [(part.layout, requests.of(part.optimizer_key, with_weights=part.with_weights)) for part in target.parts]
