"""Small SVG charts: pure functions from numbers to markup.

Horizontal positions are in percent and vertical ones in pixels, so a chart fills any width and its text keeps its size.
Colours are classes of the page's style sheet. Every series also has a shape of its own, so nothing depends on colour.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from xtransfer.evaluation.calibration import Bin
from xtransfer.evaluation.results import BASELINE
from xtransfer.report.page.markup import Child, Html, join, name_of, tag
from xtransfer.runs.workdir import TEACHER

HEIGHT = 150  # pixels
_WIDTH, _CHARACTER = 250, 6.5  # pixels of a small chart and of a character, to keep labels apart
_COLOURS = 7  # classes k0 … k6 of the style sheet
_SHAPES = (
    "M-4 -4H4V4H-4Z",  # square
    "M0 -5.2L4.8 3.8H-4.8Z",  # triangle
    "M0 -5.4L5.4 0L0 5.4L-5.4 0Z",  # diamond
    "M0 5.2L4.8 -3.8H-4.8Z",  # triangle, pointing down
    "M-5 -1.7H-1.7V-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5Z",  # plus
    "M-5 0H5L0 5Z",
    "M0 -5L1.5 -1.5L5 0L1.5 1.5L0 5L-1.5 1.5L-5 0L-1.5 -1.5Z",  # star
)
_CIRCLE = "M-4.2 0A4.2 4.2 0 1 1 4.2 0A4.2 4.2 0 1 1 -4.2 0Z"


@dataclass(frozen=True)
class Kind:
    """The look of one objective: the class of its colour, and the path of its marker around (0, 0)."""

    colour: str
    shape: str
    note: str = ""  # stands beside the name


def kinds(names: Iterable[str], notes: Mapping[str, str] = MappingProxyType({})) -> dict[str, Kind]:
    """Return the look of each objective, with the notes on some; the baseline and the teacher always look the same."""
    fixed = {BASELINE: Kind("baseline", _CIRCLE), TEACHER: Kind("teacher", _CIRCLE)}
    names = list(names)
    free = [name for name in names if name not in fixed]
    cycled = {name: Kind(f"k{i % _COLOURS}", _SHAPES[i % len(_SHAPES)]) for i, name in enumerate(free)}
    return {name: replace((fixed | cycled)[name], note=notes.get(name, "")) for name in names}


@dataclass(frozen=True)
class Axis:
    """One axis.

    Attributes:
      low: the value at the left or lower end.
      high: the value at the other end.
      ticks: the values with a tick, and their text.
      label: what the axis shows, and its unit.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str

    def share(self, value: float) -> float:
        """Return where a value lies between low (0) and high (1), at most a little outside."""
        return min(max((value - self.low) / (self.high - self.low), -0.02), 1.02)


def axis(values: Iterable[float], label: str, *, ticks: int = 4, signed: bool = False, whole: bool = False) -> Axis:
    """Return an axis with round ticks around some finite values.

    Args:
      values: the values to include.
      label: the axis label.
      ticks: roughly how many steps to divide the axis into.
      signed: write the tick values with their sign.
      whole: only use whole numbers.
    """
    values = list(values) or [0.0, 1.0]
    low, high = min(values), max(values)
    step = _round_step((high - low) / ticks or abs(high) / ticks or 1.0)
    if whole:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    form = f"{'+' if signed else ''},.{digits}f"
    numbers = [i * step for i in range(first, last + 1)]
    texts = tuple((number, f"{number:{form}}" if number else "0") for number in numbers)
    return Axis(numbers[0], numbers[-1], texts, label)


def _round_step(rough: float) -> float:
    """Return the next number of the form 1, 2, 2.5, or 5 × 10ⁿ that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * (1 - 1e-9))


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
      points: (x, y) from left to right.
      kind: its look.
      title: its name.
      marked: the x of the points to mark.
    """

    points: tuple[tuple[float, float], ...]
    kind: Kind
    title: str
    marked: frozenset[float] = frozenset()


def line_chart(lines: Sequence[Line], x: Axis, y: Axis, description: str) -> Html:
    """Draw lines through points; a marked point has its kind's marker."""
    marks = []
    for line in lines:
        pieces = [
            tag(
                "line",
                x1=_x(x, first[0]),
                y1=_y(y, first[1]),
                x2=_x(x, second[0]),
                y2=_y(y, second[1]),
            )
            for first, second in zip(line.points, line.points[1:], strict=False)
        ]
        dots = [
            marker(
                line.kind,
                _x(x, at),
                _y(y, value),
                f"{line.title}: {at:,.0f}, {value:.4g}",
                small=at not in line.marked,
            )
            for at, value in line.points
        ]
        marks.append(tag("g", *pieces, *dots, class_=f"line {line.kind.colour}"))
    return _frame(marks, x, y, description)


