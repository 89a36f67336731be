"""Plans kept on disk: the same as those that are made anew, never damaged ones, never another load's."""

from __future__ import annotations

import dataclasses
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.large import synthetic_catalog
from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.catalog_cache import CatalogCache
from shardferry.checkpoint.column_file import UnusableFile, encode_file
from shardferry.layout.live import LiveLayout
from shardferry.layout.mesh import Shard
from shardferry.layout.spec import HeldBy, SpecLayout
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, flat_slice, sharded
from shardferry.plan import plan_cache
from shardferry.plan import split as slabs
from shardferry.plan.cooperative import Islands, SharedPlan, share_reads
from shardferry.plan.load_plan import LoadPlan
from shardferry.plan.plan_cache import PLAN_FILE, PlanCache, encode_plan
from shardferry.plan.plan_check import check_columns
from shardferry.plan.plan_columns import COLUMNS, PlanColumns
from shardferry.plan.planner import plan_load
from shardferry.plan.rank_layouts import SpecWants, ToldWants, Wants, told
from shardferry.plan.split import SlabLimits
from shardferry.region import Region
from tests.core.test_plan_scale import REQUEST, SAVED, SMALL, wanted
from tests.core.test_sharing import node_loads
from tests.support.catalogs import catalog_of

METADATA = b"\x07" * 32  # the digest of metadata that a kept catalog was made of
SMALL_SLABS = SlabLimits(1 << 10)


@dataclasses.dataclass(frozen=True)
class Load:
    """All that one rank's part of shared reads is worked out from."""

    plan: LoadPlan
    catalog: Catalog
    wants: Wants
    islands: Islands | None
    slabs: SlabLimits = SMALL_SLABS

    def made_anew(self) -> SharedPlan:
        return share_reads(self.plan, self.catalog, self.wants, slabs=self.slabs, islands=self.islands)

    def by(self, cache: PlanCache) -> SharedPlan:
        return cache.share_reads(self.plan, self.catalog, self.wants, slabs=self.slabs, islands=self.islands)


def live_loads(
    shape: tuple[int, ...],
    saved: list[Region],
    layouts: Sequence[TensorLayout],
    islands: Islands,
    slabs: SlabLimits = SMALL_SLABS,
) -> list[Load]:
    """One of each rank: of two tensors that lie alike, and one that is whole everywhere."""
    names = {"w": (shape, saved), "x": (shape, saved), "s": ((), [Region((), ())])}
    catalog = dataclasses.replace(catalog_of(names), metadata_digest=METADATA)
    scalar = sharded((), [])
    live = [
        LiveLayout(rank, len(layouts), {"w": layout, "x": layout, "s": scalar}) for rank, layout in enumerate(layouts)
    ]
    plans = [plan_load(catalog, layout, REQUEST) for layout in live]
    wants = ToldWants({rank: told(plan) for rank, plan in enumerate(plans)})
    return [Load(plan, catalog, wants, islands, slabs) for plan in plans]


def spec_load(spec: SpecLayout, rank: int, islands: Islands | None) -> Load:
    catalog = dataclasses.replace(synthetic_catalog(SMALL, SAVED), metadata_digest=METADATA)
    return Load(plan_load(catalog, spec.rank(rank), REQUEST), catalog, SpecWants(spec, range(spec.world_size)), islands)


@pytest.fixture
def cache(tmp_path: Path) -> PlanCache:
    return PlanCache(tmp_path / "cache", min_reads=0)


@pytest.fixture
def load() -> Load:
    return spec_load(wanted(2, 4, tp=2), 5, {rank: f"node {rank // 6}" for rank in range(16)})


def kept(cache: PlanCache) -> dict[str, int]:
    """The files by name. A file that is written again is another one: its number changes."""
    assert cache.directory is not None
    return {path.name: path.stat().st_ino for path in cache.directory.glob("*")}


