"""Prefetching keeps order, errors and depth."""

import threading
import time

import pytest

from xtransfer.data.batches.prefetch import prefetch


def test_prefetch_keeps_the_order():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))
    assert list(prefetch([])) == []


def test_prefetch_raises_what_the_worker_raised_in_its_turn():
    def numbers():
        yield 1
        yield 2
        raise RuntimeError("broken disk")

    items = prefetch(numbers())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="broken disk"):
        next(items)


def test_prefetch_runs_ahead_by_depth_only_and_ends_when_closed():
    made: list[int] = []

    def numbers():
        for i in range(10**9):
            made.append(i)
            yield i

    def workers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]

    items = prefetch(numbers(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]  # one taken, two in the queue, one in hand
    assert len(workers()) == 1
    items.close()
    assert not workers()


def test_prefetch_of_nothing_ahead_is_an_error():
    with pytest.raises(ValueError, match="prefetch depth 0"):
        prefetch(range(3), depth=0)
