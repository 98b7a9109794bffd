"""Tables and plots from results: `python -m xtransfer.report --workdir DIR [DIR …]`.

Prints objectives × languages of each workdir, and writes `report/results.md` and
`report/results.png` below it. Says what was measured, on what and over how many seeds, no more.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table as RichTable

from xtransfer import cli
from xtransfer.config import ExperimentConfig
from xtransfer.errors import UserError
from xtransfer.evaluation.metrics import METRICS, above_chance
from xtransfer.evaluation.selection import PROTOCOLS
from xtransfer.evaluation.statistics import BASELINE, TEACHER, Line, Row, Summary, Table, aggregate, read_rows
from xtransfer.workdir import Workdir, read_config

# Tasks whose text was generated; every mention of one says so.
SYNTHETIC = frozenset({"minireviews"})

# Okabe and Ito's palette, told apart with any colour vision; grey is the baseline's.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_FIXED_COLOURS = {BASELINE: "#999999", TEACHER: "#333333"}
_DARK = frozenset({"#0072B2", "#009E73", "#D55E00", "#333333"})


def main(argv: list[str]) -> None:
    """The binary."""
    parser = argparse.ArgumentParser(prog="python -m xtransfer.report", description=__doc__.split("\n")[0])
    parser.add_argument("--workdir", type=Path, nargs="+", required=True, metavar="DIR", help="of xtransfer.main")
    parser.add_argument("--metric", choices=METRICS, default="accuracy")
    parser.add_argument("--split", default="test", help="which split's results (default: test)")
    parser.add_argument("--selection", choices=PROTOCOLS, default="source_dev", help="how checkpoints are chosen")
    arguments = parser.parse_args(argv)
    for root in arguments.workdir:
        workdir = Workdir(root)
        config = read_config(workdir)
        table = aggregate(
            read_rows(workdir.results),
            source_language=config.task.source_language,
            target_languages=config.task.target_languages,
            metric=arguments.metric,
            split=arguments.split,
            selection=arguments.selection,
        )
        num_classes = find_num_classes(workdir, config)
        show(table, cli.console, num_classes)
        for path in write(table, root / "report", num_classes):
            cli.log(f"written: {path}")


def print_table(
    rows: Iterable[Row],
    console: Console,
    *,
    source_language: str,
    target_languages: Iterable[str] = (),
    metric: str = "accuracy",
    split: str = "test",
    selection: str = "source_dev",
    num_classes: int | None = None,
) -> None:
    """Prints the table of one experiment's rows with its caption; arguments and errors as `aggregate`."""
    table = aggregate(
        rows,
        source_language=source_language,
        target_languages=tuple(target_languages),
        metric=metric,
        split=split,
        selection=selection,
    )
    show(table, console, num_classes)


