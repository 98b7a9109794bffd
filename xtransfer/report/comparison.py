"""The paired comparison of two objectives: its table on the terminal, and as Markdown and JSON lines."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.config import ExperimentConfig
from xtransfer.errors import ConfigError
from xtransfer.evaluation import significance
from xtransfer.evaluation.paired import Pair, Students, differences_of, load
from xtransfer.evaluation.significance import Difference
from xtransfer.report import table as table_writer
from xtransfer.report.workdir_report import default_split
from xtransfer.runs.draws import axis as axis_of
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import Workdir, read_config, read_task
from xtransfer.runtime import terminal


def students_of(name: str, workdirs: Sequence[Path]) -> Students:
    """Return the students that OBJECTIVE or DIR:OBJECTIVE names.

    Args:
      name: an objective of the only workdir, or a directory and an objective of it.
      workdirs: the value of `--workdir`.

    Raises:
      UserError: the workdir is not clear.
    """
    root, has_root, objective = name.rpartition(":")
    if has_root:
        return Students(Workdir(Path(root)), objective)
    if len(workdirs) != 1:
        raise ConfigError(f"--compare {name}: name one workdir with --workdir DIR, or write DIR:{name}")
    return Students(Workdir(workdirs[0]), name)


def compare(a: Students, b: Students, *, split: str | None = None, selection: str = "source_dev") -> None:
    """Print the comparison of two objectives, and write it to `report/compare-*.md` and `.jsonl` in the workdir of A.

    Args:
      a: objective A.
      b: objective B.
      split: None for test, or for the first evaluated split if test was not evaluated.
      selection: a name from `PROTOCOLS`.

    Raises:
      UserError: the two cannot be compared, see `paired.load`; or a file cannot be written.
    """
    names = _names(a, b)
    config = read_config(a.workdir)
    split = split or default_split(config.evaluation_splits)
    pair = load(a, b, split=split, selection=selection)
    task = read_task(a.workdir)
    differences = differences_of(pair, task.source_language, task.target_languages)
    title = f"{task.name}{' (synthetic)' if task.synthetic else ''}: {names[0]} minus {names[1]}, accuracy on {split}"
    table = _table(title, names, pair, config, differences, selection, task.source_language)
    table_writer.show(table, terminal.console, wrap=False)
    for note in table.notes:
        terminal.log(note)
    path = a.workdir.root / "report" / f"compare-{'-'.join(names).replace(':', '-')}"
    markdown, lines = path.with_name(f"{path.name}.md"), path.with_name(f"{path.name}.jsonl")
    storage.write_atomically(markdown, "\n".join(table_writer.section(table, "#")))
    unit = "draw" if len(pair.a.draws) > 1 else "seed"
    storage.write_jsonl(lines, rows(names, differences, split=split, selection=selection, unit=unit))
    for written in (markdown, lines):
        terminal.log(f"written: {written}")


def rows(
    names: Sequence[str], differences: Sequence[Difference], *, split: str, selection: str, unit: str
) -> Iterator[dict[str, Any]]:
    """Yield every difference for programs, as shares; the language of the average is null.

    Args:
      names: the names of A and B.
      differences: the differences.
      split: the split that was evaluated.
      selection: the protocol that selected the checkpoints.
      unit: the unit that the intervals go over, "seed" or "draw".
    """
    for difference in differences:
        yield {
            "a": names[0],
            "b": names[1],
            "split": split,
            "selection": selection,
            "language": difference.language,
            "count": difference.count,
            "accuracy_a": difference.a,
            "accuracy_a_interval": difference.a_interval,
            "accuracy_b": difference.b,
            "accuracy_b_interval": difference.b_interval,
            "difference": difference.mean,
            "difference_interval": difference.interval,
            f"difference_by_{unit}": {str(name): value for name, value in difference.by_unit.by_unit.items()},
            "p": difference.p,
            "p_holm": difference.p_holm,
            "p_mcnemar": difference.p_mcnemar,
        }


def _names(a: Students, b: Students) -> tuple[str, str]:
    """Return the names of A and B, with the one of their workdirs if these differ."""
    if a.workdir.root.resolve() != b.workdir.root.resolve():
        return f"{a.workdir.root.resolve().name}:{a.objective}", f"{b.workdir.root.resolve().name}:{b.objective}"
    if a.objective == b.objective:
        raise ConfigError(f"--compare {a.objective} {b.objective}: name two objectives, or two workdirs")
    return a.objective, b.objective


def _table(
    title: str,
    names: tuple[str, str],
    pair: Pair,
    config: ExperimentConfig,
    differences: Sequence[Difference],
    selection: str,
    source_language: str,
) -> table_writer.Table:
    header = ("language", "items", *names, "difference", "95 % interval", "p", "p (Holm)", "p (McNemar)")
    lines = tuple(_cells(difference, source_language) for difference in differences)
    return table_writer.Table(header, lines, title=title, notes=tuple(_notes(pair, config, selection)))


def _cells(difference: Difference, source_language: str) -> tuple[str, ...]:
    low, high = (bound * 100 for bound in difference.interval)
    is_source = difference.language == source_language
    return (
        f"{difference.language} (source)" if is_source else difference.language or "avg of targets",
        f"{difference.count:,}",
        f"{difference.a * 100:.1f}",
        f"{difference.b * 100:.1f}",
        f"{difference.mean * 100:+.1f}",
        f"[{low:+.1f}, {high:+.1f}]",
        *map(_p, (difference.p, difference.p_holm, difference.p_mcnemar)),
    )


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _notes(pair: Pair, config: ExperimentConfig, selection: str) -> Iterator[str]:
    seeds = ", ".join(map(str, sorted({run.seed for run in pair.a.runs})))
    draws = pair.a.draws
    paired = f"draw ({', '.join(draws)}), and seed ({seeds})" if len(draws) > 1 else f"and seed ({seeds})"
    yield (
        f"Accuracy in %, differences in points, paired by test item{',' if len(draws) > 1 else ''} {paired}; "
        f"checkpoint: {PROTOCOLS[selection].description}."
    )
    axis, count = axis_of(config, draws), len(pair.a.units)
    if count > 1:
        yield f"Means and intervals are over {axis.over(count)}."
    joint = "A text and its translations are resampled together." if pair.shares_items else ""
    yield f"Interval and p: {significance.RESAMPLES:,} resamples of items and {axis.units}, two-sided. {joint}".rstrip()
    yield "p (Holm) is corrected for the number of target languages. p (McNemar) is over items, for these runs alone."
    if count == 1:
        yield "There is one seed, so nothing here says what another seed would give."
    if pair.left_out:
        yield f"Left out, because only one of the two has them: {', '.join(map(str, pair.left_out))}."
