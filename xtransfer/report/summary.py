"""A results table as text: its cells, its headline, its caption, its caveats, and its warnings."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

from xtransfer.distillation.objectives import kinds_of_target_text
from xtransfer.evaluation.metrics import at_chance, higher_is_better
from xtransfer.evaluation.results import BASELINE, TARGET_TEXT_MARK, ObjectiveResults, ResultsTable, Summary
from xtransfer.evaluation.significance import Difference
from xtransfer.report import table as table_writer
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TEACHER, TaskRecord

_MOST_NAMED = 8  # languages of an objective that a caveat names
_MARKDOWN_WIDTH = 120  # characters of a Markdown table's row, beyond which languages go into rows

Gains = Mapping[str, Difference]
"""The difference of each objective from the baseline on average over target languages, from stored predictions."""

NO_GAINS: Gains = MappingProxyType({})


def show(
    results: ResultsTable,
    console: table_writer.Console,
    task: TaskRecord,
    gains: Gains = NO_GAINS,
    notes: Sequence[str] = (),
) -> None:
    """Print the table, what its numbers are, one sentence that says what it shows, one line of caveats, and notes."""
    table_writer.show(grid(results, task, width=console.width), console, wrap=False)
    for text in (legend(results), headline(results, gains), caveats(results, task), *notes):
        if text:
            console.print(text, markup=False)


def markdown(results: ResultsTable, task: TaskRecord, gains: Gains = NO_GAINS, notes: Sequence[str] = ()) -> str:
    """Return the table, its headline, its caption, further notes, and its warnings as a Markdown page."""
    table = table_writer.markdown(grid(results, task, width=_MARKDOWN_WIDTH))
    sentence = headline(results, gains)
    lines = [*caption(results, task), *notes, *(f"**{text}**" for text in warnings(results))]
    return "\n".join(
        [
            f"# {title_of(results, task)}",
            "",
            *([sentence, ""] if sentence else []),
            *table,
            "",
            *(f"- {text}" for text in lines),
            "",
        ]
    )


def grid(results: ResultsTable, task: TaskRecord, *, width: int) -> table_writer.Table:
    """Return the table with objectives in rows, or in columns if that is narrower and rows exceed `width`."""
    header, rows = cells(results)
    title = title_of(results, task)
    wide = table_writer.Table(tuple(header), tuple(map(tuple, rows)), title=title)
    if table_writer.width(wide) <= width:
        return wide
    columns = list(zip(header, *rows, strict=True))
    narrow = table_writer.Table(("language", *columns[0][1:]), tuple(columns[1:]), title=title)
    return min(wide, narrow, key=table_writer.width)


def cells(results: ResultsTable) -> tuple[list[str], list[list[str]]]:
    """Return header and rows as text: values in percent, gains in points, and "–" for a missing value."""
    has_gain = any(line.gain for line in results.lines)
    sources = [f"{language} (source)" for language in results.source_languages]
    header = ["objective", *sources, *results.target_languages, "avg of targets"]
    if has_gain:
        header.append(gain_title(results))
    lines = []
    for line in results.lines:
        row = [results.name_of(line.objective), *(value_text(line.languages.get(name)) for name in results.languages)]
        row.append(value_text(line.average))
        if has_gain:
            row.append(value_text(line.gain, "+.1f"))
        lines.append(row)
    return header, lines


def headline(results: ResultsTable, gains: Gains = NO_GAINS) -> str | None:
    """Return one sentence about the gain of the first objective with a monolingual teacher, or None without one.

    An objective that uses text in target languages never is the headline.

    Args:
      results: the results.
      gains: the paired differences from stored predictions, whose intervals go over test items too. Without the
        objective's own, the interval is over seeds (or draws) alone, and the sentence says so.
    """
    for line in results.lines:
        if line.gain is not None and results.may_be_headline(line.objective):
            return _gain_sentence(results, line.objective, line.gain, gains.get(line.objective))
    return None


def _gain_sentence(results: ResultsTable, objective: str, gain: Summary, paired: Difference | None) -> str:
    """State a gain, and whether it is clear. One run alone shows no effect of an objective."""
    kind = "zero-shot" if PROTOCOLS[results.selection].zero_shot else "oracle"
    metric = f"{kind} {results.metric}{direction_note(results)}"
    points = (gain.mean if paired is None else paired.mean) * 100
    interval = gain.interval if paired is None else paired.interval
    low, high = (bound * 100 for bound in interval) if interval is not None else (points, points)
    if len(gain.by_unit) == 1:
        unit, others = ("run", "seeds") if len(results.draws) == 1 else ("draw", "draws")
        if points < 0:  # a loss is stated without its sign
            low, high = -high, -low
        seeds = " and seeds" if paired is not None and len(paired.by_unit.by_unit) > 1 else ""
        covers = (
            f"; other {others} and test items are not included"
            if paired is None
            else f": {_interval(low, high)} over test items{seeds}; other {others} are not included"
        )
        return (
            f"{objective} has {abs(points):.1f} points {'more' if points >= 0 else 'less'} {metric} than direct "
            f"fine-tuning ({BASELINE}) in one {unit}{covers}."
        )
    is_clear = low > 0 or high < 0
    if high < 0:
        low, high = -high, -low
    over = (
        f"over {_over(results, gain)}; test items are not included"
        if paired is None
        else f"over test items and {_over(results, gain)}; p {p_text(paired.p)}"
    )
    if not is_clear:
        return (
            f"{objective} makes no clear difference to {metric}: {points:+.1f} points over direct "
            f"fine-tuning ({BASELINE}), {_interval(low, high)} {over}."
        )
    verb = "raises" if points > 0 else "lowers"
    return (
        f"{objective} {verb} {metric} by {abs(points):.1f} points over direct fine-tuning "
        f"({BASELINE}): {_interval(low, high)} {over}."
    )


def _interval(low: float, high: float) -> str:
    return f"95 % interval {low:.1f} to {high:.1f}"


def p_text(value: float) -> str:
    """Return a p-value with its sign of comparison, such as "= 0.012"."""
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def gain_title(results: ResultsTable) -> str:
    """Return the name of a difference from the baseline, which is no gain if lower values are better."""
    is_gain = higher_is_better(results.metric)
    return f"gain over {BASELINE}" if is_gain else f"minus {BASELINE}{direction_note(results)}"


def direction_note(results: ResultsTable) -> str:
    """Return " (lower is better)" for such a metric, and "" for the others."""
    return "" if higher_is_better(results.metric) else " (lower is better)"


def legend(results: ResultsTable) -> str:
    """Return one line that says what the numbers of the table are."""
    summary = max((next(iter(line.languages.values())) for line in results.lines), key=lambda s: len(s.by_unit))
    spread = f"mean ± sd over {_over(results, summary)}" if len(summary.by_unit) > 1 else "one seed"
    counts_by_name = {
        line.objective: len(next(iter(line.languages.values())).by_unit)
        for line in results.lines
        if line.objective != TEACHER
    }
    fewer = [f"{name} has {n}" for name, n in counts_by_name.items() if n < max(counts_by_name.values())]
    if fewer:
        spread += f" ({', '.join(fewer)}; gains are over those in common)"
    counts = sorted(set(results.counts.values()))
    examples = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
    return f"in %, {spread}; {examples} examples per language; checkpoint: {results.checkpoint}"


def caveats(results: ResultsTable, task: TaskRecord) -> str:
    """Return one line that says how far the numbers can be trusted, or "" if there is nothing to say."""
    texts = []
    if task.synthetic:
        texts.append("the text is synthetic, so the numbers say nothing about real languages")
    if len(results.draws) == 1 and any(len(line.seeds) > 1 for line in results.lines):
        texts.append("all seeds share one labelled sample and one teacher")
    at_majority = _at_majority(results)
    if at_majority:
        texts.append(at_majority)
    return f"Caveats: {'; '.join(texts)}." if texts else ""


def _over(results: ResultsTable, summary: Summary) -> str:
    """Return what a summary goes over, such as "3 seeds; one labelled sample and one teacher"."""
    return results.axis.over(len(summary.by_unit)) + _seeds_each(results)


def _seeds_each(results: ResultsTable) -> str:
    """Return the number of seeds within a draw, unless seeds are the axis or each draw has one."""
    students = [run for line in results.lines if line.objective != TEACHER for run in line.runs]
    seeds = len({run.seed for run in students})
    return f"; {seeds} seeds each" if len(results.draws) > 1 and seeds > 1 else ""


def source_title(results: ResultsTable) -> str:
    """Return the title of a column with `ResultsTable.source_average`."""
    sources = results.source_languages
    return f"{sources[0]} (source)" if len(sources) == 1 else f"avg of {', '.join(sources)} (sources)"


def value_text(summary: Summary | None, form: str = ".1f") -> str:
    """Return a mean in percent with its standard deviation, if there is one, or "–" for a missing value."""
    if summary is None:
        return "–"
    mean = f"{summary.mean * 100:{form}}"
    return mean if summary.sd is None else f"{mean} ± {summary.sd * 100:.1f}"


def title_of(results: ResultsTable, task: TaskRecord) -> str:
    """Return the heading: task, metric, and split."""
    return f"{task_name(results, synthetic=task.synthetic)}: {results.metric} on {results.split}"


def task_name(results: ResultsTable, *, synthetic: bool) -> str:
    """Return the task's name, marked "(synthetic)" if its text was generated."""
    return f"{results.task} (synthetic)" if synthetic else results.task


