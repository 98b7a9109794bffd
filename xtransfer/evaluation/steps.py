"""Scoring the checkpoints of runs in training: each one once, in the order of its steps, into `watch.jsonl`.

A checkpoint counts if training scored it on dev, that is, if `metrics.jsonl` has its row. One that an interrupted run
saved in between, only to resume from it, does not.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer.config import ExperimentConfig
from xtransfer.data.batches.batches import Dataset
from xtransfer.data.task import Task, load_if_present
from xtransfer.distillation.objectives import definitions
from xtransfer.errors import UserError
from xtransfer.evaluation import metrics, results
from xtransfer.evaluation.evaluator import Run, languages_of, rows_of
from xtransfer.runs.workdir import TEACHER, RunId, Workdir
from xtransfer.train import metrics_log
from xtransfer.train.checkpoints import CHECKPOINTS, Checkpoints
from xtransfer.train.finetuning import Finetuner, Models
from xtransfer.train.snapshots import committed_steps, file_names, snapshot

_Key = tuple[str, RunId, int]
_Score = tuple[str, str, str]  # split, language, and metric of a row

SELECTION = "step"
"""The "selection" of a row of `watch.jsonl`: no protocol selected the checkpoint."""


@dataclass(frozen=True)
class Landed:
    """A run's checkpoints that nobody has scored or skipped yet.

    Attributes:
      steps: the steps of those that are complete, ascending.
      deleted: the steps of those that training has deleted, ascending.
    """

    steps: tuple[int, ...]
    deleted: tuple[int, ...]


@dataclass(frozen=True)
class Scored:
    """A checkpoint with its rows of `watch.jsonl`."""

    run: Run
    step: int
    rows: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was not scored, and why: training had deleted it, or it is damaged."""

    run: Run
    step: int
    reason: str
    damaged: bool = False


