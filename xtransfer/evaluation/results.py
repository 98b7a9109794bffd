"""A results table from result rows: means over seeds or draws, averages over languages, and gains over the baseline."""

import dataclasses
import logging
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.distillation.objectives import OBJECTIVES, Objective, scored_languages, uses_target_text
from xtransfer.errors import ConfigError, DataError, nearest
from xtransfer.evaluation.metrics import CHANCE, metric_of, value_range
from xtransfer.runs.draws import SAMPLES, SEEDS, Axis, order
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import DEFAULT_DRAW, TEACHER, RunId
from xtransfer.runtime import checksums

_log = logging.getLogger(__name__)

ROW: Mapping[str, type] = {
    "task": str,
    "objective": str,
    "draw": str,
    "seed": int,
    "step": int,
    "selection": str,
    "split": str,
    "language": str,
    "metric": str,
    "value": float,
    "count": int,
}
"""The keys of a row of results.jsonl, all of them required, and the types of their values.

The file adds the digest of the others (see `runtime.checksums`), which a row of an older version lacks.

"draw" names the labelled sample and its teacher (see `runs.draws`). A row without it is older than draws, and belongs
to the default one. "selection" is the protocol (see `runs.selection.PROTOCOLS`) that selected the checkpoint. A
checkpoint that two protocols selected has its rows twice. It is "step" in watch.jsonl, and "none" for a model that is
no run.
"""

MARK = "uses_target_text"
"""The key that a row has, with the value true, only if its student is not zero-shot without target text."""

SELECTIONS = (*PROTOCOLS, "step", "none")
"""The values of "selection"."""

Row = Mapping[str, Any]

Unit = str | int
"""What a number varies over: the seed of a run, the name of a draw, or the number of a study's repetition."""

BASELINE = "vanilla"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A quantity over independent units: its values, their mean, interval, and spread.

    The units are the draws if a table has several of them, and a value is then the mean over the seeds of a draw.
    Otherwise they are the seeds, or the repetitions of a study.
    """

    by_unit: Mapping[Unit, float]

    @property
    def mean(self) -> float:
        """The arithmetic mean."""
        return statistics.fmean(self.by_unit.values())

    @property
    def sd(self) -> float | None:
        """The sample standard deviation (n − 1), or None for a single value."""
        return statistics.stdev(self.by_unit.values()) if len(self.by_unit) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % confidence interval of the mean, by Student's t, or None for a single value."""
        if self.sd is None:
            return None
        from scipy.stats import t

        n = len(self.by_unit)
        half = float(t.ppf(0.975, n - 1)) * self.sd / math.sqrt(n)
        return self.mean - half, self.mean + half


@dataclasses.dataclass(frozen=True)
class ObjectiveResults:
    """The results of one objective: each language, the average over target languages, and the gain over the baseline.

    `average` and `gain` are None for the teacher, and for an objective of some languages alone. `gain` is also None for
    the baseline itself, and if the two have no run in common. A gain is the difference between averages with the same
    draw and seed.
    """

    objective: str
    languages: Mapping[str, Summary]
    average: Summary | None
    gain: Summary | None
    runs: tuple[RunId, ...] = ()

    @property
    def draws(self) -> tuple[str, ...]:
        """The draws, the default one first."""
        return tuple(dict.fromkeys(run.draw for run in self.runs))

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, ascending."""
        return tuple(sorted({run.seed for run in self.runs}))


@dataclasses.dataclass(frozen=True)
class ResultsTable:
    """The results of all objectives on one split, by one metric and one selection protocol; values as in the rows.

    `counts` holds the number of examples in each language, and `majority` the share of its majority class, if the rows
    have it. `axis` says what the summaries go over. `objectives` defines the objectives by name, in the order of the
    lines; other names come after them.
    """

    task: str
    metric: str
    split: str
    selection: str
    source_languages: tuple[str, ...]
    target_languages: tuple[str, ...]
    counts: Mapping[str, int]
    majority: Mapping[str, float]
    lines: tuple[ObjectiveResults, ...]
    axis: Axis = SEEDS
    objectives: Mapping[str, Objective] = dataclasses.field(default_factory=lambda: OBJECTIVES)

    def may_be_headline(self, objective: str) -> bool:
        """Return whether an objective learns from the monolingual teacher, and is zero-shot without target text."""
        is_taught = objective in self.objectives and self.objectives[objective].teacher == "monolingual"
        return is_taught and not uses_target_text(self.objectives, objective)

    def name_of(self, objective: str) -> str:
        """Return an objective's name for people, marked if its student has learned from text in target languages."""
        return marked_name(self.objectives, objective)

    @property
    def languages(self) -> tuple[str, ...]:
        """The source languages, then the target languages."""
        return (*self.source_languages, *self.target_languages)

    @property
    def checkpoint(self) -> str:
        """The selection protocol in words."""
        return PROTOCOLS[self.selection].text(len(self.source_languages))

    def source_average(self, line: ObjectiveResults) -> Summary | None:
        """Return the mean over the source languages of a line, or None if it has none."""
        values = [line.languages[language].by_unit for language in self.source_languages if language in line.languages]
        if not values:
            return None
        return Summary({unit: statistics.fmean(by_unit[unit] for by_unit in values) for unit in values[0]})

    @property
    def draws(self) -> tuple[str, ...]:
        """The draws of all runs, the default one first. If there are several, they are the units of every summary."""
        return tuple(sorted({run.draw for line in self.lines for run in line.runs}, key=order))


