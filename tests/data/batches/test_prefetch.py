"""Prefetching keeps the order, passes errors on, and runs ahead by its depth only."""

import threading
import time

import pytest

from xtransfer.data.batches.prefetch import prefetch


def test_prefetch_keeps_the_order():
    assert list(prefetch(iter(range(50)), depth=3)) == list(range(50))
    assert list(prefetch([])) == []


def test_prefetch_raises_the_error_of_the_source_after_the_items_before_it():
    def numbers():
        yield 1
        yield 2
        raise RuntimeError("broken disk")

    items = prefetch(numbers())
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(RuntimeError, match="broken disk"):
        next(items)


def test_prefetch_runs_ahead_by_its_depth_only_and_its_thread_exits_on_close():
    produced: list[int] = []

    def numbers():
        for i in range(10**9):
            produced.append(i)
            yield i

    def workers() -> list[str]:
        return [thread.name for thread in threading.enumerate() if thread.name == "prefetch"]

    items = prefetch(numbers(), depth=2)
    assert next(items) == 0
    deadline = time.monotonic() + 5
    while len(produced) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert produced == [0, 1, 2, 3]  # one consumed, two in the queue, and one that the worker waits to put there
    assert len(workers()) == 1
    items.close()
    assert not workers()


def test_a_prefetch_depth_of_zero_is_an_error():
    with pytest.raises(ValueError, match="prefetch depth 0"):
        prefetch(range(3), depth=0)
