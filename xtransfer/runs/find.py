"""Which checkpoint of a workdir is meant: a finished run, by objective and seed, and the step that a protocol chose."""

from dataclasses import dataclass
from pathlib import Path

from xtransfer import storage
from xtransfer.runs import workdir as workdirs
from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.errors import UserError, nearest
from xtransfer.runs.selection import PROTOCOLS, choose
from xtransfer.train import loop
from xtransfer.runs.workdir import TEACHER, Workdir

SELECTIONS = tuple(name for name, protocol in PROTOCOLS.items() if protocol.zero_shot)
"""The protocols by which a checkpoint may be chosen for use: an oracle over target languages is none."""


@dataclass(frozen=True)
class TaskRecord:
    """What an experiment put on record of its task, and the fingerprints of its base checkpoints (`Workdir.task`)."""

    name: str
    labels: tuple[str, ...]
    synthetic: bool
    source_language: str
    target_languages: tuple[str, ...]
    teacher_checkpoint: str
    student_checkpoint: str


@dataclass(frozen=True)
class SelectedRun:
    """A finished run and the step of it that the protocol `selection` chose.

    `objective` is "teacher" for the teacher; `directory` is the run's.
    """

    workdir: Workdir
    config: ExperimentConfig
    task: TaskRecord
    objective: str
    seed: int
    directory: Path
    selection: str
    step: int

    @property
    def is_teacher(self) -> bool:
        """Whether this is the monolingual teacher, not a student."""
        return self.objective == TEACHER

    @property
    def settings(self) -> ModelConfig:
        """How the model of this run was trained."""
        return self.config.teacher if self.is_teacher else self.config.student

    @property
    def fingerprint(self) -> str:
        """That of the base checkpoint's files when the experiment was begun."""
        return self.task.teacher_checkpoint if self.is_teacher else self.task.student_checkpoint

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that it is for, the source language first; a teacher knows no other."""
        return (self.task.source_language, *(() if self.is_teacher else self.task.target_languages))


def check_selection(selection: str) -> None:
    """`UserError` for a protocol that is not one of SELECTIONS."""
    if selection not in SELECTIONS:
        raise UserError(f"selection {selection!r}: one of {', '.join(SELECTIONS)}{nearest(selection, SELECTIONS)}")


def find_run(workdir: Workdir, objective: str, seed: int | None, selection: str) -> SelectedRun:
    """The finished run of an objective (or "teacher") and seed, and its step; reads no weights.

    `seed` may be None for the teacher, of which there is one.

    Raises:
      UserError: no experiment, no such run (what there is, is named), not finished, or no such protocol.
    """
    check_selection(selection)
    config = workdirs.read_config(workdir)
    task = read_task(workdir)
    if objective == TEACHER:
        if seed not in (None, config.teacher_seed):
            raise UserError(f"{workdir.root}: the teacher's seed is {config.teacher_seed}, not {seed}")
        seed, directory, steps = config.teacher_seed, workdir.teacher, config.teacher.steps
    else:
        seed = _known_seed(workdir, objective, seed)
        directory, steps = workdir.student(objective, seed), config.student.steps
    if not loop.finished(directory, steps):
        raise UserError(
            f"{directory}: this run has not come to its end (step {steps:,}): "
            "give python -m xtransfer.main its config and workdir again, and it goes on"
        )
    scores = {int(row["step"]): row["dev_accuracy"] for row in loop.read_metrics(directory)}
    return SelectedRun(workdir, config, task, objective, seed, directory, selection, choose(scores)[selection])


def run_of(workdir: Workdir, directory: Path) -> tuple[str, int | None] | None:
    """(objective, seed) of a run's directory, which may lead there by a link; None where it is no run's."""
    directory = directory.resolve()
    if directory == workdir.teacher.resolve():
        return TEACHER, None
    runs = ((workdir.student(*run).resolve(), run) for run in _students(workdir))
    return next((run for path, run in runs if path == directory), None)


def list_runs(workdir: Workdir) -> str:
    """The runs that were begun, by their paths below the workdir, for a message."""
    runs = [workdir.teacher, *(workdir.student(*run) for run in _students(workdir))]
    return ", ".join(run.relative_to(workdir.root).as_posix() for run in runs if run.is_dir()) or "no run yet"


def read_task(workdir: Workdir) -> TaskRecord:
    """The task as the experiment recorded it; `UserError` where it did not, or where the record is broken."""
    path, remedy = workdir.task, "start the experiment again with python -m xtransfer.main"
    if not path.is_file():
        raise UserError(f"{path}: no such file: {remedy}")
    found = storage.read_object(path, remedy)
    for key in ("labels", "target_languages"):
        if not isinstance(found.get(key), list) or not all(isinstance(name, str) for name in found[key]):
            raise UserError(f"{path}: {key} = {found.get(key)!r}, expected a list of names: {remedy}")
    for key in ("name", "source_language", "teacher_checkpoint", "student_checkpoint"):
        if not isinstance(found.get(key), str):
            raise UserError(f"{path}: {key} = {found.get(key)!r}, expected text: {remedy}")
    if len(found["labels"]) < 2 or not isinstance(found.get("synthetic"), bool):
        raise UserError(f"{path}: expected two or more labels, and synthetic as true or false: {remedy}")
    return TaskRecord(
        name=found["name"],
        labels=tuple(found["labels"]),
        synthetic=found["synthetic"],
        source_language=found["source_language"],
        target_languages=tuple(found["target_languages"]),
        teacher_checkpoint=found["teacher_checkpoint"],
        student_checkpoint=found["student_checkpoint"],
    )


def _known_seed(workdir: Workdir, objective: str, seed: int | None) -> int:
    """The seed, where there is a run of it."""
    students = _students(workdir)
    if (objective, seed) in students and seed is not None:
        return seed
    names = [TEACHER, *(name for name, _ in students)]
    if objective not in names:
        what = f"no run of {objective!r}{nearest(objective, names)}"
    elif seed is None:
        what = f"{objective} has a run for each seed: name one"
    else:
        what = f"no run of {objective} with seed {seed}"
    raise UserError(f"{workdir.root}: {what}; there is {list_runs(workdir)}")


def _students(workdir: Workdir) -> list[tuple[str, int]]:
    """(objective, seed) of every student that was begun, whatever the config asks for now."""
    found = workdir.root.glob("students/*/seed-*")
    numbers = [(path.parent.name, path.name.removeprefix("seed-")) for path in found if path.is_dir()]
    return sorted((objective, int(number)) for objective, number in numbers if number.isdecimal())
