"""The training loop: from the newest checkpoint, or from the start, to the last step."""

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xtransfer import cli
from xtransfer.data.pipeline import prefetch
from xtransfer.errors import UserError
from xtransfer.sharding import place_batch
from xtransfer.train import state as states
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.state import TrainState
from xtransfer.train.steps import TrainStep

_LOG_EVERY = 50  # steps between two looks at the loss: a look waits for the device
METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Plan:
    """How long to train, and when to stop for a checkpoint: `evaluations` times, evenly spaced, the end included."""

    title: str
    steps: int
    evaluations: int
    seed: int

    def milestones(self) -> frozenset[int]:
        """The steps after which the model is scored and saved."""
        count = min(self.evaluations, self.steps)
        return frozenset(round(self.steps * (i + 1) / count) for i in range(count))


def fit(
    directory: Path,
    plan: Plan,
    initial: Callable[[], TrainState],
    train_step: TrainStep,
    batch_at: Callable[[int], Mapping[str, np.ndarray]],
    score: Callable[[Any], dict[str, float]] | None,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Trains to `plan.steps`, with checkpoints and `metrics.jsonl` in `directory`; goes on where it stopped.

    `batch_at(i)` is the batch of step i, a pure function, so what was interrupted ends with the same
    weights. `score(params)` gives metrics on the source language's dev split, of which the first ranks
    the checkpoints; without it only the newest is kept. A loss that is not finite is a `UserError`,
    and nothing is saved after it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    milestones = plan.milestones()
    key = jax.random.key(plan.seed)
    with Checkpoints(directory / "checkpoints") as checkpoints:
        state = _resumed(checkpoints, initial(), directory)
        start = int(state.step)
        window: list[Any] = []
        batches = prefetch(place_batch(mesh, batch_at(i)) for i in range(start, plan.steps))
        with cli.ticking(plan.title, plan.steps - start) as ticker:
            for step, batch in enumerate(batches, start + 1):
                state, terms = train_step(state, batch, key)
                window.append(terms)
                stop = cli.stop_requested()
                due = step in milestones
                if due or stop or step % _LOG_EVERY == 0:
                    means = _means(window, step, directory)
                    ticker.advance(len(window), note=f"loss {means['loss']:.4f}")
                    window.clear()
                if due:
                    metrics = {} if score is None else score(state.params)
                    # The row comes first: a row without its checkpoint is dropped on resume.
                    cli.append_jsonl(directory / METRICS_FILE, {"step": step, **means, **metrics})
                    checkpoints.save(state, score=next(iter(metrics.values()), None))
                elif stop:
                    checkpoints.save(state, score=None)
                if stop:
                    checkpoints.wait()
                    raise SystemExit(cli.EXIT_PREEMPTED)
        checkpoints.wait()
    return state


def finished(directory: Path, plan: Plan) -> bool:
    """Whether the run in `directory` has its last checkpoint, scored."""
    rows = read_metrics(directory)
    if not rows or rows[-1]["step"] != plan.steps:
        return False
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return plan.steps in checkpoints.steps()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`: one per scored checkpoint, by step. A half-written last row is not there."""
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def _resumed(checkpoints: Checkpoints, state: TrainState, directory: Path) -> TrainState:
    steps = checkpoints.steps()
    newest = steps[-1] if steps else 0
    rows = [row for row in read_metrics(directory) if row["step"] <= newest]
    temporary = directory / f"{METRICS_FILE}.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, directory / METRICS_FILE)
    if not newest:
        return state
    cli.log(f"{directory}: goes on from step {newest:,}")
    return checkpoints.restore(newest, states.abstract(state))


def _means(window: list[Any], step: int, directory: Path) -> dict[str, float]:
    terms = jax.device_get(window)
    means = {}
    for name in terms[0]:
        total, count = (float(sum(pair[name][i] for pair in terms)) for i in (0, 1))
        means[name] = total / count if count else 0.0
    for i, pair in enumerate(terms):
        if not math.isfinite(float(pair["loss"][0])):
            bad = step - len(terms) + i + 1
            raise UserError(f"{directory}: the loss of step {bad} is not finite: try a lower learning_rate")
    return means