TARGET_TEXT_MARK = "uses target text"
"""Stands beside every number of a student that is not zero-shot without text in target languages."""


def marked_name(objectives: Mapping[str, Objective], objective: str) -> str:
    """Return the name of an objective, with a mark if it uses text in target languages; see `uses_target_text`."""
    return f"{objective} ({TARGET_TEXT_MARK})" if uses_target_text(objectives, objective) else objective


def marked_row(row: Row, objectives: Mapping[str, Objective]) -> dict[str, Any]:
    """Return a row with `MARK`, if its objective uses text in target languages, and else without it.

    A row of an objective that is not defined stays as it is. See `uses_target_text`.
    """
    if row["objective"] not in objectives:
        return dict(row)
    rest = {key: value for key, value in row.items() if key != MARK}
    return {**rest, MARK: True} if uses_target_text(objectives, row["objective"]) else rest


def run_id(row: Row) -> RunId:
    """Return the draw and the seed of a row's run."""
    return RunId(row["draw"], row["seed"])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read results.jsonl; a UserError names the file and line of anything that is not a row as it was written."""
    rows, faults = _read(path)
    if faults:
        raise DataError(f"{faults[0]}: run python -m xtransfer.evaluate, which drops this line and scores it again")
    return rows


def whole_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file that are as they were written; leave out the others, with a warning for each.

    Without the file there are none.
    """
    if not path.exists():
        return []
    return _read_whole(path)[0]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Write rows of results.jsonl atomically, each with its digest."""
    storage.write_jsonl(path, map(checksums.signed, rows))


def mend(path: Path, objectives: Mapping[str, Objective]) -> None:
    """Remove the damaged rows from a file, so that they are scored again, and mark the others by their objectives.

    Rows of an older version have no mark. The caller holds the file.
    """
    if not path.exists():
        return
    rows, faults = _read_whole(path)
    marked = [marked_row(row, objectives) for row in rows]
    if marked != rows or faults:
        write_rows(path, marked)


def _read_whole(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what `_read` does, and warn of each fault."""
    rows, faults = _read(path)
    for fault in faults:
        _log.warning("%s, so this row is left out", fault)
    return rows, faults


def _read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the whole rows of a file, and what is wrong with each of the other lines, which it names."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: run python -m xtransfer.evaluate first") from error
    rows, faults = [], []
    *lines, rest = content.split(b"\n")  # not splitlines: U+2028 inside a string ends no line
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_row(line))
        except ValueError as error:
            faults.append(f"{path}:{number}: {error}")
    return rows, faults + ([f"{path}:{len(lines) + 1}: the last line is cut off"] if rest else [])


