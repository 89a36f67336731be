"""The stage: start loaders, load, and deliver the shards to the trainers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from shardferry.actors.loader_group import LoaderGroup, start_loaders
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import SpecError
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.loading import Loading, ProgressCallback, Refs, StageResult, Submission
from shardferry.pipeline.preflight import check_checkpoint, check_topology, target_layout
from shardferry.pipeline.waiting import Wait, gather
from shardferry.schemas.stage_config import StageConfig

Trainers = Sequence[ActorHandle[Any]]
Location = str | Path | ray.ObjectRef[Any]


class OptimizerLoadStage:
    """Loads an optimizer's state from a checkpoint, in the topology of the next trainers.

    ::

        stage = OptimizerLoadStage(StageConfig.from_file("stage.yaml"))
        result = stage.run(trainers)            # actors whose class mixes in shardferry.OptimizerReceiver
        print(result.report.read_amplification)

    A stage keeps no state between runs, and can run many times.
    """

    def __init__(self, config: StageConfig) -> None:
        self.config = config

    def submit(self, trainers: Trainers | None = None, location: Location | None = None) -> Loading:
        """Start a load and return at once.

        Args:
            trainers: actors, by rank. They are asked for their layouts, which replace the spec's topology. The shards are not
                delivered to them: pass ``refs[rank]`` on, or use `run`.
            location: the checkpoint, or an ObjectRef of it, the result of an upstream task. Default: the spec's.

        Raises:
            SpecError: no location, no topology, or fewer GPUs in the cluster than the ranks need.
            CatalogError, PlanError, LayoutError, StorageError: the checkpoint or the topology is wrong; nothing was started. If
                ``location`` is an ObjectRef, `Loading.wait` raises these.
        """
        return self._submit(trainers, location, exclusive=False)

    def run(
        self,
        trainers: Trainers | None = None,
        location: Location | None = None,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> StageResult:
        """Load, deliver to the trainers if they are given, and return when all is done.

        Each trainer gets an arena of its own, and the loaders are taken down at the end. Without trainers, keep the result
        until the handles are opened.

        Args:
            trainers: actors, by rank, whose class mixes in `shardferry.OptimizerReceiver`.
            location: as for `submit`.
            on_progress: called twice a second with every rank's progress.

        Raises:
            As `submit`, `Loading.wait` and `shardferry.OptimizerReceiver.shardferry_receive` do.
        """
        loading = self._submit(trainers, location, exclusive=trainers is not None)
        try:
            result = loading.result(on_progress=on_progress)
            if trainers is not None:
                self._deliver(loading, trainers, result)
        except BaseException:
            loading.close()
            raise
        return result

    def _submit(self, trainers: Trainers | None, location: Location | None, *, exclusive: bool) -> Loading:
        where = location if location is not None else self.config.checkpoint.location
        if where is None:
            raise SpecError("checkpoint.location: missing; give it in the spec, or to submit() or run()")
        layout = self._spec_layout(trainers)
        world_size = len(trainers) if trainers is not None else layout.world_size if layout else 0
        catalog = None if isinstance(where, ray.ObjectRef) else self._open(where, layout)
        if not ray.is_initialized():
            ray.init()
        group = start_loaders(self.config, world_size)
        catalog_ref = ray.put(catalog) if catalog is not None else self._open_on_rank_0(group, where)
        receptions = [] if trainers is None else _ask_for_layouts(trainers)
        targets = receptions or [ray.put(layout)] * world_size
        reports, handles = self._load(group, catalog_ref, targets, exclusive=exclusive)
        refs = Refs(location=where, catalog=catalog_ref, receptions=receptions, reports=reports, handles=handles)
        return Loading(Submission(self.config, group, refs, layout))

    def _open(self, where: str | Path, layout: SpecLayout | None) -> Catalog:
        """Open the checkpoint and refuse what can't be loaded."""
        spec = self.config.checkpoint
        catalog = open_checkpoint(os.fspath(where), storage_options=spec.storage_options, cache=spec.cache)
        check_checkpoint(catalog, spec.request())
        if layout is not None:
            check_topology(catalog, layout, spec.request())
        return catalog

    def _open_on_rank_0(self, group: LoaderGroup, where: Any) -> Any:
        """Let a loader open the checkpoint, as its location is not known yet. Returns the ObjectRef of the catalog."""
        spec = self.config.checkpoint
        return group.loaders[0].open_catalog.remote(where, spec.storage_options, spec.cache)

    def _spec_layout(self, trainers: Trainers | None) -> SpecLayout | None:
        if trainers is None:
            return target_layout(self.config)
        if not trainers:
            raise SpecError("trainers: an empty list; give one actor per rank, or None to load by the spec's topology")
        if self.config.topology is not None and self.config.topology.layout().world_size != len(trainers):
            raise SpecError(
                f"topology.mesh: {self.config.topology.layout().mesh} makes {self.config.topology.layout().world_size} ranks, "
                f"but {len(trainers)} trainers were given; leave topology out to follow the trainers"
            )
        return None

    def _load(
        self, group: LoaderGroup, catalog: ray.ObjectRef[Any], targets: list[Any], *, exclusive: bool
    ) -> tuple[list[Any], list[Any]]:
        """Start the load of each rank. Returns the ObjectRefs of reports and of handles, by rank."""
        request = self.config.checkpoint.request()
        read = self.config.read.options(self.config.timeouts.load_s)
        reports: list[Any] = [
            loader.load.remote(catalog, target, request, read, joined)
            for loader, target, joined in zip(group.loaders, targets, group.joined, strict=True)
        ]
        handles: list[Any] = [
            loader.handle.remote(report, exclusive) for loader, report in zip(group.loaders, reports, strict=True)
        ]
        return reports, handles

    def _deliver(self, loading: Loading, trainers: Trainers, result: StageResult) -> None:
        start = time.time()
        timeout_s = self.config.timeouts.handoff_s
        receipts = [
            trainer.shardferry_receive.remote(handle) for trainer, handle in zip(trainers, loading.refs, strict=True)
        ]
        result.add_receipts(gather(receipts, Wait("delivering to the trainers", timeout_s, "timeouts.handoff_s")))
        result.add_phase("handoff", time.time() - start)
        loading.close()


def _ask_for_layouts(trainers: Trainers) -> list[Any]:
    """The ObjectRefs of the trainers' receptions, by rank."""
    return [trainer.shardferry_layout.remote(rank, len(trainers)) for rank, trainer in enumerate(trainers)]
