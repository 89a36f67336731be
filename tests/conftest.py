"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import save_fsdp2
from tests.support.ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Up to 8 real processes with gloo."""
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def saved_by(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Checkpoints of the same FSDP2 model, saved by stock torch on 1 to 8 ranks, by number of ranks."""
    paths = {}
    for num_ranks in (1, 2, 3, 4, 6, 8):
        paths[num_ranks] = tmp_path_factory.mktemp(f"saved-by-{num_ranks}") / "ckpt"
        ranks.run(num_ranks, save_fsdp2, str(paths[num_ranks]))
    return paths
