"""Atomic files and directories, digests, and strict JSON."""

import collections
import contextlib
import fcntl
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from xtransfer.errors import BusyError, CheckpointError, MachineError

LARGEST_FILE = 256 << 20  # bytes of a JSON object or a vocabulary; those of the hub have up to 35 MB
_LFS_POINTER = b"version https://git-lfs"
_ROWS = 4096  # rows of JSON lines that are written at once
_BLOCK = 1 << 16  # bytes read at once from the end of a file


class AtomicFile:
    """A file that takes its name when it is complete: `write`, then `commit`. Without `commit` it leaves nothing.

    The data go to a hidden file beside it, which replaces the target in one step. A reader sees the old content or the
    new one, never half of it.

    Args:
      path: the target. Its directory is created. A symbolic link stays, and its target is replaced.
      exclusive: refuse to write while another process writes the same file.
      unique: give each process a hidden file of its own, so that several may write, and the last one wins. Otherwise
        the hidden file has a fixed name: one that a killed process left is overwritten, and a second writer waits for
        the first.

    Raises:
      UserError: from every method, naming the path, when the file system refuses.
    """

    def __init__(self, path: Path, *, exclusive: bool = False, unique: bool = False):
        self.path = path
        self._target = Path(os.path.realpath(path))
        suffix = f".{os.getpid()}" if unique else ""
        self.temporary = self._target.with_name(f".{self._target.name}{suffix}.tmp")
        with self._naming_the_path():
            self._target.parent.mkdir(parents=True, exist_ok=True)
            while True:
                # Never follow a link that somebody put there, and never wait for a pipe's reader.
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
                # Unbuffered, so that closing it after a failed write does not fail once more.
                self._file = os.fdopen(os.open(self.temporary, flags, 0o666), "ab", buffering=0)
                try:
                    is_mine = unique or self._lock(wait=not exclusive)
                    if exclusive and not is_mine:
                        raise BusyError(f"{path}: another process is writing it; wait, or choose another name")
                    if is_mine:
                        self._file.truncate(0)
                        return
                except BaseException:
                    self._file.close()
                    raise
                self._file.close()

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def write(self, data: bytes) -> None:
        """Append data."""
        with self._naming_the_path():
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]

    def restart(self) -> None:
        """Discard everything written so far."""
        with self._naming_the_path():
            self._file.truncate(0)

    def commit(self) -> None:
        """Give the file its name; it is on the disk when this returns."""
        with self._naming_the_path():
            os.fsync(self._file.fileno())
            os.replace(self.temporary, self._target)
            _sync_directory(self._target.parent)

    def close(self) -> None:
        """Remove the hidden file unless it was committed."""
        if self._file.closed:
            return
        with contextlib.suppress(OSError):
            if self._is_in_place():
                self.temporary.unlink()
        self._file.close()

    def _lock(self, *, wait: bool) -> bool:
        """Lock the hidden file; return False if it has another owner, or if the last one renamed or removed it."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # no locks on this file system
            if not wait:
                raise
        try:
            return self._is_in_place()
        except FileNotFoundError:
            return False

    def _is_in_place(self) -> bool:
        return os.path.samestat(os.fstat(self._file.fileno()), self.temporary.stat())

    @contextlib.contextmanager
    def _naming_the_path(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MachineError(f"{self.path} cannot be written: {error.strerror or error}") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, creating its directory, so that a reader finds the whole content or the previous one.

    Raises:
      UserError: the file system refuses; the message names the path.
    """
    with AtomicFile(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)
        file.commit()


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file as `write_atomically` does, from pieces that need not fit into memory together."""
    with AtomicFile(path) as file:
        for piece in pieces:
            file.write(piece)
        file.commit()


def check_creatable(path: Path) -> None:
    """Create the directory of a file or directory that a long computation will write, and test that it can be written.

    Raises:
      UserError: the file system refuses; the message names the path.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            path.lstat()  # refuses a name that is too long
        with tempfile.TemporaryFile(dir=path.parent):  # without a name, so that a killed process leaves nothing
            pass
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror or error}") from error


