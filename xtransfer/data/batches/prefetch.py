"""Prefetching: a thread that runs an iterator ahead of its consumer."""

import queue
import threading
from collections.abc import Generator, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

_POLL_SECONDS = 0.1


def prefetch(iterator: Iterable[T], depth: int = 2) -> Generator[T, None, None]:
    """Run an iterator in a thread, up to `depth` items ahead.

    An exception in the iterator is raised here, after the items before it. Closing this generator ends the thread.

    Raises:
      ValueError: depth is below 1.
    """
    if depth < 1:
        raise ValueError(f"prefetch depth {depth} is below 1")
    return _prefetch(iterator, depth)


def _prefetch(iterator: Iterable[T], depth: int) -> Generator[T, None, None]:
    items: queue.Queue[tuple[str, Any]] = queue.Queue(depth)
    closed = threading.Event()

    def put(kind: str, value: Any) -> bool:
        while not closed.is_set():
            try:
                items.put((kind, value), timeout=_POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in iterator:
                if not put("item", item):
                    break
            put("end", None)
        except BaseException as error:  # any exception belongs to the consumer
            put("error", error)

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            kind, value = items.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield value
    finally:
        closed.set()
        thread.join()
