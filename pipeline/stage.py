"""The stage: place loaders, let them load, hand the shards to trainers."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle

from shardferry.actors.loader_group import LoaderGroup, start_loaders
from shardferry.checkpoint.open import open_checkpoint
from shardferry.errors import SpecError
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.loading import Loading, ProgressCallback, Refs, StageResult
from shardferry.pipeline.planning import check_checkpoint, check_topology, target_layout
from shardferry.pipeline.waiting import Wait, gather
from shardferry.schemas.stage_config import StageConfig

Trainers = Sequence[ActorHandle[Any]]
Location = str | Path | ray.ObjectRef[Any]


class OptimizerLoadStage:
    """Loads an optimizer's state from a checkpoint, in the topology that the next trainers need.

    ::

        stage = OptimizerLoadStage(StageConfig.from_file("stage.yaml"))
        result = stage.run(trainers)            # actors whose class mixes in shardferry.OptimizerReceiver
        print(result.report.read_amplification)

    It needs no state between runs; one stage can run many times.
    """

    def __init__(self, config: StageConfig) -> None:
        self.config = config

    def submit(self, trainers: Trainers | None = None, location: Location | None = None) -> Loading:
        """Start a load and return at once.

        Args:
            trainers: actors by rank; asked for their layout, which then takes the place of the spec's topology. The shards
                are not delivered to them: pass ``refs[rank]`` on, or use `run`.
            location: the checkpoint; an ObjectRef of an upstream task's result will do. Default: the spec's.

        Raises:
            SpecError: no location, no topology, or more ranks than the cluster has GPUs for.
            CatalogError, PlanError, LayoutError, StorageError: the checkpoint or the topology is wrong; nothing was started. Where
                ``location`` is an ObjectRef these come from `Loading.wait`.
        """
        return self._submit(trainers, location, exclusive=False)

    def run(
        self,
        trainers: Trainers | None = None,
        location: Location | None = None,
        *,
        on_progress: ProgressCallback | None = None,
    ) -> StageResult:
        """Load, and deliver to the trainers where they are given; return when all is done.

        Each trainer gets its arena for itself and the loaders are gone afterwards. Without trainers, keep the result until
        the handles are opened.

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
        options, cache = self.config.checkpoint.storage_options, self.config.checkpoint.cache
        catalog = None
        if not isinstance(where, ray.ObjectRef):
            catalog = open_checkpoint(os.fspath(where), storage_options=options, cache=cache)
        if catalog is not None:
            check_checkpoint(catalog, self.config.checkpoint.request())
            if layout is not None:
                check_topology(catalog, layout, self.config.checkpoint.request())
        if not ray.is_initialized():
            ray.init()
        group = start_loaders(self.config, world_size)
        catalog_ref = (
            group.loaders[0].open_catalog.remote(where, options, cache) if catalog is None else ray.put(catalog)
        )
        return Loading(
            self.config, group, self._promise(where, catalog_ref, group, trainers, layout, exclusive), layout
        )

    def _spec_layout(self, trainers: Trainers | None) -> SpecLayout | None:
        if trainers is None:
            return target_layout(self.config)
        if not trainers:
            raise SpecError("trainers: an empty list; give one actor a rank, or None to load by the spec's topology")
        if self.config.topology is not None and self.config.topology.layout().world_size != len(trainers):
            raise SpecError(
                f"topology.mesh: {self.config.topology.layout().mesh} makes {self.config.topology.layout().world_size} ranks, "
                f"but {len(trainers)} trainers were given; leave topology out to follow the trainers"
            )
        return None

    def _promise(
        self,
        where: Location,
        catalog: ray.ObjectRef[Any],
        group: LoaderGroup,
        trainers: Trainers | None,
        layout: SpecLayout | None,
        exclusive: bool,
    ) -> Refs:
        request = self.config.checkpoint.request()
        read = self.config.read.options(self.config.timeouts.load_s)
        receptions = [
            trainer.shardferry_layout.remote(rank, group.world_size) for rank, trainer in enumerate(trainers or ())
        ]
        targets: list[Any] = receptions or [ray.put(layout)] * group.world_size
        reports: list[ray.ObjectRef[Any]] = [
            loader.load.remote(catalog, target, request, read, joined)
            for loader, target, joined in zip(group.loaders, targets, group.joined, strict=True)
        ]
        handles = [
            loader.handle.remote(report, exclusive) for loader, report in zip(group.loaders, reports, strict=True)
        ]
        return Refs(where, catalog, receptions, reports, handles)

    def _deliver(self, loading: Loading, trainers: Trainers, result: StageResult) -> None:
        start = time.time()
        timeout_s = self.config.timeouts.handoff_s
        receipts = [
            trainer.shardferry_receive.remote(handle) for trainer, handle in zip(trainers, loading.refs, strict=True)
        ]
        gather(receipts, Wait("delivering to the trainers", timeout_s, "timeouts.handoff_s"))
        result.add_phase("handoff", time.time() - start)
        loading.close()