@contextmanager
def small_parts(least_part: int, long_run: int) -> Iterator[None]:
    """Small tensors must reach every branch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "_LEAST_PART", least_part)
        patch.setattr(slabs, "_LONG_RUN", long_run)
        yield


@settings(deadline=None, max_examples=150)
@given(node_loads(), st.sampled_from([1, 8, 1 << 20]), st.sampled_from([1, 12, 1 << 20]), st.integers(1, 3))
def test_a_kept_plan_is_the_plan(
    load: tuple[tuple[int, ...], list[Region], list[TensorLayout], SlabLimits],
    least_part: int,
    long_run: int,
    num_islands: int,
) -> None:
    shape, saved, layouts, slabs = load
    islands = {rank: f"island {rank % num_islands}" for rank in range(len(layouts))}
    with small_parts(least_part, long_run), tempfile.TemporaryDirectory() as directory:
        cache = PlanCache(Path(directory, "cache"), min_reads=0)
        for one in live_loads(shape, saved, layouts, islands, slabs):
            anew, first = one.made_anew(), one.by(cache)
            before = kept(cache)
            again = one.by(cache)
            assert kept(cache) == before, "what was kept was not used"
            assert again == first == anew
            assert list(again.relayed) == list(anew.relayed)


@pytest.mark.parametrize("num_nodes", [1, 2, 3, None])
@pytest.mark.parametrize("held_by", [(), (HeldBy("layers.0.*", {"dp_replicate": (1,)}),)], ids=["all", "pipelined"])
def test_by_a_spec(cache: PlanCache, num_nodes: int | None, held_by: tuple[HeldBy, ...]) -> None:
    spec = dataclasses.replace(wanted(2, 4, tp=2), held_by=held_by)
    islands = None if num_nodes is None else {rank: str(rank * num_nodes // 16) for rank in range(16)}
    for rank in (0, 5, 15):
        load = spec_load(spec, rank, islands)
        anew, first = load.made_anew(), load.by(cache)
        before = kept(cache)
        assert load.by(cache) == first == anew
        assert kept(cache) == before
    assert len(before) == 3


def other_metadata(load: Load) -> Load:
    return dataclasses.replace(load, catalog=dataclasses.replace(load.catalog, metadata_digest=b"\x08" * 32))


def other_rank(load: Load) -> Load:
    return spec_load(wanted(2, 4, tp=2), 6, load.islands)


def other_islands(load: Load) -> Load:
    return dataclasses.replace(load, islands={rank: str(rank // 8) for rank in range(16)})


def other_layout(load: Load) -> Load:
    return spec_load(wanted(4, 2, tp=2), 5, load.islands)


def fewer_ranks(load: Load) -> Load:
    return dataclasses.replace(load, wants=SpecWants(wanted(2, 4, tp=2), range(12)))


def another_rank_wants_else(load: Load) -> Load:
    """This rank's own layouts stay; the parameter's other copy is on fewer ranks."""
    spec = dataclasses.replace(wanted(2, 4, tp=2), held_by=(HeldBy("norm.weight", {"dp_replicate": (0,)}),))
    return dataclasses.replace(load, wants=SpecWants(spec, range(16)))


@pytest.mark.parametrize(
    "changed", [other_metadata, other_rank, other_islands, other_layout, fewer_ranks, another_rank_wants_else]
)
def test_another_load_has_a_plan_of_its_own(cache: PlanCache, load: Load, changed: Callable[[Load], Load]) -> None:
    other = changed(load)
    assert load.by(cache) == load.made_anew()
    assert other.by(cache) == other.made_anew()
    assert len(kept(cache)) == 2


def test_live_layouts_are_told_apart(cache: PlanCache) -> None:
    """One rank holds another half of what the others hold as before."""
    halves = [flat_slice((64,), start=0, stop=32), flat_slice((64,), start=32, stop=64)]
    saved = [Region((start,), (16,)) for start in range(0, 64, 16)]
    for other in halves:
        first = live_loads((64,), saved, [halves[0], other], {0: "a", 1: "a"})[0]
        assert first.by(cache) == first.made_anew()
    assert len(kept(cache)) == 2


def test_another_slab(cache: PlanCache, load: Load) -> None:
    for limits in (SlabLimits(64), SlabLimits(1 << 20), SlabLimits(64, 256)):
        other = dataclasses.replace(load, slabs=limits)
        assert other.by(cache) == other.made_anew()
    assert len(kept(cache)) == 3


def test_items_that_have_moved(cache: PlanCache, load: Load) -> None:
    """Where they lie decides who reads them in windows, and not all metadata says it: safetensors files do themselves."""
    in_windows = dataclasses.replace(load, slabs=SlabLimits(1 << 10, 1 << 12))
    moved = dataclasses.replace(load.catalog, chunk_byte_offset=load.catalog.chunk_byte_offset + (1 << 11))
    for one in (in_windows, dataclasses.replace(in_windows, catalog=moved)):
        assert one.by(cache) == one.made_anew()
    assert len(kept(cache)) == 2


def test_how_islands_are_called_does_not_matter(cache: PlanCache, load: Load) -> None:
    """A node's name is of its last start."""
    load.by(cache)
    before = kept(cache)
    assert load.islands is not None
    renamed = {rank: f"{name} started again" for rank, name in load.islands.items()}
    assert dataclasses.replace(load, islands=renamed).by(cache) == load.made_anew()
    assert kept(cache) == before


