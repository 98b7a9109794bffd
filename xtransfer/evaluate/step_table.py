"""The scores of checkpoints by step and language: a line for each as it lands, and a table at the end."""

from collections.abc import Mapping, Sequence
from typing import Any

from xtransfer.data.task import Task
from xtransfer.distillation.objectives import OBJECTIVES, Objective, uses_target_text
from xtransfer.evaluation.metrics import score_names, value_range
from xtransfer.evaluation.results import TARGET_TEXT_MARK, marked_name, run_id
from xtransfer.evaluation.steps import Scored, Skipped
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.runs.workdir import DEFAULT_DRAW, TEACHER, RunId
from xtransfer.runtime import terminal

_NONE = "–"


def line(
    result: Scored | Skipped, task: Task, names: Sequence[str], objectives: Mapping[str, Objective] = OBJECTIVES
) -> str:
    """Return one line about a checkpoint: its values of the first metric, or why it was skipped."""
    title = f"{result.run.name} step {result.step:,}"
    if isinstance(result, Skipped):
        return f"warning: {title}: skipped: {result.reason}"
    metric = score_names(names, task.labels)[0]
    values = [row for row in result.rows if row["metric"] == metric]
    shown = " · ".join(f"{row['split']} {row['language']} {cell(metric, row['value'])}" for row in values)
    mark = f" ({TARGET_TEXT_MARK})" if uses_target_text(objectives, result.run.objective) else ""
    return f"{title}{mark}: {metric} {shown}"


def table(
    rows: Sequence[dict[str, Any]],
    task: Task,
    names: Sequence[str],
    objectives: Mapping[str, Objective] = OBJECTIVES,
) -> Table:
    """Return a table with a row for each checkpoint and a column for each split and language, by the first metric.

    Args:
      rows: rows of `watch.jsonl`, in the order of the checkpoints.
      task: the task.
      names: the metrics that were scored.
      objectives: the definitions of the objectives, by name.
    """
    metric = score_names(names, task.labels)[0]
    rows = [row for row in rows if row["metric"] == metric]
    columns = list(dict.fromkeys((row["split"], row["language"]) for row in sorted(rows, key=_is_teacher)))
    checkpoints: dict[tuple[str, RunId, int], dict[tuple[str, str], float]] = {}
    for row in rows:
        values = checkpoints.setdefault((row["objective"], run_id(row), row["step"]), {})
        values[row["split"], row["language"]] = row["value"]
    has_draws = any(row["draw"] != DEFAULT_DRAW for row in rows)
    lines = []
    for (objective, run, step), values in checkpoints.items():
        shown = [cell(metric, values[column]) if column in values else _NONE for column in columns]
        draw = (run.draw,) if has_draws else ()
        name = marked_name(objectives, objective)
        lines.append((name, *draw, _NONE if objective == TEACHER else str(run.seed), f"{step:,}", *shown))
    draw = ("draw",) if has_draws else ()
    header = ("objective", *draw, "seed", "step", *(f"{split} {language}" for split, language in columns))
    unit = " in %" if _is_share(metric) else ""
    return Table(header, tuple(lines), title=f"{task.name}: {metric}{unit} of each checkpoint")


def show(
    rows: Sequence[dict[str, Any]],
    task: Task,
    names: Sequence[str],
    objectives: Mapping[str, Objective] = OBJECTIVES,
) -> None:
    """Print the table, in Markdown if the output is not a terminal."""
    show_table(table(rows, task, names, objectives))


def show_table(content: Table) -> None:
    """Print a table with its title, in Markdown if the output is not a terminal."""
    if terminal.console.is_terminal:
        table_writer.show(content, terminal.console, wrap=False)
        return
    for text in ("", content.title, "", *table_writer.markdown(content), ""):
        terminal.log(text)


def cell(name: str, value: float) -> str:
    """Return a score as text: in percent if its metric is a share."""
    return f"{100 * value:.1f}" if _is_share(name) else f"{value:.4f}"


def _is_share(name: str) -> bool:
    return value_range(name) == (0, 1)


def _is_teacher(row: dict[str, Any]) -> bool:
    # Students come first, because the teacher lacks languages, and the columns are in the order of their first row.
    return bool(row["objective"] == TEACHER)
