"""The report of a sweep: a table of its points, and the average of the target languages against the swept key."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xtransfer import storage
from xtransfer.distillation.objectives import definitions
from xtransfer.errors import DataError, UserError, one_line, user_error
from xtransfer.evaluation.results import BASELINE, ResultsTable, Summary, aggregate, read_rows
from xtransfer.report import summary, sweep_plot
from xtransfer.report import table as table_writer
from xtransfer.report.workdir_report import default_split, name_of
from xtransfer.runs import draws, sweep
from xtransfer.runs.workdir import TEACHER, Workdir, read_config, read_task
from xtransfer.runtime import terminal


@dataclass(frozen=True)
class PointResults:
    """The results of one point of a sweep.

    Attributes:
      name: its name.
      values: its values by config key.
      results: its results.
      synthetic: whether its text was generated.
    """

    name: str
    values: Mapping[str, Any]
    results: ResultsTable
    synthetic: bool


def report_sweep(
    root: Path, *, metric: str | None = None, split: str | None = None, selection: str = "source_dev"
) -> list[Workdir]:
    """Print the table of a sweep, and write sweep.md, sweep.png, and sweep.jsonl to `report/` below its directory.

    A point without a finished student, or with results that cannot be used, is named below the table. The files of
    other results than the default ones have other names, see `workdir_report.file_name`.

    Args:
      root: the directory of the sweep.
      metric: a name from `METRICS`, of a metric from 0 to 1; None for the one that the kind of task is reported by.
      split: None for test, or for the first evaluated split if test was not evaluated.
      selection: a name from `PROTOCOLS`.

    Returns:
      The workdirs of the points in the table.

    Raises:
      UserError: no point has such results, or a file cannot be written.
    """
    recorded = sweep.read(root)
    points: list[PointResults] = []
    waiting: list[str] = []
    failures: dict[str, UserError] = {}
    for name, values in recorded.points.items():
        workdir = Workdir(sweep.directory(root, name))
        try:
            point = _results(workdir, name, values, metric, split, selection)
        except UserError as error:
            failures[name] = error
            continue
        if point is None:
            waiting.append(name)
        else:
            points.append(point)
    if not points and failures:
        raise next(iter(failures.values()))
    if not points:
        raise DataError(f"{root}: no point of the sweep has results yet: start it again with python -m xtransfer.main")
    table = table_of(recorded.keys, points, waiting, failures)
    directory, stem = root / "report", name_of("sweep", points[0].results, read_config(_workdir(root, points[0])))
    text, lines, picture = (directory / f"{stem}.{ending}" for ending in ("md", "jsonl", "png"))
    storage.write_atomically(text, "\n".join(table_writer.section(table, "#")))
    storage.write_jsonl(lines, rows(points))
    written = [text, lines]
    try:
        storage.write_atomically(picture, sweep_plot.plot(curves(recorded.keys, points), table.title, _note(points)))
        written.append(picture)
    except UserError:
        raise
    except Exception as error:  # a drawing library has many ways to fail, and none of them is worth the results
        picture.unlink(missing_ok=True)  # of earlier results
        terminal.log(f"warning: {picture} cannot be drawn ({one_line(error)}); {text} has the numbers")
    table_writer.show(table, terminal.console, wrap=False)
    for line in (*table.notes, *(f"written: {path}" for path in written)):
        terminal.log(line)
    return [_workdir(root, point) for point in points]


def _workdir(root: Path, point: PointResults) -> Workdir:
    return Workdir(sweep.directory(root, point.name))


def _results(
    workdir: Workdir, name: str, values: Mapping[str, Any], metric: str | None, split: str | None, selection: str
) -> PointResults | None:
    """Return the results of a point, or None if no student has any yet; a UserError says if they cannot be used."""
    if not workdir.results.is_file():
        return None
    config, task, rows = read_config(workdir), read_task(workdir), read_rows(workdir.results)
    if all(row["objective"] == TEACHER for row in rows):  # the teacher's rows may be copied before any student trains
        return None
    try:
        results = aggregate(
            rows,
            source_languages=config.task.sources,
            target_languages=task.target_languages,
            metric=metric or config.headline_metric,
            split=split or default_split(config.evaluation_splits),
            selection=selection,
            axis=draws.axis(config, {row["draw"] for row in rows}),
            objectives=definitions(config),
        )
    except UserError as error:
        raise user_error(error.exit_status, f"{workdir.root}: {error}") from error
    return PointResults(name, values, results, task.synthetic)


def table_of(
    keys: Sequence[str],
    points: Sequence[PointResults],
    waiting: Sequence[str] = (),
    failures: Mapping[str, UserError] = MappingProxyType({}),
) -> table_writer.Table:
    """Return a row for each point: values, the teacher in the source language, and the students' averages and gains.

    Args:
      keys: the swept keys.
      points: the points with results.
      waiting: the names of the points without results.
      failures: the errors of the points whose results cannot be used, by name.
    """
    objectives = _objectives(points)
    gains = [name for name in objectives if any(name in _gains(point) for point in points)]
    # A sweep may be over what an objective reads, so one marked point marks the column.
    shown = {name: max((point.results.name_of(name) for point in points), key=len) for name in objectives}
    header = (*keys, "teacher, source", *shown.values(), *(f"gain of {shown[name]}" for name in gains))
    lines = tuple(
        (
            *(value_text(point.values[key]) for key in keys),
            summary.value_text(_teacher(point)),
            *(summary.value_text(_averages(point).get(name)) for name in objectives),
            *(_with_interval(_gains(point).get(name)) for name in gains),
        )
        for point in points
    )
    first = points[0].results
    title = (
        f"{summary.task_name(first, synthetic=points[0].synthetic)}: {first.metric} on {first.split} by "
        f"{' and '.join(keys)}; checkpoint: {first.checkpoint}"
    )
    notes = [
        f"{first.metric}{summary.direction_note(first)} in %, averaged over the target languages "
        f"{', '.join(first.target_languages)}; the teacher in {' and '.join(_teacher_languages(first))}. "
        f"Checkpoint of each run: {first.checkpoint} ({first.selection}).",
        *_spread_notes(points),
    ]
    if gains:
        over = _interval_axes(points, _gains)
        intervals = f", with 95 % intervals by Student's t over {over}; test items are not included" if over else ""
        notes.append(f"Gains over {BASELINE} at the same point are in points, paired by run{intervals}.")
    if waiting:
        notes.append(f"No results yet: {'; '.join(waiting)}.")
    notes += [f"Left out: {name}: {error}." for name, error in failures.items()]
    return table_writer.Table(header, lines, text_columns=len(keys), title=title, notes=tuple(notes))


def curves(keys: Sequence[str], points: Sequence[PointResults]) -> list[sweep_plot.Panel]:
    """Return a panel for each combination of the values of all keys but the first, with a line for each objective."""
    panels: dict[tuple[str, ...], dict[str, list[sweep_plot.Mark]]] = {}
    for point in points:
        names = tuple(f"{key} = {value_text(point.values[key])}" for key in keys[1:])
        for objective, average in _averages(point).items():
            mark = sweep_plot.Mark(point.values[keys[0]], average.mean, average.interval)
            panels.setdefault(names, {}).setdefault(point.results.name_of(objective), []).append(mark)
    first = points[0].results
    label = f"{first.metric} (%), average of targets"
    return [sweep_plot.Panel(", ".join(names), keys[0], label, lines) for names, lines in panels.items()]


def rows(points: Sequence[PointResults]) -> Iterator[dict[str, Any]]:
    """Yield the means and 95 % intervals of every point for programs, as shares."""
    for point in points:
        kinds = {"average": _averages(point), "gain": _gains(point)}
        for quantity, by_objective in kinds.items():
            for objective, value in by_objective.items():
                yield {
                    "point": point.name,
                    "values": dict(point.values),
                    "objective": objective,
                    "quantity": quantity,
                    "metric": point.results.metric,
                    "split": point.results.split,
                    "selection": point.results.selection,
                    "mean": value.mean,
                    "interval": value.interval,
                    "units": point.results.axis.units,
                    "count": len(value.by_unit),
                }


def value_text(value: Any) -> str:
    """Return a value of a config key for people."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _averages(point: PointResults) -> dict[str, Summary]:
    return {line.objective: line.average for line in point.results.lines if line.average is not None}


