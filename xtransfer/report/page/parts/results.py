"""The results: a chart and two tables, with intervals and significance."""

from collections.abc import Iterable

import numpy as np

from xtransfer.errors import UserError
from xtransfer.evaluation.metrics import at_chance
from xtransfer.evaluation.results import BASELINE, ObjectiveResults
from xtransfer.evaluation.significance import RESAMPLES, Difference, bootstrap, percentile_interval, wilson
from xtransfer.report import summary
from xtransfer.report.page import charts
from xtransfer.report.page.charts import Dot
from xtransfer.report.page.markup import Child, Html, join, name_of, note, table, tag
from xtransfer.report.page.sources import Comparison, Interval, MissingSource, Source
from xtransfer.runs import teachers
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
    lines = [*summary.caption(source.results, source.task), *teachers.origins(source.config)]
    pieces.append(tag("ul", *(tag("li", line) for line in lines), class_="note"))
    return join(pieces)


def paired_gains(source: Source) -> dict[str, Difference]:
    """Return each objective's difference from the baseline on average over target languages, if predictions have it."""
    comparisons, _ = _comparisons(source)
    return {name: item.differences[None] for name, item in comparisons.items() if None in item.differences}


def problem(source: Source) -> str:
    """Return a sentence that says why the predictions cannot be compared, or "" if they can or need not be."""
    return _comparisons(source)[1] if source.results.metric == source.config.headline_metric else ""


def _comparisons(source: Source) -> tuple[dict[str, Comparison], str]:
    """Return the comparisons, and a sentence that says why there are none."""
    headline = source.config.headline_metric
    if source.results.metric != headline:
        return {}, f"Intervals and tests exist for {headline} only, and this table shows {source.results.metric}."
    try:
        return source.comparisons, ""
    except UserError as error:
        return {}, f"There are no intervals and no tests, because the predictions cannot be compared: {error}."


def _columns(source: Source) -> list[tuple[str | None, Html]]:
    """Return the languages and the average, each with its name for a row."""
    sources = source.results.source_languages
    rows: list[tuple[str | None, Html]] = [
        (language, join([name_of(language), Html(" <small>source</small>") if language in sources else None]))
        for language in source.languages
    ]
    return [*rows, (None, Html("average of targets"))]


def _chart(source: Source, comparisons: dict[str, Comparison]) -> Html:
    rows = _columns(source)
    omitted = ""
    if len(source.results.target_languages) > _CHART_LANGUAGES:
        shown = source.shown_languages(_CHART_LANGUAGES)
        rows = [row for row in rows if row[0] in (*shown, None)]
        count = len(shown) - len(source.results.source_languages)
        omitted = f" {count} of {len(source.results.target_languages)} target languages are drawn."
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
        title = f"{source.results.name_of(line.objective)}: {summary.value_text(values)}"
        yield Dot(values.mean * 100, source.kinds[line.objective], title, percent)


def interval_of(
    source: Source, comparisons: dict[str, Comparison], objective: str, language: str | None
) -> Interval | None:
    """Return the 95 % interval of an accuracy, or None if it has none."""
    if objective in comparisons:
        return comparisons[objective].intervals[language]
    if objective == TEACHER and source.results.metric == "accuracy" and language is not None:
        return _teacher_interval(source, language)
    return None


def _teacher_interval(source: Source, language: str) -> Interval | None:
    """Return Wilson's interval over items for one teacher, and over items and draws for several.

    It is None if there are several, and their predictions cannot be read.
    """
    runs = tuple(source.steps(TEACHER))
    if len(runs) == 1:
        line = next(line for line in source.results.lines if line.objective == TEACHER)
        return wilson(line.languages[language].mean, source.results.counts[language])
    try:
        parts = [source.predictions(TEACHER, run, language) for run in runs]
    except (MissingSource, UserError):
        return None
    right = [dict(zip(part.ids, part.guesses == part.gold, strict=True)) for part in parts]
    if any(by_item.keys() != right[0].keys() for by_item in right):
        return None
    correct = np.array([[[by_item[item] for item in right[0]]] for by_item in right], float)  # [S, 1, N]
    low, high = np.clip(percentile_interval(bootstrap(correct))[:, 0], 0, 1)
    return float(low), float(high)


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
        texts.append(f"Small: 95 % interval over {_population(source)} ({_method(source)}){_teacher_note(source)}.")
    if any_at_chance:
        texts.append("† In at least one run, no better than always answering the majority class.")
    return join([table(header, rows, class_="results"), note(" ".join(texts))])


def _population(source: Source) -> str:
    """Return what the intervals of the students go over."""
    return f"test items and {source.results.axis.units}" if _is_repeated(source) else "test items"


def _method(source: Source) -> str:
    """Return how the intervals of the students come about."""
    items = f"items: {RESAMPLES:,} resamples"
    return f"{items}; {source.results.axis.units}: Student's t" if _is_repeated(source) else items


def _teacher_note(source: Source) -> str:
    """Return how the interval of the teacher differs from those of the students, or ""."""
    if len(source.steps(TEACHER)) != 1 or source.results.metric != "accuracy":
        return ""
    return "; for the teacher over items alone (Wilson)" if _is_repeated(source) else "; for the teacher Wilson's"


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
        f"Difference in points, paired by test item and run, with its 95 % interval over {_population(source)}. "
        f"{marks}; two-sided, for a target language with Holm's correction for the number of languages."
    )
    return join([table(header, rows, class_="results"), note(explanation)])


def _gain(difference: Difference) -> Html:
    low, high = (bound * 100 for bound in difference.interval)
    p = difference.p if difference.p_holm is None else difference.p_holm
    stars = mark(p)
    return join(
        [
            f"{difference.mean * 100:+.1f}",
            tag("sup", stars, title=f"p {summary.p_text(p)}"),
            tag("small", f"{low:+.1f} to {high:+.1f}"),
        ]
    )


def mark(p: float) -> str:
    """Return the stars of a p-value, or "" if the difference is not significant."""
    return next((stars for level, stars in _MARKS if p < level), "")
