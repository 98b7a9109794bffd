"""The selection protocols side by side."""

from xtransfer.errors import UserError
from xtransfer.evaluation.results import ResultsTable, aggregate
from xtransfer.report import summary
from xtransfer.report.page import charts
from xtransfer.report.page.markup import Child, Html, join, note, table, tag
from xtransfer.report.page.sources import MissingSource, Source
from xtransfer.runs.selection import PROTOCOLS
from xtransfer.runs.workdir import TEACHER


def build(source: Source) -> Html:
    """Return a table with the average of the target languages by objective and protocol."""
    tables = _tables(source)
    if len(tables) < 2:
        raise MissingSource("Only one selection protocol has results.")
    header: list[Child] = ["objective"]
    for name in tables:
        tags = None if PROTOCOLS[name].zero_shot else tag("small", "oracle, not zero-shot", class_="warn")
        header.append(join([name, tags]))
    rows: list[list[Child]] = []
    for objective, kind in source.student_kinds.items():
        row: list[Child] = [charts.named(kind, objective)]
        for name, results in tables.items():
            line = next((line for line in results.lines if line.objective == objective), None)
            steps = sorted(_steps(source, objective, name))
            row.append(
                join(
                    [
                        summary.value_text(line.average if line else None),
                        tag("small", f"step {', '.join(f'{step:,}' for step in steps)}") if steps else None,
                    ]
                )
            )
        rows.append(row)
    meanings = "; ".join(f"{name}: {results.checkpoint}" for name, results in tables.items())
    return join(
        [
            table(header, rows, class_="results"),
            note(f"Average of the target languages, {source.results.metric} in %. {meanings}. Small: selected steps."),
        ]
    )


def _tables(source: Source) -> dict[str, ResultsTable]:
    """Return the results by protocol, in the order of their table, without protocols that lack results."""
    tables = {}
    for name in PROTOCOLS:
        try:
            tables[name] = aggregate(
                source.rows,
                source_languages=source.results.source_languages,
                target_languages=source.results.target_languages,
                metric=source.results.metric,
                split=source.results.split,
                selection=name,
                axis=source.results.axis,
                objectives=source.results.objectives,
            )
        except UserError:
            continue
    return tables


def _steps(source: Source, objective: str, protocol: str) -> set[int]:
    return {
        row["step"]
        for row in source.rows
        if (row["objective"], row["selection"], row["split"]) == (objective, protocol, source.results.split)
        and objective != TEACHER
    }
