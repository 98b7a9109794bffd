"""What every binary shares: its exit status, its one-line errors, its progress bars, its log lines."""

import io
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xtransfer.errors import UserError, one_line
from xtransfer.runtime import preemption, processes
from xtransfer.runtime.cluster import Flags

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_LOST = 134  # another process died; also the status of JAX's own abort then
EXIT_PREEMPTED = preemption.EXIT_PREEMPTED

console = Console(highlight=False, soft_wrap=True)
_LOG_EVERY_SECONDS = 15.0
_stop = threading.Event()
_deferred: list[str] = []  # for each `deferred_stop` that is open what SIGTERM says
_LOST = ("Gloo", "oordination service", "UNAVAILABLE", "eartbeat")


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
        processes.finish()
    except KeyboardInterrupt:
        if processes.is_first():
            print(f"interrupted: {interrupted}", file=sys.stderr, flush=True)
        _exit("", EXIT_INTERRUPTED)
    except SystemExit as stop:
        if processes.joined():
            processes.leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
    except Exception as error:
        message = _for_people(error)
        if message is None and not processes.joined():
            raise
        _say_and_exit(error, message)


def start(flags: Flags) -> None:
    """Joins the other processes of a run, where there are any; only the first has a terminal from here on."""
    processes.start(flags, preemption.look)
    if not processes.joined():
        return
    # What the libraries below write to the descriptor itself, of their connections, is nobody's business.
    sys.stdout.flush()
    terminal, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    sys.stdout = os.fdopen(terminal if processes.is_first() else nowhere, "w", encoding="utf-8", errors="replace")
    if not processes.is_first():
        console.quiet = True
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def _say_and_exit(error: Exception, message: str | None) -> None:
    """Says an error once for all processes, and ends them."""
    if processes.joined():
        processes.settle()
    line = " ".join((message or f"{type(error).__name__}: {error}").split())
    if message is None:
        traceback.print_exception(error)
    print(f"{processes.prefix()}error: {line}", file=sys.stderr, flush=True)
    _exit(line, EXIT_LOST if _is_loss(error) else EXIT_USER_ERROR)


def _exit(line: str, status: int) -> None:
    if processes.joined():
        processes.end(line, status)
    sys.exit(status)


def _for_people(error: Exception) -> str | None:
    """What to say of an error that its user can mend; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # JAX's own class is not imported for this: its errors carry the status by name.
    text = one_line(error, limit=1000)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return (
            f"out of memory ({text[:150]}): lower the batch size (student.batch_size, evaluation_batch_size, "
            "--batch-size) or max_length, or set student.accumulation, student.remat or mesh.fsdp"
        )
    if text.startswith("Unable to initialize backend"):
        return f"{text[:200]}: JAX_PLATFORMS asks for devices that are not here"
    if _is_loss(error):
        return f"another process has ended or is out of reach ({text[:60]}…): the logs of the others tell more"
    return None


def _is_loss(error: Exception) -> bool:
    """Whether the connection to another process broke: by their texts, as JAX raises no class of its own for it."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return False  # they name what users named
    return processes.count() > 1 and any(sign in str(error) for sign in _LOST)


def _terminate(signum: int, frame: Any) -> None:
    again = _stop.is_set()
    _stop.set()
    if processes.joined():
        preemption.request_stop()
    elif not _deferred:
        # Not sys.exit: an exception that is raised inside a callback of the garbage collector is swallowed.
        sys.stdout.flush()
        os._exit(EXIT_PREEMPTED)
    elif _deferred[-1] and not again:
        os.write(2, f"{_deferred[-1]}\n".encode())  # print may be at work right now, and is not to be entered twice


@contextmanager
def deferred_stop(said: str = preemption.SAVING) -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM (preemption) ends nothing by itself: the work polls what this yields, saves, and exits.

    Elsewhere SIGTERM exits at once with `EXIT_PREEMPTED`: what is done piece by piece is safe on the disk. Of many
    processes one signal is enough, and all stop at the same poll; so they all have to poll equally often. What comes
    after the last poll ends the process behind the section, where all is saved. A process that works alone says `said`
    as soon as the signal comes; many have their own line.
    """
    _deferred.append(said)
    preemption.saving(True)
    try:
        yield preemption.stop_requested if processes.joined() else _stop.is_set
    finally:
        preemption.saving(False)
        _deferred.pop()
    if processes.joined():
        preemption.leave_if_stopped()
    elif _stop.is_set() and not _deferred:
        raise SystemExit(EXIT_PREEMPTED)


class ProgressBar:
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
        processes.note_progress()
        now = time.monotonic()
        rate = f"{self._done / max(now - self._started, 1e-9):,.0f} {self.unit}/s"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=steps, rate=rate, note=note)
        elif now - self._logged >= _LOG_EVERY_SECONDS or self._done >= self.total:
            self._logged = now
            left = (now - self._started) / self._done * (self.total - self._done)
            log(f"{self.title}: {self._done:,.0f}/{self.total:,} · {rate} · {left:,.0f} s left · {note}".rstrip(" ·"))


@contextmanager
def progress_bar(title: str, total: int, *, unit: str = "steps") -> Iterator[ProgressBar]:
    """A progress bar with throughput and time left on a terminal; a plain line now and then elsewhere."""
    if not console.is_terminal or console.quiet:
        yield ProgressBar(title, total, unit, None)
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
        yield ProgressBar(title, total, unit, progress)


def log(message: str) -> None:
    """One line for people, at once."""
    console.print(message, markup=False)
