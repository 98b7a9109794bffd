"""Tables and plots from results: `python -m xtransfer.report --workdir DIR [DIR …]`.

Prints objectives × languages of each workdir, and writes `report/results.md` and
`report/results.png` below it. Says what was measured, on what and over how many seeds, no more.
"""

import argparse
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table as RichTable

from xtransfer import storage
from xtransfer.evaluation.metrics import METRICS, at_chance
from xtransfer.evaluation.results import BASELINE, TEACHER, Line, Summary, Table, aggregate, read_rows
from xtransfer.runs.find import TaskRecord, read_task
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.runtime import terminal

# Okabe and Ito's palette, told apart with any colour vision; grey is the baseline's.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_FIXED_COLOURS = {BASELINE: "#999999", TEACHER: "#333333"}
_DARK = frozenset({"#0072B2", "#009E73", "#D55E00", "#333333"})


def main(argv: list[str]) -> None:
    """The binary."""
    parser = argparse.ArgumentParser(prog="python -m xtransfer.report", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, nargs="+", required=True, metavar="DIR", help="of xtransfer.main")
    parser.add_argument("--metric", choices=METRICS, default="accuracy")
    parser.add_argument("--split", help="which split's results (default: test, where that was evaluated)")
    parser.add_argument("--selection", choices=PROTOCOLS, default="source_dev", help="how checkpoints are chosen")
    arguments = parser.parse_args(argv)
    for root in arguments.workdir:
        workdir = Workdir(root)
        config, facts = read_config(workdir), read_task(workdir)
        table = aggregate(
            read_rows(workdir.results),
            source_language=config.task.source_language,
            target_languages=facts.target_languages,
            metric=arguments.metric,
            split=arguments.split or default_split(config.evaluation_splits),
            selection=arguments.selection,
        )
        show(table, terminal.console, facts)
        for path in write(table, root / "report", facts):
            terminal.log(f"written: {path}")


def default_split(evaluated: tuple[str, ...]) -> str:
    """The split to report where none is asked for: test, or else the first that was evaluated."""
    return "test" if "test" in evaluated else evaluated[0]


def show(table: Table, console: Console, facts: TaskRecord) -> None:
    """Prints the table, its caption, and warnings about results at chance."""
    header, lines = cells(table)
    rich = RichTable(box=box.SIMPLE_HEAD, title=escape(_title(table, facts)), title_justify="left")
    for position, name in enumerate(header):
        rich.add_column(escape(name), justify="left" if position == 0 else "right", no_wrap=True)
    for line in lines:
        rich.add_row(*map(escape, line))
    # In a narrow or unknown terminal lines run over: better than losing digits.
    needed = Measurement.get(console, console.options.update(max_width=10_000), rich).maximum
    segments = console.render(rich, console.options.update(width=needed, max_width=needed))
    console.print(Segments(segments), crop=False, no_wrap=True, overflow="ignore", end="")
    for text in caption(table, facts):
        console.print(text, markup=False)
    for text in warnings(table):
        console.print(text, markup=False, style="bold red")


def cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """The table as text, header and lines: percents, gains in points; "–" where there is no value."""
    has_gain = any(line.gain for line in table.lines)
    header = ["objective", f"{table.source_language} (source)", *table.target_languages, "avg of targets"]
    if has_gain:
        header.append(f"gain over {BASELINE}")
    lines = []
    for line in table.lines:
        row = [line.objective, *(_text(line.languages.get(name)) for name in _columns(table))]
        row.append(_text(line.average))
        if has_gain:
            row.append(_text(line.gain, "+.1f"))
        lines.append(row)
    return header, lines


def _columns(table: Table) -> tuple[str, ...]:
    """The source language, then the targets."""
    return (table.source_language, *table.target_languages)


def _text(summary: Summary | None, form: str = ".1f") -> str:
    if summary is None:
        return "–"
    mean = f"{summary.mean * 100:{form}}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd * 100:.1f}"


def _title(table: Table, facts: TaskRecord) -> str:
    return f"{_name(table, facts)}: {table.metric} on {table.split}"


def _name(table: Table, facts: TaskRecord) -> str:
    """The task's name, with "(synthetic)" where its text was generated."""
    return f"{table.task} (synthetic)" if facts.synthetic else table.task


