"""The parts that every command shares: exit statuses, one-line errors, progress bars, and log lines."""

import argparse
import errno
import io
import logging
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xtransfer.errors import UserError, is_disk_full, one_line, refuse_url
from xtransfer.runtime import preemption, processes
from xtransfer.runtime.cluster import Flags

EXIT_USER_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_LOST = 134  # another process died; JAX's own abort has the same status
EXIT_PREEMPTED = preemption.EXIT_PREEMPTED

console = Console(highlight=False, soft_wrap=True)
_LOG_EVERY_SECONDS = 15.0
_LONGEST_ERROR = 1 << 16  # characters
_stop = threading.Event()
_deferred: list[str] = []  # the message that SIGTERM prints in each open `deferred_stop`
_LOST = re.compile(r"\b(gloo|coordination service|unavailable|heartbeat)", re.IGNORECASE)


def run(main: Callable[[list[str]], None], *, interrupted: str = "run the same command again to resume") -> None:
    """Run a command's `main(argv)`; print an error that a user can fix as one line, and exit with status 1.

    Such errors are a `UserError`, a path that the system refuses, a full disk, and too little memory. If the reader
    stops early (`| head`), the command drops further output and carries on. If output cannot be written (a full disk),
    it carries on too, but exits with status 1.

    Args:
      main: takes the arguments without the program's name.
      interrupted: the message after Ctrl-C.
    """
    signal.signal(signal.SIGTERM, _terminate)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that PyTorch is missing, as it should be
    for stream in (sys.stdout, sys.stderr):  # in an ASCII locale, a table with question marks is better than none
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Orbax and TFDS warn about what they were asked to do. Their errors come as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    with _one_line_warnings(), _lasting_output():
        _ignore_other_semantics()
        _run(main, interrupted)


def _run(main: Callable[[list[str]], None], interrupted: str) -> None:
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
        message = _user_message(error)
        if message is None and not processes.joined():
            raise
        _report_and_exit(error, message)


class _Output(io.RawIOBase):
    """A file descriptor to write to. After an error it drops everything, and keeps the error."""

    def __init__(self, descriptor: int):
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int | None:
        if self.error is None:
            try:
                return os.write(self.descriptor, data)
            except BlockingIOError:
                return None
            except OSError as error:
                self.error = error
        return len(data)


def _lasting(descriptor: int) -> io.TextIOWrapper:
    """Return a text stream on a file descriptor that no error of writing interrupts."""
    raw = _Output(descriptor)
    return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", errors="replace", line_buffering=raw.isatty())


@contextmanager
def _lasting_output() -> Iterator[None]:
    """Let no error of standard output interrupt the block; then exit with status 1, unless the reader just left."""
    before = sys.stdout
    try:
        descriptor = before.fileno()
    except (AttributeError, OSError, ValueError):  # closed, or no file
        yield
        return
    before.flush()
    encoding = before.encoding
    sys.stdout = _lasting(descriptor)
    sys.stdout.reconfigure(encoding=encoding)
    try:
        yield
        sys.stdout.flush()
        raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
        error = raw.error if isinstance(raw, _Output) else None
        if error is not None and not isinstance(error, BrokenPipeError):
            print(
                f"error: standard output: {error.strerror}; part of the output is lost, everything else is finished",
                file=sys.stderr,
                flush=True,
            )
            sys.exit(EXIT_USER_ERROR)
    finally:
        sys.stdout.flush()
        sys.stdout = before


class _Warnings(logging.Handler):
    """Print the package's log records as every other warning or error: one line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(
            f"{record.levelname.lower()}: {one_line(record.getMessage(), _LONGEST_ERROR)}", file=sys.stderr, flush=True
        )


@contextmanager
def _one_line_warnings() -> Iterator[None]:
    """Print the package's own log records, whatever handlers another library gives to the root logger."""
    logger, handler = logging.getLogger("xtransfer"), _Warnings()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


# Settings of JAX that the environment may change, with which the same run would fail or give other numbers.
_SEMANTICS = {
    "jax_debug_infs": False,
    "jax_debug_nans": False,
    "jax_default_prng_impl": "threefry2x32",
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_threefry_partitionable": True,
}


def _ignore_other_semantics() -> None:
    """Undo the environment variables that would change the results, and name them."""
    for name, value in _SEMANTICS.items():
        if name.upper() not in os.environ:
            continue
        import jax  # takes a second, and few users set these variables

        if getattr(jax.config, name) != value:
            jax.config.update(name, value)
            log(f"warning: {name.upper()} is ignored, because it would change the results")


