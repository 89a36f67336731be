"""Heads of items as torch.save writes them, and heads that nobody should believe."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.serialization import get_crc32_options, set_crc32_options
from torch.utils.serialization import config

from shardferry.errors import DecodeError
from shardferry.read.objects import decode_object
from shardferry.read.zip_header import MAX_HEADER_BYTES, HeaderTooShort, ItemLayout, parse_header
from tests.support.alone import item_of

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.bool,
    torch.complex64,
    torch.complex128,
]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """Of the elements, row-major."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def gathered(item: bytes, layout: ItemLayout) -> bytes:
    """The elements at the byte positions that the layout gives, row-major."""
    indices = torch.cartesian_prod(*(torch.arange(n) for n in layout.shape)).view(-1, len(layout.shape)).tolist()
    positions = [layout.byte_position(tuple(index)) for index in indices]
    return b"".join(item[start : start + layout.dtype.itemsize] for start in positions)


@pytest.mark.conformance(13)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_dtype(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[1, 1, 2], [4, 8, 16]], dtype=torch.float32).to(dtype)
    item = item_of(tensor)
    layout = parse_header(item[:1024])
    assert (layout.dtype, layout.shape, layout.strides, layout.storage_offset) == (dtype, (2, 3), (3, 1), 0)
    assert gathered(item, layout) == raw_bytes(tensor)


@pytest.mark.conformance(12)
@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(torch.arange(12.0).view(3, 4).t(), id="transposed"),
        pytest.param(torch.arange(48.0).view(2, 3, 2, 4).contiguous(memory_format=torch.channels_last), id="channels"),
        pytest.param(torch.arange(20.0).view(4, 5)[1:3, 2:], id="inside a bigger storage"),
        pytest.param(torch.arange(20.0)[::3], id="every third"),
        pytest.param(torch.arange(3.0).expand(2, 3), id="stride 0"),
        pytest.param(torch.nn.Parameter(torch.arange(6.0).view(2, 3)), id="parameter"),
        pytest.param(torch.arange(6.0).requires_grad_(), id="requires grad"),
    ],
)
def test_each_stride(tensor: torch.Tensor) -> None:
    item = item_of(tensor)
    layout = parse_header(item)
    assert (layout.shape, layout.strides) == (tuple(tensor.shape), tensor.stride())
    assert layout.storage_offset == tensor.storage_offset()
    assert gathered(item, layout) == raw_bytes(tensor)


def test_a_scalar_and_an_empty_tensor() -> None:
    item = item_of(torch.tensor(2.5))
    layout = parse_header(item)
    assert (layout.shape, layout.strides) == ((), ())
    assert item[layout.byte_position(()) :][:4] == raw_bytes(torch.tensor([2.5]))
    empty = parse_header(item_of(torch.zeros(0, 3)))
    assert (empty.shape, empty.dtype) == ((0, 3), torch.float32)


@pytest.fixture
def alignment() -> Iterator[None]:
    before = config.save.storage_alignment
    yield
    config.save.storage_alignment = before


@pytest.mark.usefixtures("alignment")
@pytest.mark.parametrize("num_bytes", [64, 256, 4096, 32768])
def test_the_start_of_the_data_is_what_the_zip_says(num_bytes: int) -> None:
    config.save.storage_alignment = num_bytes
    tensor = torch.arange(10.0)
    item = item_of(tensor)
    layout = parse_header(item)
    assert layout.raw_start == item.index(raw_bytes(tensor))
    assert layout.raw_start % num_bytes == 0


class _Ends:
    """A file of which only the first bytes are kept: the item below is as long as it says, and takes no room."""

    def __init__(self) -> None:
        self.head = bytearray()
        self.num_bytes = 0

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self.head += view[: max(0, 4096 - len(self.head))]
        self.num_bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""


@pytest.fixture
def no_checksums() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(False)
    yield
    set_crc32_options(before)


