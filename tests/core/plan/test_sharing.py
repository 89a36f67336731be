"""Shared reads against brute force over elements: every wanted element arrives once, and leaves storage once."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard

from shardferry.config import LoadRequest, ReadOptions, SplitLimits
from shardferry.exchange.node_files import NodeFiles, ranks_of_files, with_asked
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import Mesh
from shardferry.layout.spec import Rule, SpecLayout
from shardferry.layout.tensor_layout import AxisCut, LocalRegion, TensorLayout, shard_on_mesh
from shardferry.plan.cooperative import CooperativePlan, Forward, MemoryGroups, assign_reads
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.planner import plan_load
from shardferry.plan.rank_layouts import ExchangedLayouts, LayoutsFromSpec, layouts_to_send
from shardferry.plan.split import RankCopy
from shardferry.region import BoxCopy, Region
from shardferry.storage.base import OBJECT_STORE
from tests.strategies import grids, layouts, shapes
from tests.support.catalogs import catalog_of
from tests.support.simulation import expected

REQUEST = LoadRequest("optim")


def shared_plans(
    shape: tuple[int, ...],
    saved: list[Region],
    wanted: list[TensorLayout],
    limits: SplitLimits,
    groups: MemoryGroups | None = None,
    num_tensors: int = 1,
    have: list[set[int]] | None = None,
) -> list[tuple[LoadPlan, CooperativePlan]]:
    """Of each rank: of some tensors of one shape, saved and wanted alike, one behind the other in their files.

    Args:
        have: by rank, the files that it has: the i-th has the i-th chunk of each tensor. None: all have all.
    """
    names = [f"w{number:03}" for number in range(num_tensors)]
    catalog = catalog_of(dict.fromkeys(names, (shape, saved)))
    live = [LiveLayout(rank, len(wanted), dict.fromkeys(names, layout)) for rank, layout in enumerate(wanted)]
    plans = [plan_load(catalog, layout, REQUEST) for layout in live]
    wants = ExchangedLayouts({rank: layouts_to_send(plan) for rank, plan in enumerate(plans)})
    if have is None:
        return [(plan, assign_reads(plan, catalog, wants, limits=limits, memory_groups=groups)) for plan in plans]
    nodes = [
        NodeFiles(
            node="",
            host="",
            lacking=frozenset(f"__{file}_0.distcp" for file in range(len(saved)) if file not in here),
            needed=frozenset(),
            asked=tuple((plan.tensors[i.tensor], i) for i in plan.reads if i.chunk % len(saved) not in here),
        )
        for plan, here in zip(plans, have, strict=True)
    ]
    found, read_by = [with_asked(plan, catalog, nodes) for plan in plans], ranks_of_files(catalog.files, nodes)
    return [
        (plan, assign_reads(plan, catalog, wants, limits=limits, memory_groups=groups, ranks_of_files=read_by))
        for plan in found
    ]


class Cluster:
    """The memory of all ranks, how often each element left storage, and what went between islands."""

    def __init__(
        self, shape: tuple[int, ...], saved: list[Region], wanted: list[TensorLayout], groups: MemoryGroups
    ) -> None:
        self._groups = groups
        self.forwarded: dict[tuple[int, int], list[tuple[int, Region]]] = {}  # chunk and box, by reader and relay
        self._saved = saved
        self._whole = np.arange(math.prod(shape)).reshape(shape)
        self.memory = [np.full(layout.local_numel, -1) for layout in wanted]
        self.taken = np.zeros(math.prod(shape), dtype=int)

    def content(self, chunk: int, box: Region) -> np.ndarray:
        region = self._saved[chunk]
        inside = self._whole[tuple(map(slice, region.offsets, region.ends))]
        return inside[tuple(map(slice, box.offsets, box.ends))]

    def take(self, chunk: int, box: Region) -> None:
        self.taken[self.content(chunk, box).ravel()] += 1

    def put(self, rank: int, chunk: int, copy: BoxCopy) -> None:
        content = self.content(chunk, copy.source)
        for index in product(*map(range, copy.source.sizes)):
            place = copy.offset + sum(i * s for i, s in zip(index, copy.strides, strict=True))
            assert self.memory[rank][place] == -1, "filled twice"
            self.memory[rank][place] = content[index]

    def read(self, plan: LoadPlan, shared: CooperativePlan) -> None:
        for item in shared.own:
            self.take(item.chunk, item.copy.source)
            self.put(plan.world_rank, item.chunk, item.copy)
        for read in shared.reads:
            self.take(read.chunk, read.region)
            self.deliver(plan.world_rank, read.chunk, read.copies, read.region)
            for forward in read.forwards:
                sent = self.forwarded.setdefault((plan.world_rank, forward.relay), [])
                assert forward.index == len(sent)
                assert self._groups[forward.relay] != self._groups[plan.world_rank]
                sent.append((read.chunk, forward.box))

    def relay(self, plan: LoadPlan, shared: CooperativePlan) -> None:
        for reader, boxes in shared.forwarded.items():
            sent = self.forwarded.pop((reader, plan.world_rank))
            assert [box for _, box in sent] == [forwarded.box for forwarded in boxes]
            for (chunk, box), forwarded in zip(sent, boxes, strict=True):
                self.deliver(plan.world_rank, chunk, forwarded.copies, box)

    def deliver(self, by: int, chunk: int, copies: Iterable[RankCopy], region: Region) -> None:
        for one in copies:
            assert self._groups[one.world_rank] == self._groups[by], "written into another group's memory"
            assert one.copy.source.intersect(region) == one.copy.source, "outside of what was read"
            self.put(one.world_rank, chunk, one.copy)


@st.composite
def node_loads(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Region], list[TensorLayout], SplitLimits]:
    shape = draw(shapes())
    wanted = draw(st.lists(layouts(shape), min_size=1, max_size=4))
    return (
        shape,
        draw(grids(shape)),
        wanted,
        SplitLimits(
            max_part_bytes=draw(st.sampled_from([4, 16, 64, 1 << 20])),
            window_bytes=draw(st.sampled_from([0, 16, 128, 1 << 20])),
        ),
    )


@given(node_loads(), st.sampled_from([1, 8, 1 << 20]), st.sampled_from([1, 12, 1 << 20]), st.integers(1, 4))
def test_every_wanted_element_arrives_once(
    load: tuple[tuple[int, ...], list[Region], list[TensorLayout], SplitLimits],
    min_part: int,
    long_run: int,
    num_groups: int,
) -> None:
    shape, saved, wanted, limits = load
    groups = {rank: f"group {rank % num_groups}" for rank in range(len(wanted))}
    limits = replace(limits, min_part_bytes=min_part, long_run_bytes=long_run)  # small tensors must reach every branch
    plans = shared_plans(shape, saved, wanted, limits, groups)
    assert plans == shared_plans(shape, saved, wanted, limits, groups), "plans are deterministic"
    cluster = Cluster(shape, saved, wanted, groups)
    for plan, shared in plans:
        cluster.read(plan, shared)
    for plan, shared in plans:
        cluster.relay(plan, shared)
    assert not cluster.forwarded, "sent, and expected by nobody"
    for memory, layout in zip(cluster.memory, wanted, strict=True):
        assert memory.tolist() == expected(layout).tolist()
    assert cluster.taken.max(initial=0) <= 1, "an element left storage twice"
    assert sum(s.bytes_sent for _, s in plans) == sum(s.bytes_received for _, s in plans)
    assert sum(s.balance for _, s in plans) == 0


@given(node_loads(), st.sampled_from([1, 8, 1 << 20]), st.sampled_from([4, 16, 1 << 20]), st.integers(1, 3), st.data())
def test_plans_that_add_up_fit_each_other(
    load: tuple[tuple[int, ...], list[Region], list[TensorLayout], SplitLimits],
    min_part: int,
    max_part: int,
    num_groups: int,
    data: st.DataObject,
) -> None:
    """Ranks with limits of their own: their plans don't add up, or every wanted element arrives all the same."""
    shape, saved, wanted, limits = load
    groups = {rank: f"group {rank % num_groups}" for rank in range(len(wanted))}
    one, other = (
        shared_plans(shape, saved, wanted, with_limits, groups)
        for with_limits in (limits, replace(limits, min_part_bytes=min_part, max_part_bytes=max_part))
    )
    plans = [data.draw(st.sampled_from(pair)) for pair in zip(one, other, strict=True)]
    if sum(shared.balance for _, shared in plans):
        return
    cluster = Cluster(shape, saved, wanted, groups)
    for plan, shared in plans:
        cluster.read(plan, shared)
    for plan, shared in plans:
        cluster.relay(plan, shared)
    for memory, layout in zip(cluster.memory, wanted, strict=True):
        assert memory.tolist() == expected(layout).tolist()