class StepScorer:
    """The scores of an experiment's checkpoints by step. The caller holds the workdir for the purpose "watch".

    A checkpoint that an earlier process scored with other metrics, splits, or languages is scored again, and keeps the
    rows that it has.

    Args:
      workdir: the experiment's workdir.
      config: its config; `metrics` and `evaluation_splits` say what to score.
      task: its task.
      models: its models.
      languages: the languages to score; () is all of the task's.

    Raises:
      UserError: `watch.jsonl` cannot be read. A damaged row of it is left out, with a warning.
    """

    def __init__(
        self, workdir: Workdir, config: ExperimentConfig, task: Task, models: Models, languages: Sequence[str] = ()
    ):
        self._workdir, self._config, self._task, self._models = workdir, config, task, models
        self._languages, self._objectives = languages, definitions(config)
        self.rows = [results.marked_row(row, self._objectives) for row in results.whole_rows(workdir.by_step)]
        self._scores: dict[_Key, set[_Score]] = {}  # of each checkpoint with rows
        for row in self.rows:
            self._scores.setdefault(_key_of(row), set()).add(_score_of(row))
        self._given_up: set[_Key] = set()  # checkpoints that were deleted, or are damaged
        self._unreadable: dict[_Key, tuple[frozenset[str], str]] = {}  # its files, and the reason
        self._datasets: dict[tuple[str, str, str], Dataset] = {}
        shutil.rmtree(workdir.snapshots, ignore_errors=True)  # left by a killed process

    def look(self, run: Run) -> Landed:
        """Return the checkpoints of a run that are new."""
        # Read the rows first. Each is written before its checkpoint, and checkpoints are completed in order, so a step
        # with a row and a later checkpoint has been deleted. Without a later one, it is still being saved.
        scheduled = [int(row["step"]) for row in metrics_log.read_metrics(run.directory)]
        committed = committed_steps(run.directory / CHECKPOINTS)
        new = [step for step in scheduled if not self._is_done(run, step)]
        newest = max(committed, default=0)
        return Landed(
            steps=tuple(step for step in new if step in committed),
            deleted=tuple(step for step in new if step not in committed and step < newest),
        )

    def score(self, runs: Sequence[Run], *, last: bool = False) -> Iterator[Scored | Skipped]:
        """Score every new checkpoint of these runs, and write its rows; a deleted one is yielded once, as skipped.

        A checkpoint that cannot be read may be half deleted, so it is left for a later call.

        Args:
          runs: the runs, in the order of the experiment's stages.
          last: training has ended, so checkpoints that cannot be read are damaged.

        Raises:
          UserError: logits are not finite, or a file cannot be written.
        """
        for run in runs:
            landed = self.look(run)
            for step in landed.deleted:
                self._given_up.add(_key(run, step))
                what = "scored in full" if _key(run, step) in self._scores else "read"
                yield Skipped(run, step, f"deleted before it could be {what}")
            for step in landed.steps:
                scored = self._score(run, step)
                if scored is not None:
                    known = self._scores.setdefault(_key(run, step), set())
                    new = (row for row in scored.rows if _score_of(row) not in known)
                    self.rows += (results.marked_row(row, self._objectives) for row in new)
                    known.update(map(_score_of, scored.rows))
                    # All rows of a checkpoint are written at once, so that it has all of them or none.
                    results.write_rows(self._workdir.by_step, self.rows)
                    yield scored
                elif last and _key(run, step) in self._unreadable:
                    self._given_up.add(_key(run, step))
                    yield Skipped(run, step, self._unreadable[_key(run, step)][1], damaged=True)

    def rows_of(self, runs: Sequence[Run]) -> list[dict[str, Any]]:
        """Return the rows of these runs, also those that an earlier process wrote, in the order of runs and steps."""
        place = {(run.objective, run.id): index for index, run in enumerate(runs)}
        rows = rows_of(runs, self.rows)
        return sorted(rows, key=lambda row: (place[row["objective"], results.run_id(row)], row["step"]))

    def _is_done(self, run: Run, step: int) -> bool:
        """Return whether a checkpoint has all rows that it should have, or cannot get them."""
        key = _key(run, step)
        return key in self._given_up or self._wanted(run) <= self._scores.get(key, set())

    def _wanted(self, run: Run) -> set[_Score]:
        names = metrics.score_names(self._config.metrics, self._task.labels)
        return {(split, language, name) for split, language in self._parts(run) for name in names}

    def _parts(self, run: Run) -> list[tuple[str, str]]:
        """Return what to score, as (split, language): the source languages' dev, if any, then the evaluation splits.

        Dev is left out in source languages that were not requested.
        """
        languages = languages_of(self._config, self._task, self._languages, run.objective)
        sources = [language for language in self._task.source_languages if language in languages]
        dev = [("dev", source) for source in sources if load_if_present(self._task, "dev", source) is not None]
        parts = [(split, language) for split in self._config.evaluation_splits for language in languages]
        return list(dict.fromkeys([*dev, *parts]))

    def _score(self, run: Run, step: int) -> Scored | None:
        """Return a checkpoint's rows, or None if it cannot be read now."""
        is_teacher = run.objective == TEACHER
        model = self._models.teacher if is_teacher else self._models.student_of(run.objective)
        params = self._read(run, step, model)
        if params is None:
            return None
        rows = []
        for split, language in self._parts(run):
            row = {"task": self._task.name, **run.facts, "step": step}
            row |= {"selection": SELECTION, "split": split, "language": language}
            gold = self._task.gold(self._task.load(split, language))
            logits = model.predict(params, self._dataset(model, split, language))
            scores = metrics.scores(logits, gold, self._task.labels, self._config.metrics)
            rows += [row | score._asdict() for score in scores]
        return Scored(run, step, tuple(rows))

    def _read(self, run: Run, step: int, model: Finetuner) -> Any:
        """Return the parameters of a checkpoint from a snapshot of it, or None if it cannot be read now."""
        directory, key = run.directory / CHECKPOINTS, _key(run, step)
        try:
            files = file_names(directory, step)
            if key in self._unreadable and self._unreadable[key][0] == files:
                return None  # it would fail again
            with snapshot(directory, step, self._workdir.snapshots) as private:
                try:
                    return _restore(private, step, model)
                except UserError as error:
                    reason = str(error).partition("this checkpoint ")[2].partition("; ")[0]
                    self._unreadable[key] = files, reason or str(error)
        except FileNotFoundError:  # it is being deleted
            pass
        return None

    def _dataset(self, model: Finetuner, split: str, language: str) -> Dataset:
        key = (model.role, split, language)
        if key not in self._datasets:
            self._datasets[key] = model.dataset(self._task.load(split, language))
        return self._datasets[key]


def _restore(checkpoints: Path, step: int, model: Finetuner) -> Any:
    with Checkpoints(checkpoints, read_only=True) as opened:
        return opened.restore_params(step, model.abstract_params())


def _key(run: Run, step: int) -> _Key:
    return run.objective, run.id, step


def _key_of(row: Mapping[str, Any]) -> _Key:
    return row["objective"], results.run_id(row), row["step"]


def _score_of(row: Mapping[str, Any]) -> _Score:
    return row["split"], row["language"], row["metric"]
