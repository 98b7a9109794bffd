"""Keeps TFDS silent, which has bars and messages of its own."""

import contextlib
import io
import logging
import sys
from collections.abc import Callable, Iterator

from xtransfer.runtime import terminal


@contextlib.contextmanager
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
