"""Writes what a TFDS builder makes: once, beside other processes, and whole or not at all."""

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


def prepared(root: Path, name: str, find: Callable[[], _Builder | None], write: Callable[[], _Builder]) -> _Builder:
    """A builder whose data are there: as `find` finds them, else as `write` writes them.

    One process writes, others that want the same name wait for it. Where the data are there nothing is written, so
    `root` may be read-only.

    Raises:
      UserError: `root` cannot be written.
    """
    builder = find()
    if builder is None:
        with _writable(root), locks.directory_lock(root, name, wait=True):
            builder = find() or write()  # another process may have written them by now
    return builder


def write(new: Callable[[Callable[[str], None]], _Builder], root: Path) -> _Builder:
    """Writes a builder's data, in place of what a killed process left; the caller holds the lock.

    Args:
      new: makes the builder, with what logs a line while all else is silent.
      root: for errors.

    Raises:
      UserError: they cannot be written, or whatever the builder's rows raise.
    """
    with _writable(root), quiet() as say:
        builder = new(say)
        for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        builder.download_and_prepare()
    return builder


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:  # array_record raises the latter, whatever the operating system said
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{root} cannot be written: {reason}") from error


@contextmanager
def quiet() -> Iterator[Callable[[str], None]]:
    """TFDS shows bars of its own, says "downloading" though nothing is, and warns of a folder yet to be filled.

    Yields:
      What logs a line for people all the same.
    """
    heard = sys.stdout

    def say(message: str) -> None:
        with contextlib.redirect_stdout(heard):
            terminal.log(message)

    logger = logging.getLogger("absl")
    level, handlers = logger.level, list(logging.root.handlers)
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield say
    finally:
        logger.setLevel(level)
        # The first warning of all adds a handler, which would go on writing to where nobody reads.
        logging.root.handlers[:] = handlers
