"""The report of one workdir: its table on the terminal, and the table, a chart, and a page as files."""

import re
from collections.abc import Sequence
from pathlib import Path

from xtransfer import storage
from xtransfer.config import ExperimentConfig
from xtransfer.distillation.objectives import definitions
from xtransfer.errors import one_line
from xtransfer.evaluation.results import ResultsTable, aggregate, read_rows
from xtransfer.report import plot, summary
from xtransfer.report.page.page import page
from xtransfer.report.page.parts.results import paired_gains, problem
from xtransfer.report.page.sources import Source
from xtransfer.runs import draws, teachers
from xtransfer.runs.workdir import TaskRecord, Workdir, read_config, read_task
from xtransfer.runtime import terminal

_UNSAFE = re.compile(r"[^\w.-]")  # characters that a file's name does not keep, such as the bar of class_f1/LABEL


def report(
    workdir: Workdir, *, metric: str | None = None, split: str | None = None, selection: str | None = None
) -> Source:
    """Print the results of a workdir, and write results.md, results.png, and report.html to `report/` below it.

    The files of other results than the default ones have other names, see `file_name`.

    Args:
      workdir: an experiment that has been evaluated.
      metric: a name from `METRICS`, of a metric from 0 to 1; None for the one that the kind of task is reported by.
      split: None for test, or for the first evaluated split if test was not evaluated.
      selection: a name from `PROTOCOLS`; None for source_dev, or for last without a dev split.

    Returns:
      What was reported, for a page of several workdirs.

    Raises:
      UserError: there are no such results, or a file cannot be written.
    """
    config, task = read_config(workdir), read_task(workdir)
    rows = read_rows(workdir.results)
    results = aggregate(
        rows,
        source_languages=config.task.sources,
        target_languages=task.target_languages,
        metric=metric or config.headline_metric,
        split=split or default_split(config.evaluation_splits),
        selection=selection or default_selection(has_dev=task.has_dev),
        axis=draws.axis(config, {row["draw"] for row in rows}),
        objectives=definitions(config),
    )
    source = Source(workdir, config, task, tuple(rows), results)
    directory = workdir.root / "report"
    gains, origins = _paired_gains(source), teachers.origins(config)
    names = [name_of(stem, results, config, has_dev=task.has_dev) for stem in ("results", "report")]
    written = [
        *write(results, directory, task, gains, origins, name=names[0]),
        *write_page([source], directory, names[1]),
    ]
    try:
        summary.show(results, terminal.console, task, gains, origins)
    except Exception as error:  # whatever a terminal or an odd name does, the results are in the files
        terminal.log(f"warning: the table cannot be printed ({one_line(error)}); {written[0]} has it")
    for path in written:
        terminal.log(f"written: {path}")
    return source


def _paired_gains(source: Source) -> summary.Gains:
    """Return the paired gains; predictions that cannot be compared cost a warning."""
    try:
        if source.students and (reason := problem(source)):
            terminal.log(f"warning: {reason}")
        return paired_gains(source)
    except Exception as error:  # as with the picture, the results do not depend on it
        terminal.log(f"warning: {source.workdir.root}: the predictions cannot be compared ({one_line(error)})")
        return summary.NO_GAINS


def default_split(evaluated: tuple[str, ...]) -> str:
    """Return the split to report by default: test, or the first that was evaluated."""
    return "test" if "test" in evaluated else evaluated[0]


def default_selection(*, has_dev: bool) -> str:
    """Return the protocol to report by default: source_dev, or last without a dev split."""
    return "source_dev" if has_dev else "last"


def file_name(
    stem: str, config: ExperimentConfig, *, metric: str, split: str, selection: str, has_dev: bool = True
) -> str:
    """Return the name of a report's files without an ending: the stem, and whatever is not reported by default.

    So an oracle's numbers, or another metric's, never replace the headline: "results-target_dev", "sweep-macro_f1-dev".
    """
    defaults = {
        config.headline_metric,
        default_selection(has_dev=has_dev),
        default_split(config.evaluation_splits),
    }
    others = [name for name in (metric, split, selection) if name not in defaults]
    return "-".join([stem, *(_UNSAFE.sub("_", name) for name in others)])


def name_of(stem: str, results: ResultsTable, config: ExperimentConfig, *, has_dev: bool = True) -> str:
    """Return the `file_name` of a results table."""
    chosen = {"metric": results.metric, "split": results.split, "selection": results.selection}
    return file_name(stem, config, **chosen, has_dev=has_dev)


def write(
    results: ResultsTable,
    directory: Path,
    task: TaskRecord,
    gains: summary.Gains = summary.NO_GAINS,
    notes: Sequence[str] = (),
    *,
    name: str = "results",
) -> list[Path]:
    """Write the table and the picture, and return their paths; a picture that cannot be drawn costs a warning.

    Args:
      results: the table.
      directory: where to write.
      task: the task's record.
      gains: the paired gains of the objectives.
      notes: further lines below the table.
      name: the name of both files, without an ending.
    """
    text, picture = directory / f"{name}.md", directory / f"{name}.png"
    storage.write_atomically(text, summary.markdown(results, task, gains, notes))
    try:
        content = plot.plot(results, task)
    except Exception as error:  # a drawing library has many ways to fail, and none of them is worth the results
        picture.unlink(missing_ok=True)  # of earlier results
        terminal.log(f"warning: {picture} cannot be drawn ({one_line(error)}); {text} has the numbers")
        return [text]
    storage.write_atomically(picture, content)
    return [text, picture]


def write_page(sources: Sequence[Source], directory: Path, name: str = "report") -> list[Path]:
    """Write the page `<name>.html`, and return its path; a page that cannot be made costs a warning."""
    path = directory / f"{name}.html"
    try:
        content = page(sources)
    except Exception as error:  # as with the picture, the results do not depend on it
        path.unlink(missing_ok=True)  # of earlier results
        terminal.log(f"warning: {path} cannot be made ({one_line(error)})")
        return []
    storage.write_atomically(path, content)
    return [path]
