"""The results: a chart and two tables, with intervals and significance."""

from collections.abc import Iterable

from xtransfer.errors import UserError
from xtransfer.evaluation.metrics import at_chance
from xtransfer.evaluation.results import BASELINE, ObjectiveResults
from xtransfer.evaluation.significance import RESAMPLES, Difference, wilson
from xtransfer.report import summary
from xtransfer.report.page import charts
from xtransfer.report.page.charts import Dot
from xtransfer.report.page.markup import Child, Html, join, name_of, note, table, tag
from xtransfer.report.page.sources import Comparison, Interval, Source
from xtransfer.runs.workdir import TEACHER

_MARKS = ((0.001, "***"), (0.01, "**"), (0.05, "*"))
_CHART_LANGUAGES = 60  # a chart of more target languages would be taller than a few screens


def build(source: Source) -> Html:
    """Return the chart and the tables of all languages."""
    comparisons, problem = _comparisons(source)
    pieces = [_chart(source, comparisons), _accuracy_table(source, comparisons)]
    if problem:
        pieces.append(note(problem))
    gains = _gains_table(source, comparisons)
    if gains:
        pieces += [tag("h3", f"Gain over {BASELINE}"), gains]
    pieces.append(tag("ul", *(tag("li", line) for line in summary.caption(source.results, source.task)), class_="note"))
    return join(pieces)


def gain_sentence(source: Source) -> str | None:
    """Return one sentence about the gain of the main objective over test items and runs, or None without it."""
    comparisons, _ = _comparisons(source)
    comparison = comparisons.get(source.main_objective)
    if comparison is None or None not in comparison.differences:
        return None
    difference = comparison.differences[None]
    low, high = (bound * 100 for bound in difference.interval)
    return (
        f"Paired over test items and {_axis(source, difference)}: {difference.mean * 100:+.1f} points, 95 % interval "
        f"{low:+.1f} to {high:+.1f}, p {_p(difference.p)}."
    )


def _axis(source: Source, difference: Difference) -> str:
    """Return what the interval of a difference goes over besides items."""
    count = len(difference.by_unit.by_unit)
    return source.results.axis.over(count) if count > 1 else "one run"


def _comparisons(source: Source) -> tuple[dict[str, Comparison], str]:
    """Return the comparisons, and a sentence that says why there are none."""
    if source.results.metric != "accuracy":
        return {}, f"Intervals and tests exist for accuracy only, and this table shows {source.results.metric}."
    try:
        return source.comparisons, ""
    except UserError as error:
        return {}, f"There are no intervals and no tests, because the predictions cannot be compared: {error}."


def _columns(source: Source) -> list[tuple[str | None, Html]]:
    """Return the languages and the average, each with its name for a row."""
    rows: list[tuple[str | None, Html]] = [
        (language, join([name_of(language), Html(" <small>source</small>") if i == 0 else None]))
        for i, language in enumerate(source.languages)
    ]
    return [*rows, (None, Html("average of targets"))]


def _chart(source: Source, comparisons: dict[str, Comparison]) -> Html:
    rows = _columns(source)
    omitted = ""
    if len(source.results.target_languages) > _CHART_LANGUAGES:
        shown = {*source.shown_languages(_CHART_LANGUAGES), None}
        rows = [row for row in rows if row[0] in shown]
        omitted = f" {_CHART_LANGUAGES - 1} of {len(source.results.target_languages)} target languages are drawn."
    dots = [(name, list(_dots(source, comparisons, language))) for language, name in rows]
    values = [bound for _, row in dots for dot in row for bound in (dot.value, *(dot.interval or ()))]
    metric = source.results.metric
    scale = charts.axis(values, f"{metric} (%)", ticks=5)
    has_intervals = any(dot.interval for _, row in dots for dot in row)
    explanation = f"Lines are 95 % intervals over {_population(source)}." if has_intervals else ""
    return join(
        [
            charts.legend(source.kinds),
            charts.dot_rows(dots, scale, f"{metric} of every objective in every language"),
            note(explanation + omitted) if explanation + omitted else None,
        ]
    )


