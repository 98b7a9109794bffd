"""Find a checkpoint in a workdir: a run, by objective, draw, and seed, and the step that a protocol selects."""

from dataclasses import dataclass
from pathlib import Path

from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.data.task import Task
from xtransfer.distillation.objectives import scored_languages
from xtransfer.errors import CheckpointError, ConfigError, nearest
from xtransfer.runs import draws
from xtransfer.runs.selection import PROTOCOLS, DevScores, choose, weights_name
from xtransfer.runs.workdir import DEFAULT_DRAW, TEACHER, TaskRecord, Workdir, read_config, read_task
from xtransfer.train import metrics_log

SELECTIONS = tuple(name for name, protocol in PROTOCOLS.items() if protocol.zero_shot)
"""The protocols that may select a checkpoint for use, which excludes oracles over target languages."""


@dataclass(frozen=True)
class SelectedRun:
    """A finished run, and the step that a protocol selected.

    Attributes:
      workdir: the experiment's workdir, with the run's draw.
      config: the experiment's config, for this draw alone.
      task: the experiment's task.
      objective: the student's objective, or "teacher".
      seed: the run's seed.
      directory: the run's directory.
      selection: the protocol.
      step: the selected step.
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
        """Whether this is the monolingual teacher and not a student."""
        return self.objective == TEACHER

    @property
    def item(self) -> str:
        """The item of the checkpoint that holds the weights."""
        return PROTOCOLS[self.selection].item

    @property
    def weights_name(self) -> str:
        """The name of the weights, see `selection.weights_name`."""
        return weights_name(self.step, self.item)

    @property
    def role(self) -> str:
        """The config key of this run's model."""
        return TEACHER if self.is_teacher else self.config.encoder_of(self.objective)

    @property
    def settings(self) -> ModelConfig:
        """The settings that this run's model was trained with."""
        return self.config.teacher if self.is_teacher else self.config.encoders[self.role]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the base checkpoint's files at the start of the experiment."""
        if self.is_teacher:
            return self.task.teacher_checkpoint
        return self.task.students.get(self.role, self.task.student_checkpoint)

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages that the model is for, the source languages first; a teacher knows no others."""
        return known_languages(self.config, self.task, self.objective)


def known_languages(config: ExperimentConfig, task: Task | TaskRecord, objective: str) -> tuple[str, ...]:
    """Return the languages that the model of an objective, or the teacher, is scored in, the source languages first.

    Args:
      config: the experiment's config.
      task: its task.
      objective: the student's objective, or "teacher", which knows the source language only, or of several those that
        it reads.
    """
    if objective == TEACHER:
        sources = task.source_languages
        return sources if len(sources) == 1 else tuple(name for name in sources if name in config.languages_of(TEACHER))
    only = (config.objective[objective].languages or ()) if objective in config.objective else ()
    return scored_languages(only, task.source_languages, task.target_languages)


def check_selection(selection: str) -> None:
    """Refuse a protocol that is not one of `SELECTIONS`."""
    if selection not in SELECTIONS:
        raise ConfigError(f"selection {selection!r}: one of {', '.join(SELECTIONS)}{nearest(selection, SELECTIONS)}")


def find_run(workdir: Workdir, objective: str, seed: int | None, selection: str) -> SelectedRun:
    """Find the finished run of an objective and seed, and its selected step, without reading any weights.

    Args:
      workdir: the experiment's workdir, with the run's draw.
      objective: the student's objective, or "teacher".
      seed: the student's seed; None for the teacher, because a draw has only one.
      selection: the protocol, one of `SELECTIONS`.

    Raises:
      UserError: there is no experiment, no such run (the message lists the runs), or no such protocol; or the run is
        not finished, or has no average.
    """
    check_selection(selection)
    config = read_config(workdir)
    draw = draws.named(config, workdir.draw)
    if draw is None:
        raise ConfigError(f"{workdir.root}: no draw {workdir.draw!r}; runs: {list_runs(workdir)}")
    config, task = draw.apply(config), read_task(workdir)
    if objective == TEACHER:
        if config.teacher.is_file:
            raise ConfigError(f"{workdir.root}: there is no teacher here, because its logits come from a file")
        if seed not in (None, config.teacher_seed):
            raise ConfigError(f"{workdir.root}: the teacher's seed is {config.teacher_seed}, not {seed}")
        seed, directory, steps = config.teacher_seed, workdir.teacher, config.teacher.known_steps
    else:
        seed = _known_seed(workdir, objective, seed)
        directory, steps = workdir.student(objective, seed), config.encoders[config.encoder_of(objective)].known_steps
    if not metrics_log.finished(directory, steps):
        needed = "its last step" if steps is None else f"step {steps:,}"
        raise CheckpointError(
            f"{directory}: this run is not finished (it needs {needed}): "
            "run python -m xtransfer.main with its config and workdir again to resume"
        )
    scores = read_dev_scores(directory)
    steps_by_protocol = choose(scores)
    if not scores.has_dev and selection == "source_dev":
        selection = "last"  # what is used without a dev split
    if selection not in steps_by_protocol:
        role = "teacher" if objective == TEACHER else config.encoder_of(objective)
        raise ConfigError(
            f"{directory}: this run has no average of its last checkpoints: train it in another workdir with "
            f"--config.{role}.average_last=3"
        )
    return SelectedRun(workdir, config, task, objective, seed, directory, selection, steps_by_protocol[selection])


def selected_steps(run: Path) -> dict[str, int]:
    """Return the step that each protocol selects for all languages, from the dev scores in a run's metrics.jsonl."""
    return choose(read_dev_scores(run))


