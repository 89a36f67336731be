"""All ranks go on, or all raise, soon."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch.distributed as dist

from shardferry.errors import PlanError, RankError
from shardferry.exchange.agreement import Agreement
from tests.support.ranks import RankPool


def fail_on(ranks: tuple[int, ...], error: type[Exception]) -> tuple[str, str, float]:
    """What this rank raises, and after how long."""
    agreement = Agreement(dist.group.WORLD)

    def work() -> None:
        if agreement.rank in ranks:
            raise error(f"no cover on {agreement.rank}")

    start = time.monotonic()
    try:
        agreement.all_or_raise("planning", work)
    except Exception as caught:
        return type(caught).__name__, str(caught), time.monotonic() - start
    return "", "", 0.0


@pytest.mark.conformance(19)
@pytest.mark.parametrize("error", [PlanError, ZeroDivisionError])
@pytest.mark.parametrize("failing", [(0,), (2,), (1, 2)], ids=str)
def test_one_rank_fails_and_all_raise(ranks: RankPool, failing: tuple[int, ...], error: type[Exception]) -> None:
    outcomes = ranks.run(3, fail_on, failing, error)
    for rank, (kind, message, seconds) in enumerate(outcomes):
        assert seconds < 10
        if rank in failing and error is PlanError:
            assert (kind, message) == ("PlanError", f"no cover on {rank}")
        else:
            assert kind == "RankError"
            assert f"planning failed on rank {failing[0]}" in message
            assert f"no cover on {failing[0]}" in message


def share_rank() -> list[Any]:
    agreement = Agreement(dist.group.WORLD)
    return agreement.gather("counting", lambda: agreement.rank * 10)


def test_shared_values_come_by_rank(ranks: RankPool) -> None:
    assert ranks.run(3, share_rank) == [[0, 10, 20]] * 3


def test_alone() -> None:
    agreement = Agreement(None)
    assert agreement.all_or_raise("planning", lambda: 7) == 7
    assert agreement.gather("planning", lambda: 7) == [7]
    with pytest.raises(ZeroDivisionError):
        agreement.all_or_raise("planning", lambda: 1 // 0)


def test_rank_error_keeps_its_ranks() -> None:
    assert RankError("late", (3, 1)).world_ranks == (3, 1)
