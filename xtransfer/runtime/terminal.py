"""The parts that every command shares: exit statuses, one-line errors, progress bars, and log lines."""

import argparse
import contextlib
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
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from xtransfer import startup
from xtransfer.errors import Exit, MachineError, UserError, is_disk_full, one_line, refuse_url
from xtransfer.runtime import preemption, processes
from xtransfer.runtime.cluster import Flags

console = Console(highlight=False, soft_wrap=True)
_LOG_EVERY_SECONDS = 15.0
_LONGEST_ERROR = 1 << 16  # characters
_show_traceback = threading.Event()
_stop = threading.Event()
_interrupted = threading.Event()
_continued = 0  # the number of times that the process was continued after a stop (Ctrl-Z)
_deferred: list[str] = []  # the message that SIGTERM prints in each open `deferred_stop`
_LOST = re.compile(r"\b(gloo|coordination service|unavailable|heartbeat)", re.IGNORECASE)


def parser(command: str, doc: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return a parser for the flags of a command, with the flag that all commands have.

    Args:
      command: the command's name.
      doc: the docstring of its module. The first line describes the command.
      epilog: the last paragraph of `--help`.
    """
    result = argparse.ArgumentParser(
        prog=f"python -m xtransfer.{command}",
        description=(doc or "").partition("\n")[0],
        epilog=epilog,
        allow_abbrev=False,
    )
    result.add_argument(
        "--traceback", action=_ShowTraceback, nargs=0, help="if an error ends the command, show its traceback too"
    )
    return result


class _ShowTraceback(argparse.Action):
    """Show the traceback of errors from here on, also of errors in the other flags."""

    def __call__(self, *_: Any) -> None:
        _show_traceback.set()


def run(main: Callable[[list[str]], None], *, interrupted: str = "run the same command again to resume") -> None:
    """Run a command's `main(argv)`; print an error that a user can fix as one line, and exit with its status.

    Such errors are a `UserError`, a path that the system refuses, a full disk, and too little memory. If the reader
    stops early (`| head`), the command drops further output and carries on. If output cannot be written (a full disk),
    it carries on too, but exits with `Exit.MACHINE`. Any other exception is a defect: its traceback comes first. See
    `deferred_stop` for SIGTERM, SIGHUP, and Ctrl-C.

    Args:
      main: takes the arguments without the program's name.
      interrupted: the message after Ctrl-C.
    """
    startup.imported()
    _show_traceback.clear()
    _handle_signals()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would warn that PyTorch is missing, as it should be
    for stream in (sys.stdout, sys.stderr):  # in an ASCII locale, a table with question marks is better than none
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Orbax and TFDS warn about what they were asked to do. Their errors come as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # of several failed writes, one comes as an exception
    _ignore_closed_loops()
    try:
        with one_line_warnings(), _lasting_output():
            _name_ignored_variables()
            _run(main, interrupted)
    finally:
        _interrupted.set()  # while Python shuts down, Ctrl-C ends it at once


def _ignore_closed_loops() -> None:
    """Keep silent about callbacks of an event loop that has ended.

    After a write that failed, as on a full disk, TensorStore calls back into the loop that Orbax has closed. Nothing
    waits for these calls, and the error itself comes as an exception. Each would print a traceback.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        error = unraisable.exc_value
        if not (isinstance(error, RuntimeError) and str(error) == "Event loop is closed"):
            before(unraisable)

    if getattr(before, "__module__", None) != __name__:  # a process may run several commands
        sys.unraisablehook = hook


def _handle_signals() -> None:
    _stop.clear()
    _interrupted.clear()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGCONT, _note_continuation)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup keeps a command running without its terminal
        signal.signal(signal.SIGHUP, _terminate)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a job in the background keeps ignoring Ctrl-C
        signal.signal(signal.SIGINT, _interrupt)


def _run(main: Callable[[list[str]], None], interrupted: str) -> None:
    try:
        main(sys.argv[1:])
        processes.finish()
    except KeyboardInterrupt:
        _exit_interrupted(interrupted)
    except SystemExit as stop:
        if _interrupted.is_set() and stop.code == Exit.PREEMPTED:
            _exit_interrupted(interrupted)
        if processes.joined():
            processes.leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
        raise
    except Exception as error:
        _report_and_exit(error)


