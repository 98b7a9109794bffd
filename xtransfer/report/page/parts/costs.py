"""What each stage cost."""

from collections.abc import Sequence

from xtransfer.report.page.markup import Child, Html, join, name_of, note, table, tag
from xtransfer.report.page.sources import MissingSource, Source
from xtransfer.runs.costs import STAGES, Cost, read_costs

_GIB = 2**30


def build(source: Source) -> Html:
    """Return a table of the stages, and one of their runs."""
    costs = read_costs(source.workdir)
    if not costs:
        raise MissingSource("The workdir has no costs.jsonl, which its stages write.")
    by_stage = {stage: [cost for cost in costs if cost.stage == stage] for stage in STAGES}
    by_run: dict[tuple[str, str], list[Cost]] = {}
    for cost in costs:
        by_run.setdefault((cost.stage, cost.run), []).append(cost)
    header = ["stage", "runs", "time", "examples", "examples/s", "real tokens", "devices", "peak memory"]
    stages = [[stage, str(len({cost.run for cost in rows})), *_cells(rows)] for stage, rows in by_stage.items() if rows]
    total = ["total", "", duration(sum(cost.seconds for cost in costs)), *[""] * 5]
    runs: list[list[Child]] = [
        [name_of(f"{stage}: {run}"), f"{len(rows):,}", *_cells(rows)] for (stage, run), rows in by_run.items()
    ]
    memory = {cost.memory for cost in costs}
    whose = "of one device" if memory == {"device"} else "of the process" if memory == {"process"} else "of either"
    return join(
        [
            table(header, [*stages, total]),
            note(
                "Time on the clock, with compiling and saving; a resumed stage counts from each of its starts. In "
                f"training, the share of real tokens is estimated. Peak memory {whose} since it started."
            ),
            tag("details", tag("summary", "By run"), table(["run", "starts", *header[2:]], runs)),
        ]
    )


def duration(seconds: float) -> str:
    """Return a time for people, such as "2 min 05 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def _cells(rows: Sequence[Cost]) -> list[Child]:
    seconds = sum(cost.seconds for cost in rows)
    examples = sum(cost.examples for cost in rows)
    real, slots = sum(cost.real_tokens for cost in rows), sum(cost.tokens for cost in rows)
    return [
        duration(seconds),
        f"{examples:,}",
        f"{examples / max(seconds, 1e-3):,.0f}",
        f"{real / slots:.0%}" if slots else "–",
        ", ".join(dict.fromkeys(cost.devices for cost in rows)),
        f"{max(cost.peak_bytes for cost in rows) / _GIB:.2f} GiB",
    ]
