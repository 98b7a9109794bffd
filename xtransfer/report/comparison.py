"""The paired comparison of two objectives: its table on the terminal, and as Markdown and JSON lines."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.config import ExperimentConfig
from xtransfer.data.names import within_limit
from xtransfer.distillation.objectives import OBJECTIVES, definitions, kinds_of_target_text
from xtransfer.errors import ConfigError
from xtransfer.evaluation import significance
from xtransfer.evaluation.paired import Pair, Students, differences_of, load
from xtransfer.evaluation.results import TARGET_TEXT_MARK
from xtransfer.evaluation.significance import Difference
from xtransfer.report import table as table_writer
from xtransfer.report.workdir_report import default_selection, default_split
from xtransfer.runs import sharing
from xtransfer.runs.draws import axis as axis_of
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import Workdir, read_config, read_task
from xtransfer.runtime import terminal

_PAIRED = ("task.labelled_seed", "teacher_seed")


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


def check_comparable(metric: str, a: Students, b: Students) -> None:
    """Refuse a metric that objectives are not compared by."""
    for students in (a, b):
        headline = read_config(students.workdir).headline_metric
        if metric != headline:
            raise ConfigError(f"--metric {metric}: --compare compares {headline} only")


def compare(a: Students, b: Students, *, split: str | None = None, selection: str | None = None) -> None:
    """Print the comparison of two objectives, and write it to `report/compare-*.md` and `.jsonl` in the workdir of A.

    Args:
      a: objective A.
      b: objective B.
      split: None for test, or for the first evaluated split if test was not evaluated.
      selection: a name from `PROTOCOLS`; None for source_dev, or for last if neither workdir has a dev split.

    Raises:
      UserError: the two cannot be compared, see `paired.load`; or a file cannot be written.
    """
    names = _names(a, b)
    config = read_config(a.workdir)
    split = split or default_split(config.evaluation_splits)
    usual = default_selection(has_dev=any(read_task(one.workdir).has_dev for one in (a, b)))
    selection = selection or usual
    pair = load(a, b, split=split, selection=selection)
    task = read_task(a.workdir)
    differences = differences_of(pair, task.source_languages, task.target_languages)
    notes, metric = tuple(_notes(a, b, pair, config, selection)), config.headline_metric
    shown_names = _marked(a, names[0]), _marked(b, names[1])
    title = f"{task.name}{' (synthetic)' if task.synthetic else ''}: {' minus '.join(shown_names)}, {metric} on {split}"
    table = _table(title, shown_names, differences, task.source_languages, notes)
    brief = _table(title, shown_names, differences, task.source_languages, notes, intervals=False)
    shown = table if table_writer.width(table) <= terminal.console.width else brief
    table_writer.show(shown, terminal.console, wrap=False)
    for note in table.notes:
        terminal.log(note)
    path = (
        a.workdir.root
        / "report"
        / within_limit(_file_name(names, split, "" if selection == usual else selection, config))
    )
    markdown, lines = path.with_name(f"{path.name}.md"), path.with_name(f"{path.name}.jsonl")
    storage.write_atomically(markdown, "\n".join(table_writer.section(table, "#")))
    unit = "draw" if len(pair.a.draws) > 1 else "seed"
    differing = rows(names, differences, split=split, selection=selection, unit=unit, metric=metric)
    storage.write_jsonl(lines, differing)
    for written in (markdown, lines):
        terminal.log(f"written: {written}")


def rows(
    names: Sequence[str],
    differences: Sequence[Difference],
    *,
    split: str,
    selection: str,
    unit: str,
    metric: str = "accuracy",
) -> Iterator[dict[str, Any]]:
    """Yield every difference for programs, as shares; the language of the average is null.

    Args:
      names: the names of A and B.
      differences: the differences.
      split: the split that was evaluated.
      selection: the protocol that selected the checkpoints.
      unit: the unit that the intervals go over, "seed" or "draw".
      metric: what is compared.
    """
    for difference in differences:
        yield {
            "a": names[0],
            "b": names[1],
            "split": split,
            "selection": selection,
            "language": difference.language,
            "count": difference.count,
            f"{metric}_a": difference.a,
            f"{metric}_a_interval": difference.a_interval,
            f"{metric}_b": difference.b,
            f"{metric}_b_interval": difference.b_interval,
            "difference": difference.mean,
            "difference_interval": difference.interval,
            f"difference_by_{unit}": {str(name): value for name, value in difference.by_unit.by_unit.items()},
            "p": difference.p,
            "p_holm": difference.p_holm,
            "p_mcnemar": difference.p_mcnemar,
        }


def _names(a: Students, b: Students) -> tuple[str, str]:
    """Return the names of A and B, with the ends of their workdirs' paths that differ if there are two."""
    first, second = a.workdir.root.resolve(), b.workdir.root.resolve()
    if first == second:
        if a.objective == b.objective:
            raise ConfigError(f"--compare {a.objective} {b.objective}: name two objectives, or two workdirs")
        return a.objective, b.objective
    count = 1
    while first.parts[-count:] == second.parts[-count:]:
        count += 1
    return tuple(  # type: ignore[return-value]
        f"{'/'.join(part.strip('/') for part in root.parts[-count:])}:{students.objective}"
        for root, students in ((first, a), (second, b))
    )


