"""The scores of a run's checkpoints in `metrics.jsonl`. Checkpoints hold copies of its rows."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.errors import CheckpointError
from xtransfer.runtime import checksums, processes, terminal
from xtransfer.train.checkpoints import CHECKPOINTS, Checkpoints, mend_scores, read_scores, saved_scores

METRICS_FILE = "metrics.jsonl"
DEV_ACCURACY, DEV_SCORE = "dev_accuracy", "dev_score"
"""The keys of `metrics.jsonl` that rank checkpoints: the second if a row has it, and otherwise the first."""

SOURCE_DEV_METRICS = "source_dev_metrics"
"""The key of `metrics.jsonl` with the metrics on dev by source language, if the model reads several.

The other keys hold their means over these languages, so that the mean ranks checkpoints.
"""

TARGET_DEV_SCORES = "target_dev_scores"
"""The key of `metrics.jsonl` with the scores on target dev by language, higher is better, if the run has an oracle.

Each of several source languages has its own score here too.
"""

TARGET_DEV_METRICS = "target_dev_metrics"
"""The key of the metrics behind these scores, by language. They go to loggers and not to `metrics.jsonl`."""

AVERAGED = "averaged"
"""The key of `metrics.jsonl` with the number of checkpoints in the average that the step's checkpoint holds."""

PLANNED_STEPS = "planned_steps"
"""The key of `metrics.jsonl` with the number of steps of a run whose length is given in epochs."""

STOPPED = "stopped_early"
"""The key of `metrics.jsonl` that marks the last row of a run that ran out of patience."""


def finished(directory: Path, steps: int | None) -> bool:
    """Return whether the run in `directory` has its last checkpoint, scored. All processes must call this.

    The last one is the checkpoint of step `steps`, or of the step at which the run ran out of patience. With None, the
    rows of `metrics.jsonl` say which one it is.
    """

    def last_step() -> int | None:
        rows = read_metrics(directory)
        planned = rows[-1].get(PLANNED_STEPS) if rows and steps is None else steps
        is_last = bool(rows) and (rows[-1]["step"] == planned or STOPPED in rows[-1])
        return int(rows[-1]["step"]) if is_last else None

    step = processes.on_first(last_step)
    if step is None:
        return False
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        is_saved = step in checkpoints.steps()
        return processes.on_first(lambda: is_saved)


def dev_score(row: Mapping[str, Any]) -> float:
    """Return the score on dev that ranks a checkpoint, from its row or its metrics; higher is better."""
    return row[DEV_SCORE] if DEV_SCORE in row else row[DEV_ACCURACY]


