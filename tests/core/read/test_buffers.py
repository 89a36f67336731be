"""The memory of reads: never more than the budget, never a wait without end, and buffers that are reused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardferry.errors import StorageError
from shardferry.read.buffers import BufferPool, buffer_bytes


@given(st.integers(0, 1 << 40))
def test_buffers_are_hardly_larger_than_their_content(nbytes: int) -> None:
    size = buffer_bytes(nbytes)
    assert nbytes <= size <= max(4096, nbytes + nbytes // 8 + 1)
    assert buffer_bytes(size) == size


def test_a_buffer_is_reused() -> None:
    pool = BufferPool(1 << 20, timeout_s=0)
    with pool.claim(20_000), pool.buffer(5_000) as one, pool.buffer(5_000) as other:
        one[:], other[:] = b"1" * 5_000, b"2" * 5_000
    with pool.claim(20_000), pool.buffer(4_900) as again:
        assert again == b"1" * 4_900, "the one that was given back last"
    assert pool.peak_bytes == 20_000 + 2 * buffer_bytes(5_000)


def test_idle_buffers_make_room_for_a_claim() -> None:
    pool = BufferPool(40_000, timeout_s=0)
    with pool.claim(20_480), pool.buffer(20_000):
        pass
    with pool.claim(30_720), pool.buffer(30_000) as buffer:
        assert len(buffer) == 30_000
    assert pool.peak_bytes <= 40_000


def test_a_claim_above_the_budget_is_admitted_alone() -> None:
    pool = BufferPool(10_000, timeout_s=0)

    def claim(nbytes: int) -> None:
        with pool.claim(nbytes):
            pass

    with ThreadPoolExecutor(1) as other, pool.claim(50_000), pool.buffer(50_000) as buffer:
        assert len(buffer) == 50_000
        with pytest.raises(StorageError, match=r"100 bytes of buffers were not free within 0 s .*read\.memory_budget"):
            other.submit(claim, 100).result()
    claim(100)
    assert pool.peak_bytes == 50_000


def test_claims_are_served_in_their_order() -> None:
    """A large claim isn't starved by small ones that would fit beside those that are held."""
    pool, order, waits = BufferPool(16_384, timeout_s=30), [], threading.Event()

    def claim(name: str, nbytes: int) -> None:
        waits.set()
        with pool.claim(nbytes):
            order.append(name)

    with ThreadPoolExecutor(2) as threads, pool.claim(8_192):
        large = threads.submit(claim, "large", 16_384)
        waits.wait(30)
        while not pool.num_waiting:
            threading.Event().wait(0.001)
        small = threads.submit(claim, "small", 1)
        assert not order
    large.result()
    small.result()
    assert order == ["large", "small"]


def test_many_threads_stay_within_the_budget() -> None:
    pool, lock, held, most = BufferPool(100_000, timeout_s=30), threading.Lock(), [0], [0]

    def use(nbytes: int) -> None:
        with pool.claim(2 * buffer_bytes(nbytes)), pool.buffer(nbytes) as one, pool.buffer(nbytes) as other:
            with lock:
                held[0] += len(one) + len(other)
                most[0] = max(most[0], held[0])
            one[:] = other[:] = b"x" * nbytes
            with lock:
                held[0] -= len(one) + len(other)

    sizes = [(n * 7_919) % 48_000 + 1 for n in range(400)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(use, sizes))
    assert 48_000 < most[0] <= pool.peak_bytes <= 100_000