def caption(results: ResultsTable, task: TaskRecord) -> list[str]:
    """Describe the numbers: metric, split, examples, seeds, selection, and the meaning of average and gain."""
    counts = set(results.counts.values())
    examples = (
        f"{counts.pop():,} examples per language"
        if len(counts) == 1
        else "examples: " + ", ".join(f"{language} {count:,}" for language, count in results.counts.items())
    )
    lines = [
        f"{results.metric} in % on the {results.split} split of {task_name(results, synthetic=task.synthetic)}, "
        f"{len(task.labels)} classes, {examples}.",
        f"Checkpoint of each run: {results.checkpoint} ({results.selection}).",
        *(_draw_lines(results) if len(results.draws) > 1 else _seed_lines(results.lines)),
        f"avg of targets: mean over {', '.join(results.target_languages)}, without the source "
        f"language{'s' if len(results.source_languages) > 1 else ''} {' and '.join(results.source_languages)}.",
    ]
    if any(line.gain for line in results.lines):
        same = "draw and seed" if len(results.draws) > 1 else "seed"
        name, better = ("Gain", "") if higher_is_better(results.metric) else (f"Minus {BASELINE}", "; lower is better")
        lines.append(f"{name}: avg of targets minus the one of {BASELINE} with the same {same}, in points{better}.")
    return [*lines, *_target_text_lines(results)]


