"""A results table as text: its cells, its caption, and its warnings."""

from collections.abc import Iterable

from xtransfer.evaluation.metrics import at_chance
from xtransfer.evaluation.results import BASELINE, Line, ResultsTable, Summary
from xtransfer.report import table as tables
from xtransfer.runs.find import TaskRecord
from xtransfer.runs.selection import PROTOCOLS


def show(results: ResultsTable, console: tables.Console, facts: TaskRecord) -> None:
    """Print the table, its caption, and warnings about results at chance."""
    tables.show(_grid(results, facts), console, wrap=False)
    for text in caption(results, facts):
        console.print(text, markup=False)
    for text in warnings(results):
        console.print(text, markup=False, style="bold red")


def markdown(results: ResultsTable, facts: TaskRecord) -> str:
    """Return the same as a Markdown page."""
    notes = [*caption(results, facts), *(f"**{text}**" for text in warnings(results))]
    grid = tables.markdown(_grid(results, facts))
    return "\n".join([f"# {title_of(results, facts)}", "", *grid, "", *(f"- {text}" for text in notes), ""])


def _grid(results: ResultsTable, facts: TaskRecord) -> tables.Table:
    header, rows = cells(results)
    return tables.Table(tuple(header), tuple(map(tuple, rows)), title=title_of(results, facts))


def cells(table: ResultsTable) -> tuple[list[str], list[list[str]]]:
    """The table as text, header and lines: percents, gains in points; "–" where there is no value."""
    has_gain = any(line.gain for line in table.lines)
    header = ["objective", f"{table.source_language} (source)", *table.target_languages, "avg of targets"]
    if has_gain:
        header.append(f"gain over {BASELINE}")
    lines = []
    for line in table.lines:
        row = [line.objective, *(_text(line.languages.get(name)) for name in columns(table))]
        row.append(_text(line.average))
        if has_gain:
            row.append(_text(line.gain, "+.1f"))
        lines.append(row)
    return header, lines


def columns(table: ResultsTable) -> tuple[str, ...]:
    """The source language, then the targets."""
    return (table.source_language, *table.target_languages)


def _text(summary: Summary | None, form: str = ".1f") -> str:
    if summary is None:
        return "–"
    mean = f"{summary.mean * 100:{form}}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd * 100:.1f}"


def title_of(table: ResultsTable, facts: TaskRecord) -> str:
    """Return the heading: task, metric, and split."""
    return f"{_name(table, facts)}: {table.metric} on {table.split}"


def _name(table: ResultsTable, facts: TaskRecord) -> str:
    """The task's name, with "(synthetic)" where its text was generated."""
    return f"{table.task} (synthetic)" if facts.synthetic else table.task


def caption(table: ResultsTable, facts: TaskRecord) -> list[str]:
    """What the numbers are: metric, split, items, seeds, selection, and what average and gain mean."""
    counts = set(table.counts.values())
    items = (
        f"{counts.pop():,} items per language"
        if len(counts) == 1
        else "items: " + ", ".join(f"{language} {count:,}" for language, count in table.counts.items())
    )
    protocol = PROTOCOLS[table.selection]
    lines = [
        f"{table.metric} in % on the {table.split} split of {_name(table, facts)}, "
        f"{len(facts.labels)} classes, {items}.",
        f"Checkpoint of each run: {protocol.describe} ({table.selection}).",
        *_seed_lines(table.lines),
        f"avg of targets: mean over {', '.join(table.target_languages)}, without the source language "
        f"{table.source_language}.",
    ]
    if any(line.gain for line in table.lines):
        lines.append(f"Gain: avg of targets less that of {BASELINE} with the same seed, in points.")
    return lines


def _seed_lines(lines: Iterable[Line]) -> list[str]:
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for line in lines:
        by_seeds.setdefault(line.seeds, []).append(line.objective)
    texts = []
    for seeds, objectives in by_seeds.items():
        who = f"{', '.join(objectives)}: " if len(by_seeds) > 1 else ""
        many = len(seeds) > 1
        what = "mean ± sample standard deviation over seeds" if many else "one run each, spread unknown"
        texts.append(f"{who}{len(seeds)} seed{'s' if many else ''} ({', '.join(map(str, seeds))}), {what}.")
    if any(len(seeds) > 1 for seeds in by_seeds):
        texts.append(
            "All seeds share one labelled and one unlabelled sample and one monolingual teacher; they differ in the "
            "new head, the order of examples and dropout only: ± does not say what other samples or teachers would do."
        )
    return texts


def warnings(table: ResultsTable) -> list[str]:
    """Names the runs whose accuracy is at chance (`metrics.at_chance`), as the evaluation's log does.

    Nothing for other metrics, and for a language of which the rows do not say its most frequent class's share.
    """
    if table.metric != "accuracy":
        return []
    found = [
        f"{line.objective} seed {seed} in {language} ({value:.1%}, always the same: {table.majority[language]:.1%})"
        for line in table.lines
        for language, summary in line.languages.items()
        if language in table.majority
        for seed, value in sorted(summary.by_seed.items())
        if at_chance(value, table.counts[language], table.majority[language])
    ]
    what = "Warning: cannot be told from always answering the most frequent class"
    return [f"{what}: {'; '.join(found)}."] if found else []
