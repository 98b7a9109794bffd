"""What every binary shares: its exit status, its one-line errors, its progress bars, its log lines."""

import io
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xtransfer.errors import UserError

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_PREEMPTED = 143

console = Console(highlight=False, soft_wrap=True)
_LOG_EVERY_SECONDS = 15.0
_stop = threading.Event()
_deferred: list[bool] = []  # one entry for each `deferred_stop` that is open


def run(
    main: Callable[[list[str]], None], *, interrupted: str = "the same command goes on where this one stopped"
) -> None:
    """Runs a binary's `main(argv)`; what a user can mend becomes one line on stderr and exit status 1.

    That is a `UserError`, a path that the system refuses, and too little memory. `interrupted` is what Ctrl-C leaves,
    for the line that is said then.
    """
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would say that PyTorch is missing, which is meant
    for stream in (sys.stdout, sys.stderr):  # a table in an ASCII locale is better with question marks than not at all
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Orbax and TFDS warn of what they were asked to do; their errors come as exceptions.
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr, flush=True)
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        message = _for_people(error)
        if message is None:
            raise
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


def _for_people(error: Exception) -> str | None:
    """What to say of an error that its user can mend; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # JAX's own class is not imported for this: its errors carry the status by name.
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        said = " ".join(str(error).split())[:150]
        return (
            f"out of memory ({said}): lower the batch size (student.batch_size, evaluation_batch_size, --batch-size) "
            "or max_length"
        )
    return None


def _terminate(signum: int, frame: Any) -> None:
    _stop.set()
    if not _deferred:
        # Not sys.exit: an exception that is raised inside a callback of the garbage collector is swallowed.
        sys.stdout.flush()
        os._exit(EXIT_PREEMPTED)


@contextmanager
def deferred_stop() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM (preemption) ends nothing by itself: the work polls what this yields, saves, and exits.

    Elsewhere SIGTERM exits at once with `EXIT_PREEMPTED`: what is done piece by piece is safe on the disk.
    """
    _deferred.append(True)
    try:
        yield _stop.is_set
    finally:
        _deferred.pop()


class Ticker:
    """Counts the work of one stage: `advance(done)` after each piece."""

    def __init__(self, title: str, total: int, unit: str, progress: Progress | None):
        self.title, self.total, self.unit = title, total, unit
        self._progress = progress
        self._task = None if progress is None else progress.add_task(title, total=total, rate="", note="")
        self._started = self._logged = time.monotonic()
        self._done = 0.0

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        """`steps` more of `total` are done."""
        self._done += steps
        now = time.monotonic()
        rate = f"{self._done / max(now - self._started, 1e-9):,.0f} {self.unit}/s"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=steps, rate=rate, note=note)
        elif now - self._logged >= _LOG_EVERY_SECONDS or self._done >= self.total:
            self._logged = now
            left = (now - self._started) / self._done * (self.total - self._done)
            log(f"{self.title}: {self._done:,.0f}/{self.total:,} · {rate} · {left:,.0f} s left · {note}".rstrip(" ·"))


@contextmanager
def ticking(title: str, total: int, *, unit: str = "steps") -> Iterator[Ticker]:
    """A progress bar with throughput and time left on a terminal; a plain line now and then elsewhere."""
    if not console.is_terminal:
        yield Ticker(title, total, unit, None)
        return
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        yield Ticker(title, total, unit, progress)


def log(message: str) -> None:
    """One line for people, at once."""
    console.print(message, markup=False)
