"""Refuse a stage that can't succeed before any actor starts: a wrong location, key or topology, missing files, holes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint, opened_storage
from shardferry.checkpoint.optimizer_state import index_optimizer
from shardferry.config import LoadRequest
from shardferry.errors import SpecError
from shardferry.layout.spec import SpecLayout
from shardferry.plan.cover import check_cover
from shardferry.plan.planner import plan_load, saved_weights
from shardferry.read.execute import check_files
from shardferry.schemas.stage_config import StageConfig


def open_checkpoint_of(config: StageConfig, location: str | None) -> Catalog:
    """Open the spec's checkpoint.

    Args:
        location: of another checkpoint than the spec's.

    Raises:
        SpecError: there is no location, neither in the spec nor given.
        CatalogError: there is no checkpoint at the location, or its metadata can't be used.
    """
    where = location or config.checkpoint.location
    if where is None:
        raise SpecError("checkpoint.location: missing; give it in the spec or with --location")
    return opened(config, where)


def opened(config: StageConfig, location: Any) -> Catalog:
    """Open a checkpoint with the spec's options. Raises CatalogError, StorageError."""
    spec = config.checkpoint
    where = os.fspath(location) if isinstance(location, Path) else location
    return open_checkpoint(where, storage_options=spec.options_for(where), cache=spec.cache)


def target_layout(config: StageConfig) -> SpecLayout:
    """The spec's topology.

    Raises:
        SpecError: the spec has no topology.
    """
    if config.topology is None:
        raise SpecError("topology: missing; give mesh and placements, or trainers to ask for their layout")
    return config.topology.layout()


def check_checkpoint(catalog: Catalog, request: LoadRequest, *, on_other_nodes: bool) -> None:
    """Check that the requested optimizer is saved, and that its files are there with all their bytes.

    Args:
        on_other_nodes: files that this node lacks may be on disks of others, whose loaders look for them.

    Raises:
        PlanError: nothing is saved under the key.
        StorageError: a file is missing or short.
    """
    keys = _requested_keys(catalog, request)
    with opened_storage(catalog) as storage:
        elsewhere = set(storage.lacking(catalog.files)) if on_other_nodes else set()
        check_files(catalog, keys, storage, elsewhere=elsewhere)


def check_topology(catalog: Catalog, layout: SpecLayout, request: LoadRequest) -> None:
    """Check that the checkpoint's tensors can have a topology, and that saved chunks cover the optimizer's state.

    Raises:
        PlanError: a hole or an overlap anywhere in the optimizer's state.
        LayoutError: a placement that a tensor can't have.
    """
    keys = _requested_keys(catalog, request)
    check_cover(catalog, [catalog.tensors[key] for key in keys if key in catalog.tensors])
    plan_load(catalog, layout.rank(0), request)


def _requested_keys(catalog: Catalog, request: LoadRequest) -> list[str]:
    index = index_optimizer(catalog, request.optimizer_key)
    weights = [] if request.model_key is None else list(saved_weights(catalog, request, index).values())
    return [*index.all_keys(), *weights]
