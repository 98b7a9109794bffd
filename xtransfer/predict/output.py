"""The output file, which appears complete or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

from xtransfer import storage
from xtransfer.errors import UserError


class Output:
    """A file that takes its name when it is complete: `write`, then `commit`. Closed before that, it leaves nothing.

    Raises:
      UserError: the path exists, is the input, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, source: Path, *, overwrite: bool):
        if path.exists():
            if not path.is_file():
                raise UserError(f"{path}: not a file; choose another --output")
            if os.path.samefile(path, source):
                raise UserError(f"{path} is the input; choose another --output")
            if not overwrite:
                raise UserError(f"{path} already exists; choose another --output, or pass --overwrite")
        self._file = storage.AtomicFile(path, exclusive=True)

    def write(self, lines: Iterator[str]) -> None:
        """Add lines; a full disk is a UserError."""
        self._file.write("".join(lines).encode("utf-8"))

    def commit(self) -> None:
        """Give the file its name; it is on the disk when this returns."""
        self._file.commit()

    def close(self) -> None:
        """Remove what has not been committed."""
        self._file.close()