def _dots(source: Source, comparisons: dict[str, Comparison], language: str | None) -> Iterable[Dot]:
    for line in source.results.lines:
        values = line.average if language is None else line.languages.get(language)
        if values is None:
            continue
        interval = interval_of(source, comparisons, line.objective, language)
        percent = (interval[0] * 100, interval[1] * 100) if interval else None
        title = f"{line.objective}: {summary.value_text(values)}"
        yield Dot(values.mean * 100, source.kinds[line.objective], title, percent)


def interval_of(
    source: Source, comparisons: dict[str, Comparison], objective: str, language: str | None
) -> Interval | None:
    """Return the 95 % interval of an accuracy; the teacher, which is a single run, has Wilson's over items."""
    if objective in comparisons:
        return comparisons[objective].intervals[language]
    if objective == TEACHER and source.results.metric == "accuracy" and language is not None:
        line = next(line for line in source.results.lines if line.objective == TEACHER)
        return wilson(line.languages[language].mean, source.results.counts[language])
    return None


def _accuracy_table(source: Source, comparisons: dict[str, Comparison]) -> Html:
    results = source.results
    header: list[Child] = ["language", "items", *(charts.named(kind, name) for name, kind in source.kinds.items())]
    rows: list[list[Child]] = []
    any_at_chance = False
    for language, name in _columns(source):
        row: list[Child] = [name, f"{results.counts[language]:,}" if language is not None else ""]
        for line in results.lines:
            value = line.average if language is None else line.languages.get(language)
            interval = interval_of(source, comparisons, line.objective, language) if value else None
            is_poor = language is not None and _is_poor(source, line, language)
            any_at_chance |= is_poor
            row.append(
                join(
                    [
                        summary.value_text(value),
                        tag("sup", "†", title="no better than the majority class") if is_poor else None,
                        tag("small", f"{interval[0] * 100:.1f} to {interval[1] * 100:.1f}") if interval else None,
                    ]
                )
            )
        rows.append(row)
    is_repeated = _is_repeated(source)
    texts = [f"Mean ± standard deviation over {results.axis.units}, in %." if is_repeated else "In %."]
    if comparisons:
        teacher = "; for the teacher over items alone (Wilson)" if is_repeated else "; for the teacher Wilson's"
        texts.append(f"Small: 95 % interval over {_population(source)} ({RESAMPLES:,} resamples){teacher}.")
    if any_at_chance:
        texts.append("† In at least one run, no better than always answering the majority class.")
    return join([table(header, rows, class_="results"), note(" ".join(texts))])


def _population(source: Source) -> str:
    """Return what the intervals of the students go over."""
    return f"test items and {source.results.axis.units}" if _is_repeated(source) else "test items"


def _is_repeated(source: Source) -> bool:
    return any(len(source.steps(name)) > 1 for name in source.students)


def _is_poor(source: Source, line: ObjectiveResults, language: str) -> bool:
    results = source.results
    if results.metric != "accuracy" or language not in results.majority or language not in line.languages:
        return False
    values = line.languages[language].by_unit.values()
    return any(at_chance(value, results.counts[language], results.majority[language]) for value in values)


def _gains_table(source: Source, comparisons: dict[str, Comparison]) -> Html | None:
    compared = {name: comparison for name, comparison in comparisons.items() if comparison.differences}
    if not compared:
        return None
    header = ["language", *(charts.named(source.kinds[name], name) for name in compared)]
    rows = [
        [name, *(_gain(comparison.differences[language]) for comparison in compared.values())]
        for language, name in _columns(source)
    ]
    marks = ", ".join(f"{mark} p < {level:g}" for level, mark in reversed(_MARKS))
    explanation = (
        f"Difference in points, paired by test item and run, with its 95 % interval. {marks}; two-sided, for a target "
        "language with Holm's correction for the number of languages."
    )
    return join([table(header, rows, class_="results"), note(explanation)])


def _gain(difference: Difference) -> Html:
    low, high = (bound * 100 for bound in difference.interval)
    p = difference.p if difference.p_holm is None else difference.p_holm
    stars = mark(p)
    return join(
        [
            f"{difference.mean * 100:+.1f}",
            tag("sup", stars, title=f"p {_p(p)}"),
            tag("small", f"{low:+.1f} to {high:+.1f}"),
        ]
    )


def mark(p: float) -> str:
    """Return the stars of a p-value, or "" if the difference is not significant."""
    return next((stars for level, stars in _MARKS if p < level), "")


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"