def read_dev_scores(run: Path) -> DevScores:
    """Read the dev scores in a run's metrics.jsonl."""
    has_dev = any(map(metrics_log.has_dev_score, metrics_log.read_metrics(run)))
    read = metrics_log.read_scored if has_dev else metrics_log.read_metrics
    rows = {int(row["step"]): row for row in read(run)}
    targets: dict[str, dict[int, float]] = {}
    for step, row in rows.items():
        for language, score in row.get(metrics_log.TARGET_DEV_SCORES, {}).items():
            targets.setdefault(language, {})[step] = score
    source = {step: metrics_log.dev_score(row) if has_dev else 0.0 for step, row in rows.items()}
    return DevScores(source, targets, [step for step, row in rows.items() if metrics_log.AVERAGED in row], has_dev)


def identify_run(workdir: Workdir, directory: Path) -> tuple[str, str, int | None] | None:
    """Return (draw, objective, seed) of a run's directory, even through a link; None for any other directory."""
    directory = directory.resolve()
    for one in _by_draw(workdir):
        if directory == one.teacher.resolve():
            return one.draw, TEACHER, None
        for run in _students(one):
            if directory == one.student(*run).resolve():
                return one.draw, *run
    return None


def list_runs(workdir: Workdir) -> str:
    """Return the paths of all runs below the workdir, finished or not, as text for a message."""
    runs = [run for one in _by_draw(workdir) for run in (one.teacher, *(one.student(*run) for run in _students(one)))]
    return ", ".join(run.relative_to(workdir.root).as_posix() for run in runs if run.is_dir()) or "none yet"


def _by_draw(workdir: Workdir) -> list[Workdir]:
    """Return the workdir of every draw that has a directory, the default draw first."""
    names = [path.name for path in workdir.draws.glob("*") if path.is_dir() and draws.order(path.name)]
    return [workdir.at(name) for name in (DEFAULT_DRAW, *sorted(names, key=draws.order))]


def _known_seed(workdir: Workdir, objective: str, seed: int | None) -> int:
    """Return the seed, or raise a UserError if the objective has no run with it."""
    students = _students(workdir)
    if (objective, seed) in students and seed is not None:
        return seed
    names = [TEACHER, *(name for name, _ in students)]
    if objective not in names:
        problem = f"no run of {objective!r}{nearest(objective, names)}"
    elif seed is None:
        problem = f"{objective} has a run for each seed; name one"
    else:
        problem = f"no run of {objective} with seed {seed}"
    raise ConfigError(f"{workdir.root}: {problem}; runs: {list_runs(workdir)}")


def _students(workdir: Workdir) -> list[tuple[str, int]]:
    """Return (objective, seed) of every student in the workdir's draw, whatever the config asks for now."""
    directories = [path for path in workdir.runs.glob("students/*/seed-*") if path.is_dir()]
    numbers = [(path.parent.name, path.name.removeprefix("seed-")) for path in directories]
    return sorted((objective, int(number)) for objective, number in numbers if number.isdecimal())
