"""The bar chart of a results table."""

import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from xtransfer.evaluation.results import BASELINE, ObjectiveResults, ResultsTable, Summary
from xtransfer.report.summary import title_of
from xtransfer.runs.workdir import TEACHER, TaskRecord

_MOST_LANGUAGES = 40  # target languages with bars of their own; more would make a picture of several metres
_LONGEST_NAME = 24  # characters of a name on the axis

# Okabe and Ito's palette, which is safe for any colour vision; the baseline is grey.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_FIXED_COLOURS = {BASELINE: "#999999", TEACHER: "#333333"}
_DARK = frozenset({"#0072B2", "#009E73", "#D55E00", "#333333"})


def plot(results: ResultsTable, task: TaskRecord) -> bytes:
    """Draw a PNG with bars for the objectives in each language; whiskers are sd, dots single seeds or draws.

    Of very many target languages, only the average is drawn.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if the home directory cannot be written
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        return _plot(results, task)


def _plot(results: ResultsTable, task: TaskRecord) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_room = len(results.target_languages) <= _MOST_LANGUAGES
    languages = results.languages if has_room else results.source_languages
    groups = [*map(drawable, languages), "avg of\ntargets"]
    figure = Figure(figsize=(max(7.0, 1.5 + 0.26 * len(groups) * (len(results.lines) + 1)), 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, (line, colour) in enumerate(
        zip(results.lines, colours(line.objective for line in results.lines).values(), strict=True)
    ):
        _draw_line(axes, results, languages, line, colour, number)
    _draw_chance(axes, results, languages)
    axes.axvline(len(groups) - 1.5, color="#cccccc", linewidth=1)
    num_sources = len(results.source_languages)
    names = [*(f"{name}\n(source)" for name in groups[:num_sources]), *groups[num_sources:]]
    axes.set_xticks(range(len(groups)), names)
    repeated = any(len(line.runs) > 1 for line in results.lines)
    units = results.axis.units
    note = f" (bars: mean over {units}, whiskers: sd, dots: single {units})" if repeated else ""
    omitted = "" if has_room else f"; of {len(results.target_languages)} target languages, only the average is drawn"
    axes.set_xlabel(f"language{omitted}{note}")
    axes.set_ylabel(f"{results.metric} (%)")
    axes.set_ylim(0, 100)
    axes.set_title(f"{title_of(results, task)}; checkpoint: {results.checkpoint}", fontsize=10)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(results.lines) + 1, frameon=False, fontsize=9)
    # Without a date or version, the same results give the same bytes.
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": None})
    return content.getvalue()


def drawable(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a name that is not too long for an axis, with codes in place of the characters that the font lacks."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    short = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return "".join(
        character if font.get_char_index(ord(character)) else character.encode("ascii", "backslashreplace").decode()
        for character in short
    )


def _draw_chance(axes: Any, results: ResultsTable, languages: Sequence[str]) -> None:
    """Draw a dashed line across each language, at the accuracy of its majority class."""
    label: str | None = "majority class"
    for group, language in enumerate(languages):
        if results.metric == "accuracy" and language in results.majority:
            height = results.majority[language] * 100
            axes.hlines(height, group - 0.45, group + 0.45, "black", "--", linewidth=1, label=label, zorder=4)
            label = None  # one legend entry for all languages


def colours(objectives: Iterable[str]) -> dict[str, str]:
    """Return the colour of each objective; the baseline and the teacher always look the same."""
    names = list(objectives)
    free = [name for name in names if name not in _FIXED_COLOURS]
    cycled = {name: _COLOURS[position % len(_COLOURS)] for position, name in enumerate(free)}
    return {name: (_FIXED_COLOURS | cycled)[name] for name in names}


def _draw_line(
    axes: Any, results: ResultsTable, languages: Sequence[str], line: ObjectiveResults, colour: str, number: int
) -> None:
    width = 0.84 / len(results.lines)
    offset = (number - (len(results.lines) - 1) / 2) * width
    summaries: Mapping[int, Summary | None] = dict(
        enumerate([*(line.languages.get(name) for name in languages), line.average])
    )
    label: str | None = results.name_of(line.objective)
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
            values = [value * 100 for value in summary.by_unit.values()]
            spread = [x + width * 0.5 * (i / (len(values) - 1) - 0.5) for i in range(len(values))]
            axes.scatter(spread, values, s=9, color="white", edgecolors="black", linewidths=0.6, zorder=6)
