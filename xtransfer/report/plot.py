"""The bar chart of a results table."""

import io
from collections.abc import Iterable, Mapping
from typing import Any

from xtransfer.evaluation.results import BASELINE, Line, ResultsTable, Summary
from xtransfer.report.summary import columns, title_of
from xtransfer.runs.find import TaskRecord
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TEACHER

# Okabe and Ito's palette, told apart with any colour vision; grey is the baseline's.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_FIXED_COLOURS = {BASELINE: "#999999", TEACHER: "#333333"}
_DARK = frozenset({"#0072B2", "#009E73", "#D55E00", "#333333"})


def plot(table: ResultsTable, facts: TaskRecord) -> bytes:
    """Bars of objectives within languages as a PNG: whiskers are sd over seeds, dots single seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [*columns(table), "avg of\ntargets"]
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
    axes.set_title(f"{title_of(table, facts)}; checkpoint: {PROTOCOLS[table.selection].describe}", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(table.lines) + 1, frameon=False, fontsize=9)
    # No date or version: the same results give the same bytes.
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_chance(axes: Any, table: ResultsTable) -> None:
    """A dashed line across each language, at what always answering its most frequent class gives."""
    label: str | None = "most frequent class"
    for group, language in enumerate(columns(table)):
        if table.metric == "accuracy" and language in table.majority:
            height = table.majority[language] * 100
            axes.hlines(height, group - 0.45, group + 0.45, "black", "--", linewidth=1, label=label, zorder=4)
            label = None  # one legend entry for all languages


def _colours(lines: Iterable[Line]) -> dict[str, str]:
    names = [line.objective for line in lines]
    free = [name for name in names if name not in _FIXED_COLOURS]
    cycled = {name: _COLOURS[position % len(_COLOURS)] for position, name in enumerate(free)}
    return {name: (_FIXED_COLOURS | cycled)[name] for name in names}


def _draw_line(axes: Any, table: ResultsTable, line: Line, colour: str, number: int) -> None:
    width = 0.84 / len(table.lines)
    offset = (number - (len(table.lines) - 1) / 2) * width
    summaries: Mapping[int, Summary | None] = dict(
        enumerate([*(line.languages.get(name) for name in columns(table)), line.average])
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