def _exit_interrupted(message: str) -> NoReturn:
    if processes.is_first():
        print(f"interrupted: {message}", file=sys.stderr, flush=True)
    _exit("", Exit.INTERRUPTED)


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


def _lasting(descriptor: int, encoding: str = "utf-8", *, by_line: bool = False) -> io.TextIOWrapper:
    """Return a text stream on a file descriptor that no error of writing interrupts."""
    raw = _Output(descriptor)
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors="replace", line_buffering=by_line or raw.isatty())


@contextmanager
def _lasting_output() -> Iterator[None]:
    """Let no error of standard output or standard error interrupt the block.

    Afterwards exit with `Exit.MACHINE` if standard output could not be written, unless the reader just left.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _lasting_stream(sys.stdout), _lasting_stream(sys.stderr, by_line=True)
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
            sys.exit(Exit.MACHINE)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _lasting_stream(stream: Any, *, by_line: bool = False) -> Any:
    """Return a stream like `stream` that no error of writing interrupts; if it is closed, one that drops everything."""
    if stream is None:  # closed by the parent (`>&-`): the next file that opens may have its number
        return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):  # no file, as in a notebook or a test
        return stream
    stream.flush()
    return _lasting(descriptor, stream.encoding, by_line=by_line)


class _Warnings(logging.Handler):
    """Print the package's log records as every other warning or error: one line on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        print(
            f"{record.levelname.lower()}: {one_line(record.getMessage(), _LONGEST_ERROR)}", file=sys.stderr, flush=True
        )


@contextmanager
def one_line_warnings() -> Iterator[None]:
    """Print the package's own log records, whatever handlers another library gives to the root logger."""
    logger, handler = logging.getLogger("xtransfer"), _Warnings()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _name_ignored_variables() -> None:
    for name in startup.removed_variables():
        log(f"warning: {name} is ignored, because it would change the results")


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


def _report_and_exit(error: Exception) -> NoReturn:
    """Print an error once for all processes, and end them."""
    if processes.joined():
        processes.wait_for_ending()
    known = _as_user_error(error)
    if known is None or _show_traceback.is_set():
        traceback.print_exception(error)
    defect = f"this is a defect of xtransfer, {type(error).__name__}: {error} (please report it with the lines above)"
    line = one_line(str(known or defect), limit=_LONGEST_ERROR)
    print(f"{processes.prefix()}error: {line}", file=sys.stderr, flush=True)
    if _is_lost_connection(error):
        _exit(line, Exit.LOST)
    _exit(line, Exit.DEFECT if known is None else known.exit_status)


def _exit(line: str, status: int) -> NoReturn:
    if processes.joined():
        processes.end(line, status)
    sys.exit(status)


def _as_user_error(error: Exception) -> UserError | None:
    """Return an error that the user can fix as a `UserError`; None for a defect of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.filename is not None:
        return MachineError(f"{error.filename}: {error.strerror}")
    # JAX's own exception class is not imported for this: its errors carry the status by name.
    text = one_line(error, limit=1000)
    if is_disk_full(error):  # TensorStore gives it the same status as too little memory
        return MachineError(
            f"the disk is full ({text[:150]}): free some space and run the same command again; finished work is intact"
        )
    if os.strerror(errno.EMFILE) in text:  # TensorStore gives it that status too
        return MachineError(
            f"too many open files ({text[:150]}): raise the limit with ulimit -n and run the same command again"
        )
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        return MachineError(
            f"out of memory ({text[:150]}): lower the batch size (student.batch_size, evaluation_batch_size, "
            "--batch-size) or max_length, or set student.accumulation, student.remat or mesh.fsdp"
        )
    if text.startswith("Unable to initialize backend"):
        return MachineError(f"{text[:200]}: JAX_PLATFORMS asks for devices that this machine does not have")
    if _is_lost_connection(error):
        return MachineError(
            f"another process has ended or cannot be reached ({text[:60]}…): see the logs of the others"
        )
    return None


def _is_lost_connection(error: Exception) -> bool:
    """Return whether the connection to another process broke, by the error's text: JAX raises no class of its own."""
    if isinstance(error, UserError) or (isinstance(error, OSError) and error.filename is not None):
        return False  # its text holds names that the user chose
    return processes.count() > 1 and _LOST.search(str(error)) is not None


