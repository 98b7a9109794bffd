"""A results table as text: its cells, its caption, and its warnings."""

from collections.abc import Iterable

from xtransfer.evaluation.metrics import at_chance
from xtransfer.evaluation.results import BASELINE, ObjectiveResults, ResultsTable, SeedSummary
from xtransfer.report import table as table_writer
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TaskRecord


def show(results: ResultsTable, console: table_writer.Console, task: TaskRecord) -> None:
    """Print the results table, its caption, and warnings about results at chance."""
    table_writer.show(_grid(results, task), console, wrap=False)
    for text in caption(results, task):
        console.print(text, markup=False)
    for text in warnings(results):
        console.print(text, markup=False, style="bold red")


def markdown(results: ResultsTable, task: TaskRecord) -> str:
    """Return the results table, its caption, and its warnings as a Markdown page."""
    notes = [*caption(results, task), *(f"**{text}**" for text in warnings(results))]
    grid = table_writer.markdown(_grid(results, task))
    return "\n".join([f"# {title_of(results, task)}", "", *grid, "", *(f"- {text}" for text in notes), ""])


def _grid(results: ResultsTable, task: TaskRecord) -> table_writer.Table:
    header, rows = cells(results)
    return table_writer.Table(tuple(header), tuple(map(tuple, rows)), title=title_of(results, task))


def cells(results: ResultsTable) -> tuple[list[str], list[list[str]]]:
    """Return header and rows as text: values in percent, gains in points, and "–" for a missing value."""
    has_gain = any(line.gain for line in results.lines)
    header = ["objective", f"{results.source_language} (source)", *results.target_languages, "avg of targets"]
    if has_gain:
        header.append(f"gain over {BASELINE}")
    lines = []
    for line in results.lines:
        row = [line.objective, *(_text(line.languages.get(name)) for name in columns(results))]
        row.append(_text(line.average))
        if has_gain:
            row.append(_text(line.gain, "+.1f"))
        lines.append(row)
    return header, lines


def columns(results: ResultsTable) -> tuple[str, ...]:
    """Return the source language, then the target languages."""
    return (results.source_language, *results.target_languages)


def _text(summary: SeedSummary | None, form: str = ".1f") -> str:
    if summary is None:
        return "–"
    mean = f"{summary.mean * 100:{form}}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd * 100:.1f}"


def title_of(results: ResultsTable, task: TaskRecord) -> str:
    """Return the heading: task, metric, and split."""
    return f"{_name(results, task)}: {results.metric} on {results.split}"


def _name(results: ResultsTable, task: TaskRecord) -> str:
    """Return the task's name, marked "(synthetic)" if its text was generated."""
    return f"{results.task} (synthetic)" if task.synthetic else results.task


def caption(results: ResultsTable, task: TaskRecord) -> list[str]:
    """Describe the numbers: metric, split, examples, seeds, selection, and the meaning of average and gain."""
    counts = set(results.counts.values())
    examples = (
        f"{counts.pop():,} examples per language"
        if len(counts) == 1
        else "examples: " + ", ".join(f"{language} {count:,}" for language, count in results.counts.items())
    )
    protocol = PROTOCOLS[results.selection]
    lines = [
        f"{results.metric} in % on the {results.split} split of {_name(results, task)}, "
        f"{len(task.labels)} classes, {examples}.",
        f"Checkpoint of each run: {protocol.description} ({results.selection}).",
        *_seed_lines(results.lines),
        f"avg of targets: mean over {', '.join(results.target_languages)}, without the source language "
        f"{results.source_language}.",
    ]
    if any(line.gain for line in results.lines):
        lines.append(f"Gain: avg of targets minus the one of {BASELINE} with the same seed, in points.")
    return lines


def _seed_lines(lines: Iterable[ObjectiveResults]) -> list[str]:
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for line in lines:
        by_seeds.setdefault(line.seeds, []).append(line.objective)
    texts = []
    for seeds, objectives in by_seeds.items():
        names = f"{', '.join(objectives)}: " if len(by_seeds) > 1 else ""
        repeated = len(seeds) > 1
        spread = "mean ± sample standard deviation over seeds" if repeated else "one run each, spread unknown"
        texts.append(f"{names}{len(seeds)} seed{'s' if repeated else ''} ({', '.join(map(str, seeds))}), {spread}.")
    if any(len(seeds) > 1 for seeds in by_seeds):
        texts.append(
            "All seeds share one labelled sample, one unlabelled sample, and one monolingual teacher. They differ only "
            "in the new head, the order of examples, and dropout, so ± says nothing about other samples or teachers."
        )
    return texts


def warnings(results: ResultsTable) -> list[str]:
    """Name the runs whose accuracy is at chance (`metrics.at_chance`), as the evaluation's log does.

    Other metrics get no warning, and neither do languages whose majority share is not in the rows.
    """
    if results.metric != "accuracy":
        return []
    at_majority = [
        f"{line.objective} seed {seed} in {language} ({value:.1%}, majority class {results.majority[language]:.1%})"
        for line in results.lines
        for language, summary in line.languages.items()
        if language in results.majority
        for seed, value in sorted(summary.by_seed.items())
        if at_chance(value, results.counts[language], results.majority[language])
    ]
    if not at_majority:
        return []
    return [f"Warning: no better than the majority class: {'; '.join(at_majority)}."]
