"""Tell all ranks which files each node has, where a checkpoint is on the nodes' own disks: who reads for whom, or the error."""

from __future__ import annotations

import socket
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from shardferry.checkpoint.catalog import Catalog
from shardferry.errors import MissingFile
from shardferry.exchange.agreement import Agreement
from shardferry.plan.cooperative import RanksOfFiles
from shardferry.plan.load_plan import LoadPlan, PlannedTensor, ReadItem
from shardferry.storage.base import RangeReader

_MAX_SHOWN = 8  # files of a node in a message


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """What one rank tells of the checkpoint's files."""

    node: str
    host: str
    lacking: frozenset[str]  # of all files
    needed: frozenset[str]  # that it wants something of
    asked: tuple[tuple[PlannedTensor, ReadItem], ...] = ()  # what it wants of those that it lacks, once per chunk


def gather_node_files(
    agreement: Agreement,
    storage: RangeReader,
    catalog: Catalog,
    plan: LoadPlan | None,
    *,
    node: str,
) -> list[NodeFiles]:
    """What every rank tells, by world rank. All ranks must call it.

    Args:
        plan: this rank's; None: it needs all files.
        node: this rank's.
    """

    def tell() -> NodeFiles:
        lacking = frozenset(storage.lacking(catalog.files))
        if plan is None:
            return NodeFiles(node, socket.gethostname(), lacking, frozenset(catalog.files))
        items = {(item.chunk, item.tensor): item for item in plan.reads}
        file_of = {chunk: _file(catalog, chunk) for chunk, _ in items}
        asked = ((plan.tensors[i.tensor], i) for i in items.values() if file_of[i.chunk] in lacking)
        return NodeFiles(node, socket.gethostname(), lacking, frozenset(file_of.values()), tuple(asked))

    return agreement.gather("finding the files", tell)


def _file(catalog: Catalog, chunk: int) -> str:
    return catalog.files[int(catalog.chunk_file[chunk])]


def ranks_of_files(files: Sequence[str], ranks: Sequence[NodeFiles]) -> RanksOfFiles:
    """The ranks that have a file, by the file's row; without files that all ranks have, and those that none has.

    Args:
        files: of the catalog.
        ranks: by world rank.
    """
    lacked = frozenset[str]().union(*(rank.lacking for rank in ranks))
    found = {
        row: frozenset(world_rank for world_rank, rank in enumerate(ranks) if path not in rank.lacking)
        for row, path in enumerate(files)
        if path in lacked
    }
    return {row: have for row, have in found.items() if have}


def with_asked(plan: LoadPlan, catalog: Catalog, ranks: Sequence[NodeFiles]) -> LoadPlan:
    """A rank's plan, and behind it what others ask of the files that this rank has: it may have to read that for them.

    Args:
        ranks: by world rank.
    """
    tensors, reads, lacking = list(plan.tensors), list(plan.reads), ranks[plan.world_rank].lacking
    rows = {tensor.key: row for row, tensor in enumerate(tensors)}
    for tensor, item in (asked for rank in ranks for asked in rank.asked):
        if _file(catalog, item.chunk) not in lacking:
            row = rows.setdefault(tensor.key, len(tensors))
            if row == len(tensors):
                tensors.append(tensor)
            reads.append(replace(item, tensor=row))
    return replace(plan, tensors=tuple(tensors), reads=tuple(reads))


def first_to_have(paths: Collection[str], ranks: Sequence[NodeFiles]) -> int:
    """The lowest rank that has all of some files; rank 0 where none has them all."""
    return next((world_rank for world_rank, rank in enumerate(ranks) if rank.lacking.isdisjoint(paths)), 0)


def lacking_error(location: str, ranks: Sequence[NodeFiles], because: str) -> MissingFile | None:
    """The error for files that ranks need, and that their node lacks but another has; None where there are none.

    Args:
        ranks: by world rank.
        because: why no other rank reads them.
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
        f"Each rank reads for itself: {because}. Let ranks that have a file read it for the others (strategy: cooperative), or "
        "put all files where every node sees them"
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
