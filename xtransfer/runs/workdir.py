"""The places of a workdir, what is on record there, and the lock that keeps a second run out."""

import dataclasses
import fcntl
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer import config as settings
from xtransfer.runtime import processes
from xtransfer import storage
from xtransfer.config import ExperimentConfig
from xtransfer.errors import UserError

_MARK = ".processes"  # what the first of many processes leaves, for the others to find
_MARK_SECONDS = 15.0


@dataclass(frozen=True)
class Workdir:
    """Where everything of one experiment lies, below `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.json"

    @property
    def task(self) -> Path:
        """What the experiment is made from: the task's name and labels, fingerprints of data and checkpoints."""
        return self.root / "task.json"

    @property
    def teacher(self) -> Path:
        """The monolingual teacher's run."""
        return self.root / "teacher"

    @property
    def logits(self) -> Path:
        """All logits stores."""
        return self.root / "logits"

    @property
    def results(self) -> Path:
        """One row per checkpoint × language × split × metric."""
        return self.root / "results.jsonl"

    def student(self, objective: str, seed: int) -> Path:
        """One student's run."""
        return self.root / "students" / objective / f"seed-{seed}"

    def predictions(self, run: Path, step: int, split: str, language: str) -> Path:
        """What one checkpoint said of one language's split."""
        return self.root / "predictions" / run.relative_to(self.root) / str(step) / f"{split}-{language}.jsonl"


def read_config(workdir: Workdir) -> ExperimentConfig:
    """The config that the workdir was made with."""
    if not workdir.config.is_file():
        raise UserError(f"{workdir.root}: no config.json, so no experiment has been started in this workdir")
    return settings.parse(_read(workdir.config))


def as_record(config: Any) -> dict[str, Any]:
    """A config as it is written and compared."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def check_unchanged(path: Path, facts: Mapping[str, Any]) -> None:
    """Refuses to go on with what was begun with other facts than those on record; the error names the difference."""
    if not path.exists():
        return
    changed = settings.differences(_read(path), facts)
    if changed:
        raise UserError(
            f"{path.parent} was made with something else ({'; '.join(changed)}): choose another directory, "
            "or start again with what is on record"
        )


def record(path: Path, facts: Mapping[str, Any]) -> None:
    """Puts facts on record; where they stand there already, nothing is written.

    Of many processes the first writes, and the others see that they know the same facts.
    """
    processes.first(lambda: _record(path, facts))
    if not processes.is_first():
        check_unchanged(path, facts)


def _record(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        storage.write_whole(path, text)


def _read(path: Path) -> dict[str, Any]:
    return storage.read_object(path, "choose another directory")


@contextmanager
def held(directory: Path, purpose: str = "run", *, wait: bool = False) -> Iterator[None]:
    """`locked` for a group of processes: the first holds the lock, and all see that they share the directory."""
    with ExitStack() as stack:

        def take() -> str:
            stack.enter_context(locked(directory, purpose, wait=wait))
            mark = uuid.uuid4().hex if processes.count() > 1 else ""
            if mark:
                storage.write_whole(directory / _MARK, mark)
            return mark

        mark = processes.first(take)
        if mark and not processes.is_first():
            _check_shared(directory, mark)
        yield


def _check_shared(directory: Path, mark: str) -> None:
    """UserError where the first process's mark cannot be read; a network's file system may show it late."""
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
def locked(directory: Path, purpose: str = "run", *, wait: bool = False) -> Iterator[None]:
    """Holds a directory for one process per purpose; a second one waits, or is refused with the first one's number.

    The lock is the operating system's, so a killed run leaves none behind.
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
            os.write(file.fileno(), f"{os.getpid()}\n".encode())  # not buffered: closing would fail once more
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}; make room, or choose another disk") from error
        yield