@dataclass(frozen=True)
class Point:
    """One point of a scatter chart: its place, look, and name, and a label to write beside it if there is room."""

    x: float
    y: float
    kind: Kind
    title: str
    label: str = ""


def scatter(points: Sequence[Point], x: Axis, y: Axis, description: str) -> Html:
    """Draw points, with a line at zero if the vertical axis has one."""
    marks: list[Html] = []
    if y.low < 0 < y.high:
        marks.append(tag("line", x1="0%", x2="100%", y1=_y(y, 0), y2=_y(y, 0), class_="zero"))
    for point in points:
        marks.append(marker(point.kind, _x(x, point.x), _y(y, point.y), point.title))
    places = _label_places([(x.share(point.x) * _WIDTH, _y(y, point.y), point.label) for point in points])
    for point, place in zip(points, places, strict=True):
        if place is not None:
            anchor, dx, dy = place
            at_x, at_y = _x(x, point.x), _y(y, point.y)
            marks.append(tag("text", point.label, x=at_x, y=at_y, dx=dx, dy=dy, text_anchor=anchor, class_="label"))
    return _frame(marks, x, y, description)


def _label_places(points: Sequence[tuple[float, float, str]]) -> list[tuple[str, float, float] | None]:
    """Return where to write each point's label: its anchor, and its offsets; None if it would cover something.

    Args:
      points: x and y in pixels of a chart of usual width, and the label.
    """
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in points]
    places: list[tuple[str, float, float] | None] = []
    for x, y, label in points:
        width = _CHARACTER * len(label)
        place = None
        for anchor, dx, dy in (("start", 8, 4), ("end", -8, 4), ("middle", 0, -9), ("middle", 0, 17)):
            left = x + dx - {"start": 0, "end": width, "middle": width / 2}[anchor]
            box = (left, y + dy - 9, left + width, y + dy + 1)
            if label and left >= 0 and left + width <= _WIDTH + 8 and not any(_overlap(box, other) for other in taken):
                place = (anchor, float(dx), float(dy))
                taken.append(box)
                break
        places.append(place)
    return places


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Return whether two boxes (left, top, right, bottom) overlap."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def reliability(bins: Sequence[Bin], kind: Kind, description: str) -> Html:
    """Draw accuracy against confidence with a diagonal; the area of a marker grows with the share of predictions."""
    percent = Axis(0, 1, ((0, "0"), (0.5, "50"), (1, "100")), "confidence (%)")
    total = sum(part.count for part in bins)
    height = 130
    marks = [tag("line", x1="0%", y1=float(height), x2="100%", y2=0.0, class_="zero")]
    for part in bins:
        x, y = _x(percent, part.confidence), height * (1 - percent.share(part.accuracy))
        marks.append(tag("line", x1=x, x2=x, y1=y, y2=height * (1 - part.confidence), class_="whisker"))
        title = f"{part.count:,} predictions: confidence {part.confidence:.1%}, accuracy {part.accuracy:.1%}"
        radius = 2 + 7 * math.sqrt(part.count / total)
        marks.append(tag("circle", tag("title", title), cx=x, cy=y, r=radius, class_="mark"))
    group = tag("g", *marks, class_=kind.colour)
    return _frame([group], percent, Axis(0, 1, percent.ticks, "accuracy (%)"), description, height=height)


@dataclass(frozen=True)
class Dot:
    """A value in a row of dots, with its 95 % interval or None."""

    value: float
    kind: Kind
    title: str
    interval: tuple[float, float] | None = None


