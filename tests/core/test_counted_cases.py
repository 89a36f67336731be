"""The cases that the benchmark times, counted: a server's own log says how many bytes and requests each load took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import Shard

from shardferry.config import LoadRequest, ReadOptions, Strategy
from shardferry.exchange.agreement import Agreement
from shardferry.handoff.handle import make_handle
from shardferry.layout.mesh import Mesh
from shardferry.layout.rank_layout import RankLayout
from shardferry.layout.spec import SpecLayout
from shardferry.load import LoadedShard, LoadJob, load_rank, open_for_all
from shardferry.region import Region
from shardferry.stats import Counters
from shardferry.storage.open import open_storage
from tests.support.chunk_files import Chunk, write_chunks
from tests.support.models import STATES, save_fsdp2
from tests.support.oracle import full_tensor
from tests.support.range_server import Asked, served
from tests.support.ranks import RankPool

Shapes = Mapping[str, tuple[int, ...]]

SHAPES: Shapes = {
    "wide.weight": (640, 768),
    "tall.weight": (1536, 320),
    "odd.weight": (509, 701),
    "tall.bias": (1536,),
    "ln_1.weight": (768,),
}
SMALL: Shapes = {f"block{number}.weight": (64, 512) for number in range(100)}  # 64 rows: one for each rank that saved
SAVED_BY = 64


def rows_over(num_ranks: int, copies: int = 1) -> SpecLayout:
    return SpecLayout(Mesh((("copies", copies), ("dp", num_ranks // copies))), (), {"dp": Shard(0)})


def columns_over(num_ranks: int) -> SpecLayout:
    return SpecLayout(Mesh((("dp", num_ranks),)), (), {"dp": Shard(1)})


@dataclass(frozen=True)
class Case:
    """A model saved by rows, wanted otherwise."""

    saved_by: int  # ranks
    wanted: SpecLayout
    most_requests: int  # of 40 or 10 saved items, 27 values of the param groups among them; a few more than there are


CASES = {
    "4-4": Case(4, rows_over(4), 10),
    "4-2": Case(4, rows_over(2), 14),
    "4-3": Case(4, rows_over(3), 13),
    "4-6": Case(4, rows_over(6), 15),
    "4-8": Case(4, rows_over(8), 15),
    "1-4": Case(1, rows_over(4), 8),
    "rows-columns-2": Case(4, columns_over(2), 10),
    "rows-columns-4": Case(4, columns_over(4), 10),
    "rows-columns-8": Case(4, columns_over(8), 10),
    "hsdp-2x2": Case(4, rows_over(4, copies=2), 14),
}


def unique_bytes(shapes: Shapes) -> int:
    return len(STATES) * 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def load(url: str, layout: RankLayout, shapes: Shapes, strategy: Strategy, agreement: Agreement) -> LoadedShard:
    """Load and compare."""
    options = ReadOptions(load_s=60, strategy=strategy, node="one")
    request, counters = LoadRequest("optim"), Counters()
    with closing(open_storage(url)) as storage:
        catalog, values = open_for_all(storage, agreement, request, options, counters)
        job = LoadJob(catalog, layout, request, torch.device("cpu"), options)
        loaded = load_rank(job, agreement, counters=counters, values=values, storage=storage)
    with make_handle(loaded.manifest, loaded.arena, "in_process", exclusive=True).open() as shard:
        for fqn, entries in shard.state_dict()["state"].items():
            for name in STATES:
                full = full_tensor(fqn, name, shapes[fqn])
                for whole, local in shard.regions(fqn, name):
                    box = full[tuple(map(slice, whole.offsets, whole.ends))]
                    assert torch.equal(entries[name][tuple(map(slice, local.offsets, local.ends))], box), fqn
    return loaded


def load_together(url: str, spec: SpecLayout, shapes: Shapes, strategy: Strategy) -> str:
    """On each rank. Which strategy it was."""
    layout = spec.rank(dist.get_rank())
    return load(url, layout, shapes, strategy, Agreement(dist.group.WORLD)).strategy.name


def data(log: Sequence[Asked]) -> list[Asked]:
    """Requests for tensors and values, without those for the metadata."""
    return [asked for asked in log if asked.method == "GET" and asked.name.endswith(".distcp")]


@pytest.fixture(scope="module")
def saved(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By the number of ranks that saved."""
    folder = tmp_path_factory.mktemp("cases")
    for num_ranks in (1, 4):
        ranks.run(num_ranks, save_fsdp2, str(folder / str(num_ranks)), SHAPES)
    return {num_ranks: folder / str(num_ranks) for num_ranks in (1, 4)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_each_case_takes_each_byte_once_out_of_storage(ranks: RankPool, saved: dict[int, Path], case: Case) -> None:
    with served(saved[case.saved_by]) as server:
        names = ranks.run(case.wanted.world_size, load_together, server.url, case.wanted, SHAPES, "cooperative")
        asked = data(server.log)
    assert names == ["cooperative"] * case.wanted.world_size
    nbytes = sum(one.nbytes for one in asked)
    assert unique_bytes(SHAPES) <= nbytes <= 1.02 * unique_bytes(SHAPES)
    assert len(asked) <= case.most_requests, "\n".join(
        f"{a.name} {a.start} {a.stop}" for a in sorted(asked, key=lambda a: (a.name, a.start))
    )


@pytest.fixture(scope="module")
def many_small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 tensors as 64 ranks save them: 12800 items in 64 files."""
    path = tmp_path_factory.mktemp("small") / "ckpt"
    saved = {}
    for fqn, shape in SMALL.items():
        for name in STATES:
            full = full_tensor(fqn, name, shape)
            rows = [Region((row, 0), (1, shape[1])) for row in range(SAVED_BY)]
            chunks = [Chunk(rows[row], full[row : row + 1].clone(), file=row) for row in range(SAVED_BY)]
            saved[f"optim.state.{fqn}.{name}"] = (shape, chunks)
    write_chunks(path, saved)
    return path


def test_many_small_tensors_in_the_same_topology(many_small: Path) -> None:
    """Two of the 64 ranks, one after another: each reads its own file, in a few requests."""
    with served(many_small) as server:
        for rank in (0, 63):
            before = len(server.log)
            load(server.url, rows_over(SAVED_BY).rank(rank), SMALL, "auto", Agreement(None))
            asked = data(server.log[before:])
            assert {one.name for one in asked} == {f"__{rank}_0.distcp"}
            assert len(asked) <= 4
            assert sum(one.nbytes for one in asked) <= (many_small / f"__{rank}_0.distcp").stat().st_size


def test_many_small_tensors_on_few_ranks(ranks: RankPool, many_small: Path) -> None:
    with served(many_small) as server:
        ranks.run(4, load_together, server.url, rows_over(4), SMALL, "cooperative")
        asked = data(server.log)
    assert len(asked) <= 2 * SAVED_BY, "of 12800 items"
    assert sum(one.nbytes for one in asked) <= sum(file.stat().st_size for file in many_small.glob("*.distcp"))


def permuted(fqn: str, name: str, order: tuple[int, ...]) -> torch.Tensor:
    """The oracle's tensor, in memory in another order of its dimensions."""
    full = full_tensor(fqn, name, PERMUTED[fqn])
    back = [order.index(dim) for dim in range(len(order))]
    return full.permute(order).contiguous().permute(back)


PERMUTED: Shapes = {"long": (4, 3, 16384), "rows": (2, 16, 4096), "flat": (64, 512)}
ORDERS = {"long": (1, 0, 2), "rows": (1, 0, 2), "flat": (1, 0)}


@pytest.mark.parametrize("compressed", [False, True], ids=["plain", "compressed"])
@pytest.mark.parametrize("kind", ["files", "web server"])
def test_items_in_another_order_than_their_ranks_read_for_each_other(
    ranks: RankPool, tmp_path: Path, kind: str, compressed: bool
) -> None:
    """What is one slab of the chunk is many pieces of the item."""
    saved = {}
    for fqn, shape in PERMUTED.items():
        for name in STATES:
            chunk = Chunk(Region.whole(shape), permuted(fqn, name, ORDERS[fqn]), file=0, compressed=compressed)
            assert not chunk.tensor.is_contiguous()
            saved[f"optim.state.{fqn}.{name}"] = (shape, [chunk])
    write_chunks(tmp_path / "ckpt", saved)
    replicas, uneven = SpecLayout(Mesh((("dp", 2),)), (), {}), rows_over(3)
    with served(tmp_path / "ckpt") as server:
        location = server.url if kind == "web server" else str(tmp_path / "ckpt")
        assert ranks.run(2, load_together, location, replicas, PERMUTED, "cooperative") == ["cooperative"] * 2
        ranks.run(3, load_together, location, uneven, PERMUTED, "cooperative")
