"""Objects of any length reach every rank as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from shardferry.exchange.messages import broadcast_object, gather_objects
from tests.support.ranks import RankPool

_CPU = torch.device("cpu")
# Around the length of a slot, around that of the first part of a broadcast, and some times as much.
_LENGTHS = (0, 1, 2000, 2020, 2030, 2031, 2032, 2033, 2034, 2048, 5000, 65_500, 65_520, 65_521, 65_522, 65_530, 300_000)


def words_of(rank: int, length: int) -> dict[str, Any]:
    """What one rank says."""
    return {"rank": rank, "words": bytes((rank + place) % 251 for place in range(length))}


def gathered(lengths: tuple[int, ...]) -> list[Any]:
    rank = dist.get_rank()
    assert dist.group.WORLD is not None
    return gather_objects(words_of(rank, lengths[rank]), dist.group.WORLD, _CPU)


def told(length: int) -> Any:
    assert dist.group.WORLD is not None
    return broadcast_object(words_of(0, length) if dist.get_rank() == 0 else None, dist.group.WORLD, _CPU)


@pytest.mark.parametrize("longest", _LENGTHS)
def test_every_rank_hears_every_other(ranks: RankPool, longest: int) -> None:
    lengths = (7, longest, 0)
    expected = [words_of(rank, length) for rank, length in enumerate(lengths)]
    assert ranks.run(3, gathered, lengths) == [expected] * 3


@pytest.mark.parametrize("length", _LENGTHS)
def test_every_rank_hears_the_first(ranks: RankPool, length: int) -> None:
    assert ranks.run(3, told, length) == [words_of(0, length)] * 3
