"""State that stays in the memory of the cluster: find it, attach to it, drop it, and read from it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from shardferry.actors.guard import NAMESPACE, KeptRecord, guard_name, kept_prefix, loader_name
from shardferry.actors.loader_group import completed
from shardferry.actors.resident.reread import handle_of, lost
from shardferry.errors import HandoffError, SpecError
from shardferry.handoff.handle import ShardHandle

_ANSWER_S = 60.0  # for a guard to answer, also on a node that is very busy


@dataclass(frozen=True)
class KeptState:
    """State that is kept under a name."""

    name: str
    location: str  # of the checkpoint
    optimizer_key: str | None
    topology: str  # mesh, or number of ranks
    world_size: int
    bytes_per_node: dict[str, int]
    age_s: float
    left_s: float  # until it is dropped, if nobody attaches
    lost_ranks: tuple[int, ...]  # whose loader has died
    digest: str  # of the checkpoint: of its catalog and the versions of its files
    model_key: str | Mapping[str, str] | None
    selection: Mapping[str, Any]  # rename, include and exclude, where the spec has them
    step: float | None  # that the optimizer has taken; None: its state doesn't tell


def kept() -> list[KeptState]:
    """The state that is kept in the cluster, by name."""
    _connect()
    found = [(record, guard) for name in _names() for record, guard in [_record_of(name)] if record is not None]
    return sorted((_state_of(record) for record, _ in found), key=lambda state: state.name)


def attach(
    name: str,
    rank: int,
    *,
    location: str | None = None,
    optimizer_key: str | None = None,
    model_key: str | None = None,
    timeout_s: float = 600.0,
) -> ShardHandle:
    """A handle of one rank's kept state. Nothing is read from storage, unless the rank's loader has died.

    On the loader's node the handle's memory is the loader's own, and each opener gets private pages where it writes. On
    another node it holds a copy of the bytes, through Ray's object store. Where the loader has died, another one reads that
    rank's part again, on this node; see ``handoff.retries``.

    Args:
        name: under which the state is kept.
        location, optimizer_key, model_key: of the checkpoint that is expected; another one is an error. None: any.
        timeout_s: for the bytes to come from another node.

    Raises:
        HandoffError: nothing is kept under the name, or the state of another checkpoint or key; or the rank's loader has died,
            and its part can't be read again.
    """
    record, guard = find(name)
    if location is not None and location.rstrip("/") != record.location.rstrip("/"):
        raise HandoffError(f"{name!r} keeps the state of {record.location}, not of {location}")
    for word, expected, there in (
        ("optimizer_key", optimizer_key, record.optimizer_key),
        ("model_key", model_key, record.model_key),
    ):
        if expected is not None and expected != there:
            raise HandoffError(f"{name!r} keeps the state of {record.location} with {word} {there!r}, not {expected!r}")
    if not 0 <= rank < record.world_size:
        raise HandoffError(f"{name!r} keeps the state of {record.world_size} ranks; there is no rank {rank}")
    guard.touch.remote()
    loader, handle = handle_of(record, guard, rank)
    return completed(handle, loader, record.nodes[rank], timeout_s)


def drop(name: str) -> None:
    """Give the memory of kept state back. Memory that trainers have opened stays theirs. Raises HandoffError: there is none."""
    _, guard = find(name)
    with suppress(ray.exceptions.RayActorError):
        ray.get(guard.drop.remote(), timeout=_ANSWER_S)


def find(name: str, *, answer_s: float = _ANSWER_S) -> tuple[KeptRecord, Any]:
    """The record of kept state, and its guard.

    Args:
        answer_s: deadline for the guard's answer.

    Raises:
        HandoffError: nothing is kept under the name, or its guard doesn't answer.
    """
    _connect()
    found = [_record_of(one, answer_s) for one in _names(name)]
    complete = [(record, guard) for record, guard in found if record is not None]
    if not complete:
        names = sorted({state.name for state in kept()})
        raise HandoffError(
            f"nothing is kept under {name!r}; there is {', '.join(names) or 'nothing kept in this cluster'}"
        )
    return max(complete, key=lambda found: found[0].created)


def others_of(name: str, stage: str | None = None) -> list[Any]:
    """The guards of state that is kept, or is being loaded to be kept, under a name.

    Args:
        stage: whose own guard is left out.
    """
    found = []
    for actor in _names(name):
        if stage is None or actor != guard_name(stage, name):
            with suppress(ValueError):  # gone since
                found.append(ray.get_actor(actor, NAMESPACE))
    return found


def name_is_taken(name: str) -> SpecError:
    """The error for a name under which state is kept already."""
    return SpecError(
        f"handoff.keep.name: {name!r} is taken; `shardferry kept` lists what is kept. Attach to it, drop it, take another name, or "
        "set handoff.keep.replace: true"
    )


def _connect() -> None:
    if not ray.is_initialized():
        ray.init()


def _names(name: str | None = None) -> list[str]:
    """The names of the guards of kept state."""
    named = ray.util.list_named_actors(all_namespaces=True)
    prefix = kept_prefix(name)
    return [actor["name"] for actor in named if actor["namespace"] == NAMESPACE and actor["name"].startswith(prefix)]


def _record_of(actor: str, answer_s: float = _ANSWER_S) -> tuple[KeptRecord | None, Any]:
    """None: it is being loaded, or its guard has ended since. Raises HandoffError: the guard doesn't answer."""
    try:
        guard: Any = ray.get_actor(actor, NAMESPACE)
        return ray.get(guard.record.remote(), timeout=answer_s), guard
    except (ValueError, ray.exceptions.ActorDiedError):
        return None, None
    except ray.exceptions.RayError as error:  # out of reach, which is not gone
        raise HandoffError(
            f"{actor}: the guard of this kept state did not answer within {answer_s:g} s ({type(error).__name__}): its node is very "
            "busy, or can't be reached; try again"
        ) from error


def _state_of(record: KeptRecord) -> KeptState:
    per_node: dict[str, int] = {}
    for node, nbytes in zip(record.nodes, record.nbytes, strict=True):
        per_node[node] = per_node.get(node, 0) + nbytes
    now = time.time()
    return KeptState(
        name=record.name,
        location=record.location,
        optimizer_key=record.optimizer_key,
        topology=record.topology,
        world_size=record.world_size,
        bytes_per_node=per_node,
        age_s=now - record.created,
        left_s=max(0.0, record.used + record.ttl_s - now),
        lost_ranks=tuple(rank for rank in range(record.world_size) if not _lives(record, rank)),
        digest=record.digest,
        model_key=record.model_key,
        selection=record.selection,
        step=record.step,
    )


def _lives(record: KeptRecord, rank: int) -> bool:
    with suppress(ValueError):
        ray.get_actor(loader_name(record.stage, rank), NAMESPACE)
        return True
    return False


def loader_of(record: KeptRecord, rank: int) -> Any:
    """The loader of a rank. Raises HandoffError: it has died."""
    try:
        return ray.get_actor(loader_name(record.stage, rank), NAMESPACE)
    except ValueError:
        raise lost(record, rank) from None
