"""Which way of loading the cost model takes, for storages and layouts whose better way is known."""

from __future__ import annotations

import pytest

from shardferry.plan.costs import RankCosts, StorageRates, Work, compare

MIB = 1 << 20
STORE = StorageRates(latency_s=0.02, bytes_per_s=1e8, shares_reads=False)
FAST_STORE = StorageRates(latency_s=1e-4, bytes_per_s=2e10, shares_reads=False)
DISK = StorageRates(latency_s=1e-4, bytes_per_s=5e8, shares_reads=True)


def replicas(num_ranks: int, rates: StorageRates, *, on_one_node: bool) -> list[RankCosts]:
    """All ranks want the same 1,024 MiB."""
    part = 1024 * MIB // num_ranks
    delivered = part * (num_ranks - 1) if on_one_node else 0
    forwarded = 0 if on_one_node else part * (num_ranks - 1)
    shared = Work(part, part // (8 * MIB), delivered, forwarded)
    alone = Work(1024 * MIB, 128)
    from_storage = shared if on_one_node and rates.shares_reads else alone
    return [RankCosts(alone, from_storage, shared, rates, 16)] * num_ranks


def rows_that_stay_rows(rates: StorageRates) -> list[RankCosts]:
    alone = Work(256 * MIB, 32)
    return [RankCosts(alone, alone, alone, rates, 16)] * 4


@pytest.mark.parametrize(
    ("ranks", "is_cooperative"),
    [
        pytest.param(replicas(4, STORE, on_one_node=True), True, id="replicas of a node, slow store"),
        pytest.param(replicas(8, STORE, on_one_node=False), True, id="replicas on nodes of their own, slow store"),
        pytest.param(replicas(4, FAST_STORE, on_one_node=False), False, id="a store quicker than the group"),
        pytest.param(replicas(4, DISK, on_one_node=True), False, id="a node's page cache gives to all"),
        pytest.param(replicas(4, DISK, on_one_node=False), True, id="every node would ask the disk"),
        pytest.param(rows_that_stay_rows(STORE), False, id="nothing to gain"),
    ],
)
def test_the_quicker_way_is_taken(ranks: list[RankCosts], is_cooperative: bool) -> None:
    choice = compare(ranks)
    assert choice.is_cooperative == is_cooperative
    assert "MB/s" in choice.reason


def test_one_slow_rank_decides() -> None:
    """3 ranks have their files in memory, one has to ask a slow store for what the others have too."""
    quick = [
        RankCosts(rank.direct, rank.direct, rank.cooperative, None, 16) for rank in replicas(4, STORE, on_one_node=True)
    ]
    assert compare([*quick[:3], replicas(4, STORE, on_one_node=True)[3]]).is_cooperative
