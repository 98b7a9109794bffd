"""Entries of a cache on disk: each is a directory with the files of one result, named by a hash of what decides it.

    <directory>/<hash of the key>/manifest.json   the key, and the size and sha256 of each file
                                  …               the files

An entry is never stale, and any entry may be deleted. It exists completely or not at all, and a damaged one is
replaced.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

from xtransfer import storage
from xtransfer.errors import MachineError
from xtransfer.runtime import checksums
from xtransfer.runtime.locks import directory_lock

T = TypeVar("T")

_log = logging.getLogger(__name__)


class Entry(Generic[T]):
    """One entry of a cache, which may not exist yet.

    Args:
      directory: holds the entries of the cache.
      key: everything that decides the result, which JSON can hold.
      files: its files by their names in the manifest.
      read: returns the result from the entry's directory. It raises an OSError, ValueError, KeyError, or TypeError if
        a file is damaged.
      content: what the entry holds, for errors, such as "tokens".
      work: what makes it, for messages, such as "tokenizing the texts".
      lock: the name of the lock under which it is made.
    """

    def __init__(
        self,
        directory: Path,
        key: Mapping[str, Any],
        files: Mapping[str, str],
        read: Callable[[Path], T],
        *,
        content: str,
        work: str,
        lock: str,
    ) -> None:
        encoded = json.dumps(key, sort_keys=True)
        self.key = json.loads(encoded)  # as a manifest gives it
        self.path = directory / hashlib.sha256(encoded.encode()).hexdigest()[:16]
        self._files, self._read = files, read
        self._content, self._work, self._lock = content, work, lock

    def get(self, write: Callable[[], None]) -> T:
        """Return the result, or make it first. A second process waits for the one that makes it, and reads that.

        Args:
          write: makes the result, in a block of `written`.

        Raises:
          UserError: from `write`; or the disk gives back something else than was written.
        """
        result = self._found()
        if result is None:
            # One lock for all entries, because the work takes all cores. Its holder knows that nobody is writing.
            with directory_lock(self.path.parent, self._lock, wait=True):
                result = self._found(warn=True)
                if result is None:
                    write()
                    result = self._found(warn=True)
            if result is None:
                raise MachineError(
                    f"{self.path}: the {self._content} written there cannot be read again: the disk is failing"
                )
        return result

    @contextlib.contextmanager
    def written(self) -> Iterator[Path]:
        """Yield a hidden directory for the files. At the end of the block it becomes the entry."""
        with contextlib.ExitStack() as stack:
            with self.disk_errors():
                temporary = stack.enter_context(storage.atomic_directory(self.path, locked=True))
            yield temporary
            with self.disk_errors():
                facts = {name: checksums.facts(temporary / file) for name, file in self._files.items()}
                manifest = {"key": self.key, "files": facts}
                storage.write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
                if os.path.lexists(self.path):  # it is damaged, or it would have been read
                    is_directory = self.path.is_dir() and not self.path.is_symlink()
                    shutil.rmtree(self.path) if is_directory else self.path.unlink()
                stack.close()  # gives the directory its name

    @contextlib.contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Turn a failure of the disk into a UserError that names the entry."""
        try:
            yield
        except OSError as error:
            # Arrow's own words name neither the file nor the reason first.
            reason = os.strerror(error.errno) if error.errno else error
            raise MachineError(
                f"{self.path}: the {self._content} cannot be written: {reason}; free some space, or choose another "
                "task.cache_dir"
            ) from error

    def _found(self, *, warn: bool = False) -> T | None:
        """Return the result from the disk; None if it is not there or damaged."""
        if not self.path.exists():
            return None
        try:
            manifest = storage.read_json((self.path / "manifest.json").read_text(encoding="utf-8"))
            if manifest["key"] != self.key:
                raise ValueError(f"the manifest belongs to other {self._content}")
            for name, file in self._files.items():
                fault = checksums.fault(self.path / file, manifest["files"][name])
                if fault is not None:
                    raise ValueError(fault)
            return self._read(self.path)
        except (OSError, ValueError, KeyError, TypeError) as error:
            if warn:
                _log.warning("%s: damaged, so %s again: %s", self.path, self._work, error)
            return None