@given(node_loads(), st.sampled_from([1, 8, 1 << 20]), st.integers(1, 4), st.data())
def test_every_wanted_element_is_read_once_where_its_file_is(
    load: tuple[tuple[int, ...], list[Region], list[TensorLayout], SplitLimits],
    min_part: int,
    num_groups: int,
    data: st.DataObject,
) -> None:
    """Three tensors alike, so that guests have to keep count; each rank has some files, and each file is on some rank."""
    shape, saved, wanted, limits = load
    groups = {rank: f"group {rank % num_groups}" for rank in range(len(wanted))}
    limits = replace(limits, min_part_bytes=min_part, long_run_bytes=min_part)
    some = st.sets(st.integers(0, len(wanted) - 1), min_size=1)
    ranks_of = [data.draw(some) for _ in saved]
    have = [{file for file, on in enumerate(ranks_of) if rank in on} for rank in range(len(wanted))]
    plans = shared_plans(shape, saved, wanted, limits, groups, 3, have)
    for plan, shared in plans:
        for one in (*shared.own, *shared.reads):
            assert one.chunk % len(saved) in have[plan.world_rank], "read by a rank that lacks the file"
    assert sum(s.balance for _, s in plans) == 0
    assert sum(s.bytes_sent for _, s in plans) == sum(s.bytes_received for _, s in plans)
    sent: dict[tuple[int, int], list[Region]] = {}
    for plan, shared in plans:
        for forward in (forward for read in shared.reads for forward in read.forwards):
            boxes = sent.setdefault((plan.world_rank, forward.relay), [])
            assert forward.index == len(boxes)
            boxes.append(forward.box)
    for plan, shared in plans:
        for reader, forwarded in shared.forwarded.items():
            assert sent.pop((reader, plan.world_rank)) == [one.box for one in forwarded]
    assert not sent, "sent, and expected by nobody"
    for tensor in range(3):  # each by itself, element by element
        of_this = range(tensor * len(saved), (tensor + 1) * len(saved))
        cluster = Cluster(shape, saved, wanted, groups)
        for plan, shared in plans:
            cluster.read(plan, only(shared, of_this))
        for plan, shared in plans:
            cluster.relay(plan, only(shared, of_this))
        for memory, layout in zip(cluster.memory, wanted, strict=True):
            assert memory.tolist() == expected(layout).tolist()
        assert cluster.taken.max(initial=0) <= 1, "an element left storage twice"