@contextlib.contextmanager
def atomic_directory(path: Path, *, locked: bool = False) -> Iterator[Path]:
    """Yield a hidden directory that takes the name `path` when the block ends without an error, or is removed.

    A killed process leaves its hidden directory behind. The next one to write the same path removes it.

    Args:
      path: the target, which must not exist or be empty at the end of the block. Its parent is created.
      locked: the caller holds a lock on the parent, so any other hidden directory in it was left by a killed process
        and is removed.

    Raises:
      OSError: the file system refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if locked:
        for leftover in path.parent.glob(".*.tmp"):
            if leftover.is_dir():  # a file is somebody else's
                shutil.rmtree(leftover)
    _remove_abandoned(path)
    temporary, lock = _hidden_directory(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _hidden_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _hidden_directory(path: Path) -> tuple[Path, int]:
    """Create a hidden directory for the target `path`; return it, and the descriptor that holds its lock."""
    while True:
        temporary = _hidden_name(path)
        temporary.mkdir()
        with contextlib.suppress(FileNotFoundError):  # another process found it before it was locked, and removed it
            lock = os.open(temporary, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), temporary.stat()):
                    return temporary, lock
            except BlockingIOError:  # it is being removed
                pass
            except FileNotFoundError:
                os.close(lock)
                raise
            except OSError:  # no locks on this file system, so nobody removes it
                return temporary, lock
            os.close(lock)


def _remove_abandoned(path: Path) -> None:
    """Remove the hidden directories for the target `path` whose processes are dead: they hold no lock any more."""
    hidden = re.compile(rf"\.{re.escape(path.name)}\.[0-9a-f]+\.tmp")
    with contextlib.suppress(OSError):
        for leftover in [entry for entry in path.parent.iterdir() if hidden.fullmatch(entry.name)]:
            with contextlib.suppress(OSError):
                _remove_unlocked(leftover, _hidden_name(path))


def _remove_unlocked(directory: Path, doomed: Path) -> None:
    """Rename a directory to `doomed` and remove it; raise an OSError if a process has it locked or it has no locks."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(directory, doomed)  # first, so that its process could not give its name to half of it
        shutil.rmtree(doomed, ignore_errors=True)
    finally:
        os.close(lock)


def sha256(path: Path) -> str:
    """Return the hex digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines, atomically; NaN and infinities raise a ValueError."""
    write_pieces(path, jsonl(rows))


def jsonl(rows: Iterable[Mapping[str, Any]]) -> Iterator[bytes]:
    """Yield rows as JSON lines in UTF-8, some thousand at a time; NaN and infinities raise a ValueError."""
    iterator = iter(rows)
    while group := list(itertools.islice(iterator, _ROWS)):
        yield "".join(map(_line, group)).encode()


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Append one row and wait until it is on the disk; a full disk raises a UserError.

    If the last line is incomplete, because its writer was killed or the disk was full, the row replaces it.
    """
    try:
        with path.open("a+b") as file:
            end = _end_of_lines(file)
            if end < file.seek(0, os.SEEK_END):
                file.truncate(end)
            file.write(_line(row).encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MachineError(f"{path} cannot be written: {error.strerror or error}") from error


def read_json(text: str) -> Any:
    """Parse strict JSON: no NaN or infinity, not even by overflow, and no key twice in an object.

    Raises:
      ValueError: says what is wrong; the caller adds the file and line.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def refuse_lfs_pointer(path: Path) -> None:
    """Raise a UserError if Git LFS has left a pointer in place of the file's content."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise CheckpointError(
                f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
            )


def refuse_size(path: Path) -> None:
    """Raise a UserError for a file that is too large to be what its name says, so that it does not fill the memory."""
    with contextlib.suppress(OSError):
        if path.stat().st_size > LARGEST_FILE:
            raise CheckpointError(f"{path}: over {LARGEST_FILE >> 20} MiB, so this is no such file: replace it")


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read the JSON object in a file strictly; anything else raises a UserError that ends with the remedy."""
    refuse_size(path)
    try:
        value = read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error}): {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}: {remedy}")
    return value


def _end_of_lines(file: BinaryIO) -> int:
    """Return the position after the last complete line of a file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - _BLOCK)
        file.seek(start)
        position = file.read(end - start).rfind(b"\n")
        if position >= 0:
            return start + position + 1
        end = start
    return 0


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        repeated = next(name for name, count in counts.items() if count > 1)
        raise ValueError(f"the key {repeated!r} occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large a number")
    return value


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