def mean_over_languages(metrics_by_language: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return metrics on source dev for a row of `metrics.jsonl`: one language's own, or the means over several.

    Args:
      metrics_by_language: the metrics by name for each source language, the same names for all; none without dev.
    """
    metrics = list(metrics_by_language.values())
    if len(metrics) < 2:
        return dict(metrics[0]) if metrics else {}
    means = {name: statistics.fmean(one[name] for one in metrics) for name in metrics[0]}
    return {**means, SOURCE_DEV_METRICS: {language: dict(one) for language, one in metrics_by_language.items()}}


def has_dev_score(row: Mapping[str, Any]) -> bool:
    """Return whether a row has a score on dev, which a task may lack."""
    return DEV_SCORE in row or DEV_ACCURACY in row


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl`, one per scored checkpoint, by step. A half-written last row is left out.

    A damaged row is replaced by its copy in a checkpoint, with a warning. The file stays as it is, see `mend`.

    Raises:
      UserError: a row is damaged, and no checkpoint has a copy. The message names the line.
    """
    return _read(directory)[0]


def read_scored(directory: Path) -> list[dict[str, Any]]:
    """Return the rows of `metrics.jsonl` as `read_metrics` does; every row has a score on dev.

    Raises:
      UserError: a row is damaged or has no score, and no checkpoint has a copy.
    """
    return _read(directory, scored=True)[0]


def mend(directory: Path) -> None:
    """Repair the scores of a run: `metrics.jsonl` from its checkpoints' copies, and these from `metrics.jsonl`.

    Call this in process 0, before the checkpoints are opened. The directory need not exist.

    Raises:
      UserError: see `read_metrics`.
    """
    checkpoints = directory / CHECKPOINTS
    rows, is_damaged = _read(directory)
    by_step = {row["step"]: row for row in rows}
    lost = [row for row in _copies(checkpoints) if row["step"] not in by_step]
    if is_damaged or lost:
        by_step |= {row["step"]: row for row in lost}
        rows = [by_step[step] for step in sorted(by_step)]
        write(directory, rows)
        terminal.log(
            f"{directory / METRICS_FILE}: damaged or incomplete, so restored from the copies in {CHECKPOINTS}/"
        )
    scores_by_step = {
        row["step"]: saved_scores(row["step"], dev_score(row), row.get(TARGET_DEV_SCORES), rows[: index + 1])
        for index, row in enumerate(rows)
        if has_dev_score(row)
    }
    mend_scores(checkpoints, scores_by_step)


def _copies(checkpoints: Path) -> list[dict[str, Any]]:
    """Return the copies of rows that checkpoints hold, by step.

    A checkpoint of an older version holds no copy, but its score, which is all that selection needs.
    """
    saved = read_scores(checkpoints)
    by_step = {scores["step"]: {"step": scores["step"], DEV_SCORE: scores["score"]} for scores in saved}
    for scores in saved:
        if scores.get("targets"):
            by_step[scores["step"]][TARGET_DEV_SCORES] = scores["targets"]
    by_step |= {row["step"]: row for scores in saved for row in scores.get("rows", ())}
    return [by_step[step] for step in sorted(by_step)]


def _read(directory: Path, *, scored: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """Return the rows of `metrics.jsonl` by step, damaged ones from their copies, and whether one is damaged."""
    path = directory / METRICS_FILE
    if not path.exists():
        return [], False
    rows: list[dict[str, Any] | None] = []
    faults: dict[int, str] = {}  # by index in `rows`
    for index, line in enumerate(path.read_bytes().split(b"\n")[:-1]):
        try:
            rows.append(_row(line, scored=scored))
        except ValueError as error:
            rows.append(None)
            faults[index] = str(error)
    whole = [row for row in rows if row is not None]
    if not faults:
        return whole, False
    copies = [row for row in _copies(directory / CHECKPOINTS) if not scored or has_dev_score(row)]
    for index, fault in faults.items():
        before = max((row["step"] for row in rows[:index] if row is not None), default=-1)
        after = min((row["step"] for row in rows[index:] if row is not None), default=math.inf)
        if not any(before < row["step"] < after for row in copies):
            raise CheckpointError(
                f"{path}:{index + 1}: this row is damaged ({fault}), and no checkpoint has a copy of it, so none of "
                "them needs it: delete this line, and nothing else"
            )
        _warn_once(f"warning: {path}:{index + 1}: this row is damaged ({fault}), so its copy in {CHECKPOINTS}/ is used")
    by_step = {row["step"]: row for row in (*copies, *whole)}
    return [by_step[step] for step in sorted(by_step)], True


def _row(line: bytes, *, scored: bool) -> dict[str, Any]:
    """Parse one row; a ValueError says what is wrong with it."""
    row = storage.read_json(line.decode("utf-8"))
    if not isinstance(row, dict):
        raise ValueError(f"expected an object with a step, found {type(row).__name__}")
    row = checksums.unsigned(row)
    if not isinstance(row.get("step"), int) or isinstance(row["step"], bool):
        raise ValueError("expected an object with a step")
    targets, sources = row.get(TARGET_DEV_SCORES, {}), row.get(SOURCE_DEV_METRICS, {})
    for key, value in ((TARGET_DEV_SCORES, targets), (SOURCE_DEV_METRICS, sources)):
        if not isinstance(value, dict):
            raise ValueError(f"{key} = {value!r}, expected an object")
    for language, metrics in sources.items():
        if not isinstance(metrics, dict) or not has_dev_score(metrics):
            raise ValueError(f"{SOURCE_DEV_METRICS} of {language} = {metrics!r}, expected an object with a score")
    values = [*row.items(), *targets.items(), *(item for metrics in sources.values() for item in metrics.items())]
    for key, value in values:
        if key not in (TARGET_DEV_SCORES, SOURCE_DEV_METRICS) and not isinstance(value, int | float):
            raise ValueError(f"{key} = {value!r}, expected a number")
    if scored and not has_dev_score(row):
        raise ValueError(f"no {DEV_ACCURACY}")
    return row


@functools.cache
def _warn_once(message: str) -> None:
    terminal.log(message)


def append(directory: Path, row: Mapping[str, Any]) -> None:
    """Append a row, with its checksum."""
    storage.append_jsonl(directory / METRICS_FILE, checksums.signed(row))


def write(directory: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Replace all rows, each with its checksum."""
    storage.write_jsonl(directory / METRICS_FILE, map(checksums.signed, rows))
