"""Locks that keep a second run out of a directory, on this machine and on others that share it.

    <directory>/.<purpose>.lock    first line: the owner, as JSON; second line: its heartbeat, which counts up

Two things say whether an owner is alive.

- The operating system's lock (flock) ends with its process, however that ends. All processes of one kernel see it,
  whatever their containers. So on one machine it decides at once, together with the owner's process id and start time,
  which also hold on a file system without flock.
- Other machines may not see that lock, because some network file systems keep it to each client. So the owner counts up
  the second line every `HEARTBEAT_SECONDS`, and a process on another machine watches the file. If it changes, the owner
  is alive. If it stays the same for `WATCH_SECONDS`, which is six beats, the owner is dead, and its lock is taken over.
  No clocks are compared, so they may differ.

A machine is its host name and the id of its boot. After a restart, or in another container of the same name, the
owner's process id says nothing. A copied or restored directory may contain a lock file that nobody renews.

An owner that was suspended for long may find at its next beat that its lock was taken over. It then ends its process,
because two runs must never write to one directory.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from xtransfer import storage
from xtransfer.errors import BusyError, Exit, MachineError, one_line
from xtransfer.runtime import processes, terminal

HEARTBEAT_SECONDS = 5.0
WATCH_SECONDS = 30.0

_LOOK_SECONDS = 0.2
_LONGEST_COMMAND = 150  # characters
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_MARK = ".processes"  # a file that process 0 leaves for the others to find
_SETTLE_SECONDS = 1.0  # after which whoever took over a lock at the same time has written it
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
            raise MachineError(
                f"{directory} is not the directory that process 0 writes to: the workdir must be on storage that all "
                "processes share"
            )
        time.sleep(0.2)


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
      host: its host name.
      boot: the id of its kernel's boot; "" if the system has none.
      namespace: the id of its process namespace, in which `pid` counts; "" if the system has none.
      pid: its process id.
      started: its start, in clock ticks since the boot; "" if the system does not say.
      command: its command line, shortened.
      since: the time, in UTC, at which it took the lock, by its own clock; for people.
      nonce: different each time a lock is taken.
    """

    host: str
    boot: str
    namespace: str
    pid: int
    started: str
    command: str
    since: str
    nonce: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since} ({self.command})"

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return (self.host, self.boot) == (socket.gethostname(), _boot_id())


def _this_process() -> Owner:
    return Owner(
        host=socket.gethostname(),
        boot=_boot_id(),
        namespace=_namespace(),
        pid=os.getpid(),
        started=_start_time(os.getpid()) or "",
        command=one_line(" ".join(sys.orig_argv), _LONGEST_COMMAND),
        since=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        nonce=uuid.uuid4().hex,
    )


@contextmanager
def directory_lock(directory: Path, purpose: str = "run", *, wait: bool = False) -> Iterator[None]:
    """Hold a directory for one process per purpose.

    A killed run leaves no lock that its own machine respects. On another machine, taking over its lock takes
    `WATCH_SECONDS`.

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
        raise MachineError(f"{directory} cannot be written to: {error.strerror}; choose another directory") from error
    with file:
        owner = None
        while owner is None:
            owner = _take(file, path, wait)
        lease = _Lease(path, owner)
        try:
            yield
        finally:
            lease.end()


def is_held(directory: Path, purpose: str = "run") -> bool:
    """Return whether a live process holds a directory for a purpose, without taking the lock.

    For an owner on another machine, this takes until its next beat, or `WATCH_SECONDS` if it is dead.
    """
    path = directory / f".{purpose}.lock"
    owner, content = _read(path)
    if owner is None:
        return False
    lives = _lives_here(owner, flocked=False) if owner.is_here else None
    return _beats(path, content) if lives is None else lives


def _take(file: TextIO, path: Path, wait: bool) -> Owner | None:
    """Become the owner once nobody else holds the lock; return None if another process became the owner meanwhile.

    Where locks of the operating system count on one machine only, two machines may take over a dead one's lock at
    once. The last to write has it.
    """
    was_taken_over = _acquire(file, path, wait)
    owner = _this_process()
    try:
        _write(path, owner, 0)
    except OSError as error:
        raise MachineError(
            f"{path} cannot be written: {error.strerror}; free some space, or choose another disk"
        ) from error
    if not was_taken_over:
        return owner
    time.sleep(_SETTLE_SECONDS)
    winner = _read(path)[0]
    if winner == owner:
        return owner
    if winner is not None and not wait:
        raise BusyError(f"{path.parent} is in use by {winner}; wait, or choose another directory")
    return None


def _acquire(file: TextIO, path: Path, wait: bool) -> bool:
    """Return once nobody else holds the lock, and whether it is a dead one of another machine.

    A UserError names the owner unless `wait`.
    """
    watched = ""  # the nonce of the owner on another machine that was announced
    while True:
        flocked = _flock(file, path)
        owner, content = _read(path)
        if flocked is not False:
            if owner is None:
                return False
            is_elsewhere = False
            lives = _lives_here(owner, bool(flocked)) if owner.is_here else None
            if lives is None:
                if owner.nonce != watched:
                    terminal.log(f"{path}: left by {owner}; watching it for up to {WATCH_SECONDS:g} s")
                watched, lives = owner.nonce, _beats(path, content)
                is_elsewhere = not lives
                if not lives:
                    terminal.log(f"{path}: no sign of life in {WATCH_SECONDS:g} s, so taking over the lock")
            if not lives:
                return is_elsewhere
        if not wait:
            name = owner or f"process {content.strip() or 'unknown'}"
            raise BusyError(f"{path.parent} is in use by {name}; wait, or choose another directory")
        if flocked:
            fcntl.flock(file, fcntl.LOCK_UN)
        processes.note_progress()
        time.sleep(_LOOK_SECONDS)


def _flock(file: TextIO, path: Path) -> bool | None:
    """Return whether the operating system's lock was taken; None if the file system has no such locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_FLOCK:
            return None
        raise MachineError(f"{path} cannot be locked: {error.strerror}; choose a directory on another disk") from error
    return True


