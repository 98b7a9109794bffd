"""The learning curves: loss and dev score by step."""

from collections.abc import Callable, Mapping, Sequence

from xtransfer.report.page import charts
from xtransfer.report.page.charts import Line
from xtransfer.report.page.markup import Html, join, note, tag
from xtransfer.report.page.sources import MissingSource, Source
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import RunId
from xtransfer.train import metrics_log
from xtransfer.train.checkpoints import PARAMS

Rows = Sequence[Mapping[str, float]]


def build(source: Source) -> Html:
    """Return a chart of the dev score and one of the loss for the teacher and every objective."""
    runs = {name: runs for name in source.kinds if (runs := _runs(source, name))}
    if not runs:
        raise MissingSource("The workdir has no metrics.jsonl of its runs.")
    metric = source.config.selection_metric
    key = metrics_log.DEV_ACCURACY if metric == "accuracy" else f"dev_{metric}"
    scale, unit = (100, " (%)") if metric in ("accuracy", "micro_f1") else (1, "")
    scores = {name: _lines(source, name, by_run, key, scale) for name, by_run in runs.items()}
    losses = {name: _lines(source, name, by_run, "loss", 1) for name, by_run in runs.items()}
    sources = source.results.source_languages
    label = f"{'mean ' if len(sources) > 1 else ''}{metric} on {', '.join(sources)} dev{unit}"
    common = charts.axis([y for lines in scores.values() for line in lines for _, y in line.points], label, ticks=3)
    pieces: list[Html] = []
    if any(scores.values()):
        pieces += [tag("h3", "Dev score"), _charts(source, scores, lambda lines: common)]
    pieces += [
        tag("h3", "Training loss"),
        _charts(
            source,
            losses,
            lambda lines: charts.axis([0, *(y for line in lines for _, y in line.points)], "loss", ticks=3),
        ),
        note(
            f"A line for each run, and a point for each checkpoint. {_used(source)} Losses of different objectives "
            "measure different things, so each chart has its own scale."
        ),
    ]
    return join(pieces)


def _used(source: Source) -> str:
    """Say which checkpoints the results use."""
    protocol = PROTOCOLS[source.results.selection]
    if protocol.item != PARAMS:
        return f"The results use none of them alone: {protocol.description}."
    if protocol.per_language:
        return "The large points are the checkpoints that the results of one or more languages use."
    return "The large point is the checkpoint that the results use."


def _runs(source: Source, objective: str) -> dict[RunId, Rows]:
    by_run = {run: metrics_log.read_metrics(source.run_directory(objective, run)) for run in source.steps(objective)}
    return {run: rows for run, rows in by_run.items() if rows}


def _lines(source: Source, objective: str, by_run: Mapping[RunId, Rows], key: str, scale: float) -> list[Line]:
    steps = source.steps(objective)
    is_point = PROTOCOLS[source.results.selection].item == PARAMS  # not an average of several
    lines = []
    for run, rows in by_run.items():
        points = tuple((float(row["step"]), row[key] * scale) for row in rows if key in row)
        if points:
            marked = frozenset(steps[run].values()) if is_point else frozenset[float]()
            lines.append(Line(points, source.kinds[objective], f"{source.results.name_of(objective)} {run}", marked))
    return lines


def _charts(
    source: Source, lines_by_name: Mapping[str, Sequence[Line]], y_axis: Callable[[Sequence[Line]], charts.Axis]
) -> Html:
    figures = []
    for name, lines in lines_by_name.items():
        if lines:
            steps = charts.axis([0, *(x for line in lines for x, _ in line.points)], "step", ticks=4, whole=True)
            y = y_axis(lines)
            figures.append(
                charts.panel(
                    charts.named(source.kinds[name], name),
                    charts.line_chart(lines, steps, y, f"{y.label} of {name} by step"),
                )
            )
    return charts.panels(*figures)