def _row(line: bytes) -> dict[str, Any]:
    """Parse a row; a ValueError says what is wrong with it."""
    try:
        row = storage.read_json(line.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"not strict JSON: {error}") from error
    if isinstance(row, dict):
        row = checksums.unsigned(row)
        row.setdefault("draw", DEFAULT_DRAW)  # keeps the order of keys, so that rows are written as they were read
    if not isinstance(row, dict) or row.keys() - {MARK} != ROW.keys():
        actual = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"expected an object with the keys {sorted(ROW)}, found {actual}")
    if row.get(MARK, True) is not True:
        raise ValueError(f"{MARK} = {row[MARK]!r}, expected true, or no such key")
    for key, kind in ROW.items():
        accepted = (int, float) if kind is float else kind
        if not isinstance(row[key], accepted) or isinstance(row[key], bool):
            raise ValueError(f"{key} = {row[key]!r}, expected {kind.__name__}")
    if row["count"] < 1 or not row["language"]:
        raise ValueError(f"count = {row['count']} and language = {row['language']!r}, expected 1 or more, and a name")
    if row["selection"] not in SELECTIONS:
        raise ValueError(f"no selection {row['selection']!r}{nearest(row['selection'], SELECTIONS)}")
    if row["metric"] != CHANCE:
        try:
            metric_of(row["metric"])
        except ConfigError as error:
            raise ValueError(str(error)) from error
    low, high = value_range(row["metric"])
    if not low <= row["value"] <= high:
        raise ValueError(f"value = {row['value']!r}, expected {low:g} to {high:g}")
    return row


def aggregate(
    rows: Iterable[Row],
    *,
    source_languages: Sequence[str],
    target_languages: Sequence[str] = (),
    metric: str = "accuracy",
    split: str = "test",
    selection: str = "source_dev",
    axis: Axis = SAMPLES,
    objectives: Mapping[str, Objective] = OBJECTIVES,
) -> ResultsTable:
    """Collect the rows of one experiment into a results table.

    Args:
      rows: all rows; other metrics, splits, and checkpoints are ignored.
      source_languages: the languages to leave out of the average, the main one first.
      target_languages: the languages that every run must have; by default, every language that any run has.
      metric: the metric to report.
      split: the split to report.
      selection: the protocol whose checkpoints are reported.
      axis: what differs between the draws, if there are several (see `draws.axis`).
      objectives: the definitions of the objectives, by name (see `objectives.definitions`).

    Raises:
      UserError: no rows match, a run lacks a language (no average is taken over fewer), a run has two different results
        in one language, the numbers of examples differ, or the rows belong to several tasks.
    """
    rows = list(rows)
    matching = _matching(rows, metric, split, selection)
    if not matching:
        raise DataError(
            f"no results: {metric} on split {split}, checkpoints selected by {selection}; {_describe_available(rows)}"
        )
    tasks = sorted({row["task"] for row in matching})
    if len(tasks) > 1:
        raise DataError(f"results of more than one task in one table: {', '.join(tasks)}")
    runs = _runs(matching, per_language=PROTOCOLS[selection].per_language)
    sources = tuple(source_languages)
    evaluated = {language for run in runs.values() for language in run} - set(sources)
    targets = tuple(target_languages) or tuple(sorted(evaluated))
    if not targets:
        raise DataError(f"no {split} results in any language but the source language {' or '.join(sources)}")
    read = {language for (objective, _), run in runs.items() if objective == TEACHER for language in run}
    read_sources = tuple(source for source in sources if source in read) or sources
    known = {
        name: read_sources
        if name == TEACHER
        else scored_languages(objectives[name].languages if name in objectives else (), sources, targets)
        for name, _ in runs
    }
    for (objective, name), run in runs.items():
        for language in known[objective]:
            if language not in run:
                raise DataError(f"{objective} {name} has no {split} {metric} in {language}: evaluate it first")
    has_draws = len({run.draw for _, run in runs}) > 1
    lines = _lines(runs, known, targets, [TEACHER, *objectives], has_draws=has_draws)
    counts = _counts(matching, (*sources, *targets))
    majority = {row["language"]: row["value"] for row in _matching(rows, CHANCE, split, selection)}
    return ResultsTable(
        tasks[0],
        metric,
        split,
        selection,
        sources,
        targets,
        counts,
        majority,
        lines,
        axis if has_draws else SEEDS,
        objectives,
    )


