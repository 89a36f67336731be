"""Find, for all ranks at once, the files that a node lacks and another one has: a checkpoint on the nodes' own disks."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardferry.errors import MissingFile
from shardferry.exchange.agreement import Agreement
from shardferry.storage.base import RangeReader

_MAX_SHOWN = 8  # files of a node in a message


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """What one rank tells of the checkpoint's files."""

    node: str
    host: str
    lacking: frozenset[str]  # of all files
    needed: frozenset[str]  # that it reads


def check_node_files(
    agreement: Agreement,
    storage: RangeReader,
    files: Sequence[str],
    needed: Iterable[str],
    *,
    node: str,
) -> None:
    """Refuse a load from files that the nodes don't share. All ranks must call it.

    Args:
        files: all of the checkpoint's.
        needed: those that this rank reads.
        node: this rank's.

    Raises:
        MissingFile: names the nodes, and what each lacks. Nothing is raised for files that no node has.
    """

    def tell() -> NodeFiles:
        return NodeFiles(node, socket.gethostname(), frozenset(storage.lacking(files)), frozenset(needed))

    if (error := lacking_error(storage.location, agreement.gather("finding the files", tell))) is not None:
        raise error


def lacking_error(location: str, ranks: Sequence[NodeFiles]) -> MissingFile | None:
    """The error for files that ranks need, and that their node lacks but another has; None where there are none.

    Args:
        ranks: by world rank.
    """
    nowhere = frozenset.intersection(*(rank.lacking for rank in ranks))
    lacked: dict[str, set[str]] = {}  # by node
    for rank in ranks:
        if files := (rank.needed & rank.lacking) - nowhere:
            lacked.setdefault(rank.node, set()).update(files)
    if not lacked:
        return None
    return MissingFile(
        f"{location}: is on disks that nodes don't share: {'; '.join(_of_node(node, lacked[node], ranks) for node in lacked)}. "
        "Each rank reads the files that it needs on its own node: put all of them where every node sees them"
    )


def _of_node(node: str, lacked: set[str], ranks: Sequence[NodeFiles]) -> str:
    here = [world_rank for world_rank, rank in enumerate(ranks) if rank.node == node]
    have = [world_rank for world_rank, rank in enumerate(ranks) if not lacked <= rank.lacking]
    names = sorted(lacked)
    shown = ", ".join(names[:_MAX_SHOWN]) + (f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else "")
    return (
        f"node {_name(node, ranks)} (rank {_list(here)}) lacks {len(names)} of the files ({shown}), "
        f"which rank {_list(have)} has"
    )


def _name(node: str, ranks: Sequence[NodeFiles]) -> str:
    """The host's name where it tells the nodes apart."""
    hosts = {rank.node: rank.host for rank in ranks}
    return hosts[node] if len(set(hosts.values())) == len(hosts) else node


def _list(world_ranks: Sequence[int]) -> str:
    more = ", ..." if len(world_ranks) > _MAX_SHOWN else ""
    return ", ".join(map(str, world_ranks[:_MAX_SHOWN])) + more