def _marked(students: Students, name: str) -> str:
    """Return the name of one side, with a mark if it uses text in target languages."""
    return f"{name} ({TARGET_TEXT_MARK})" if _kinds_of_target_text(students) else name


def _kinds_of_target_text(students: Students) -> tuple[str, ...]:
    return kinds_of_target_text(definitions(read_config(students.workdir)), students.objective)


def _is_of_some_languages(students: Students) -> bool:
    known = definitions(read_config(students.workdir))
    return students.objective in known and bool(known[students.objective].languages)


def _file_name(names: Sequence[str], split: str, selection: str, config: ExperimentConfig) -> str:
    """Return the name of the files without their ending, with `selection` and any split but the default one."""
    parts = ["compare", *(re.sub("[:/]", "-", name) for name in names)]
    if split != default_split(config.evaluation_splits):
        parts.append(split)
    if selection:
        parts.append(selection)
    return "-".join(parts)


def differing_settings(a: Students, b: Students) -> list[str]:
    """Return the settings that decide the training of both objectives and differ between two workdirs, with values.

    Seeds and samples are paired, and do not count. The settings of the transfer count if the objectives are the same.
    """
    if a.workdir.root.resolve() == b.workdir.root.resolve():
        return []
    first, second = _settings(a), _settings(b)
    is_same = a.objective == b.objective
    keys = [key for key in first if key in second and (is_same or not key.startswith("transfer."))]
    return [f"{key} {first[key]!r} and {second[key]!r}" for key in keys if first[key] != second[key]]


def _settings(students: Students) -> dict[str, Any]:
    """Return the settings of an objective's training and the fingerprints of its checkpoints, shortened."""
    config, task = read_config(students.workdir), read_task(students.workdir)
    if students.objective not in config.objectives or students.objective not in OBJECTIVES:
        return {}
    settings = sharing.settings_of(config, students.objective)
    result = {key.replace("objective.", "transfer."): settings[key] for key in settings if key not in _PAIRED}
    result["student.checkpoint"] = task.student_checkpoint[:8]
    if OBJECTIVES[students.objective].teacher == "monolingual":
        result["teacher.checkpoint"] = task.teacher_checkpoint[:8]
        result["teacher.logits_file"] = task.teacher_logits[:8]
    return result


def _table(
    title: str,
    names: tuple[str, str],
    differences: Sequence[Difference],
    source_languages: Sequence[str],
    notes: tuple[str, ...],
    *,
    intervals: bool = True,
) -> table_writer.Table:
    """Return the table; `intervals` adds those of the accuracies, which make it wide."""
    header = ("language", "items", *names, "difference", "95 % interval", "p", "p (Holm)", "p (McNemar)")
    lines = tuple(_cells(difference, source_languages, intervals) for difference in differences)
    return table_writer.Table(header, lines, title=title, notes=notes)