def _matching(rows: Iterable[Row], metric: str, split: str, selection: str) -> list[Row]:
    requested = (metric, split, selection)
    return [row for row in rows if (row["metric"], row["split"], row["selection"]) == requested]


def _describe_available(rows: Iterable[Row]) -> str:
    """Name the metrics, splits, and selections that have results."""
    available = {(row["split"], row["selection"], row["metric"]) for row in rows if row["metric"] != CHANCE}
    if not available:
        return "there are no results yet"
    splits, selections, metrics = (", ".join(sorted(set(names))) for names in zip(*available, strict=True))
    return f"available: metric {metrics}; split {splits}; selection {selections}"


_Run = tuple[str, RunId]  # the objective and its run


def _runs(rows: Iterable[Row], *, per_language: bool) -> dict[_Run, dict[str, float]]:
    """Return value by language for each run; a repeated row counts once, and a contradiction fails.

    A run has one step, or one for each language if the selection is `per_language`.
    """
    runs: dict[_Run, dict[str, float]] = {}
    steps: dict[tuple[str, RunId, str], int] = {}
    for row in rows:
        key = (row["objective"], run_id(row))
        run = runs.setdefault(key, {})
        step = steps.setdefault((*key, row["language"] if per_language else ""), row["step"])
        if step != row["step"] or run.setdefault(row["language"], row["value"]) != row["value"]:
            raise DataError(
                f"{key[0]} {key[1]} has two different results: steps {step} and {row['step']}, "
                f"{row['split']} {row['metric']} in {row['language']}"
            )
    return runs


def _counts(rows: Iterable[Row], languages: tuple[str, ...]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for row in rows:
        if counts.setdefault(row["language"], row["count"]) != row["count"]:
            raise DataError(
                f"{row['objective']} {run_id(row)} was scored on {row['count']} examples in {row['language']}, "
                f"other runs on {counts[row['language']]}: evaluate all of them on the same data"
            )
    return {language: counts[language] for language in languages if language in counts}


def _lines(
    runs: Mapping[_Run, Mapping[str, float]],
    known_languages: Mapping[str, tuple[str, ...]],
    targets: tuple[str, ...],
    known: Sequence[str],
    *,
    has_draws: bool,
) -> tuple[ObjectiveResults, ...]:
    """Return the results of each objective: the known ones in their order, then any others by name."""
    averages = {
        key: statistics.fmean(run[language] for language in targets)
        for key, run in runs.items()
        if set(targets) <= set(known_languages[key[0]])
    }

    def summary(values: Mapping[RunId, float]) -> Summary:
        return Summary(by_unit(values, has_draws=has_draws))

    lines = []
    for objective in in_order({objective for objective, _ in runs}, known):
        ids = sorted((run for name, run in runs if name == objective), key=lambda run: (order(run.draw), run.seed))
        languages = known_languages[objective]
        has_average = (objective, ids[0]) in averages
        paired = [run for run in ids if (BASELINE, run) in averages] if has_average else []
        lines.append(
            ObjectiveResults(
                objective,
                {name: summary({run: runs[objective, run][name] for run in ids}) for name in languages},
                summary({run: averages[objective, run] for run in ids}) if has_average else None,
                summary({run: averages[objective, run] - averages[BASELINE, run] for run in paired})
                if objective != BASELINE and paired
                else None,
                tuple(ids),
            )
        )
    return tuple(lines)


def by_unit(values: Mapping[RunId, float], *, has_draws: bool) -> dict[Unit, float]:
    """Return the values by seed, or, if there are several draws, the means of the draws."""
    if not has_draws:
        return {run.seed: value for run, value in values.items()}
    draws: dict[str, list[float]] = {}
    for run, value in values.items():
        draws.setdefault(run.draw, []).append(value)
    return {draw: statistics.fmean(group) for draw, group in draws.items()}


def in_order(objectives: Iterable[str], known: Sequence[str] = (TEACHER, *OBJECTIVES)) -> list[str]:
    """Return objectives in the order of `known`, then any others by name."""
    return sorted(objectives, key=lambda name: (known.index(name) if name in known else len(known), name))
