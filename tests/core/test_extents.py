"""Joined reads: nothing is lost, nothing twice, and the limits hold; held against random files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardferry.arena import HostArena
from shardferry.checkpoint.catalog import RawItem
from shardferry.checkpoint.open import open_checkpoint
from shardferry.config import LoadRequest
from shardferry.layout.mesh import Mesh, Shard
from shardferry.layout.spec import SpecLayout
from shardferry.plan.planner import plan_load
from shardferry.read.coalesce import JoinLimits, join
from shardferry.read.execute import Counters, ReadOptions, read_plan
from shardferry.read.items import StoredItem
from shardferry.storage.local import LocalReader
from tests.core.test_reader import SMALL, check, save


@dataclass(frozen=True)
class Wanted:
    item: StoredItem
    bytes_to_read: int

    @property
    def unwanted(self) -> int:
        return self.item.byte_length - self.bytes_to_read


@st.composite
def files(draw: st.DrawFn) -> list[Wanted]:
    """Items of some files in reading order, with gaps, and with any part wanted."""
    wanted = []
    for path in draw(st.lists(st.sampled_from("abc"), unique=True, max_size=3)):
        position = 0
        for _ in range(draw(st.integers(0, 8))):
            position += draw(st.integers(0, 6))
            length = draw(st.integers(1, 12))
            wanted.append(Wanted(StoredItem("w", path, position, length, RawItem()), draw(st.integers(1, length))))
            position += length
    return wanted


@settings(deadline=None, max_examples=500)
@given(files(), st.integers(0, 5), st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.0, 0.2, 0.5, 3.0]))
def test_joined_reads_keep_their_limits(
    wanted: Sequence[Wanted], gap: int, request: int, item: int, over_read: float
) -> None:
    limits = JoinLimits(gap, over_read, request, min(item, request), maps_files=True, free_gap_bytes=3)
    extents, alone = join(wanted, limits)
    joined = [member for extent in extents for member in extent.members]
    assert sorted(map(id, [*joined, *alone])) == sorted(map(id, wanted)), "each item once"
    assert [one for one in wanted if one in alone] == alone, "in their order"
    for extent in extents:
        assert extent.stop - extent.start <= request
        assert len(extent.members) > 1
        end, vain = extent.start, 0
        for member in extent.members:
            assert (member.item.path, member.item.byte_length <= limits.max_item_bytes) == (extent.path, True)
            assert 0 <= member.item.byte_offset - end <= gap
            assert member.unwanted <= gap
            vain += sum(part for part in (member.item.byte_offset - end, member.unwanted) if part >= 3)
            end = member.item.byte_stop
        assert end == extent.stop
        assert vain <= over_read * sum(member.bytes_to_read for member in extent.members)


def asked(path: Path, options: ReadOptions) -> Counters:
    catalog, counters = open_checkpoint(path), Counters()
    layout = SpecLayout(Mesh((("dp", 1),)), default={"dp": Shard(0)}).rank(0)
    plan = plan_load(catalog, layout, LoadRequest("optim"))
    arena, storage = HostArena(plan.arena_bytes), LocalReader(path)
    read_plan(plan, catalog, storage, arena, options, counters)
    storage.close()
    assert check(plan, arena) == sum(torch.Size(shape).numel() for shape in SMALL.values())
    return counters


def test_many_small_items_are_few_requests(tmp_path: Path) -> None:
    path = save(tmp_path / "ckpt", SMALL)
    file_bytes = sum(file.stat().st_size for file in path.glob("*.distcp"))
    joined, bounded = asked(path, ReadOptions()), asked(path, ReadOptions(max_request_bytes=64 * 1024))
    assert joined.num_requests == 1
    assert file_bytes // (64 * 1024) <= bounded.num_requests <= 2 * file_bytes // (64 * 1024)
    assert max(joined.bytes_requested, bounded.bytes_requested) <= file_bytes
    apart = asked(path, ReadOptions(max_gap_bytes=0))
    assert apart.num_requests == len(SMALL), "the data of each with its head"
