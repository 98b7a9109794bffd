"""The places of a workdir, its config on record, and the lock that keeps a second run out."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer import config as settings
from xtransfer.config import ExperimentConfig
from xtransfer.errors import UserError


@dataclass(frozen=True)
class Workdir:
    """Where everything of one experiment lies, below `root`."""

    root: Path

    @property
    def config(self) -> Path:
        """The resolved config."""
        return self.root / "config.json"

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


def record_config(path: Path, config: Any) -> None:
    """Writes a config beside what it makes, or refuses where that was begun with settings that differ."""
    text = settings.to_json(config)
    if path.exists():
        changed = settings.differences(_read(path), json.loads(text))
        if changed:
            raise UserError(
                f"{path.parent} was made with another config ({'; '.join(changed)}): choose another directory, "
                "or start again with the recorded settings"
            )
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): choose another directory") from error


@contextmanager
def locked(workdir: Workdir, purpose: str = "run") -> Iterator[None]:
    """Holds the workdir for one process per purpose; a second is refused with the first one's process number.

    The lock is the operating system's, so a killed run leaves none behind.
    """
    path = workdir.root / f".{purpose}.lock"
    try:
        workdir.root.mkdir(parents=True, exist_ok=True)
        file = path.open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(f"workdir {workdir.root} cannot be written to: {error.strerror}; choose another") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise UserError(f"workdir {workdir.root} is in use by process {owner}; wait, or choose another") from error
        file.truncate(0)  # in append mode the next write goes to the start
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