def find_num_classes(workdir: Workdir, config: ExperimentConfig) -> int | None:
    """K of the experiment, from its config or else from its logits store; None where neither tells."""
    if config.task.labels:
        return len(config.task.labels)
    for path in sorted(workdir.logits.glob("*/manifest.json")):
        try:
            return len(json.loads(path.read_text(encoding="utf-8"))["classes"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: not the manifest of a logits store: {error}") from error
    return None


def show(table: Table, console: Console, num_classes: int | None = None) -> None:
    """Prints the table, its caption, and warnings about results at chance."""
    header, lines = cells(table)
    rich = RichTable(box=box.SIMPLE_HEAD, title=escape(_title(table)), title_justify="left")
    for position, name in enumerate(header):
        rich.add_column(escape(name), justify="left" if position == 0 else "right", no_wrap=True)
    for line in lines:
        rich.add_row(*map(escape, line))
    # In a narrow or unknown terminal lines run over: better than losing digits.
    needed = Measurement.get(console, console.options.update(max_width=10_000), rich).maximum
    segments = console.render(rich, console.options.update(width=needed, max_width=needed))
    console.print(Segments(segments), crop=False, no_wrap=True, overflow="ignore", end="")
    for text in caption(table):
        console.print(text, markup=False)
    for text in warnings(table, num_classes):
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


def _title(table: Table) -> str:
    return f"{task_name(table.task)}: {table.metric} on {table.split}"


def task_name(task: str) -> str:
    """The task's name, with "(synthetic)" where its text was generated."""
    return f"{task} (synthetic)" if task in SYNTHETIC else task


def caption(table: Table) -> list[str]:
    """What the numbers are: metric, split, items, seeds, selection, and what average and gain mean."""
    counts = set(table.counts.values())
    items = (
        f"{counts.pop():,} items per language"
        if len(counts) == 1
        else "items: " + ", ".join(f"{language} {count:,}" for language, count in table.counts.items())
    )
    protocol = PROTOCOLS[table.selection]
    lines = [
        f"{table.metric} in % on the {table.split} split of {task_name(table.task)}, {items}.",
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
    return texts


def warnings(table: Table, num_classes: int | None) -> list[str]:
    """Names the runs whose accuracy cannot be told from 1/K; nothing for other metrics or unknown K."""
    if table.metric != "accuracy" or num_classes is None:
        return []
    chance = 1 / num_classes
    found = [
        f"{line.objective} seed {seed} in {language} ({value:.1%})"
        for line in table.lines
        for language, summary in line.languages.items()
        for seed, value in sorted(summary.by_seed.items())
        if not above_chance(round(value * table.counts[language]), table.counts[language], chance)
    ]
    return [f"Warning: not above chance ({chance:.1%}): {'; '.join(found)}."] if found else []


def markdown(table: Table, num_classes: int | None = None) -> str:
    """The same as a Markdown page."""
    header, lines = cells(table)
    rule = ["---", *["---:"] * (len(header) - 1)]
    grid = ["| " + " | ".join(name.replace("|", "\\|") for name in row) + " |" for row in (header, rule, *lines)]
    notes = [*caption(table), *(f"**{text}**" for text in warnings(table, num_classes))]
    return "\n".join([f"# {_title(table)}", "", *grid, "", *(f"- {text}" for text in notes), ""])


def write(table: Table, directory: Path, num_classes: int | None = None) -> list[Path]:
    """Writes results.md and results.png; returns their paths."""
    text, picture = directory / "results.md", directory / "results.png"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _replace(text, lambda path: path.write_text(markdown(table, num_classes), encoding="utf-8"))
        _replace(picture, lambda path: plot(table, path, num_classes))
    except OSError as error:
        raise UserError(f"cannot write the report to {directory}: {error.strerror}") from error
    return [text, picture]


def _replace(path: Path, produce: Callable[[Path], Any]) -> None:
    temporary = path.with_name(f".{path.name}")
    produce(temporary)
    os.replace(temporary, path)


def plot(table: Table, path: Path, num_classes: int | None = None) -> None:
    """Bars of objectives within languages as a PNG: whiskers are sd over seeds, dots single seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [*_columns(table), "avg of\ntargets"]
    figure = Figure(figsize=(max(7.0, 1.5 + 0.26 * len(groups) * (len(table.lines) + 1)), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (line, colour) in enumerate(zip(table.lines, _colours(table.lines).values(), strict=True)):
        _draw_line(axes, table, line, colour, number)
    if num_classes and table.metric == "accuracy":
        axes.axhline(100 / num_classes, color="black", linestyle="--", linewidth=1, label="chance", zorder=4)
    axes.axvline(len(groups) - 1.5, color="#cccccc", linewidth=1)
    axes.set_xticks(range(len(groups)), [f"{groups[0]}\n(source)", *groups[1:]])
    repeated = any(len(line.seeds) > 1 for line in table.lines)
    axes.set_xlabel("language" + " (bars: mean over seeds, whiskers: sd, dots: single seeds)" * repeated)
    axes.set_ylabel(f"{table.metric} (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"{_title(table)}; checkpoint: {PROTOCOLS[table.selection].describe}", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(table.lines) + 1, frameon=False, fontsize=9)
    # No date or version: the same results give the same bytes.
    figure.savefig(path, dpi=150, format="png", metadata={"Software": None})


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
    cli.run(main)
