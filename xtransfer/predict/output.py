"""The output file, which appears whole or not at all."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from xtransfer.errors import UserError


class Output:
    """A file that takes its name when it is whole: `write`, then `commit`; closed without it, nothing is left.

    Raises:
      UserError: the path exists already, is the input, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, source: Path, *, overwrite: bool):
        self._path = path
        if path.exists():
            if not path.is_file():
                raise UserError(f"{path}: not a file; give another --output")
            if os.path.samefile(path, source):
                raise UserError(f"{path}: is the input; give another --output")
            if not overwrite:
                raise UserError(f"{path}: exists already; give another --output, or --overwrite")
        self._target = Path(os.path.realpath(path))  # a link stays a link
        # One fixed name, so that what a killed process left behind is overwritten and does not pile up.
        self._temporary = self._target.with_name(f".{self._target.name}.tmp")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # Not what a link in a shared directory leads to, and no pipe to wait for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._refusal(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            self._file.close()
            raise self._refusal(error) from error
        if not mine:
            self._file.close()
            raise UserError(f"{path}: another process is writing it; wait, or give another --output")
        self._file.truncate(0)

    def write(self, lines: Iterator[str]) -> None:
        """Adds lines; a full disk is a UserError."""
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            raise self._refusal(error) from error

    def commit(self) -> None:
        """Gives the file its name; it is on the disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._target)
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Removes what has not been committed."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat()):
                    self._temporary.unlink()
            with contextlib.suppress(OSError):  # what a full disk did not take is written again by closing
                self._file.close()

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written: {error.strerror or error}")
