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



TEACHER = "teacher"
"""What stands in place of an objective's name for the teacher, which knows the source language only."""


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
    processes.on_first(lambda: _record(path, facts))
    if not processes.is_first():
        check_unchanged(path, facts)


def _record(path: Path, facts: Mapping[str, Any]) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        storage.write_atomically(path, text)


def _read(path: Path) -> dict[str, Any]:
    return storage.read_object(path, "choose another directory")






