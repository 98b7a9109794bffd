"""How often students predict what their teacher predicts: a table for one workdir."""

from collections.abc import Mapping, Sequence

from xtransfer import storage
from xtransfer.distillation.objectives import OBJECTIVES, Objective, definitions
from xtransfer.errors import ConfigError, DataError
from xtransfer.evaluation.results import Row, Summary, by_unit, in_order, marked_name, read_rows, run_id
from xtransfer.report import summary
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.report.workdir_report import default_selection, default_split, file_name
from xtransfer.runs import draws
from xtransfer.runs.draws import SEEDS, Axis
from xtransfer.runs.find import known_languages
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TEACHER, RunId, Workdir, read_config, read_task
from xtransfer.runtime import terminal


def report_agreement(workdir: Workdir, *, metric: str, split: str | None, selection: str | None) -> None:
    """Print a row for each objective, and write `report/<metric>.md` below the workdir.

    Args:
      workdir: an experiment that has been evaluated.
      metric: a name from `TEACHER_METRICS`.
      split: None for test, or for the first evaluated split if test was not evaluated.
      selection: a name from `PROTOCOLS`; None for source_dev, or for last without a dev split.

    Raises:
      UserError: there are no such results, or the file cannot be written.
    """
    config, task, rows = read_config(workdir), read_task(workdir), read_rows(workdir.results)
    if config.teacher.is_file:
        raise ConfigError(
            f"{workdir.root}: there is no teacher to agree with, because its logits come from a file: leave out "
            f"--metric {metric}"
        )
    selection = selection or default_selection(has_dev=task.has_dev)
    usual_split = default_split(config.evaluation_splits)
    chosen = [
        row
        for row in rows
        if (row["split"], row["selection"]) == (split or usual_split, selection)
        and row["language"] in known_languages(config, task, TEACHER)
    ]
    if not any(row["metric"] == metric for row in chosen):
        raise DataError(
            f"{workdir.results}: no {metric} on split {split or usual_split}, checkpoints selected by {selection}: "
            f"run python -m xtransfer.evaluate --workdir {workdir.root}"
        )
    axis = draws.axis(config, {row["draw"] for row in chosen})
    headline = config.headline_metric
    table = table_of(
        chosen,
        metric,
        selection,
        axis,
        synthetic=task.synthetic,
        headline=headline,
        known=definitions(config),
        num_sources=len(task.source_languages),
    )
    chosen_by = {"metric": headline, "split": split or usual_split, "selection": selection}
    name = file_name(metric, config, **chosen_by, has_dev=task.has_dev)
    path = workdir.root / "report" / f"{name}.md"
    storage.write_atomically(path, "\n".join(table_writer.section(table, "#")))
    table_writer.show(table, terminal.console, wrap=False)
    for line in (*table.notes, f"written: {path}"):
        terminal.log(line)


def table_of(
    rows: Sequence[Row],
    metric: str,
    selection: str,
    axis: Axis,
    *,
    synthetic: bool,
    headline: str = "accuracy",
    known: Mapping[str, Objective] = OBJECTIVES,
    num_sources: int = 1,
) -> Table:
    """Return a row for each objective: its agreement with the teacher, and its headline metric and the teacher's.

    Args:
      rows: the rows of one split, one selection, and the source languages that the teacher reads.
      metric: a name from `TEACHER_METRICS`.
      selection: the protocol.
      axis: what differs between the draws, if there are several.
      synthetic: whether the text was generated.
      headline: the metric beside it.
      known: the definitions of the objectives, by name.
      num_sources: the number of source languages, whose dev splits selected the checkpoints.
    """
    first, counts = rows[0], {row["language"]: row["count"] for row in rows if row["metric"] == metric}
    columns = [(name, language) for language in counts for name in (metric, headline)]
    values = {(name, language): _by_objective(rows, name, language) for name, language in columns}
    agreeing = {objective for language in counts for objective in values[metric, language]}
    scored = {objective for by_objective in values.values() for objective in by_objective}
    objectives = [name for name in in_order(scored) if name in agreeing or name == TEACHER]
    lines = [
        (marked_name(known, name), *(summary.value_text(values[column].get(name)) for column in columns))
        for name in objectives
    ]
    count = max(len(value.by_unit) for language in counts for value in values[metric, language].values())
    has_draws = len({row["draw"] for row in rows}) > 1
    spread = f"mean ± sample standard deviation over {(axis if has_draws else SEEDS).over(count)}"
    what = "class" if headline == "accuracy" else "set of labels"
    examples = " and ".join(f"{count:,}" for count in dict.fromkeys(counts.values()))
    notes = (
        f"In %, {spread if count > 1 else 'one run each, spread unknown'}. Checkpoint of each student: "
        f"{PROTOCOLS[selection].text(num_sources)} ({selection}).",
        f"{metric}: the share of {examples} examples on which a student predicts the same {what} as the "
        "selected checkpoint of its own draw's teacher, whatever their labels are. More is not always better.",
    )
    task = f"{first['task']} (synthetic)" if synthetic else first["task"]
    header = ("objective", *(f"{name}, {language} (source)" for name, language in columns))
    return Table(header, tuple(lines), title=f"{task}: {metric} on {first['split']}", notes=notes)


def _by_objective(rows: Sequence[Row], metric: str, language: str) -> dict[str, Summary]:
    values: dict[str, dict[RunId, float]] = {}
    for row in rows:
        if (row["metric"], row["language"]) == (metric, language):
            values.setdefault(row["objective"], {})[run_id(row)] = row["value"]
    has_draws = len({row["draw"] for row in rows}) > 1
    return {name: Summary(by_unit(runs, has_draws=has_draws)) for name, runs in values.items()}