def _gains(point: PointResults) -> dict[str, Summary]:
    return {line.objective: line.gain for line in point.results.lines if line.gain is not None}


def _teacher(point: PointResults) -> Summary | None:
    lines = (line for line in point.results.lines if line.objective == TEACHER)
    line = next(lines, None)
    return point.results.source_average(line) if line is not None else None


def _teacher_languages(results: ResultsTable) -> tuple[str, ...]:
    """Return the source languages that the teacher reads, or all of them without a teacher."""
    read = (tuple(line.languages) for line in results.lines if line.objective == TEACHER)
    return next(read, results.source_languages)


def _objectives(points: Sequence[PointResults]) -> list[str]:
    return list(dict.fromkeys(name for point in points for name in _averages(point)))


def _with_interval(value: Summary | None) -> str:
    if value is None or value.interval is None:
        return summary.value_text(value, "+.1f")
    low, high = (bound * 100 for bound in value.interval)
    return f"{value.mean * 100:+.1f} [{low:+.1f}, {high:+.1f}]"


def _spread_notes(points: Sequence[PointResults]) -> list[str]:
    """Say what ± and the intervals go over, once for all points or for each group of them."""
    by_text: dict[str, list[str]] = {}
    for point in points:
        by_text.setdefault(_spread(point), []).append(point.name)
    if len(by_text) == 1:
        return [f"{next(iter(by_text))}."]
    return [f"{text}: {'; '.join(names)}." for text, names in by_text.items()]


def _spread(point: PointResults) -> str:
    count = max(len(average.by_unit) for average in _averages(point).values())
    over = point.results.axis.over(count)
    return f"± is the sample standard deviation over {over}" if count > 1 else "One run each, spread unknown"


def _note(points: Sequence[PointResults]) -> str:
    """Return what the error bars of the chart are, or "" if there are none."""
    over = _interval_axes(points, _averages)
    return f"bars: 95 % interval over {over}; test items are not included" if over else ""


def _interval_axes(points: Sequence[PointResults], quantity: Callable[[PointResults], Mapping[str, Summary]]) -> str:
    """Return what the intervals of a quantity go over, or "" if there are none."""
    axes = {
        point.results.axis.over(len(value.by_unit)): None
        for point in points
        for value in quantity(point).values()
        if value.interval is not None
    }
    return " or ".join(axes)