def only(shared: CooperativePlan, chunks: range) -> CooperativePlan:
    """What a plan does for one tensor, with its chunks counted from 0 and its boxes too."""
    counts: dict[int, int] = {}

    def counted(forward: Forward) -> Forward:
        counts[forward.relay] = counts.get(forward.relay, -1) + 1
        return replace(forward, index=counts[forward.relay])

    return replace(
        shared,
        own=tuple(replace(i, chunk=i.chunk - chunks.start) for i in shared.own if i.chunk in chunks),
        reads=tuple(
            replace(r, chunk=r.chunk - chunks.start, forwards=tuple(map(counted, r.forwards)))
            for r in shared.reads
            if r.chunk in chunks
        ),
        forwarded={
            reader: here
            for reader, boxes in shared.forwarded.items()
            if (here := tuple(replace(b, chunk=b.chunk - chunks.start) for b in boxes if b.chunk in chunks))
        },
    )


def rows(size: int, ranks: int) -> list[Region]:
    bounds = [size * rank // ranks for rank in range(ranks + 1)]
    return [Region((a, 0), (b - a, 64)) for a, b in pairwise(bounds)]


def split(ranks: int, dim: int) -> list[TensorLayout]:
    return [shard_on_mesh((64, 64), [AxisCut(ranks, rank, Shard(dim))]) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_rows_to_columns_reads_each_byte_once_and_evenly(ranks: int) -> None:
    limits = SplitLimits(max_part_bytes=1 << 20, min_part_bytes=256)
    plans = shared_plans((64, 64), rows(64, 4), split(ranks, 1), limits)
    read = [sum(r.region.numel for r in s.reads) + sum(i.copy.source.numel for i in s.own) for _, s in plans]
    assert sum(read) == 64 * 64
    assert max(read) == min(read)


def test_rows_that_stay_rows_are_read_by_their_own_ranks() -> None:
    """No rank reads for another, and the plan's reads are as they were."""
    for plan, shared in shared_plans((64, 64), rows(64, 4), split(3, 0), SplitLimits(max_part_bytes=1 << 20)):
        assert shared.reads == ()
        assert shared.own == plan.reads
        assert shared.bytes_sent == shared.bytes_received == 0


def test_replicas_are_read_once() -> None:
    wanted = [shard_on_mesh((64, 64), [AxisCut(2, r // 2, Replicate()), AxisCut(2, r % 2, Shard(0))]) for r in range(4)]
    plans = shared_plans((64, 64), rows(64, 4), wanted, SplitLimits(max_part_bytes=1 << 20))
    read = [sum(r.region.numel for r in s.reads) + sum(i.copy.source.numel for i in s.own) for _, s in plans]
    assert sum(read) == 64 * 64
    assert sum(s.bytes_sent for _, s in plans) == 64 * 64 * 4


WINDOWS = SplitLimits(max_part_bytes=1 << 20, window_bytes=1 << 16)


def many_tensors(
    wanted: list[TensorLayout], limits: SplitLimits, groups: MemoryGroups | None = None
) -> list[tuple[LoadPlan, CooperativePlan]]:
    """Of 64 tensors of 64 x 64, saved by 4 ranks, one chunk of each in a file."""
    return shared_plans((64, 64), rows(64, 4), wanted, limits, groups, num_tensors=64)


def stretches(shared: CooperativePlan) -> int:
    """Of chunks side by side in their files that one rank reads, each as far as all of its ranks want it."""
    chunks = sorted({(read.chunk % 4, read.chunk // 4) for read in (*shared.own, *shared.reads)})
    return 1 + sum(here != (before[0], before[1] + 1) for before, here in pairwise(chunks))


@pytest.mark.parametrize("ranks", [3, 6, 8])
def test_uneven_rows_that_lie_side_by_side_have_one_reader(ranks: int) -> None:
    plans = many_tensors(split(ranks, 0), WINDOWS)
    wanted = [sum(item.copy.source.numel for item in plan.reads) for plan, _ in plans]
    read = [sum(r.region.numel for r in s.reads) + sum(i.copy.source.numel for i in s.own) for _, s in plans]
    assert sum(read) == 64 * 64 * 64
    for mine, its in zip(read, wanted, strict=True):
        assert mine == pytest.approx(its, rel=0.35), "about as much as it wants, in windows of a fifth of a file"
    num_windows = 4 * -(-64 * (4 * 16 * 64 + 1024) // WINDOWS.window_bytes)
    assert sum(stretches(shared) for _, shared in plans) <= num_windows + 4
    alone = many_tensors(split(ranks, 0), SplitLimits(max_part_bytes=1 << 20))
    assert sum(len(shared.own) for _, shared in alone) >= 64 * ranks, "each its own part of each chunk"


def test_what_one_island_wants_is_not_read_on_another() -> None:
    islands = {0: "a", 1: "a", 2: "b", 3: "b", 4: "c", 5: "c"}
    plans = many_tensors(split(6, 0), WINDOWS, islands)
    assert sum(s.bytes_forwarded for _, s in plans) == 0
    assert any(s.reads for _, s in plans)


def wide_plans(
    shape: tuple[int, ...], saved: list[Region], wanted: list[TensorLayout], num_tensors: int = 1
) -> list[tuple[LoadPlan, CooperativePlan]]:
    """Of large tensors in an object store; nothing is read."""
    limits = OBJECT_STORE.split_limits(OBJECT_STORE.read_limits(ReadOptions()))
    return shared_plans(shape, saved, wanted, limits, num_tensors=num_tensors)


def one_box(shape: tuple[int, ...], region: Region) -> TensorLayout:
    """A rank that wants this of a tensor."""
    return TensorLayout(shape, region.sizes, (LocalRegion(region, Region.whole(region.sizes)),))


def elements_read(shared: CooperativePlan) -> int:
    return sum(read.region.numel for read in shared.reads) + sum(item.copy.source.numel for item in shared.own)


def test_a_long_run_that_one_rank_alone_wants_stays_with_it() -> None:
    """As a request of its own it is no dearer, and it is read in place. What is beside it may be short."""
    shape = (1024, 1024)  # 4 MiB
    wanted = [one_box(shape, Region((0, 0), (960, 1024))), one_box(shape, Region((960, 0), (64, 1024)))]
    for plan, shared in wide_plans(shape, [Region.whole(shape)], wanted):
        assert shared.own == plan.reads
        assert not shared.reads


def test_columns_that_nobody_wants_are_no_reason_to_read_rows_whole() -> None:
    shape = (1024, 1024)
    parts = [Region((0, 0), (32, 64)), Region((32, 0), (32, 64))]
    wanted = [one_box(shape, part) for part in parts]
    for plan, shared in wide_plans(shape, [Region.whole(shape)], wanted):
        assert shared.own == plan.reads


@pytest.mark.parametrize(
    ("shape", "num_tensors"),
    [
        pytest.param((2, 4096, 2048), 48, id="chunks of 64 MiB, divided by rows"),
        pytest.param((4, 2097152), 24, id="32 MiB"),
        pytest.param((1024, 1024), 96, id="a window each"),
        pytest.param((64, 1024), 700, id="many in a window"),
    ],
)
def test_what_all_want_is_read_by_all_alike(shape: tuple[int, ...], num_tensors: int) -> None:
    ranks = 8
    wanted = [shard_on_mesh(shape, [AxisCut(ranks, rank, Replicate())]) for rank in range(ranks)]
    read = [elements_read(s) for _, s in wide_plans(shape, [Region.whole(shape)], wanted, num_tensors)]
    assert sum(read) == num_tensors * math.prod(shape)
    assert max(read) <= 1.35 * sum(read) / ranks


def test_slabs_of_a_window_have_one_reader_whatever_their_rows() -> None:
    """Some are cut between two ranks, some are wanted by both."""
    shape = (64, 64)
    halves = [shard_on_mesh(shape, [AxisCut(2, rank, Shard(0))]) for rank in range(2)]
    both = shard_on_mesh(shape, [AxisCut(2, 0, Replicate())])
    names = [f"w{number:03}" for number in range(400)]
    catalog = catalog_of(dict.fromkeys(names, (shape, [Region.whole(shape)])))
    live = [
        LiveLayout(rank, 2, {name: both if number % 3 else halves[rank] for number, name in enumerate(names)})
        for rank in range(2)
    ]
    plans = [plan_load(catalog, layout, REQUEST) for layout in live]
    wants = ExchangedLayouts({rank: layouts_to_send(plan) for rank, plan in enumerate(plans)})
    for plan in plans:
        shared = assign_reads(plan, catalog, wants, limits=WINDOWS)
        read = {catalog.chunk_byte_offset[one.chunk] // WINDOWS.window_bytes for one in shared.reads}
        num_here = sum(offset // WINDOWS.window_bytes in read for offset in catalog.chunk_byte_offset.tolist())
        assert len(shared.reads) == num_here, "all of a window, or nothing of it"


def test_what_is_wanted_by_nobody_between_two_ranks_is_not_read() -> None:
    wanted = [shard_on_mesh((64, 64), [AxisCut(8, rank, Shard(0))]) for rank in (0, 2)]  # rows 0 to 7 and 16 to 23
    whole = catalog_of({"w": ((64, 64), [Region((0, 0), (64, 64))])})
    plans = [plan_load(whole, LiveLayout(rank, 2, {"w": layout}), REQUEST) for rank, layout in enumerate(wanted)]
    wants = ExchangedLayouts({rank: layouts_to_send(plan) for rank, plan in enumerate(plans)})
    for plan in plans:
        assert assign_reads(plan, whole, wants, limits=WINDOWS).own == plan.reads


def test_a_spec_tells_what_ranks_would_tell() -> None:
    mesh = Mesh((("replicas", 2), ("shards", 2)))
    spec = SpecLayout(mesh, (Rule("a", {"shards": Shard(1)}),), {"shards": Shard(0)})
    catalog = catalog_of({"a": ((64, 64), rows(64, 4)), "b": ((64, 64), rows(64, 4))})
    plans = [plan_load(catalog, spec.rank(rank), REQUEST) for rank in range(4)]
    by_spec, exchanged = (
        LayoutsFromSpec(spec, range(4)),
        ExchangedLayouts({rank: layouts_to_send(plan) for rank, plan in enumerate(plans)}),
    )
    for plan in plans:
        for tensor in plan.tensors:
            for region in rows(64, 4):
                assert by_spec.holders(tensor, region) == exchanged.holders(tensor, region)


def test_between_islands_a_replica_travels_once() -> None:
    """4 copies on 2 islands: half of the bytes are read on each, and each half goes to the other island once."""
    wanted = [shard_on_mesh((64, 64), [AxisCut(4, rank, Replicate())]) for rank in range(4)]
    islands = {0: "a", 1: "a", 2: "b", 3: "b"}
    plans = shared_plans((64, 64), rows(64, 4), wanted, SplitLimits(max_part_bytes=1 << 20), islands)
    itemsize = plans[0][0].tensors[0].dtype.itemsize
    assert sum(s.bytes_forwarded for _, s in plans) == 64 * 64 * itemsize
    assert sum(s.bytes_sent for _, s in plans) == 3 * 64 * 64 * itemsize
