"""The output file, which appears complete or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

from xtransfer import storage
from xtransfer.errors import ConfigError


class Output:
    """The file of predictions, written under a temporary name until `commit`. Closing it before that removes it.

    Raises:
      UserError: the path exists, is the input, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, source: Path, *, overwrite: bool):
        if path.exists():
            if not path.is_file():
                raise ConfigError(f"{path}: not a file; choose another --output")
            if os.path.samefile(path, source):
                raise ConfigError(f"{path} is the input; choose another --output")
            if not overwrite:
                raise ConfigError(f"{path} already exists; choose another --output, or pass --overwrite")
        self._file = storage.AtomicFile(path, exclusive=True)

    def write(self, lines: Iterator[str]) -> None:
        """Append lines. Raise a UserError if the disk is full."""
        self._file.write("".join(lines).encode("utf-8"))

    def commit(self) -> None:
        """Flush the file to disk and give it its final name."""
        self._file.commit()

    def close(self) -> None:
        """Remove the temporary file unless it was committed."""
        self._file.close()
