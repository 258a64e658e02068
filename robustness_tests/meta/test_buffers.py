"""The pool of buffers: bounded, shared by threads, and nobody waits in it for ever."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergeguard.mergers.buffers import BufferPool

if TYPE_CHECKING:
    from mergeguard.mergers.buffers import Buffer

LONG = 60  # seconds after which a thread hangs; it needs microseconds

acquisitions = st.lists(st.lists(st.sampled_from([0, 1, 2, 3, 8, 8, 8, 13, 40]), max_size=4), max_size=25)


class Counted(BufferPool):
    """Counts what is in use from outside the pool, where an acquisition has just ended."""

    def __init__(self, budget: int) -> None:
        super().__init__(budget)
        self.most_used = self.most_held = 0

    def acquire(self, sizes: list[int]) -> list[Buffer]:
        buffers = super().acquire(sizes)
        with self._changed:
            self.most_used = max(self.most_used, self._used_bytes)
            self.most_held = max(self.most_held, self._used_bytes + self._free_bytes)
            assert self._free_bytes == sum(buffer.nbytes for buffer in self._free)
        return buffers


@settings(max_examples=60)
@given(budget=st.integers(0, 60), acquired=acquisitions, threads=st.integers(1, 4))
def test_one_thread_acquires_and_others_release_within_the_budget(
    budget: int, acquired: list[list[int]], threads: int
) -> None:
    pool = Counted(budget)
    ended = threading.Event()

    def use(buffers: list[Buffer], mark: int) -> None:
        for buffer in buffers:
            buffer.fill(mark)
        assert all((buffer == mark).all() for buffer in buffers), "no two acquisitions share a buffer"
        pool.release(buffers)

    def acquire_all() -> None:
        with ThreadPoolExecutor(threads) as executor:
            used = []
            for mark, sizes in enumerate(acquired):
                buffers = pool.acquire(sizes)
                assert [buffer.nbytes for buffer in buffers] == sizes
                used.append(executor.submit(use, buffers, mark))
            for future in used:
                future.result(LONG)
        ended.set()

    reader = threading.Thread(target=acquire_all, daemon=True)
    reader.start()
    assert ended.wait(LONG), "every acquisition ends"
    reader.join(LONG)
    limit = max([budget, *map(sum, acquired)])
    assert pool.most_used <= limit
    assert pool.most_held <= limit
    assert pool._used_bytes == 0
    assert pool._free_bytes == sum(buffer.nbytes for buffer in pool._free) <= budget


@settings(max_examples=60)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_released_buffers_are_given_out_again_for_their_sizes(sizes: list[int]) -> None:
    pool = BufferPool(100)
    first = pool.acquire(sizes)
    addresses = {buffer.ctypes.data for buffer in first}
    pool.release(first)
    again = pool.acquire(sizes[::-1])
    assert [buffer.nbytes for buffer in again] == sizes[::-1]
    assert {buffer.ctypes.data for buffer in again} == addresses


def test_a_buffer_of_another_size_is_dropped_where_the_budget_ends() -> None:
    pool = BufferPool(10)
    pool.release(pool.acquire([6]))
    assert pool._free_bytes == 6
    pool.acquire([4])
    assert pool._free_bytes == 6
    pool.acquire([6])
    assert pool._free_bytes == 0
    pool = BufferPool(10)
    pool.release(pool.acquire([6]))
    pool.acquire([5])
    assert pool._free_bytes == 0


def test_the_buffers_of_one_acquisition_that_is_too_large_are_not_kept() -> None:
    pool = BufferPool(10)
    pool.release(pool.acquire([11]))
    assert (pool._used_bytes, pool._free_bytes) == (0, 0)


def waiting(pool: BufferPool, sizes: list[int]) -> Future[list[Buffer]]:
    """An acquisition in a thread of its own that has begun to wait."""
    future: Future[list[Buffer]] = Future()

    def acquire() -> None:
        try:
            future.set_result(pool.acquire(sizes))
        except BaseException as error:  # noqa: BLE001 - whatever it is, the test looks at it
            future.set_exception(error)

    before = len(pool._changed._waiters)  # type: ignore[attr-defined] # no public way to tell that a thread waits
    threading.Thread(target=acquire, daemon=True).start()
    for _ in range(60_000):
        if len(pool._changed._waiters) > before or future.done():  # type: ignore[attr-defined]
            break
        threading.Event().wait(0.001)
    return future


def test_an_acquisition_waits_until_there_is_room() -> None:
    pool = BufferPool(10)
    first, second = pool.acquire([4]), pool.acquire([6])
    future = waiting(pool, [5])
    assert not future.done()
    pool.release(first)
    assert not wait_for([future], 0.05).done, "4 bytes are too few"
    pool.release(second)
    assert [buffer.nbytes for buffer in future.result(LONG)] == [5]


def test_a_failure_wakes_who_waits_and_refuses_who_comes_later() -> None:
    pool = BufferPool(10)
    buffers = pool.acquire([10])
    futures = [waiting(pool, [1]), waiting(pool, [10])]
    assert not any(future.done() for future in futures)
    pool.fail(ZeroDivisionError("the first"))
    pool.fail(ValueError("the second"))
    for future in futures:
        assert isinstance(future.exception(LONG), ZeroDivisionError)
    pool.release(buffers)
    with pytest.raises(ZeroDivisionError, match="the first"):
        pool.acquire([1])