def _cells(difference: Difference, source_languages: Sequence[str], intervals: bool) -> tuple[str, ...]:
    low, high = (bound * 100 for bound in difference.interval)
    is_source = difference.language in source_languages
    return (
        f"{difference.language} (source)" if is_source else difference.language or "avg of targets",
        f"{difference.count:,}",
        _accuracy(difference.a, difference.a_interval if intervals else None),
        _accuracy(difference.b, difference.b_interval if intervals else None),
        f"{difference.mean * 100:+.1f}",
        f"[{low:+.1f}, {high:+.1f}]",
        *map(_p, (difference.p, difference.p_holm, difference.p_mcnemar)),
    )


def _accuracy(value: float, interval: tuple[float, float] | None) -> str:
    bounds = "" if interval is None else f" [{interval[0] * 100:.1f}, {interval[1] * 100:.1f}]"
    return f"{value * 100:.1f}{bounds}"


def _p(value: float | None) -> str:
    if value is None:
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _notes(a: Students, b: Students, pair: Pair, config: ExperimentConfig, selection: str) -> Iterator[str]:
    for name, kinds in dict.fromkeys((one.objective, _kinds_of_target_text(one)) for one in (a, b)):
        if kinds:
            yield (
                f"{TARGET_TEXT_MARK}: {name} learned from {' and '.join(kinds)} in target languages, so its numbers "
                "are not zero-shot without target text."
            )
    for name in dict.fromkeys(one.objective for one in (a, b) if _is_of_some_languages(one)):
        yield f"{name}: no dev split selects its checkpoint, and its last one is used."
    targets = read_task(a.workdir).target_languages
    known = [language for language in targets if language in pair.a.languages]
    if len(known) < len(targets):
        yield f"avg of targets: mean over {', '.join(known)} alone, the target languages that both know."
    seeds = ", ".join(map(str, sorted({run.seed for run in pair.a.runs})))
    protocol = PROTOCOLS[selection].text(len(config.task.sources))
    draws, runs = pair.a.draws, len(pair.a.runs)
    paired = f"draw ({', '.join(draws)}), and seed ({seeds})" if len(draws) > 1 else f"and seed ({seeds})"
    yield (
        f"{config.headline_metric.capitalize()} in %, differences in points, paired by test item"
        f"{',' if len(draws) > 1 else ''} {paired}; checkpoint: {protocol}."
    )
    axis, count = axis_of(config, draws), len(pair.a.units)
    if count > 1:
        yield f"Means and intervals are over {axis.over(count)}."
    joint = "A text and its translations are resampled together." if pair.shares_items else ""
    of_units = f", {axis.units} by Student's t" if count > 1 else ""
    yield (
        f"Interval and p of a difference: items by {significance.RESAMPLES:,} resamples{of_units}; two-sided. {joint}"
    ).rstrip()
    if not pair.a.multi_label:
        yield "Intervals of accuracies, where there is room for them: over items, for these runs alone (Wilson)."
    majority = "; an item counts for the objective that is right on it in more runs" if runs > 1 else ""
    yield "p (Holm) is corrected for the number of target languages."
    if pair.a.multi_label:
        yield "There is no p (McNemar), because an item has several labels, some right and some wrong."
    else:
        exact = f"exact below {significance.EXACT_BELOW} discordant items, otherwise χ² with continuity correction"
        yield f"p (McNemar) is over items, for {'these runs' if runs > 1 else 'this run'} alone{majority}; {exact}."
    if runs == 1:
        yield "There is one seed, so nothing here says what another seed would give."
    if pair.left_out:
        yield f"Left out, because only one of the two has them: {', '.join(map(str, pair.left_out))}."
    differing = differing_settings(a, b)
    if differing:
        yield f"Settings that differ, A and B: {'; '.join(differing)}."
