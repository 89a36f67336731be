"""Blocks are written into another rank's arena element by element as asked, however they lie in memory and in the arena."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shardferry.arena import HostArena
from shardferry.exchange.peer_memory import ArenaAddress, PeerArenas

_SHAPE = (3, 5, 40)  # of a block in the cases below: a row of it has 160 bytes
_TABLE = np.arange(4_000_000, dtype=np.uint32)


def _block(shape: tuple[int, ...], *, columns_of: int = 1, flipped: bool = False) -> np.ndarray:
    """Different elements, and those of neighbours: every ``columns_of``-th column of a wider table, or one that lies transposed."""
    numel = int(np.prod(shape))
    if flipped:
        return _TABLE[:numel].reshape(shape[::-1]).T
    return _TABLE[: numel * columns_of].reshape(*shape[:-1], shape[-1] * columns_of)[..., ::columns_of]


@pytest.mark.parametrize(
    ("block", "place_shape"),
    [
        pytest.param(_block(_SHAPE), _SHAPE, id="together-there-and-here"),
        pytest.param(_block(_SHAPE, columns_of=3), _SHAPE, id="small-and-strided"),
        pytest.param(_block((700, 500), columns_of=4), (700, 500), id="packed-in-several-goes"),
        pytest.param(_block((3, 100_000), columns_of=2), (3, 100_000), id="a-row-longer-than-what-is-packed-at-once"),
        pytest.param(_block((900, 400), flipped=True), (900, 400), id="transposed"),
        pytest.param(_block((4, 2000), columns_of=2), (4, 3000), id="long-runs-apart-in-the-arena"),
        pytest.param(_block((40, 7), columns_of=2), (40, 9), id="short-runs-apart-in-the-arena"),
        pytest.param(_block((1,))[0, ...], (), id="one-element"),
    ],
)
def test_block_reaches_another_arena(block: np.ndarray, place_shape: tuple[int, ...]) -> None:
    place = np.empty(place_shape, dtype=np.uint32)
    offset = 3 * place.itemsize  # of the block in its tensor, which begins behind another one
    tensors = np.array([64, 4096], dtype=np.int64)
    arena = HostArena(4096 + offset + place.nbytes, num_places=len(tensors))
    arena.directory[:] = tensors
    before = np.full(arena.nbytes, 7, dtype=np.uint8)
    arena.tensor(0, (arena.nbytes,), torch.uint8).numpy()[...] = before
    expected = before.copy()
    np.ndarray(block.shape, np.uint32, expected.data, 4096 + offset, place.strides)[...] = block

    with PeerArenas({1: ArenaAddress.of(arena)}) as peers:
        peers.put(1, 1, offset, block, place.strides)

    np.testing.assert_array_equal(arena.tensor(0, (arena.nbytes,), torch.uint8).numpy(), expected)