def _lives_here(owner: Owner, flocked: bool) -> bool | None:
    """Return whether an owner on this machine is alive; None if this process cannot tell.

    Args:
      owner: the owner.
      flocked: whether this process has the operating system's lock, which the owner then has lost.
    """
    me = _this_process()
    if owner.namespace != me.namespace:  # another container, whose process ids are others
        return False if flocked else None
    if (owner.pid, owner.started) == (me.pid, me.started):
        return not flocked
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it exists, and belongs to another user
    started = _start_time(owner.pid)
    if started is None:  # a zombie, or a process that this one may not see
        return False if flocked else None
    return started == owner.started


def _beats(path: Path, content: str) -> bool:
    """Watch the lock file of an owner on another machine, and return whether it changes and has an owner then."""
    end = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < end:
        processes.note_progress()
        time.sleep(_LOOK_SECONDS)
        if _read(path)[1] != content:
            return _read(path)[0] is not None
    return False


def _read(path: Path) -> tuple[Owner | None, str]:
    """Return the owner in a lock file, None without one, and the file's content.

    The file is opened anew each time, because a network file system then asks the server.
    """
    try:
        content = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, ""
    try:
        fields = json.loads(content.partition("\n")[0])
        owner = Owner(**{field.name: fields[field.name] for field in dataclasses.fields(Owner)})
    except (ValueError, TypeError, KeyError):  # released, or written by an older version
        return None, content
    return (owner, content) if isinstance(owner.pid, int) and owner.pid > 0 else (None, content)


def _write(path: Path, owner: Owner, beat: int) -> None:
    """Write a lock file in place, so that it is never empty and needs no more space than before."""
    data = f"{json.dumps(dataclasses.asdict(owner))}\n{beat:012d}\n".encode()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        os.pwrite(handle, data, 0)
        os.ftruncate(handle, len(data))
    finally:
        os.close(handle)


class _Lease:
    """The heartbeat of a lock, in a thread that ends with the lock and keeps no process alive."""

    def __init__(self, path: Path, owner: Owner):
        self._path, self._owner = path, owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lock heartbeat", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """Stop the heartbeat, then give up the lock. Nothing is written after this."""
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(OSError):
            if _read(self._path)[0] == self._owner:
                os.truncate(self._path, 0)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(HEARTBEAT_SECONDS):
            beat += 1
            owner = _read(self._path)[0]
            if owner is not None and owner != self._owner:
                self._end_process(owner)
                return
            with contextlib.suppress(OSError):  # a full disk, or a directory that was removed
                _write(self._path, self._owner, beat)

    def _end_process(self, owner: Owner) -> None:
        message = f"{self._path.parent} was taken over by {owner}; this process ends: wait for that one to finish"
        with contextlib.suppress(OSError):
            print(f"{processes.prefix()}error: {message}", file=sys.stderr, flush=True)
        processes.end(message, Exit.BUSY)


@functools.cache
def _boot_id() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _namespace() -> str:
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _start_time(pid: int) -> str | None:
    """Return the start of a process in clock ticks since the boot; None if it is not seen or a zombie.

    Without /proc, as on macOS, the start of every process is "".
    """
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()  # a command may contain anything
    except OSError:
        return None
    state, started = fields[0], fields[19]
    return None if state in "ZXx" else started