def _target_text_lines(results: ResultsTable) -> list[str]:
    """Say which objectives have used text in target languages, and which are of some languages alone."""
    kinds_by_name = {line.objective: kinds_of_target_text(results.objectives, line.objective) for line in results.lines}
    names = [name for name, kinds in kinds_by_name.items() if kinds]
    lines = []
    for kinds in dict.fromkeys(kinds_by_name[name] for name in names):
        alike = ", ".join(name for name in names if kinds_by_name[name] == kinds)
        lines.append(
            f"{TARGET_TEXT_MARK}: {alike} learned from {' and '.join(kinds)} in target languages, so these numbers are "
            "not zero-shot without target text."
        )
    for line in results.lines:
        only = results.objectives[line.objective].languages if line.objective in names else ()
        if only:
            without = ", so without an average" if line.average is None else ""
            lines.append(
                f"{line.objective}: for {', '.join(only)} alone{without}. No dev split selects its checkpoint, and its "
                "last one is used."
            )
    return lines


def _draw_lines(results: ResultsTable) -> list[str]:
    by_draws: dict[tuple[str, ...], list[str]] = {}
    for line in results.lines:
        by_draws.setdefault(line.draws, []).append(line.objective)
    texts = []
    for draws, objectives in by_draws.items():
        names = f"{', '.join(objectives)}: " if len(by_draws) > 1 else ""
        count = results.axis.over(len(draws)) if len(draws) > 1 else "one draw"
        spread = f"mean ± sample standard deviation over {results.axis.units}" if len(draws) > 1 else "spread unknown"
        texts.append(f"{names}{count}{_seeds_each(results)} ({', '.join(draws)}), {spread}.")
    texts.append(
        "A draw is a labelled sample, an unlabelled sample, and a teacher trained on the first. A draw's value is the "
        f"mean over its seeds. All draws use the same seeds, so ± covers other {results.axis.units}, and not other "
        "seeds. All draws are scored on the same test text."
    )
    return texts


def _seed_lines(lines: Iterable[ObjectiveResults]) -> list[str]:
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for line in lines:
        by_seeds.setdefault(line.seeds, []).append(line.objective)
    texts = []
    for seeds, objectives in by_seeds.items():
        names = f"{', '.join(objectives)}: " if len(by_seeds) > 1 else ""
        repeated = len(seeds) > 1
        spread = "mean ± sample standard deviation over seeds" if repeated else "one run each, spread unknown"
        texts.append(f"{names}{len(seeds)} seed{'s' if repeated else ''} ({', '.join(map(str, seeds))}), {spread}.")
    if any(len(seeds) > 1 for seeds in by_seeds):
        texts.append(
            "All seeds share one labelled sample, one unlabelled sample, and one monolingual teacher. They differ only "
            "in the new head, the order of examples, and dropout, so ± says nothing about other samples or teachers."
        )
    return texts


def warnings(results: ResultsTable) -> list[str]:
    """Return one line that names everything whose accuracy is at chance, if there is any."""
    at_majority = _at_majority(results)
    return [f"Warning: {at_majority}."] if at_majority else []


def _at_majority(results: ResultsTable) -> str:
    """Name everything whose accuracy is at chance (`metrics.at_chance`), or return "".

    Other metrics name nothing, and neither do languages whose majority share is not in the rows.
    """
    if results.metric != "accuracy":
        return ""
    texts = []
    for line in results.lines:
        languages = []
        for language, summary in line.languages.items():
            if language not in results.majority:
                continue
            values = summary.by_unit.values()
            units = "seeds" if len(results.draws) == 1 else "draws"
            poor = sum(at_chance(value, results.counts[language], results.majority[language]) for value in values)
            if poor:
                languages.append(f"{language} ({poor} of {len(values)} {units})" if len(values) > 1 else language)
        if languages:
            more = f" and {len(languages) - _MOST_NAMED} more languages" if len(languages) > _MOST_NAMED else ""
            texts.append(f"{results.name_of(line.objective)} in {', '.join(languages[:_MOST_NAMED])}{more}")
    return f"no better than the majority class: {'; '.join(texts)}" if texts else ""
