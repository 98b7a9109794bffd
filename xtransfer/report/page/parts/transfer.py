"""The transfer to each language: the gap to the source language, and the gain against how the tokenizer splits it."""

import statistics
from collections.abc import Callable, Sequence

from xtransfer.evaluation.metrics import higher_is_better
from xtransfer.evaluation.results import BASELINE
from xtransfer.evaluation.token_counts import TokenCounts, read_token_counts
from xtransfer.report import summary
from xtransfer.report.page import charts
from xtransfer.report.page.charts import Dot, Point
from xtransfer.report.page.markup import Child, Html, join, name_of, note, table, tag
from xtransfer.report.page.sources import Source

_LABELLED_POINTS = 25  # points with their names; more would overlap
_CHART_LANGUAGES = 60
_MANY_UNKNOWN = 0.001  # the smallest share worth a chart


def build(source: Source) -> Html:
    """Return the transfer gap of every language, and its gain against tokens per word and unknown tokens."""
    counts = {row.language: row for row in read_token_counts(source.workdir) if row.split == source.results.split}
    pieces = [tag("h3", "Transfer gap"), _gaps(source), tag("h3", "Gain and tokenization")]
    targets = [language for language in source.results.target_languages if language in counts]
    if not targets:
        pieces.append(note("The workdir has no tokens.jsonl for this split, which an evaluation writes."))
    else:
        if BASELINE in source.students and source.main_objective != BASELINE:
            pieces.append(_scatters(source, counts, targets))
        pieces.append(_table(source, counts))
    return join(pieces)


def gap(source: Source, objective: str, language: str) -> float:
    """Return by how much a language is worse than the source language, the mean over runs, in points.

    Several source languages count as their mean.
    """
    line = next(line for line in source.results.lines if line.objective == objective)
    in_sources = source.results.source_average(line)
    assert in_sources is not None  # only objectives in all languages are drawn
    below = (in_sources.mean - line.languages[language].mean) * 100
    return below if higher_is_better(source.results.metric) else -below


def gain(source: Source, objective: str, language: str) -> float:
    """Return the metric of an objective minus the metric of the baseline in a language, in points.

    It is a loss if it is positive and lower values are better, see `summary.gain_title`.
    """
    lines = {line.objective: line for line in source.results.lines}
    ours, baseline = (lines[name].languages[language] for name in (objective, BASELINE))
    common = ours.by_unit.keys() & baseline.by_unit.keys()
    if not common:
        return (ours.mean - baseline.mean) * 100
    # Paired by run, like every other gain.
    return statistics.fmean(ours.by_unit[unit] - baseline.by_unit[unit] for unit in common) * 100


def _gaps(source: Source) -> Html:
    order = sorted(
        source.results.target_languages,
        key=lambda language: -sum(gap(source, objective, language) for objective in source.students),
    )
    omitted = ""
    if len(order) > _CHART_LANGUAGES:
        shown = source.shown_languages(_CHART_LANGUAGES)
        count = len(shown) - len(source.results.source_languages)
        omitted = f" {count} of {len(order)} languages are drawn; the table below has all."
        order = [language for language in order if language in shown]
    rows = [
        (
            name_of(language),
            [
                Dot(value, kind, f"{source.results.name_of(objective)}: {value:+.1f} points")
                for objective, kind in source.student_kinds.items()
                for value in (gap(source, objective, language),)
            ],
        )
        for language in order
    ]
    values = [dot.value for _, dots in rows for dot in dots]
    sources, metric = source.results.source_languages, source.results.metric
    name = sources[0] if len(sources) == 1 else f"the mean of {', '.join(sources)}"
    than = "the source language" if len(sources) == 1 else "the source languages on average"
    side = "below" if higher_is_better(metric) else "above"
    scale = charts.axis([0, *values], f"points {side} {name}", ticks=5)
    return join(
        [
            charts.legend(source.student_kinds),
            charts.dot_rows(rows, scale, "transfer gap of every objective in every language"),
            note(
                f"Gap: points by which {metric} is worse in a target language than in {than}, the largest "
                f"gap first.{omitted}"
            ),
        ]
    )


def _scatters(source: Source, counts: dict[str, TokenCounts], targets: Sequence[str]) -> Html:
    objective = source.main_objective
    label = f"{summary.gain_title(source.results)}, points"
    name = "gain" if higher_is_better(source.results.metric) else "difference"
    y = charts.axis([0, *(gain(source, objective, language) for language in targets)], label, ticks=3, signed=True)

    def chart(languages: Sequence[str], value: Callable[[TokenCounts], float], title: str, from_zero: bool) -> Html:
        values = [value(counts[language]) for language in languages]
        x = charts.axis([0.0, *values] if from_zero else values, title, ticks=4)
        points = [
            Point(
                value(counts[language]),
                gain(source, objective, language),
                source.kinds[objective],
                f"{language}: {title} {value(counts[language]):.3g}, {gain(source, objective, language):+.1f} points",
                language if len(languages) <= _LABELLED_POINTS else "",
            )
            for language in languages
        ]
        return charts.panel(
            f"{source.results.name_of(objective)}: {name} by {title}",
            charts.scatter(points, x, y, f"{name} by {title}"),
        )

    figures = []
    for unit in ("word", "character"):
        languages = [language for language in targets if counts[language].unit == unit]
        if len(languages) > 1:
            figures.append(chart(languages, lambda row: row.fertility, f"tokens per {unit}", False))
    if any(counts[language].unknown >= _MANY_UNKNOWN for language in targets):
        figures.append(chart(targets, lambda row: row.unknown * 100, "unknown tokens (%)", True))
    return charts.panels(*figures) if figures else Html("")


def _table(source: Source, counts: dict[str, TokenCounts]) -> Html:
    has_gain = BASELINE in source.students and source.main_objective != BASELINE
    header: list[Child] = [
        "language",
        "tokens per word",
        "unknown",
        "truncated",
        f"gap of {source.results.name_of(source.main_objective)}",
    ]
    if has_gain:
        header.append(summary.gain_title(source.results))
    rows: list[list[Child]] = []
    for language in source.languages:
        is_source = language in source.results.source_languages
        row: list[Child] = [join([name_of(language), Html(" <small>source</small>") if is_source else None])]
        if language in counts:
            tokens = counts[language]
            star = "*" if tokens.unit == "character" else ""
            row += [
                f"{tokens.fertility:.2f}{star}",
                f"{tokens.unknown:.1%}",
                f"{tokens.truncated / tokens.examples:.1%}",
            ]
        else:
            row += ["–"] * 3
        row.append("" if is_source else f"{gap(source, source.main_objective, language):+.1f}")
        if has_gain:
            row.append(f"{gain(source, source.main_objective, language):+.1f}")
        rows.append(row)
    texts = ["Tokens of the student's tokenizer, without special ones."]
    if any(row.unit == "character" for row in counts.values()):
        texts.append("* Tokens per character, because the script has no spaces between words.")
    return join([table(header, rows), note(" ".join(texts))])
