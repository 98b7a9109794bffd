"""Write the data of a TFDS builder once, completely or not at all, even beside other processes."""

import contextlib
import io
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from xtransfer.errors import UserError, one_line
from xtransfer.runtime import locks, terminal

_Builder = TypeVar("_Builder", bound=Any)


def find_or_write(
    root: Path, name: str, find: Callable[[], _Builder | None], write: Callable[[], _Builder]
) -> _Builder:
    """Return a builder whose data exist, from `find` or else from `write`.

    One process writes, and others with the same name wait for it. If the data exist, nothing is written, so `root`
    may be read-only.

    Raises:
      UserError: `root` cannot be written.
    """
    builder = find()
    if builder is None:
        with _writable(root), locks.directory_lock(root, name, wait=True):
            builder = find() or write()  # another process may have written the data by now
    return builder


def write(new: Callable[[Callable[[str], None]], _Builder], root: Path) -> _Builder:
    """Write a builder's data, replacing what a killed process left. The caller holds the lock.

    Args:
      new: creates the builder, given a function that logs a line while everything else is silent.
      root: the directory, for errors.

    Raises:
      UserError: the data cannot be written; or whatever the builder's rows raise.
    """
    with _writable(root), quiet() as log_line:
        builder = new(log_line)
        for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        builder.download_and_prepare()
    return builder


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises RuntimeError for any failure of the file system
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{root} cannot be written: {reason}") from error


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
