"""The memory of reads: never more than the budget, never a wait for ever, and buffers that are used again."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardferry.errors import StorageError
from shardferry.read.buffers import Budget, buffer_bytes


@given(st.integers(0, 1 << 40))
def test_buffers_are_hardly_larger_than_what_they_are_for(nbytes: int) -> None:
    size = buffer_bytes(nbytes)
    assert nbytes <= size <= max(4096, nbytes + nbytes // 8 + 1)
    assert buffer_bytes(size) == size


def test_a_buffer_is_used_again() -> None:
    budget = Budget(1 << 20, timeout_s=0)
    with budget.lease(5_000) as one, budget.lease(5_000) as other:
        one[:], other[:] = b"1" * 5_000, b"2" * 5_000
    with budget.lease(4_900) as again:
        assert again == b"1" * 4_900, "the one that was given back last"
    assert budget.most_held_bytes == 2 * buffer_bytes(5_000)


def test_idle_buffers_make_room() -> None:
    budget = Budget(40_000, timeout_s=0)
    with budget.lease(20_000):
        pass
    with budget.lease(30_000) as buffer:
        assert len(buffer) == 30_000
    assert budget.most_held_bytes <= 40_000


def test_what_is_larger_than_all_of_it_is_let_through_alone() -> None:
    budget = Budget(10_000, timeout_s=0)
    with ThreadPoolExecutor(1) as other, budget.lease(50_000) as buffer:
        assert len(buffer) == 50_000
        with pytest.raises(StorageError, match=r"4096 bytes of buffers were not free within 0 s .*read\.memory_budget"):
            other.submit(with_room_for, budget, 100).result()
    with budget.lease(100):
        pass


def with_room_for(budget: Budget, nbytes: int) -> None:
    with budget.lease(nbytes):
        pass


def test_leases_come_out_of_a_claim() -> None:
    budget = Budget(16_384, timeout_s=0)
    with budget.claim(16_384):
        for _ in range(3):
            with budget.lease(8_192), budget.lease(8_192):
                assert budget.most_held_bytes == 16_384
        with pytest.raises(RuntimeError, match="has claimed 16384 bytes already"), budget.claim(1):
            pass
    assert budget.most_held_bytes == 16_384


def test_a_claim_that_was_too_small_shows_and_does_not_hang() -> None:
    budget = Budget(16_384, timeout_s=0)
    with budget.claim(4_096), budget.lease(16_384):
        assert budget.most_held_bytes == 16_384
    with budget.claim(16_384), budget.lease(20_480):
        assert budget.most_held_bytes == 20_480


def test_who_holds_a_buffer_waits_for_none() -> None:
    budget = Budget(8_192, timeout_s=0)
    with budget.lease(8_192), budget.lease(4_096), budget.lease(4_096):
        assert budget.most_held_bytes == 16_384
    with budget.lease(8_192):
        pass


def test_who_came_first_is_served_first() -> None:
    """A large claim isn't starved by the small ones that would fit beside those that are held."""
    budget, order, waits = Budget(16_384, timeout_s=30), [], threading.Event()

    def claim(name: str, nbytes: int) -> None:
        waits.set()
        with budget.claim(nbytes):
            order.append(name)

    with ThreadPoolExecutor(2) as pool, budget.claim(8_192):
        large = pool.submit(claim, "large", 16_384)
        waits.wait(30)
        while not budget._queue:
            threading.Event().wait(0.001)
        small = pool.submit(claim, "small", 1)
        assert not order
    large.result()
    small.result()
    assert order == ["large", "small"]


def test_many_threads_stay_within_it() -> None:
    budget, lock, held, most = Budget(100_000, timeout_s=30), threading.Lock(), [0], [0]

    def use(nbytes: int) -> None:
        with budget.claim(2 * buffer_bytes(nbytes)), budget.lease(nbytes) as one, budget.lease(nbytes) as other:
            with lock:
                held[0] += len(one) + len(other)
                most[0] = max(most[0], held[0])
            one[:] = other[:] = b"x" * nbytes
            with lock:
                held[0] -= len(one) + len(other)

    sizes = [(n * 7_919) % 48_000 + 1 for n in range(400)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, sizes))
    assert 48_000 < most[0] <= budget.most_held_bytes <= 100_000
