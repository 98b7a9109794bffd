"""The recorded files of a workdir, as the parts of the page read them."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer import storage
from xtransfer.config import ExperimentConfig
from xtransfer.distillation.objectives import uses_target_text
from xtransfer.errors import DataError
from xtransfer.evaluation import calibration, multi_label, significance
from xtransfer.evaluation.metrics import confusion_matrix, higher_is_better
from xtransfer.evaluation.multi_label import set_of
from xtransfer.evaluation.paired import Students, differences_of, load
from xtransfer.evaluation.results import BASELINE, TARGET_TEXT_MARK, ResultsTable, Row, run_id
from xtransfer.evaluation.significance import Difference
from xtransfer.report.page import charts
from xtransfer.runs.draws import order
from xtransfer.runs.selection import PROTOCOLS, weights_name
from xtransfer.runs.workdir import TEACHER, RunId, TaskRecord, Workdir
from xtransfer.runtime import checksums

Interval = tuple[float, float]


class MissingSource(Exception):
    """A part of the page has nothing to show; the message is the sentence that stands in its place."""


@dataclass(frozen=True)
class Predictions:
    """A checkpoint's predictions on n examples.

    Attributes:
      ids: the ids of the examples.
      gold: the classes of their labels [n]; in a multi-label task [n, K], 1 for each of its labels and else 0.
      guesses: the predicted classes, in the same form.
      logits: float32 [n, K].
    """

    ids: tuple[str, ...]
    gold: np.ndarray
    guesses: np.ndarray
    logits: np.ndarray


@dataclass(frozen=True)
class Tally:
    """The predictions of one objective in one language, all runs together.

    Attributes:
      confusion: the number of examples of gold class i that were predicted as class j, int64 [K, K]; in a multi-label
        task each class against the rest, [K, 2, 2], see `multi_label.confusions`.
      bins: the occupied bins of equal width, by confidence.
      error: the expected calibration error of a run, mean over runs; from 0 to 1.
      runs: the number of runs.
    """

    confusion: np.ndarray
    bins: tuple[calibration.Bin, ...]
    error: float
    runs: int


@dataclass(frozen=True)
class Comparison:
    """One objective with its intervals, and compared with the baseline.

    Attributes:
      intervals: the 95 % interval of its score over items and seeds (or draws), by language; None is the average of
        targets.
      differences: the differences from the baseline, by language; empty for the baseline, or without one.
    """

    intervals: Mapping[str | None, Interval]
    differences: Mapping[str | None, Difference]


@dataclass(frozen=True)
class Source:
    """One workdir, and the results to show.

    Attributes:
      workdir: the experiment.
      config: its settings.
      task: the record of its task.
      rows: all result rows.
      results: the table for one metric, split, and selection protocol.
    """

    workdir: Workdir
    config: ExperimentConfig
    task: TaskRecord
    rows: tuple[Row, ...]
    results: ResultsTable

    @property
    def students(self) -> tuple[str, ...]:
        """The objectives of the students in all languages, in order; those of some languages are in `kinds` alone."""
        everything = set(self.results.languages)
        return tuple(line.objective for line in self.results.lines if everything <= line.languages.keys())

    @property
    def kinds(self) -> dict[str, charts.Kind]:
        """The look of the teacher and of every objective."""
        return charts.kinds((line.objective for line in self.results.lines), self.notes)

    @property
    def notes(self) -> dict[str, str]:
        """The mark of every objective that uses text in target languages."""
        names = [line.objective for line in self.results.lines]
        return {name: TARGET_TEXT_MARK for name in names if uses_target_text(self.results.objectives, name)}

    @property
    def student_kinds(self) -> dict[str, charts.Kind]:
        """The look of every objective in `students`."""
        return {name: kind for name, kind in self.kinds.items() if name in self.students}

    @property
    def main_objective(self) -> str:
        """The objective that the headline is about: the first with a monolingual teacher, or else the last one.

        Raises:
          MissingSource: there are no students yet.
        """
        if not self.students:
            raise MissingSource("There are no results of students yet.")
        monolingual = filter(self.results.may_be_headline, self.students)
        return next(monolingual, self.students[-1])

    @property
    def languages(self) -> tuple[str, ...]:
        """The source languages, then the target languages that have results."""
        targets = (language for language in self.results.target_languages if language in self.results.counts)
        return (*self.results.source_languages, *targets)

    def shown_languages(self, limit: int) -> tuple[str, ...]:
        """Return the source languages and target languages from the hardest to the easiest, `limit` in all.

        If there are more, they are evenly spaced by the mean score of the objectives.
        """
        is_reversed = not higher_is_better(self.results.metric)
        sources = self.results.source_languages
        targets = sorted(self.languages[len(sources) :], key=self._mean_of_students, reverse=is_reversed)
        count = min(max(limit - len(sources), 0), len(targets))
        positions = np.linspace(0, len(targets) - 1, count).round().astype(int)
        return (*sources, *(targets[position] for position in positions))

    def _mean_of_students(self, language: str) -> float:
        lines = [line for line in self.results.lines if line.objective in self.students]
        return sum(line.languages[language].mean for line in lines) / len(lines)

    def steps(self, objective: str) -> dict[RunId, dict[str, int]]:
        """Return the evaluated step of each run in each language, in the order of draws and seeds."""
        chosen = (objective, self.results.split, self.results.selection)
        steps: dict[RunId, dict[str, int]] = {}
        for row in self.rows:
            if (row["objective"], row["split"], row["selection"]) == chosen:
                steps.setdefault(run_id(row), {})[row["language"]] = row["step"]
        return {run: steps[run] for run in sorted(steps, key=lambda run: (order(run.draw), run.seed))}

    def mean(self, metric: str, objective: str, language: str) -> float | None:
        """Return the mean of a recorded metric over the runs of an objective; None if it is not recorded."""
        chosen = (metric, objective, language, self.results.split, self.results.selection)
        keys = ("metric", "objective", "language", "split", "selection")
        values = [row["value"] for row in self.rows if tuple(row[key] for key in keys) == chosen]
        return float(np.mean(values)) if values else None

    def run_directory(self, objective: str, run: RunId) -> Path:
        """Return the directory of a run."""
        drawn = self.workdir.at(run.draw)
        return drawn.teacher if objective == TEACHER else drawn.student(objective, run.seed)

    def predictions(self, objective: str, run: RunId, language: str) -> Predictions:
        """Read the predictions of one run in one language; MissingSource if there are none."""
        step = self.steps(objective)[run].get(language)
        if step is None:
            raise MissingSource(f"{objective} {run} has no results in {language}.")
        weights = weights_name(step, PROTOCOLS[self.results.selection].item)
        path = self.workdir.predictions(self.run_directory(objective, run), weights, self.results.split, language)
        return read_predictions(path, self.task.labels, multi_label=self.task.multi_label)

    @functools.cached_property
    def tallies(self) -> dict[tuple[str, str], Tally]:
        """The predictions by objective and language; MissingSource if a file is missing."""
        return {
            (line.objective, language): self._tally(line.objective, language)
            for line in self.results.lines
            for language in self.languages
            if language in line.languages
        }

    def _tally(self, objective: str, language: str) -> Tally:
        parts = [self.predictions(objective, run, language) for run in self.steps(objective)]
        logits = np.concatenate([part.logits for part in parts])
        gold = np.concatenate([part.gold for part in parts])
        guesses = np.concatenate([part.guesses for part in parts])
        if self.task.multi_label:
            confusion = multi_label.confusions(guesses, gold)
        else:
            confusion = confusion_matrix(guesses, gold, len(self.task.labels))
        errors = [calibration.expected_error(calibration.equal_width_bins(part.logits, part.gold)) for part in parts]
        bins = tuple(calibration.equal_width_bins(logits, gold))
        return Tally(confusion, bins, float(np.mean(errors)), len(parts))

    @functools.cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """The intervals and tests by objective; a UserError if the predictions cannot be compared."""
        return {name: self._comparison(name) for name in self.students}

    def _comparison(self, objective: str) -> Comparison:
        baseline = BASELINE if BASELINE in self.students else objective
        pair = load(
            Students(self.workdir, objective),
            Students(self.workdir, baseline),
            split=self.results.split,
            selection=self.results.selection,
        )
        sources, targets = self.results.source_languages, self.results.target_languages
        in_sources = significance.bootstrap(pair.a.select(sources).by_unit)[:, : len(sources)]
        in_targets = significance.bootstrap(pair.a.select(targets).by_unit)
        bounds = np.clip(significance.percentile_interval(np.column_stack([in_sources, in_targets])), 0, 1)
        keys = (*sources, *targets, None)
        intervals = {key: (float(low), float(high)) for key, low, high in zip(keys, *bounds, strict=True)}
        if baseline == objective:
            return Comparison(intervals, {})
        return Comparison(
            intervals, {difference.language: difference for difference in differences_of(pair, sources, targets)}
        )


def read_predictions(path: Path, labels: tuple[str, ...], *, multi_label: bool = False) -> Predictions:
    """Read a file of predictions, in a multi-label task of lists of labels.

    Raises:
      MissingSource: there is no such file.
      UserError: it is damaged or malformed; the message names the line.
    """
    damage = checksums.fault_of(path) if path.exists() else None
    if damage is not None:
        raise DataError(f"{path} is damaged: {damage}: evaluate this run again")
    position = {label: index for index, label in enumerate(labels)}
    try:
        lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    except FileNotFoundError:
        raise MissingSource(f"The workdir has no {path.name} in {path.parent.name}/ of its predictions.") from None
    ids: list[str] = []
    classes: list[tuple[Any, Any]] = []

    def index(value: Any) -> Any:
        if not multi_label:
            return position[value]
        if not isinstance(value, list):
            raise TypeError(f"{value!r} is no list of labels")
        return set_of(value, position)

    logits: list[list[float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            row: Any = storage.read_json(line.decode("utf-8"))
            ids.append(row["id"])
            classes.append((index(row["label"]), index(row["prediction"])))
            logits.append([float(value) for value in row["logits"]])
            if len(logits[-1]) != len(labels):
                raise ValueError(f"{len(logits[-1])} logits for {len(labels)} classes")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}:{number}: not a prediction ({error}): evaluate this run again") from error
    gold, guesses = np.moveaxis(np.array(classes, np.int64), 1, 0)
    return Predictions(tuple(ids), gold, guesses, np.array(logits, np.float32))