def path_argument(text: str) -> Path:
    """Return a path from the command line, for argparse.

    It is not empty, not the address of object storage, and UTF-8, because files record it.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; '.' is the current directory")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # half surrogates, which stand for the other bytes
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: rename it") from None
    try:
        refuse_url(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(text)


def start(flags: Flags) -> None:
    """Join the other processes of a run, if there are any. From here on, only process 0 has a terminal."""
    processes.start(flags, preemption.on_signs)
    if not processes.joined():
        return
    # Libraries below Python write about their connections to the file descriptor itself: discard that.
    sys.stdout.flush()
    terminal, devnull = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    sys.stdout = _lasting(terminal if processes.is_first() else devnull)
    if not processes.is_first():
        console.quiet = True
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")


def _report_and_exit(error: Exception, message: str | None) -> None:
    """Print an error once for all processes, and end them."""
    if processes.joined():
        processes.wait_for_ending()
    line = one_line(message or f"{type(error).__name__}: {error}", limit=_LONGEST_ERROR)
    if message is None:
        traceback.print_exception(error)
    print(f"{processes.prefix()}error: {line}", file=sys.stderr, flush=True)
    _exit(line, EXIT_LOST if _is_lost_connection(error) else EXIT_USER_ERROR)


def _exit(line: str, status: int) -> None:
    if processes.joined():
        processes.end(line, status)
    sys.exit(status)


def _user_message(error: Exception) -> str | None:
    """Return the message for an error that the user can fix; None for a defect of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    # JAX's own exception class is not imported for this: its errors carry the status by name.
    text = one_line(error, limit=1000)
    if is_disk_full(error):  # TensorStore gives it the same status as too little memory
        return (
            f"the disk is full ({text[:150]}): free some space and run the same command again; finished work is intact"
        )
    if os.strerror(errno.EMFILE) in text:  # TensorStore gives it that status too
        return f"too many open files ({text[:150]}): raise the limit with ulimit -n and run the same command again"
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return (
            f"out of memory ({text[:150]}): lower the batch size (student.batch_size, evaluation_batch_size, "
            "--batch-size) or max_length, or set student.accumulation, student.remat or mesh.fsdp"
        )
    if text.startswith("Unable to initialize backend"):
        return f"{text[:200]}: JAX_PLATFORMS asks for devices that this machine does not have"
    if _is_lost_connection(error):
        return f"another process has ended or cannot be reached ({text[:60]}…): see the logs of the others"
    return None


def _is_lost_connection(error: Exception) -> bool:
    """Return whether the connection to another process broke, by the error's text: JAX raises no class of its own."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return False  # its text holds names that the user chose
    return processes.count() > 1 and _LOST.search(str(error)) is not None


def _terminate(signum: int, frame: Any) -> None:
    again = _stop.is_set()
    _stop.set()
    if processes.joined():
        preemption.request_stop()
    elif not _deferred:
        # Not sys.exit: an exception raised inside a callback of the garbage collector is swallowed.
        sys.stdout.flush()
        os._exit(EXIT_PREEMPTED)
    elif _deferred[-1] and not again:
        os.write(2, f"{_deferred[-1]}\n".encode())  # not print, which may be running now and cannot be entered twice


@contextmanager
def deferred_stop(message: str = preemption.SAVING) -> Iterator[Callable[[], bool]]:
    """Defer SIGTERM (preemption) inside the block, which polls the yielded function, saves, and exits.

    Outside such a block, SIGTERM exits at once with `EXIT_PREEMPTED`, because everything finished is on the disk. With
    several processes one signal is enough, and all of them stop at the same poll, so they must poll equally often. If
    the signal comes after the last poll, the process exits at the end of the block.

    Args:
      message: the line that a process working alone prints when the signal comes; a group prints its own.
    """
    _deferred.append(message)
    preemption.note_saving_section(True)
    try:
        yield preemption.stop_requested if processes.joined() else _stop.is_set
    finally:
        preemption.note_saving_section(False)
        _deferred.pop()
    if processes.joined():
        preemption.leave_if_stopped()
    elif _stop.is_set() and not _deferred:
        raise SystemExit(EXIT_PREEMPTED)


class ProgressBar:
    """The progress of one stage. Call `advance` after each piece of work."""

    def __init__(self, title: str, total: int, unit: str, progress: Progress | None):
        self.title, self.total, self.unit = title, total, unit
        self._progress = progress
        self._task = None if progress is None else progress.add_task(title, total=total, rate="", note="")
        self._started = self._logged = time.monotonic()
        self._done = 0.0

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        """Report that `steps` more of `total` are done."""
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
    """Show a progress bar with throughput and time left on a terminal, or a plain line now and then elsewhere."""
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
    """Print one line for people, at once."""
    console.print(message, markup=False)
