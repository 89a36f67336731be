"""Load a checkpoint into the live models and optimizers of the calling ranks: plan, try, read, install; all or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, Unpack

import torch
import torch.distributed as dist
from torch.nn import Module

from shardferry.config import (
    DtypePolicy,
    HyperparameterPolicy,
    KeyPolicy,
    LoadRequest,
    ReadKeywords,
    ReadOptions,
    Selection,
    StalePolicy,
    one_of,
)
from shardferry.errors import SpecError
from shardferry.exchange.agreement import Agreement, Balance
from shardferry.layout.rank_layout import RankLayout
from shardferry.load import LoadedShard, LoadFigures, LoadJob, combined, load_rank, open_for_all, retries
from shardferry.optimizer.install import Checked, Installation, check, fit
from shardferry.optimizer.live import LiveModel, as_tuple
from shardferry.optimizer.live_layout import live_layout
from shardferry.optimizer.loaded_state import LoadedState
from shardferry.optimizer.parts import Models, Optimizers, live_parts
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.match_keys import KeyReport
from shardferry.state_dicts import LeftLive
from shardferry.stats import Counters
from shardferry.storage.joined import with_weights_from
from shardferry.storage.open import Location, open_storage

Keys = str | Sequence[str] | Mapping[str, str]


def load_optimizer_state(
    model: Models,
    optimizer: Optimizers,
    location: Location,
    *,
    optimizer_key: Keys = "optim",
    model_key: Keys | None = None,
    model_location: Location | None = None,
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    keys: str | Sequence[str] = "strict",
    rename: Mapping[str, str | Sequence[str]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str = "error",
    wanted_dtypes: Mapping[str, torch.dtype] | None = None,
    hyperparameters: str | Mapping[str, Sequence[str]] = "saved",
    safe_globals: Sequence[str] = (),
    stale: str = "warn",
    **read: Unpack[ReadKeywords],
) -> KeyReport:
    """Load an optimizer's state in place, resharding as needed: from any number of ranks to those of this job.

    Call it on all ranks of the process group, after the model is wrapped and the optimizer is made; neither needs to
    have taken a step. Only this rank's bytes are read. The state goes through the optimizer's own `load_state_dict`, after
    a trial on a copy without memory.

    Args:
        model: wrapped as it is trained (DDP, FSDP1, FSDP2, tensor parallel, or plain); several parts where a rank has several.
        optimizer: of that model. A list where the state of several was saved as one. A dict ``{optimizer_key: optimizer}``
            where each was saved under a key of its own.
        location: the checkpoint's directory, any URL that fsspec can open, or a ``ray.train.Checkpoint``.
        optimizer_key: the optimizer's key in the state dict that was saved; dots lead into nested ones. One for each
            optimizer where several were saved apart: a list beside a list, or a dict beside a dict of the same names.
        model_key: the model's key in the state dict that was saved, to load its weights and buffers too; a list or a dict
            beside those of the optimizers.
        model_location: where the weights were saved, if in another directory; a location of any kind.
        storage_options: of a URL: credentials, an endpoint. They are for ``model_location`` too where that is of the same kind.
        process_group: default: the whole job where torch.distributed is initialised, else this process alone.
        keys: ``strict``; or ``allow_missing``, which leaves live state that was not saved as it is; ``ignore_unexpected``,
            which leaves out saved state that no rank wants; or a list of both. Both are for parameters and for the
            entries of their state.
        rename: glob over saved FQNs to their names here, ``{"net.*": "*"}``; the first that matches. A list gives one saved
            parameter to several, as where it was tied.
        include, exclude: globs over the FQNs here; the state of other parameters stays as it is.
        dtype: ``error`` or ``cast``, where the optimizer's state (or with ``model_key`` a weight) has another dtype than was
            saved. The state of an optimizer that has not stepped is predicted by a step without memory.
        wanted_dtypes: glob over state names to the dtype that is wanted, where the optimizer's own isn't known.
        hyperparameters: whose they are after the load: ``saved``; ``live``; or ``{"live": ["lr", ...]}``, which keeps those of
            these names.
        safe_globals: dotted names of classes that saved Python objects may be of; they are imported. Those that
            ``torch.serialization.add_safe_globals`` has are allowed too.
        stale: ``warn`` or ``error``, where data files are younger than the metadata that describes them by more than the save
            took: a later save may have been killed over them.
        **read: the options of the spec's ``read`` section, and ``load_s``; see `shardferry.config.ReadOptions`. With
            ``strategy="cooperative"`` ranks read for each other, so that each byte leaves storage once; with ``"direct"`` each
            rank reads for itself; ``"auto"`` reads directly from local files on one node, else cooperatively.

    Returns:
        What ``keys`` tolerated, the hyperparameters that were overwritten, and warnings.

    Raises:
        ShardferryError: nothing of the models and optimizers has been changed. Where one rank fails, all raise.
    """

    def parts() -> list[LoadPart]:
        request = LoadRequest(
            selection=Selection.of(rename, include, exclude),
            keys=KeyPolicy.of(keys),
            dtype=one_of(DtypePolicy, "dtype", dtype),
            wanted_dtypes=tuple((wanted_dtypes or {}).items()),
            hyperparameters=HyperparameterPolicy.of(hyperparameters),
            safe_globals=tuple(safe_globals),
            stale=one_of(StalePolicy, "stale", stale),
        )
        if model_location is not None and model_key is None:
            raise SpecError("model_location: is given without model_key, the key of the weights there")
        return _parts_of(model, optimizer, optimizer_key, model_key, request=request, location=location)

    options = with_weights_from(storage_options or {}, location, model_location)
    return load_parts(parts, lambda: ReadOptions.of(read), options, process_group)[0]


def load_model_state(
    model: Module | Sequence[Module],
    location: Location,
    *,
    model_key: str = "model",
    storage_options: Mapping[str, Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
    keys: str | Sequence[str] = "strict",
    rename: Mapping[str, str | Sequence[str]] | None = None,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    dtype: str = "error",
    stale: str = "warn",
    **read: Unpack[ReadKeywords],
) -> KeyReport:
    """Load a model's weights, buffers and extra states in place, without an optimizer; else as `load_optimizer_state`.

    Args:
        model_key: the model's key in the state dict that was saved; empty where the model's own state dict was saved.

    Raises:
        ShardferryError: nothing of the model has been changed. Where one rank fails, all raise.
    """

    def parts() -> list[LoadPart]:
        request = LoadRequest(
            optimizer_key=None,
            model_key=model_key,
            selection=Selection.of(rename, include, exclude),
            keys=KeyPolicy.of(keys),
            dtype=one_of(DtypePolicy, "dtype", dtype),
            stale=one_of(StalePolicy, "stale", stale),
        )
        return [LoadPart(LiveModel(as_tuple(model), ()), request, location)]

    return load_parts(parts, lambda: ReadOptions.of(read), storage_options, process_group)[0]


@dataclass(frozen=True)
class LoadPart:
    """Live objects that are loaded from one place under one request."""

    live: LiveModel
    request: LoadRequest
    location: Location


def _parts_of(
    model: Models,
    optimizer: Optimizers,
    optimizer_key: Keys,
    model_key: Keys | None,
    *,
    request: LoadRequest,
    location: Location,
) -> list[LoadPart]:
    """One part, or one for each optimizer where they have keys of their own. Raises SpecError, InstallError."""
    if not isinstance(optimizer, Mapping):
        if isinstance(optimizer_key, str):
            own = request if model_key is None else replace(request, model_key=_one_key("model_key", model_key))
            (part,) = live_parts(model, optimizer)
            return [LoadPart(part.live, replace(own, optimizer_key=optimizer_key), location)]
        optimizer = dict(enumerate(as_tuple(optimizer)))  # type: ignore[arg-type]
    if optimizer_key == "optim":
        optimizer_key = {name: str(name) for name in optimizer}
    optimizer_keys = _by_name("optimizer_key", optimizer_key, optimizer)
    model_keys: Mapping[Any, str | None] = (
        dict.fromkeys(optimizer, model_key)
        if model_key is None or isinstance(model_key, str)
        else _by_name("model_key", model_key, optimizer)
    )
    return [
        LoadPart(
            part.live,
            replace(
                request,
                optimizer_key=optimizer_keys[part.key],
                model_key=model_keys[part.key] if part.with_weights else None,
            ),
            location,
        )
        for part in live_parts(model, optimizer)
    ]


def _one_key(option: str, given: Keys) -> str:
    if not isinstance(given, str):
        raise SpecError(f"{option}: {given!r} is for several optimizers; give optimizer and optimizer_key likewise")
    return given


def _by_name(option: str, given: Keys, optimizers: Mapping[Any, Any]) -> dict[Any, str]:
    """The key of each optimizer. Raises SpecError."""
    if isinstance(given, str):
        raise SpecError(f"{option}: {given!r} is one key for {len(optimizers)} optimizers; give one for each")
    found = dict(given) if isinstance(given, Mapping) else dict(zip(optimizers, given, strict=False))
    if set(found) != set(optimizers) or len(given) != len(optimizers):
        raise SpecError(
            f"{option}: {given!r} has {len(given)} keys, the optimizers are {len(optimizers)}: {list(optimizers)}"
        )
    return found


@dataclass(frozen=True)
class _LoadedPart:
    """A part whose state has been read, and that fits."""

    shard: LoadedShard
    checked: Checked
    installation: Installation


_Prepared = tuple[list[LoadPart], Sequence[RankLayout], ReadOptions]


def load_parts(
    parts: Callable[[], list[LoadPart]],
    read: Callable[[], ReadOptions],
    storage_options: Mapping[str, Any] | None,
    process_group: dist.ProcessGroup | None,
) -> tuple[KeyReport, LoadFigures]:
    """Load every part, then install all of them, on all ranks or on none.

    Args:
        parts, read: are called on every rank, and may raise: then all ranks raise.
        process_group: None: the whole job where torch.distributed is initialised, else this process alone.

    Raises:
        ShardferryError: nothing of the models and optimizers has been changed.
    """
    if process_group is None and dist.is_initialized():
        process_group = dist.group.WORLD
    agreement = Agreement(process_group)

    def prepare() -> _Prepared:
        found = parts()
        layouts = [live_layout(p.live, world_rank=agreement.rank, world_size=agreement.size) for p in found]
        return found, layouts, read()

    same_keys: Balance[_Prepared] = agreement.same(
        lambda prepared: [part.request.optimizer_key for part in prepared[0]],
        "optimizer_key: ranks ask for different ones, or for the same in another order; give all ranks the same, or those "
        "that ask alike a process_group of their own",
    )
    found, layouts, options = agreement.all_or_raise("reading the model's layout", prepare, same_keys)
    loaded = [
        _load_part(part, layout, agreement, options, storage_options)
        for part, layout in zip(found, layouts, strict=True)
    ]
    start = time.perf_counter()
    _install(Installation([step for part in loaded for step in part.installation.steps]), agreement)
    figures = combined([part.shard.figures() for part in loaded])
    seconds = {**figures.seconds, "install": time.perf_counter() - start}
    return _report(loaded), replace(figures, seconds=seconds)


def _load_part(
    part: LoadPart,
    layout: RankLayout,
    agreement: Agreement,
    options: ReadOptions,
    storage_options: Mapping[str, Any] | None,
) -> _LoadedPart:
    checked: list[Checked] = []

    def check_plan(plan: LoadPlan) -> None:
        checked.append(check(LoadedState(plan.manifest(), None), part.live))

    counters, start = Counters(), time.perf_counter()
    retry = retries(options, counters)
    storage = agreement.all_or_raise(
        "opening the checkpoint", lambda: open_storage(part.location, storage_options, retry=retry)
    )
    with closing(storage):
        catalog, values = open_for_all(storage, agreement, part.request, options, counters)
        catalog_s = time.perf_counter() - start
        job = LoadJob(catalog, layout, part.request, part.live.device, options, stays_here=True)
        shard = load_rank(job, agreement, counters=counters, values=values, storage=storage, check_plan=check_plan)
    shard.seconds = {"catalog": catalog_s, **shard.seconds}
    ready = agreement.all_or_raise(
        "fitting the state to the optimizer", lambda: fit(shard.state(), part.live, checked[0])
    )
    left = tuple(
        f"{key}: was saved as {', '.join(value.class_names)}, which is not plain data; the live value stays"
        for key, value in values.items()
        if isinstance(value, LeftLive)
    )
    stale = (catalog.stale,) if catalog.stale else ()
    return _LoadedPart(shard, replace(checked[0], warnings=checked[0].warnings + left + stale), ready)


def _install(installation: Installation, agreement: Agreement) -> None:
    try:
        agreement.all_or_raise("installing the state", installation.apply)
    except BaseException:
        installation.undo()
        raise
    installation.finish()


def _report(loaded: Sequence[_LoadedPart]) -> KeyReport:
    reports = [KeyReport(part.shard.plan.missing, part.shard.unexpected, *part.checked.report()) for part in loaded]
    return KeyReport(*(tuple(chain.from_iterable(getattr(r, f.name) for r in reports)) for f in fields(KeyReport)))