def caption(table: Table, facts: TaskRecord) -> list[str]:
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


def warnings(table: Table) -> list[str]:
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


def markdown(table: Table, facts: TaskRecord) -> str:
    """The same as a Markdown page."""
    header, lines = cells(table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    grid = ["| " + " | ".join(name.replace("|", "\\|") for name in row) + " |" for row in (header, rule, *lines)]
    notes = [*caption(table, facts), *(f"**{text}**" for text in warnings(table))]
    return "\n".join([f"# {_title(table, facts)}", "", *grid, "", *(f"- {text}" for text in notes), ""])


def write(table: Table, directory: Path, facts: TaskRecord) -> list[Path]:
    """Writes results.md and results.png; returns their paths."""
    text, picture = directory / "results.md", directory / "results.png"
    storage.write_whole(text, markdown(table, facts))
    storage.write_whole(picture, plot(table, facts))
    return [text, picture]


def plot(table: Table, facts: TaskRecord) -> bytes:
    """Bars of objectives within languages as a PNG: whiskers are sd over seeds, dots single seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [*_columns(table), "avg of\ntargets"]
    figure = Figure(figsize=(max(7.0, 1.5 + 0.26 * len(groups) * (len(table.lines) + 1)), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (line, colour) in enumerate(zip(table.lines, _colours(table.lines).values(), strict=True)):
        _draw_line(axes, table, line, colour, number)
    _draw_chance(axes, table)
    axes.axvline(len(groups) - 1.5, color="#cccccc", linewidth=1)
    axes.set_xticks(range(len(groups)), [f"{groups[0]}\n(source)", *groups[1:]])
    repeated = any(len(line.seeds) > 1 for line in table.lines)
    axes.set_xlabel("language" + " (bars: mean over seeds, whiskers: sd, dots: single seeds)" * repeated)
    axes.set_ylabel(f"{table.metric} (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"{_title(table, facts)}; checkpoint: {PROTOCOLS[table.selection].describe}", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(table.lines) + 1, frameon=False, fontsize=9)
    # No date or version: the same results give the same bytes.
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_chance(axes: Any, table: Table) -> None:
    """A dashed line across each language, at what always answering its most frequent class gives."""
    label: str | None = "most frequent class"
    for group, language in enumerate(_columns(table)):
        if table.metric == "accuracy" and language in table.majority:
            height = table.majority[language] * 100
            axes.hlines(height, group - 0.45, group + 0.45, "black", "--", linewidth=1, label=label, zorder=4)
            label = None  # one legend entry for all languages


def _colours(lines: Iterable[Line]) -> dict[str, str]:
    names = [line.objective for line in lines]
    free = [name for name in names if name not in _FIXED_COLOURS]
    cycled = {name: _COLOURS[position % len(_COLOURS)] for position, name in enumerate(free)}
    return {name: (_FIXED_COLOURS | cycled)[name] for name in names}


def _draw_line(axes: Any, table: Table, line: Line, colour: str, number: int) -> None:
    width = 0.84 / len(table.lines)
    offset = (number - (len(table.lines) - 1) / 2) * width
    summaries: Mapping[int, Summary | None] = dict(
        enumerate([*(line.languages.get(name) for name in _columns(table)), line.average])
    )
    label: str | None = line.objective
    for group, summary in summaries.items():
        if summary is None:
            continue
        x, height = group + offset, summary.mean * 100
        axes.bar(x, height, width * 0.94, color=colour, label=label, zorder=2)
        label = None  # one legend entry for all the line's bars
        ink = "white" if colour in _DARK else "black"
        axes.text(x, 2, f"{height:.1f}", rotation=90, ha="center", va="bottom", fontsize=8, color=ink, zorder=5)
        if summary.sd is not None:
            axes.errorbar(x, height, summary.sd * 100, color="black", capsize=2.5, linewidth=1, zorder=5)
            values = [value * 100 for _, value in sorted(summary.by_seed.items())]
            spread = [x + width * 0.5 * (i / (len(values) - 1) - 0.5) for i in range(len(values))]
            axes.scatter(spread, values, s=9, color="white", edgecolors="black", linewidths=0.6, zorder=6)


if __name__ == "__main__":
    terminal.run(main)