def flipped(data: bytes, at: int) -> bytes:
    changed = bytearray(data)
    changed[at] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda data: b"", id="empty"),
        pytest.param(lambda data: data[:-1], id="cut"),
        pytest.param(lambda data: data + b"\0", id="longer"),
        pytest.param(lambda data: b"SHFYCATL" + data[8:], id="a catalog"),
        pytest.param(lambda data: flipped(data, 8), id="version"),
        pytest.param(lambda data: flipped(data, 80), id="header"),
        pytest.param(lambda data: flipped(data, len(data) // 2), id="column"),
        pytest.param(lambda data: pickle.dumps({"a": 1}), id="a pickle"),
    ],
)
def test_a_damaged_file_is_written_anew(cache: PlanCache, load: Load, spoil: Callable[[bytes], bytes]) -> None:
    anew = load.by(cache)
    assert cache.directory is not None
    (file,) = cache.directory.iterdir()
    whole = file.read_bytes()
    file.write_bytes(spoil(whole))
    before = kept(cache)
    assert load.by(cache) == anew
    assert kept(cache) != before
    assert file.read_bytes() == whole


def test_another_version(cache: PlanCache, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    anew = load.by(cache)
    assert cache.directory is not None
    (before,) = cache.directory.iterdir()
    monkeypatch.setattr(plan_cache, "PLAN_FILE", dataclasses.replace(PLAN_FILE, version=PLAN_FILE.version + 1))
    assert load.by(cache) == anew
    (after,) = set(cache.directory.iterdir()) - {before}
    after.write_bytes(before.read_bytes())  # of the older version, under the newer one's name
    assert load.by(cache) == anew
    assert after.read_bytes() != before.read_bytes()


def test_nothing_is_unpickled(cache: PlanCache, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    load.by(cache)
    before = kept(cache)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.delattr(pickle, name)
    assert load.by(cache) == load.made_anew()
    assert kept(cache) == before


def test_a_plan_of_another_tensor_is_not_taken(cache: PlanCache, load: Load) -> None:
    """Whole, by its digest, under the right name, and yet of another load."""
    load.by(cache)
    assert cache.directory is not None
    (file,) = cache.directory.iterdir()
    for other in (other_rank(load), other_layout(load), other_islands(load)):
        file.write_bytes(b"".join(encode_plan(other.made_anew())))
        assert load.by(cache) == load.made_anew()


def foreign_load() -> tuple[Load, PlanColumns]:
    """Everything that columns can hold: own, shared, forwarded and relayed reads, of matrices, vectors and scalars."""
    cuts = [sharded((8, 6), [AxisCut(2, rank % 2, Shard(1))]) for rank in range(4)]
    loads = live_loads(
        (8, 6), [Region((row, 0), (2, 6)) for row in range(0, 8, 2)], cuts, {0: "a", 1: "a", 2: "b", 3: "b"}
    )
    with small_parts(8, 1 << 20):
        found = [(load, PlanColumns.of(load.made_anew())) for load in loads]
    return next(
        pair for pair in found if all(getattr(pair[1], name).size for name in ("shared_chunk", "relayed_chunk"))
    )


FOREIGN, COLUMNS_OF_FOREIGN = foreign_load()


def targets(plan: SharedPlan) -> list[object]:
    """All that moves a byte into somebody's memory."""
    shared = [(read.tensor, read.chunk, read.deliveries) for read in plan.shared]
    relayed = [(box.tensor, box.chunk, box.deliveries) for boxes in plan.relayed.values() for box in boxes]
    return [plan.own, shared, relayed]


@settings(deadline=None, max_examples=800)
@given(
    st.sampled_from(sorted(set(COLUMNS) - {"relayed_reader", "forward_relay"})),
    st.integers(0, 10**6),
    st.integers(-3, 70) | st.sampled_from([2**31 - 1, -(2**31)]),
)
def test_one_foreign_number_moves_no_byte_to_another_place(name: str, place: int, value: int) -> None:
    """Who of another island sends or relays is in none of these columns."""
    flat = dict(COLUMNS_OF_FOREIGN.flat)
    if not len(flat[name]):
        return
    flat[name] = flat[name].copy()
    flat[name][place % len(flat[name])] = value
    try:
        columns = PlanColumns.from_flat(COLUMNS_OF_FOREIGN.header, flat)
        check_columns(columns, FOREIGN.plan, FOREIGN.catalog, FOREIGN.wants, FOREIGN.islands)
    except UnusableFile:
        return
    original = COLUMNS_OF_FOREIGN.plan(FOREIGN.plan.tensors)
    assert targets(columns.plan(FOREIGN.plan.tensors)) == targets(original)


@pytest.mark.parametrize("name", ["num_dims", "bytes_sent", "bytes_received", "bytes_forwarded"])
@pytest.mark.parametrize("value", [-1, 0, 1, 3, 10**12, "x", None])
def test_a_foreign_number_in_the_header(cache: PlanCache, name: str, value: object) -> None:
    with small_parts(8, 1 << 20):
        anew = FOREIGN.by(cache)
        assert cache.directory is not None
        (file,) = cache.directory.iterdir()
        whole = file.read_bytes()
        header = {**COLUMNS_OF_FOREIGN.header, name: value}
        file.write_bytes(b"".join(encode_file(PLAN_FILE, header, COLUMNS_OF_FOREIGN.flat)))
        assert FOREIGN.by(cache) == anew
        assert file.read_bytes() == whole


def test_columns_of_another_length(cache: PlanCache, load: Load) -> None:
    anew = load.by(cache)
    assert cache.directory is not None
    (file,) = cache.directory.iterdir()
    columns = PlanColumns.of(anew)
    for name in COLUMNS:
        longer = {**columns.flat, name: np.append(columns.flat[name], columns.flat[name][:1])}
        file.write_bytes(b"".join(encode_file(PLAN_FILE, columns.header, longer)))
        assert load.by(cache) == anew, name


def test_what_is_not_kept(cache: PlanCache, load: Load, tmp_path: Path) -> None:
    """Of checkpoints whose catalogs aren't; small plans; and where nobody wants a cache, or none can be."""
    without_digest = dataclasses.replace(load, catalog=dataclasses.replace(load.catalog, metadata_digest=b""))
    assert without_digest.by(cache) == load.made_anew()
    assert load.by(dataclasses.replace(cache, min_reads=len(load.plan.reads) + 1)) == load.made_anew()
    assert load.by(PlanCache.of(False)) == load.made_anew()
    assert not (tmp_path / "cache").exists()
    (tmp_path / "file").touch()
    assert load.by(PlanCache(tmp_path / "file" / "below", min_reads=0)) == load.made_anew()


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert PlanCache.of(True) == PlanCache(tmp_path / "shardferry")
    assert PlanCache.of(str(tmp_path)) == PlanCache(tmp_path)
    assert PlanCache.of(False).directory is None


def test_catalogs_and_plans_share_the_room(cache: PlanCache, load: Load) -> None:
    """What was not used for longest goes first, of whatever kind it is."""
    assert cache.directory is not None
    CatalogCache(cache.directory).put(METADATA, load.catalog)
    (catalog,) = cache.directory.iterdir()
    os.utime(catalog, (0, 0))
    load.by(cache)
    assert len(kept(cache)) == 2
    small = dataclasses.replace(cache, max_bytes=catalog.stat().st_size)
    other_rank(load).by(small)
    assert not catalog.exists()


def test_what_is_planned_belongs_to_the_version() -> None:
    """Where this fails, other plans are made of the same wants, or written otherwise: raise ``PLAN_FILE.version``.

    A plan that an older Shardferry kept would be this rank's, and the other ranks would plan anew: they must agree.
    """
    load = spec_load(wanted(2, 4, tp=2), 5, {rank: f"node {rank // 6}" for rank in range(16)})
    with small_parts(256, 1 << 10):
        digest = b"".join(encode_plan(load.made_anew()))[32:64].hex()
    assert (PLAN_FILE.version, digest) == (1, "dc79c580631a4f0090e878d826c1e8846a8bdf87658666d41d007212d0aaec2a")
