"""Any tensor, saved in any chunks with any strides, wanted in any layout: every element bit for bit, from real files."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.utils.serialization import config

from shardferry.checkpoint.catalog import Catalog
from shardferry.checkpoint.open import open_checkpoint, storage_of
from shardferry.layout.tensor_layout import AxisCut, TensorLayout, flat_slice, shard_on_mesh
from shardferry.read.verify import verify_checkpoint
from shardferry.region import Region
from shardferry.storage.fsspec import FsspecRangeReader
from tests.support.chunk_files import Chunk, write_chunks
from tests.support.loads import bits, load_boxes, load_layouts
from tests.support.oracle import full_tensor, random_bits

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.complex128, torch.int64, torch.bool, torch.uint16]


def laid_out(tensor: torch.Tensor, order: tuple[int, ...], *, inside: bool) -> torch.Tensor:
    """The same values with the dimensions in another order in memory; inside a bigger storage where asked."""
    packed = tensor.permute(order).contiguous()
    if inside and packed.ndim:
        bigger = torch.zeros([n + 2 for n in packed.shape], dtype=tensor.dtype)
        bigger[tuple(slice(1, n + 1) for n in packed.shape)] = packed
        packed = bigger[tuple(slice(1, n + 1) for n in packed.shape)]
    return packed.permute([order.index(dim) for dim in range(len(order))])


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Boxes that tile a shape: each dimension cut at random places."""
    spans = []
    for size in shape:
        cuts = sorted(draw(st.sets(st.integers(1, size - 1), max_size=2))) if size > 1 else []
        spans.append(list(itertools.pairwise([0, *cuts, size])))
    return [
        Region(tuple(start for start, _ in box), tuple(stop - start for start, stop in box))
        for box in itertools.product(*spans)
    ]


@st.composite
def saved_tensors(draw: st.DrawFn) -> tuple[torch.Tensor, list[Chunk]]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    whole = random_bits(shape, draw(st.sampled_from(DTYPES)), draw(st.integers(0, 9)))
    chunks = []
    for region in draw(grids(shape)):
        part = whole[tuple(map(slice, region.offsets, region.ends))]
        order = tuple(draw(st.permutations(range(len(shape)))))
        tensor = laid_out(part, order, inside=draw(st.booleans()))
        assert bits(tensor) == bits(part)
        chunks.append(Chunk(region, tensor, draw(st.integers(0, 2)), compressed=draw(st.booleans())))
    return whole, chunks


@st.composite
def targets(draw: st.DrawFn, shape: tuple[int, ...]) -> list[TensorLayout]:
    """The layouts of all ranks: along one or two mesh axes, or as flat slices."""
    if draw(st.booleans()):
        numel = torch.Size(shape).numel()
        cuts = sorted(draw(st.lists(st.integers(0, numel), max_size=3)))
        return [flat_slice(shape, start=a, stop=b) for a, b in itertools.pairwise([0, *cuts, numel])]
    dims = [Replicate(), *map(Shard, range(len(shape)))]
    axes = draw(st.lists(st.tuples(st.integers(1, 4), st.sampled_from(dims)), min_size=1, max_size=2))
    return [
        shard_on_mesh(shape, [AxisCut(n, i, placement) for (n, placement), i in zip(axes, index, strict=True)])
        for index in itertools.product(*(range(n) for n, _ in axes))
    ]


def check(whole: torch.Tensor, layout: TensorLayout, local: torch.Tensor) -> torch.Tensor:
    """Compares bit for bit; returns which elements of the whole were compared."""
    seen = torch.zeros(whole.shape, dtype=torch.bool)
    for box in layout.boxes:
        place = tuple(map(slice, box.region.offsets, box.region.ends))
        found = local[tuple(map(slice, box.local.offsets, box.local.ends))]
        assert bits(found) == bits(whole[place])
        seen[place] = True
    return seen


@given(st.data())
def test_every_element(data: st.DataObject) -> None:
    whole, chunks = data.draw(saved_tensors())
    layouts = data.draw(targets(tuple(whole.shape)))
    remote, concurrency = data.draw(st.booleans()), data.draw(st.sampled_from([1, 4]))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "ckpt"
        write_chunks(path, {"x": (whole.shape, chunks)})
        catalog, seen = open_checkpoint(path), torch.zeros(whole.shape, dtype=torch.bool)
        for layout in layouts:
            storage = FsspecRangeReader(LocalFileSystem(), str(path)) if remote else storage_of(catalog)
            (local,), _ = load_layouts(catalog, [("x", layout)], storage=storage, concurrency=concurrency)
            seen |= check(whole, layout, local)
    assert seen.all()


def wide_runs(tmp_path: Path) -> tuple[Catalog, torch.Tensor]:
    """Two chunks of several MB, one row-major, one column-major."""
    whole = full_tensor("wide", "exp_avg", (1500, 3000))
    regions = [Region((0, 0), (700, 3000)), Region((700, 0), (800, 3000))]
    parts = [whole[:700], whole[700:].t().contiguous().t()]
    write_chunks(tmp_path / "ckpt", {"x": (whole.shape, [Chunk(r, p) for r, p in zip(regions, parts, strict=True)])})
    return open_checkpoint(tmp_path / "ckpt"), whole


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    "region",
    [
        Region((0, 0), (1500, 3000)),
        Region((600, 0), (200, 3000)),
        Region((0, 100), (1500, 700)),
        Region((650, 17), (100, 5)),
        Region((0, 2999), (1500, 1)),
    ],
    ids=str,
)
def test_windows_wider_than_a_request(tmp_path: Path, region: Region, remote: bool) -> None:
    catalog, whole = wide_runs(tmp_path)
    storage = FsspecRangeReader(LocalFileSystem(), str(tmp_path / "ckpt")) if remote else storage_of(catalog)
    (found,), counters = load_boxes(catalog, [("x", region)], storage=storage)
    assert torch.equal(found, whole[tuple(map(slice, region.offsets, region.ends))])
    assert counters.bytes_requested >= counters.bytes_done == region.numel * 4


@pytest.mark.parametrize("num_bytes", [64, 512, 4096, 16384])
def test_wide_alignment_of_records(tmp_path: Path, num_bytes: int) -> None:
    """Heads of up to 80 KiB, found once and then read in one request each."""
    before, config.save.storage_alignment = config.save.storage_alignment, num_bytes
    tensors = {f"w{n}": full_tensor(f"w{n}", "exp_avg", (40, 30)) for n in range(12)}
    try:
        chunks = {key: (t.shape, [Chunk(Region.whole(t.shape), t)]) for key, t in tensors.items()}
        write_chunks(tmp_path / "ckpt", chunks)
    finally:
        config.save.storage_alignment = before
    catalog = open_checkpoint(tmp_path / "ckpt")
    found, counters = load_boxes(catalog, [(key, Region((5, 0), (10, 30))) for key in tensors], concurrency=1)
    for key, tensor in zip(tensors, found, strict=True):
        assert torch.equal(tensor, tensors[key][5:15]), key
    assert counters.num_requests <= 2 * 12 + 7
    assert verify_checkpoint(catalog, storage_of(catalog), concurrency=2) == []
