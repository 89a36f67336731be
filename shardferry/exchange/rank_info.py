"""Exchange, before anything is read, the facts that every rank must know of every other."""

from __future__ import annotations

import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shardferry.arena import Arena, HostArena, available_host_bytes, check_host_room, host_identity
from shardferry.config import LoadRequest, ReadOptions
from shardferry.exchange.agreement import Agreement
from shardferry.exchange.peer_memory import ArenaAddress
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout, spec_of
from shardferry.layout.tensor_layout import TensorLayout
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.rank_layouts import layouts_to_send

ASKED_DIRECT = "read.strategy is direct"  # why a rank reads for itself
MAX_LIVE_RANKS = 256  # whose layouts are exchanged; each rank receives every other's


@dataclass(frozen=True, slots=True, kw_only=True)
class RankInfo:
    """What one rank tells the others."""

    node: str
    memory_group: str  # ranks with the same name write into each other's arenas
    host: str
    host_arena_bytes: int  # that its arena will take of the host's memory
    available_bytes: int  # of the host's memory
    address: ArenaAddress | None  # of its arena, where that is on the host
    direct_because: str  # why it reads for itself; empty where it can read with others
    layouts: Mapping[str, TensorLayout] | None  # by checkpoint key; None where a spec gives those of all ranks
    lacks_files: bool  # its node doesn't see all files of the checkpoint
    names: int  # a hash of the saved names, as this rank selects and renames them
    taken: bytes  # one bit for each of these names: whether this rank takes it


def rank_info(
    plan: LoadPlan,
    arena: Arena,
    layout: RankLayout,
    options: ReadOptions,
    agreement: Agreement,
    *,
    is_new_arena: bool,
    lacks_files: bool,
) -> RankInfo:
    """The facts about this rank.

    Args:
        is_new_arena: it has taken no memory yet.
        lacks_files: its node doesn't see all files of the checkpoint.
    """
    node, on_host = options.node or host_identity(), isinstance(arena, HostArena)
    because = _direct_because(plan, arena, layout, options, agreement)
    return RankInfo(
        node=node,
        memory_group=node if on_host else f"{node}, rank {agreement.rank}",
        host=socket.gethostname(),
        host_arena_bytes=plan.arena_bytes if on_host and is_new_arena else 0,
        available_bytes=available_host_bytes(),
        address=ArenaAddress.of(arena) if isinstance(arena, HostArena) else None,
        direct_because=because,
        layouts=layouts_to_send(plan) if not because and spec_for_all(layout, plan.request) is None else None,
        lacks_files=lacks_files,
        names=zlib.crc32("\n".join((*plan.state_keys, "", *plan.weight_keys)).encode()),
        taken=np.packbits(np.array([*plan.state_keys.values(), *plan.weight_keys.values()], dtype=bool)).tobytes(),
    )


def spec_for_all(layout: RankLayout, request: LoadRequest) -> SpecLayout | None:
    """The spec that tells where every saved tensor is on every rank; None where each rank knows that of itself alone.

    A spec goes by names, and tells nothing of a saved tensor that other ranks hold under another name.
    """
    return None if request.selection.gives_several_names else spec_of(layout)


def _direct_because(
    plan: LoadPlan, arena: Arena, layout: RankLayout, options: ReadOptions, agreement: Agreement
) -> str:
    if options.strategy == "direct":
        return ASKED_DIRECT
    if agreement.size < 2:
        return "there is no other rank"
    if arena.device.type != "cpu" and agreement.host_group is None:
        return "arenas are on GPUs, and the process group carries no host memory: it has no gloo beside its NCCL"
    if spec_for_all(layout, plan.request) is None and agreement.size > MAX_LIVE_RANKS:
        what = "live models" if spec_of(layout) is None else "ranks, and a renaming to several names"
        return f"with more than {MAX_LIVE_RANKS} {what}, each rank knows only its own layout"
    if len({tensor.key for tensor in plan.tensors}) < len(plan.tensors):  # ranks tell by its key where a tensor is
        return "a saved tensor goes to several names, and other ranks know one place for it"
    return ""


def taken_by_any(ranks: Sequence[RankInfo], num_names: int) -> list[bool]:
    """Of each saved name, whether some rank takes it."""
    bits = np.bitwise_or.reduce([np.frombuffer(rank.taken, dtype=np.uint8) for rank in ranks])
    return np.unpackbits(bits, count=num_names).astype(bool).tolist()


def check_room(ranks: Sequence[RankInfo], fraction: float) -> None:
    """Refuse arenas that a host has no memory for. Every rank finds the same.

    Args:
        fraction: of the host's available memory that they may take.

    Raises:
        ArenaError: says how much is missing on which host.
    """
    for node in dict.fromkeys(rank.node for rank in ranks):
        here = [rank for rank in ranks if rank.node == node]
        check_host_room(
            [rank.host_arena_bytes for rank in here if rank.host_arena_bytes],
            available_bytes=min(rank.available_bytes for rank in here),
            host=here[0].host,
            fraction=fraction,
        )