@pytest.mark.usefixtures("no_checksums")
def test_an_item_longer_than_a_zip_of_32_bits_can_say() -> None:
    tensor, file = torch.empty(2**30 + 5), _Ends()
    tensor[:3] = torch.tensor([1.0, 2.0, 4.0])
    torch.save(tensor, file)
    assert file.num_bytes > 2**32
    layout = parse_header(bytes(file.head[:1024]))
    assert (layout.shape, layout.strides) == ((2**30 + 5,), (1,))
    assert layout.byte_position((2**30 + 4,)) == layout.raw_start + 2**32 + 16
    assert file.head[layout.raw_start :][:12] == raw_bytes(tensor[:3])


def test_a_head_that_is_cut_asks_for_more() -> None:
    item = item_of(torch.arange(10.0))
    layout, named = parse_header(item), item.index(b"archive/data/0") + len(b"archive/data/0")
    for length in range(named):
        with pytest.raises(HeaderTooShort):
            parse_header(item[:length])
    for length in range(named, layout.raw_start):
        assert parse_header(item[:length]) == layout


@pytest.mark.parametrize(
    ("view", "says"),
    [
        pytest.param(torch.tensor([1 + 2j, 3 - 1j]).conj(), r"lazy view \(conj\)", id="conjugated"),
        pytest.param(torch.tensor([1 + 2j]).conj().imag, r"lazy view \(neg\)", id="negated"),
        pytest.param(torch.arange(4.0).to(torch.float8_e4m3fn)[::2], None, id="a plain view"),
    ],
)
def test_values_that_are_not_those_of_the_bytes(view: torch.Tensor, says: str | None) -> None:
    if says is None:
        assert gathered(item_of(view), parse_header(item_of(view))) == raw_bytes(view)
        return
    with pytest.raises(DecodeError, match=says):
        parse_header(item_of(view).ljust(MAX_HEADER_BYTES, b"\0"))


class _Custom:
    """No plain data."""

    def __reduce__(self) -> Any:
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("value", "says"),
    [
        pytest.param(_Custom(), "names (os|posix).getcwd, which no plain tensor needs", id="forbidden global"),
        pytest.param({"a": 1}, "holds a dict, not a tensor", id="no tensor"),
        pytest.param([torch.ones(1), torch.ones(2)], "not to its own storage", id="two storages"),
        pytest.param(torch.eye(3).to_sparse(), "which no plain tensor needs", id="sparse"),
    ],
)
def test_items_of_something_else(value: Any, says: str) -> None:
    with pytest.raises(DecodeError, match=says):
        parse_header(item_of(value).ljust(MAX_HEADER_BYTES, b"\0"))


def test_damaged_heads() -> None:
    item = item_of(torch.arange(10.0))
    with pytest.raises(DecodeError, match=r"no zip record at byte 0 of the item \(found b'PK\\x03\\x05'\)"):
        parse_header(item.replace(b"PK\x03\x04", b"PK\x03\x05", 1))
    with pytest.raises(DecodeError, match="saved on a b'gittle'-endian machine, this one is little-endian"):
        parse_header(item.replace(b"little", b"gittle", 1))
    with pytest.raises(DecodeError, match=r"compressed \(method 8\)"):
        parse_header(item[:8] + b"\x08\x00" + item[10:])
    noise = random.Random(0)
    for _ in range(200):
        with pytest.raises(DecodeError, match="no zip record at byte 0"):
            parse_header(noise.randbytes(1024))


def test_any_damaged_byte_is_an_answer_or_an_error_of_ours() -> None:
    item, noise, refused = bytearray(item_of(torch.arange(10.0))), random.Random(1), 0
    for position in range(parse_header(bytes(item)).raw_start):
        damaged = bytearray(item)
        damaged[position] ^= noise.randrange(1, 256)
        try:
            assert isinstance(parse_header(bytes(damaged)), ItemLayout)
        except (DecodeError, HeaderTooShort):
            refused += 1
    assert refused > 50


def test_objects() -> None:
    value = {"lr": 0.5, "betas": (0.25, 0.5), "names": ["a", None], "on": True, "count": 3}
    assert decode_object(item_of(value)) == value
    assert torch.equal(decode_object(item_of(torch.arange(3))), torch.arange(3))
    with pytest.raises(DecodeError, match="is not plain data"):
        decode_object(item_of(_Custom()))
    with pytest.raises(DecodeError, match="the saved object of 10 bytes is damaged"):
        decode_object(item_of(value)[:10])