def dot_rows(rows: Sequence[tuple[Html, Sequence[Dot]]], scale: Axis, description: str) -> Html:
    """Draw one row for each name, with a dot for each value on a common scale."""
    grid = [tag("line", x1=_x(scale, at), x2=_x(scale, at), y1="0", y2="100%", class_="grid") for at, _ in scale.ticks]
    if scale.low < 0 < scale.high:
        grid.append(tag("line", x1=_x(scale, 0), x2=_x(scale, 0), y1="0", y2="100%", class_="zero"))
    lines = [
        tag("div", tag("div", name, class_="name"), _track(dots, scale, grid), class_="row") for name, dots in rows
    ]
    ticks = [
        tag("text", text, x=_x(scale, at), y=12.0, text_anchor=_anchor(scale, at), class_="tick")
        for at, text in scale.ticks
    ]
    axis_row = tag(
        "div", tag("div", class_="name"), tag("svg", *ticks, height=16.0, aria_hidden="true"), class_="row axis"
    )
    label = tag("p", scale.label, class_="axis-label")
    return tag("div", *lines, axis_row, label, class_="dots", role="img", aria_label=description)


def _track(dots: Sequence[Dot], scale: Axis, grid: Sequence[Html]) -> Html:
    spacing, top = 11, 10.0
    height = 20 + spacing * (len(dots) - 1) if any(dot.interval for dot in dots) else 20
    marks = []
    for number, dot in enumerate(dots):
        y = top + spacing * number if height > 20 else top
        if dot.interval is not None:
            low, high = (_x(scale, bound) for bound in dot.interval)
            marks.append(tag("line", x1=low, x2=high, y1=y, y2=y, class_=f"whisker {dot.kind.colour}"))
        marks.append(marker(dot.kind, _x(scale, dot.value), y, dot.title))
    return tag("svg", *grid, *marks, height=float(height))


def marker(kind: Kind, x: str, y: float, title: str, *, small: bool = False) -> Html:
    """Draw a marker at x (percent) and y (pixels), with a title that a pointer shows."""
    shape = tag("path", tag("title", title), d=kind.shape, transform="scale(.5)" if small else None)
    return tag("svg", shape, x=x, y=y, class_=f"mark {kind.colour}")


def swatch(kind: Kind) -> Html:
    """Draw a marker by itself, for a legend or a table's header."""
    shape = tag("path", d=kind.shape, transform="translate(6 6)")
    return tag("svg", shape, width=12.0, height=12.0, class_=f"swatch mark {kind.colour}", aria_hidden="true")


def named(kind: Kind, name: str) -> Html:
    """Return an objective's marker and name, and the note on it."""
    remark = tag("small", f" ({kind.note})") if kind.note else None
    return tag("span", swatch(kind), name_of(name), remark, class_="named")


def legend(kind_by_name: dict[str, Kind]) -> Html:
    """Return the markers and names of a chart's series."""
    return tag("p", *(named(kind, name) for name, kind in kind_by_name.items()), class_="legend")


def panel(title: Child, *children: Child) -> Html:
    """Return one of several small charts, with its title."""
    return tag("figure", tag("figcaption", title), *children)


def panels(*figures: Child, small: bool = False) -> Html:
    """Return small charts side by side, as many as the page is wide."""
    return tag("div", *figures, class_="panels small" if small else "panels")


def _frame(marks: Sequence[Html], x: Axis, y: Axis, description: str, *, height: int = HEIGHT) -> Html:
    """Return a chart with its axes, around marks that are placed in its area."""
    lines, texts = [], []
    for value, text in y.ticks:
        at = height * (1 - y.share(value))
        lines.append(tag("line", x1="0%", x2="100%", y1=at, y2=at, class_="grid"))
        texts.append(tag("text", text, x=-7.0, y=at, dy="0.32em", text_anchor="end", class_="tick"))
    for value, text in x.ticks:
        texts.append(
            tag("text", text, x=_x(x, value), y=height + 16.0, text_anchor=_anchor(x, value), class_="tick"),
        )
    texts.append(tag("text", x.label, x="50%", y=height + 32.0, text_anchor="middle", class_="axis-name"))
    if y.label:
        texts.append(tag("text", y.label, x=-40.0, y=-9.0, class_="axis-name"))
    picture = tag("svg", join(lines), join(texts), *marks, height=float(height), role="img", aria_label=description)
    return tag("div", picture, class_="chart")


def _anchor(scale: Axis, value: float) -> str:
    """Return the anchor that keeps a tick's text inside the chart."""
    share = scale.share(value)
    return "end" if share > 0.99 else "start" if share < 0.01 else "middle"


def _x(scale: Axis, value: float) -> str:
    return f"{scale.share(value) * 100:.2f}%"


def _y(scale: Axis, value: float) -> float:
    return HEIGHT * (1 - scale.share(value))