def _terminate(signum: int, frame: Any) -> None:
    """Save and stop, on SIGTERM (preemption) and SIGHUP (the terminal is gone)."""
    again = _stop.is_set()
    _stop.set()
    if processes.joined():
        preemption.request_stop()
    elif not _deferred:
        # Not sys.exit: an exception raised inside a callback of the garbage collector is swallowed.
        _exit_from_handler(Exit.PREEMPTED)
    elif _deferred[-1] and not again:
        _print_from_handler(_deferred[-1])


def _interrupt(signum: int, frame: Any) -> None:
    """Save and stop on the first Ctrl-C, and stop at once on the second."""
    if _interrupted.is_set():
        if processes.joined():
            processes.end("", Exit.INTERRUPTED)
        if any(_deferred):
            _print_from_handler("stopped at once; the work since the last checkpoint is lost")
        _exit_from_handler(Exit.INTERRUPTED)
    _interrupted.set()
    if processes.joined() or not _deferred:
        raise KeyboardInterrupt
    _stop.set()
    if _deferred[-1]:
        _print_from_handler("stopping as soon as the work is saved; press Ctrl-C again to stop at once")


def _note_continuation(signum: int, frame: Any) -> None:
    global _continued
    _continued += 1


def _print_from_handler(line: str) -> None:
    # Not print, which may be running now and cannot be entered twice.
    with contextlib.suppress(OSError):  # a terminal that is gone
        os.write(2, f"{line}\n".encode())


def _exit_from_handler(status: int) -> NoReturn:
    with contextlib.suppress(OSError, RuntimeError):  # the work may be inside this very stream
        sys.stdout.flush()
    os._exit(status)


def stop_status() -> Exit:
    """Return the status with which to exit when a poll of `deferred_stop` says so."""
    return Exit.INTERRUPTED if _interrupted.is_set() else Exit.PREEMPTED


@contextmanager
def deferred_stop(message: str = preemption.SAVING) -> Iterator[Callable[[], bool]]:
    """Defer SIGTERM, SIGHUP, and Ctrl-C inside the block, which polls the yielded function, saves, and exits.

    Outside such a block, SIGTERM and SIGHUP exit at once with `Exit.PREEMPTED`, because everything finished is on the
    disk. With several processes one signal is enough, and all of them stop at the same poll, so they must poll equally
    often. If the signal comes after the last poll, the process exits at the end of the block. A second Ctrl-C ends the
    process at once, and so does the first one in several processes.

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
        raise SystemExit(Exit.PREEMPTED)  # `run` tells Ctrl-C apart


class ProgressBar:
    """The progress of one stage. Call `advance` after each piece of work."""

    def __init__(self, title: str, total: int, unit: str, progress: Progress | None):
        self.title, self.total, self.unit = title, total, unit
        self._progress = progress
        self._task = None if progress is None else progress.add_task(title, total=total, rate="", note="")
        self._started = self._logged = self._advanced = time.monotonic()
        self._done, self._continued = 0.0, _continued

    def advance(self, steps: float = 1, *, note: str = "") -> None:
        """Report that `steps` more of `total` are done."""
        self._done += steps
        processes.note_progress()
        now = time.monotonic()
        if self._continued != _continued:  # the process was stopped since the last call: leave that time out
            self._continued = _continued
            self._started += now - self._advanced
        self._advanced = now
        rate = _rate(self._done / max(now - self._started, 1e-9), self.unit)
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, advance=steps, rate=rate, note=note)
        elif now - self._logged >= _LOG_EVERY_SECONDS or self._done >= self.total:
            self._logged = now
            left = (now - self._started) / self._done * (self.total - self._done)
            log(f"{self.title}: {self._done:,.0f}/{self.total:,} · {rate} · {left:,.0f} s left · {note}".rstrip(" ·"))


def _rate(per_second: float, unit: str) -> str:
    """Return a rate with at least two digits, so that slow steps do not look as if they stood still."""
    digits = 0 if per_second >= 10 else 1 if per_second >= 1 else 2
    return f"{per_second:,.{digits}f} {unit}/s"


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
