"""The stage: start loaders, load, and deliver the shards to the trainers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup

from shardferry.actors.guard import start_guard
from shardferry.actors.placement import UserBundles, captured_group, check_room, place
from shardferry.actors.resident.kept import name_is_taken, others_of
from shardferry.errors import SpecError
from shardferry.layout.spec import SpecLayout
from shardferry.pipeline.drive import Drive, Order, as_layout, check_load
from shardferry.pipeline.loading import Loading, ProgressCallback
from shardferry.pipeline.preflight import opened, target_layout
from shardferry.pipeline.result import StageResult
from shardferry.pipeline.trainers.delivery import check_receivers, deliver
from shardferry.pipeline.trainers.in_process import run_in_process
from shardferry.pipeline.trainers.source import held_by
from shardferry.schemas.stage_config import StageConfig, TopologySpec

Trainers = Sequence[ActorHandle[Any]]
Location = str | Path | ray.ObjectRef[Any]
Topology = TopologySpec | dict[str, Any] | ray.ObjectRef[Any]


class OptimizerLoadStage:
    """Loads an optimizer's state from a checkpoint, in the topology of the next trainers.

    ```python
    stage = OptimizerLoadStage(StageConfig.from_file("stage.yaml"))
    result = stage.run(trainers)            # actors whose class mixes in shardferry.OptimizerReceiver
    print(result.report.read_amplification)
    ```

    A stage keeps no state between runs, and can run many times.

    Args:
        config: the spec.
        placement_group: of the user's own, in which the loaders run; default: beside the trainers where there are some, else a
            placement group that the stage makes.
        bundles: the index of each rank's bundle in it; default: any with room.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        placement_group: PlacementGroup | None = None,
        bundles: Sequence[int] | None = None,
    ) -> None:
        if bundles is not None and placement_group is None:
            raise SpecError("bundles: are given without a placement_group")
        self.config = config
        self._user = None if placement_group is None else UserBundles(placement_group, bundles)

    def submit(
        self,
        trainers: Trainers | None = None,
        location: Location | None = None,
        *,
        topology: Topology | None = None,
        keep: str | None = None,
    ) -> Loading:
        """Start a load and return at once. Nothing is reserved before location and topology are known.

        Args:
            trainers: actors, by rank. They are asked for their layouts, which replace the spec's topology. The shards are not
                delivered to them: pass ``refs[rank]`` on, or use `run`.
            location: the checkpoint, or an ObjectRef of it, the result of an upstream task. Default: the spec's.
            topology: instead of the spec's: a `TopologySpec`, a dict of its fields, or an ObjectRef of one.
            keep: a name under which the state stays in the cluster's memory; default: the spec's ``handoff.keep``.

        Raises:
            SpecError: no location, no topology, trainers that are no receivers, or fewer GPUs in the cluster than the ranks need.
            CatalogError, PlanError, LayoutError, StorageError: the checkpoint or the topology is wrong; nothing was started. If
                ``location`` is an ObjectRef, `Loading.wait` raises these.
        """
        return self._kept_as(keep)._submit(trainers, location, topology, is_run=False)

    def run(
        self,
        trainers: Trainers | None = None,
        location: Location | None = None,
        *,
        topology: Topology | None = None,
        source: Trainers | None = None,
        keep: str | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> StageResult:
        """Load, deliver to the trainers if they are given, and return when all is done.

        The trainers check their shards, then all of them install; where one fails, all keep what they had. Each trainer gets an
        arena of its own, and the loaders are taken down at the end. Without trainers, keep the result until the handles are
        opened.

        Args:
            trainers: actors, by rank, whose class mixes in `shardferry.OptimizerReceiver`, or has methods of its names.
            location, topology, keep: as for `submit`.
            source: living trainers, instead of a location: what they hold now is the state. Where ranks are missing, their parts
                come from replicas, or an error names what is lost.
            on_progress: called twice a second with every rank's progress, and once when all is loaded.

        Raises:
            As `submit`, `Loading.wait` and `shardferry.OptimizerReceiver.shardferry_receive` do.
        """
        if source is not None:
            if location is not None:
                raise SpecError("source: is given beside location; leave out one of them")
            with held_by(source, self.config) as config:
                other = OptimizerLoadStage(config)
                other._user = self._user
                return other.run(trainers, topology=topology, keep=keep, on_progress=on_progress)
        if self.config.handoff.transport == "in_process":
            return run_in_process(self.config, trainers, self._location(location))
        loading = self._kept_as(keep)._submit(trainers, location, topology, is_run=True)
        try:
            result = loading.result(on_progress=on_progress)
            if trainers is not None:
                self._deliver(loading, trainers, result)
        except BaseException:
            loading.close()
            raise
        return result

    async def run_async(
        self,
        trainers: Trainers | None = None,
        location: Location | None = None,
        *,
        topology: Topology | None = None,
        keep: str | None = None,
        on_progress: ProgressCallback | None = None,
    ) -> StageResult:
        """As `run`, for an async actor: its loop goes on meanwhile."""
        return await asyncio.to_thread(
            self.run, trainers, location, topology=topology, keep=keep, on_progress=on_progress
        )

    def _kept_as(self, name: str | None) -> OptimizerLoadStage:
        """This stage, with a name under which its state is kept."""
        if name is None:
            return self
        values = self.config.model_dump(mode="json")
        values["handoff"]["keep"] = {**(values["handoff"]["keep"] or {}), "name": name}
        other = OptimizerLoadStage(StageConfig.from_values(values, source="keep"))
        other._user = self._user
        return other

    def _submit(
        self, trainers: Trainers | None, location: Location | None, topology: Topology | None, *, is_run: bool
    ) -> Loading:
        if self.config.handoff.transport == "in_process":
            raise SpecError("handoff.transport: in_process loads inside the trainers; call run(trainers)")
        where, user = self._location(location), self._user
        layout = self._topology(trainers, topology)
        known = layout if isinstance(layout, SpecLayout) else None
        catalog, start = None, time.time()
        if not isinstance(where, ray.ObjectRef) and not isinstance(layout, ray.ObjectRef):
            catalog = opened(self.config, where)
            if known is not None:
                check_load(self.config, catalog, known)
        catalog_s = time.time() - start
        if not ray.is_initialized():
            ray.init()
        user = user or captured_group()
        world_size = len(trainers) if trainers is not None else None if known is None else known.world_size
        if known is not None:
            check_room(self.config, place(self.config, known.world_size, trainer_nodes=None, user=user))
        keep = self.config.handoff.keep
        if keep is not None and not keep.replace and others_of(keep.name):
            raise name_is_taken(keep.name)
        name = uuid.uuid4().hex[:8]
        guard = start_guard(name, None if keep is None else keep.name)
        order = Order(
            name,
            self.config,
            where,
            catalog,
            catalog_s,
            topology=layout,
            trainers=trainers,
            user=user,
            exclusive=is_run and trainers is not None and keep is None,
            asks_trainers=is_run,
        )
        loading = Loading(name, self.config, guard, world_size)
        Drive(order, guard, loading.refs if world_size is not None else ()).start()
        return loading

    def _location(self, given: Location | None) -> Any:
        where = given if given is not None else self.config.checkpoint.location
        if where is None:
            raise SpecError("checkpoint.location: missing; give it in the spec, or to submit() or run()")
        return where

    def _topology(self, trainers: Trainers | None, given: Topology | None) -> SpecLayout | ray.ObjectRef[Any] | None:
        """None: the trainers'. Raises SpecError."""
        if trainers is None:
            if given is None:
                return target_layout(self.config)
            return given if isinstance(given, ray.ObjectRef) else as_layout(given)
        check_receivers(trainers)
        if given is not None:
            raise SpecError("topology: is given beside trainers, whose layouts are the topology; leave out one of them")
        if self.config.topology is not None and self.config.topology.layout().world_size != len(trainers):
            raise SpecError(
                f"topology.mesh: {self.config.topology.layout().mesh} makes {self.config.topology.layout().world_size} ranks, "
                f"but {len(trainers)} trainers were given; leave topology out to follow the trainers"
            )
        return None

    def _deliver(self, loading: Loading, trainers: Trainers, result: StageResult) -> None:
        start = time.time()
        in_steps = all(reception.in_steps for reception in result.receptions)
        result.add_receipts(deliver(trainers, loading.refs, self.config.timeouts.handoff_s, in_steps=in_steps))
        result.add_phase("handoff", time.time() - start)
        loading.close()
