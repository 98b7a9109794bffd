"""Selection protocols side by side: what each way to select checkpoints scores, as in Keung et al. (EMNLP 2020)."""

from collections.abc import Iterable, Mapping, Sequence

from xtransfer import storage
from xtransfer.distillation.objectives import OBJECTIVES, Objective, definitions
from xtransfer.evaluation.results import ObjectiveResults, ResultsTable, Row, Summary, aggregate, read_rows
from xtransfer.report import summary
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.report.workdir_report import name_of
from xtransfer.runs.draws import SAMPLES, Axis
from xtransfer.runs.draws import axis as axis_of
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TEACHER, TaskRecord, Workdir, read_config, read_task
from xtransfer.runtime import terminal

REFERENCE = "source_dev"
"""The protocol that the others are compared with, and the one of the headline."""


def compare_protocols(workdir: Workdir, *, metric: str | None, split: str) -> None:
    """Print a row for each objective and protocol, and write `report/protocols.md` below the workdir.

    The file of another metric or split than the default one has another name, see `workdir_report.file_name`.

    Args:
      workdir: an experiment that has been evaluated.
      metric: a name from `METRICS`, of a metric from 0 to 1; None for the one that the kind of task is reported by.
      split: an evaluated split.

    Raises:
      UserError: there are no such results, or the file cannot be written.
    """
    config, task, rows = read_config(workdir), read_task(workdir), read_rows(workdir.results)
    axis, metric = axis_of(config, {row["draw"] for row in rows}), metric or config.headline_metric
    by_protocol = results_by_protocol(rows, task, metric=metric, split=split, axis=axis, objectives=definitions(config))
    table = protocol_table(by_protocol, task)
    path = workdir.root / "report" / f"{name_of('protocols', by_protocol[0], config)}.md"
    storage.write_atomically(path, "\n".join(table_writer.section(table, "#")))
    table_writer.show(table, terminal.console, wrap=False)
    for note in table.notes:
        terminal.console.print(note, markup=False)
    terminal.log(f"written: {path}")


def results_by_protocol(
    rows: Sequence[Row],
    task: TaskRecord,
    *,
    metric: str,
    split: str,
    axis: Axis = SAMPLES,
    objectives: Mapping[str, Objective] = OBJECTIVES,
) -> list[ResultsTable]:
    """Return the results of each protocol that has any, `REFERENCE` first, in the order of `PROTOCOLS`."""
    available = {row["selection"] for row in rows if (row["metric"], row["split"]) == (metric, split)}
    names = [name for name in PROTOCOLS if name in available or name == REFERENCE]
    return [
        aggregate(
            rows,
            source_languages=task.source_languages,
            target_languages=task.target_languages,
            metric=metric,
            split=split,
            selection=name,
            axis=axis,
            objectives=objectives,
        )
        for name in names
    ]


def protocol_table(by_protocol: Sequence[ResultsTable], task: TaskRecord) -> Table:
    """Return a table of students: source language, average of targets, and its distance from `REFERENCE`.

    Several source languages have one column, with their average.

    Args:
      by_protocol: from `results_by_protocol`.
      task: the task's record.
    """
    first = by_protocol[0]
    rows = [
        (
            results.name_of(line.objective),
            results.selection if PROTOCOLS[results.selection].zero_shot else f"{results.selection} (not zero-shot)",
            summary.value_text(results.source_average(line)),
            summary.value_text(line.average),
            summary.value_text(_difference(line, first), "+.1f"),
        )
        for objective in _objectives(by_protocol)
        for results in by_protocol
        for line in results.lines
        if line.objective == objective
    ]
    header = ("objective", "protocol", summary.source_title(first), "avg of targets", f"minus {REFERENCE}")
    notes = [
        f"{first.metric} in %, mean ± sample standard deviation over {first.axis.units}; the last column is in "
        "points, paired by run.",
        *(f"{results.selection}: {results.checkpoint}." for results in by_protocol),
    ]
    title = f"{summary.title_of(first, task)}, by selection protocol"
    return Table(header, tuple(rows), text_columns=2, title=title, notes=tuple(notes))


def _objectives(by_protocol: Iterable[ResultsTable]) -> list[str]:
    """Return the objectives of students; the teacher has no target languages."""
    names = [line.objective for results in by_protocol for line in results.lines]
    return [name for name in dict.fromkeys(names) if name != TEACHER]


def _difference(line: ObjectiveResults, reference: ResultsTable) -> Summary | None:
    """Return an objective's average of targets minus its own by the reference protocol; None for that protocol."""
    other = next((own for own in reference.lines if own.objective == line.objective), None)
    if other is None or other is line or other.average is None or line.average is None:
        return None
    theirs = other.average.by_unit
    values = {unit: value - theirs[unit] for unit, value in line.average.by_unit.items() if unit in theirs}
    return Summary(values) if values else None
