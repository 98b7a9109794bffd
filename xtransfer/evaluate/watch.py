"""Watch mode: follow a training run in another process, and score each checkpoint as it lands.

The run has ended when its end marker exists and nobody holds the workdir. If nobody holds it and there is no end
marker, the trainer is dead, or has not started yet; it may come back within a grace period.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from xtransfer.errors import CheckpointError, ConfigError, LostError, StalledError
from xtransfer.evaluate import opening, step_table
from xtransfer.evaluate.opening import Experiment, Scope
from xtransfer.evaluation.evaluator import Run
from xtransfer.evaluation.evaluator import runs as runs_of
from xtransfer.evaluation.metrics import score_names
from xtransfer.evaluation.results import run_id
from xtransfer.evaluation.steps import Scored, Skipped, StepScorer
from xtransfer.runs import sweep
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.runtime import locks, processes, terminal
from xtransfer.train.checkpoints import FALL_BACK_FLAG

_SHOWN = 5  # the most checkpoints that an error names


@dataclass(frozen=True)
class Patience:
    """How often to look, and how long to wait.

    Attributes:
      interval: seconds between two looks.
      timeout: seconds without a new checkpoint; 0 waits for ever.
      grace: seconds in which a dead trainer may come back.
    """

    interval: float = 2.0
    timeout: float = 3600.0
    grace: float = 60.0


@dataclass
class Waiting:
    """The wait for a trainer.

    Attributes:
      workdir: the trainer's workdir.
      patience: how long to wait.
      last_news: when something new was last seen, by the monotonic clock.
      dead_since: since when the trainer has been seen dead; None while it is alive.
    """

    workdir: Workdir
    patience: Patience
    last_news: float = field(default_factory=time.monotonic)
    dead_since: float | None = None

    def note_news(self) -> None:
        """Note that work was done, such as a checkpoint scored. The time that it took does not count as waiting."""
        self.last_news = time.monotonic()

    def has_ended(self) -> bool:
        """Return whether the run has ended, and note whether the trainer is alive.

        Raises:
          UserError: the trainer has been dead for the grace period, since an earlier look.
        """
        root, grace = self.workdir.root, self.patience.grace
        # The marker is read second, because the trainer writes it before it releases the workdir.
        if locks.is_held(root):
            if self.dead_since is not None:
                terminal.log(f"{root}: a training run has started")
                self.dead_since, self.last_news = None, time.monotonic()
            return False
        if self.workdir.finished.exists():
            return True
        if self.dead_since is None:
            self.dead_since = time.monotonic()
            terminal.log(f"{root}: no training run; waiting up to {grace:g} s for one")
        elif time.monotonic() - self.dead_since >= grace:
            raise LostError(
                f"{root}: the training run has died or has not started, and none came within {grace:g} s (--grace): "
                "see its log, start python -m xtransfer.main with its config and workdir, then this command again"
            )
        return False

    def sleep(self) -> None:
        """Wait until the next look.

        Raises:
          UserError: there has been nothing new for too long.
        """
        if 0 < self.patience.timeout <= time.monotonic() - self.last_news:
            raise StalledError(
                f"{self.workdir.root}: no new checkpoint for {self.patience.timeout:g} s (--timeout): see the log of "
                "the training run, then start this command again"
            )
        time.sleep(self.patience.interval)


def watch(workdir: Workdir, patience: Patience, scope: Scope) -> None:
    """Score each checkpoint of a workdir as it lands, until the run ends; then print a table of steps and languages.

    Args:
      workdir: the workdir of a training run, which may not have started yet.
      patience: how long to wait.
      scope: what to score.

    Raises:
      UserError: the workdir holds a sweep, the trainer is dead, nothing new came in time, another process watches, or a
        checkpoint is damaged.
    """
    if processes.count() > 1:
        raise ConfigError("--watch runs in one process: leave out --processes")
    waiting = Waiting(workdir, patience)
    while not (workdir.config.is_file() and workdir.task.is_file()):
        _refuse_sweep(workdir)
        if waiting.has_ended():
            raise CheckpointError(
                f"{workdir.root}: it has an end marker, but no config.json or task.json: restore them"
            )
        waiting.sleep()
    with locks.directory_lock(workdir.root, "watch"):
        experiment = opening.open_experiment(workdir, scope)
        scorer, runs, skipped = _scorer(experiment), runs_of(workdir, experiment.config), []
        waiting.note_news()  # opening it may take a while
        while True:
            # Look for the end first: everything that landed before it is scored below.
            ended, has_news = waiting.has_ended(), False
            runs = runs_of(workdir, read_config(workdir))  # a restart may have added seeds
            for result in scorer.score(runs, last=ended):
                has_news = True
                terminal.log(step_table.line(result, experiment.task, experiment.config.metrics, experiment.objectives))
                skipped += [result] if isinstance(result, Skipped) else []
                waiting.note_news()
            if ended and not has_news:
                break
            if not has_news:
                waiting.sleep()
        _finish(scorer, runs, experiment, skipped)


def score_once(experiment: Experiment, runs: Sequence[Run]) -> None:
    """Score the checkpoints that unfinished runs have now, and print their table; leave them to a watcher if there is.

    Raises:
      UserError: a checkpoint is damaged.
    """
    root = experiment.workdir.root
    if locks.is_held(root, "watch"):
        terminal.log(f"{root}: another process watches it, and scores the checkpoints of unfinished runs")
        return
    with locks.directory_lock(root, "watch"):
        scorer = _scorer(experiment)
        skipped = []
        for result in scorer.score(runs, last=True):
            if isinstance(result, Scored):
                terminal.log(step_table.line(result, experiment.task, experiment.config.metrics, experiment.objectives))
            else:
                skipped.append(result)
        _finish(scorer, runs, experiment, skipped)


def _refuse_sweep(workdir: Workdir) -> None:
    """Refuse the directory of a sweep, and name its points."""
    if sweep.is_sweep(workdir.root):
        first, *others = (sweep.directory(workdir.root, name) for name in sweep.read(workdir.root).points)
        more = f", or another one in {first.parent}" if others else ""
        raise ConfigError(
            f"{workdir.root} holds a sweep: watch one of its points: --workdir {shlex.quote(str(first))}{more}"
        )


def _scorer(experiment: Experiment) -> StepScorer:
    return StepScorer(experiment.workdir, experiment.config, experiment.task, experiment.models, experiment.languages)


def _finish(scorer: StepScorer, runs: Sequence[Run], experiment: Experiment, skipped: Sequence[Skipped]) -> None:
    """Print the table of all checkpoints, name the skipped ones, and fail if one of them is damaged."""
    rows, workdir = scorer.rows_of(runs), experiment.workdir
    first = score_names(experiment.config.metrics, experiment.task.labels)[0]
    scored = {(row["objective"], run_id(row), row["step"]) for row in rows if row["metric"] == first}
    if scored:
        step_table.show(rows, experiment.task, experiment.config.metrics, experiment.objectives)
    deleted = [result for result in skipped if not result.damaged]
    note = f"; skipped, because training had deleted them: {_names(deleted)}" if deleted else ""
    terminal.log(f"{workdir.by_step}: {len(scored):,} checkpoints scored{note}")
    damaged = [result for result in skipped if result.damaged]
    if damaged:
        raise CheckpointError(
            f"{workdir.root}: {_names(damaged)} {damaged[0].reason}: restore it, or train again with {FALL_BACK_FLAG}"
        )


def _names(skipped: Sequence[Skipped]) -> str:
    more = f" and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
    return ", ".join(f"{result.run.name} step {result.step:,}" for result in skipped[:_SHOWN]) + more
