"""Locks that keep a second run out of a directory."""

import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.runtime import processes

_MARK = ".processes"  # a file that process 0 leaves for the others to find
_MARK_SECONDS = 15.0


@contextmanager
def group_lock(directory: Path, purpose: str = "run", *, wait: bool = False) -> Iterator[None]:
    """Hold a `directory_lock` for a group of processes: process 0 takes it, and all check that they share it."""
    with ExitStack() as stack:

        def take() -> str:
            stack.enter_context(directory_lock(directory, purpose, wait=wait))
            mark = uuid.uuid4().hex if processes.count() > 1 else ""
            if mark:
                storage.write_atomically(directory / _MARK, mark)
            return mark

        mark = processes.on_first(take)
        if mark and not processes.is_first():
            _check_shared(directory, mark)
        yield


def _check_shared(directory: Path, mark: str) -> None:
    """Raise a UserError if process 0's mark cannot be read. A network file system may show it late."""
    end = time.monotonic() + _MARK_SECONDS
    while True:
        try:
            if (directory / _MARK).read_text() == mark:
                return
        except OSError:
            pass
        if time.monotonic() >= end:
            raise UserError(
                f"{directory} is not the directory that process 0 writes to: the workdir must be on storage that all "
                "processes share"
            )
        time.sleep(0.2)


@contextmanager
def directory_lock(directory: Path, purpose: str = "run", *, wait: bool = False) -> Iterator[None]:
    """Hold a directory for one process per purpose.

    The lock is the operating system's, so a killed run leaves none behind.

    Args:
      directory: created if it does not exist.
      purpose: several processes may hold the directory for different purposes.
      wait: wait for the owner to finish; otherwise refuse.

    Raises:
      UserError: another process holds the directory (it is named), or the directory cannot be written to.
    """
    path = directory / f".{purpose}.lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{directory} cannot be written to: {error.strerror}; choose another directory") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"{directory} is in use by process {owner}; wait, or choose another directory") from error
        except OSError as error:
            raise UserError(f"{path} cannot be locked: {error.strerror}; choose a directory on another disk") from error
        try:
            os.ftruncate(file.fileno(), 0)  # in append mode the next write goes to the start
            os.write(file.fileno(), f"{os.getpid()}\n".encode())  # unbuffered: closing would fail once more
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; free some space, or choose another disk"
            ) from error
        yield
