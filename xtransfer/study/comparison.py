"""Compare the variants of a study: results of repetitions to a table with intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from xtransfer.evaluation.results import BASELINE, ObjectiveResults, ResultsTable, Summary, Unit
from xtransfer.report import table as table_writer
from xtransfer.report.summary import value_text
from xtransfer.runs.workdir import TEACHER


@dataclass(frozen=True)
class Comparison:
    """The results of one variant over its repetitions; shares, not percent.

    Attributes:
      variant: its name.
      teacher: the teacher's score in the source language, or the mean over several.
      source: the students' scores in the source language, or the means over several, by objective.
      targets: their averages over the target languages, by objective.
      gains: the differences of these averages from the baseline's in the same repetition, by objective.
      metric: what the scores are.
      marked: the names of objectives that use text in target languages, with their mark.
    """

    variant: str
    teacher: Summary
    source: Mapping[str, Summary]
    targets: Mapping[str, Summary]
    gains: Mapping[str, Summary]
    metric: str = "accuracy"
    marked: Mapping[str, str] = field(default_factory=dict)


def compare(variant: str, results: Sequence[ResultsTable]) -> Comparison:
    """Summarise the results of a variant's repetitions. A value of a repetition is its mean over seeds.

    Every draw of an experiment with several draws is a repetition.
    """

    def over_repetitions(value: Callable[[ObjectiveResults], Summary | None]) -> dict[str, Summary]:
        by_objective: dict[str, dict[Unit, float]] = {}
        for number, result in enumerate(results):
            for line in result.lines:
                summary, values = value(line), by_objective.setdefault(line.objective, {})
                if summary is None:
                    continue
                if len(result.draws) > 1:
                    values |= {f"{number} {draw}": mean for draw, mean in summary.by_unit.items()}
                else:
                    values[number] = summary.mean
        return {objective: Summary(values) for objective, values in by_objective.items() if values}

    source = over_repetitions(results[0].source_average)
    return Comparison(
        variant=variant,
        teacher=source.pop(TEACHER),
        source=source,
        targets=over_repetitions(lambda line: line.average),
        gains=over_repetitions(lambda line: line.gain),
        metric=results[0].metric,
        marked={
            line.objective: name
            for result in results
            for line in result.lines
            if (name := result.name_of(line.objective)) != line.objective
        },
    )


def table(comparisons: Sequence[Comparison]) -> table_writer.Table:
    """Return a row for each variant, in percent and points, with the 95 % intervals of the gains."""
    objectives = list(dict.fromkeys(name for comparison in comparisons for name in comparison.gains))
    marked = {name: text for comparison in comparisons for name, text in comparison.marked.items()}
    shown = [marked.get(name, name) for name in objectives]
    header = ("variant", "n", "teacher", f"{BASELINE}, source", f"{BASELINE}, targets", *shown)
    rows = tuple(
        (
            comparison.variant,
            str(len(comparison.teacher.by_unit)),
            value_text(comparison.teacher),
            value_text(comparison.source.get(BASELINE)),
            value_text(comparison.targets.get(BASELINE)),
            *(_gain(comparison.gains.get(name)) for name in objectives),
        )
        for comparison in comparisons
    )
    names = " or ".join(dict.fromkeys(comparison.metric for comparison in comparisons))
    notes = (
        f"{names.capitalize()} in %, mean ± sample standard deviation over the n repetitions of a variant.",
        f"The last columns are gains over {BASELINE} in points, averaged over the target languages and paired within "
        "each repetition, with 95 % intervals by Student's t.",
        "The intervals take repetitions for independent, although some share an encoder, and all share the test text. "
        "Other test items are not included.",
    )
    return table_writer.Table(header, rows, title="Variants of the experiment", notes=notes)


def _gain(summary: Summary | None) -> str:
    if summary is None or summary.interval is None:
        return value_text(summary, "+.1f")
    low, high = (bound * 100 for bound in summary.interval)
    return f"{summary.mean * 100:+.1f} [{low:+.1f}, {high:+.1f}]"


def rows(comparisons: Sequence[Comparison]) -> Iterator[dict[str, Any]]:
    """Yield every value of every repetition, for programs."""
    for comparison in comparisons:
        source = {TEACHER: comparison.teacher, **comparison.source}
        kinds = {"source": source, "targets": comparison.targets, "gain": comparison.gains}
        for kind, by_objective in kinds.items():
            for objective, summary in by_objective.items():
                for number, value in summary.by_unit.items():
                    yield {
                        "variant": comparison.variant,
                        "repetition": number,
                        "objective": objective,
                        "quantity": kind,
                        "value": value,
                    }
