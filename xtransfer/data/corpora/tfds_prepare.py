"""Write the data of a TFDS builder once, completely or not at all, even beside other processes.

Beside TFDS's own files, `checksums.json` lists them. Damaged data are written again.
"""

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from xtransfer.errors import MachineError, UserError, one_line
from xtransfer.runtime import checksums, locks, terminal

_log = logging.getLogger(__name__)

_Builder = TypeVar("_Builder", bound=Any)


def find_or_write(
    root: Path, name: str, data: Path, find: Callable[[], _Builder | None], write: Callable[[], _Builder]
) -> _Builder:
    """Return a builder whose data exist and are whole, from `find` or else from `write`.

    One process writes, and others with the same name wait for it. If the data exist, nothing is written, so `root`
    may be read-only.

    Args:
      root: the directory of the lock.
      name: the name of the lock.
      data: the directory of the data, below `root`.
      find: returns the builder; None if the data do not exist.
      write: writes the data and returns their builder.

    Raises:
      UserError: `root` cannot be written.
    """
    builder = _find_whole(data, find)
    if builder is None:
        with _writable(root), locks.directory_lock(root, name, wait=True):
            # Another process may have written the data by now.
            builder = _find_whole(data, find, warn=True) or write()
    return builder


def _find_whole(data: Path, find: Callable[[], _Builder | None], *, warn: bool = False) -> _Builder | None:
    """Return the builder from `find`; None if the data do not exist or are damaged."""
    fault = checksums.fault_below(data)
    if fault is None:
        try:
            return find()
        except (UserError, PermissionError):
            raise
        except Exception as error:  # TFDS raises many kinds for a file that is not as it wrote it
            fault = one_line(error)
    if warn:
        _log.warning("%s is damaged, so preparing these data again: %s", data, fault)
    return None


def write(new: Callable[[Callable[[str], None]], _Builder], root: Path, data: Path) -> _Builder:
    """Write a builder's data, replacing damaged data and what a killed process left. The caller holds the lock.

    Args:
      new: creates the builder, given a function that logs a line while everything else is silent.
      root: the directory, for errors.
      data: the directory of the data, as TFDS names it.

    Raises:
      UserError: the data cannot be written; or whatever the builder's rows raise.
    """
    with _writable(root), quiet() as log_line:
        if data.is_dir():  # in one step, so that a kill leaves no half of it under this name
            data.replace(data.with_name("incomplete.damaged"))
        builder = new(log_line)
        for leftover in data.parent.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        builder.download_and_prepare()
        checksums.write_all(data)
    return builder


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError for any failure of the file system
        reason = getattr(error, "strerror", None) or one_line(error)
        raise MachineError(f"{root} cannot be written: {reason}") from error


@contextmanager
def quiet() -> Iterator[Callable[[str], None]]:
    """Silence TFDS, which has progress bars of its own, says "downloading" without downloading, and warns needlessly.

    Yields:
      A function that logs a line for people anyway.
    """
    stdout = sys.stdout

    def log_line(message: str) -> None:
        with contextlib.redirect_stdout(stdout):
            terminal.log(message)

    logger = logging.getLogger("absl")
    level, handlers = logger.level, list(logging.root.handlers)
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield log_line
    finally:
        logger.setLevel(level)
        # The first warning adds a handler, which would keep writing to a stream that nobody reads.
        logging.root.handlers[:] = handlers
