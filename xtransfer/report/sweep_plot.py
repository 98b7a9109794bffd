"""The chart of a sweep: a panel for each value of its further keys, with a line for each objective."""

import io
import logging
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from xtransfer.report.plot import colours, drawable

_MANY_TIMES = 4  # the largest over the smallest value, from which on a scale is logarithmic
_PER_INCH = 13  # characters of the heading
_COLUMNS = 3  # panels side by side


@dataclass(frozen=True)
class Mark:
    """One point of a line: the swept value, the mean as a share, and its 95 % interval if there is one."""

    x: Any
    mean: float
    interval: tuple[float, float] | None


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
      title: the values of the further keys, or "".
      x_label: the swept key.
      y_label: what the heights are.
      lines: the marks by objective.
    """

    title: str
    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[Mark]]


def plot(panels: Sequence[Panel], title: str, note: str) -> bytes:
    """Draw a PNG of some panels with a common vertical scale.

    Args:
      panels: at least one.
      title: the heading of the chart.
      note: what the error bars are, or "".
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns if the home directory cannot be written
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a name with two dollar signs is no formula
        return _plot(panels, title, note)


def positions(values: Sequence[Any]) -> tuple[dict[Any, float], str]:
    """Return where each swept value lies, and the kind of scale: "linear", "log", or "names" for other than numbers."""
    distinct = list(dict.fromkeys(values))
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in distinct):
        return {value: float(index) for index, value in enumerate(distinct)}, "names"
    is_wide = min(distinct) > 0 and max(distinct) >= _MANY_TIMES * min(distinct)
    return {value: float(value) for value in distinct}, "log" if is_wide else "linear"


def _plot(panels: Sequence[Panel], title: str, note: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(1.5 + 4.2 * columns, 0.9 + 3.4 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    places, scale = positions(
        [_hashable(mark.x) for panel in panels for marks in panel.lines.values() for mark in marks]
    )
    for axes, panel in zip(grid, panels, strict=False):
        for name, colour in colours(names).items():
            if name in panel.lines:
                _draw_line(axes, panel.lines[name], places, name, colour)
        if scale == "log":
            axes.set_xscale("log")
        axes.set_xticks(list(places.values()), [drawable(_label(value)) for value in places])
        axes.minorticks_off()
        axes.set_xlabel(panel.x_label)
        axes.set_title(drawable(panel.title, longest=60), fontsize=9)
        axes.grid(axis="y", color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[::columns]:
        axes.set_ylabel(panels[0].y_label)
    lines = [line for text in (title, note) for line in textwrap.wrap(text, int(figure.get_figwidth() * _PER_INCH))]
    figure.suptitle("\n".join(lines), fontsize=10)
    handles = {label: line for axes in grid for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    # Without a date or version, the same results give the same bytes.
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": None})
    return content.getvalue()


def _draw_line(axes: Any, marks: Sequence[Mark], places: Mapping[Any, float], name: str, colour: str) -> None:
    ordered = sorted(marks, key=lambda mark: places[_hashable(mark.x)])
    heights = [mark.mean * 100 for mark in ordered]
    bounds = [mark.interval or (mark.mean, mark.mean) for mark in ordered]
    below = [(mark.mean - low) * 100 for mark, (low, _) in zip(ordered, bounds, strict=True)]
    above = [(high - mark.mean) * 100 for mark, (_, high) in zip(ordered, bounds, strict=True)]
    axes.errorbar(
        [places[_hashable(mark.x)] for mark in ordered],
        heights,
        [below, above] if any(mark.interval for mark in ordered) else None,
        color=colour,
        marker="o",
        markersize=4,
        capsize=2.5,
        linewidth=1.4,
        label=name,
    )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _label(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
