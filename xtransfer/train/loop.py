"""The training loop: from the newest checkpoint, or from the start, to the last step."""

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xtransfer import storage
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.errors import UserError
from xtransfer.runtime import processes, terminal
from xtransfer.runtime.sharding import place_batch, process_slice
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.state import TrainState
from xtransfer.train.steps import Terms, TrainStep

_LOG_EVERY = 50  # steps between two looks at the loss: a look waits for the device
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"


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


@dataclass(frozen=True)
class Start:
    """Where a run begins: `initial()` makes the state of step 0, `abstract` tells its shapes and shardings."""

    initial: Callable[[], TrainState]
    abstract: TrainState


def fit(
    directory: Path,
    plan: Plan,
    start: Start,
    train_step: TrainStep,
    batch_at: Callable[[int], Mapping[str, np.ndarray]],
    score: Callable[[Any], dict[str, float]] | None,
    mesh: jax.sharding.Mesh,
) -> TrainState:
    """Trains to `plan.steps`, with checkpoints and `metrics.jsonl` in `directory`; goes on where it stopped.

    `batch_at(i)` is this process's part (`sharding.process_slice`) of the batch of step i, a pure function, so what
    was interrupted ends with the same weights. `score(params)` gives metrics on the source language's dev
    split, of which the first ranks the checkpoints; without it only the newest is kept. A loss or a parameter
    that is not finite is a `UserError`, and nothing of that step is saved. SIGTERM saves the step at hand and exits.
    """
    directory.mkdir(parents=True, exist_ok=True)
    milestones = plan.milestones()
    key = jax.random.key(plan.seed)
    with Checkpoints(directory / CHECKPOINTS) as checkpoints, terminal.deferred_stop() as stop_requested:
        state = _resumed(checkpoints, start, directory, plan.steps)
        first = int(state.step)
        window: list[Terms] = []
        _, parts = process_slice(mesh)
        batches = prefetch(place_batch(mesh, batch_at(i), parts) for i in range(first, plan.steps))
        with closing(batches), terminal.progress_bar(plan.title, plan.steps - first) as ticker:
            for step, batch in enumerate(batches, first + 1):
                state, terms = train_step(state, batch, key)
                window.append(terms)
                processes.note_progress()
                stop, due = stop_requested(), step in milestones
                if due or stop or step % _LOG_EVERY == 0:
                    means = _means(window, step, directory)
                    ticker.advance(len(window), note=f"loss {means['loss']:.4f}")
                    window.clear()
                if due or stop:
                    _check_finite(state.params, step, directory)
                if due:
                    metrics = {} if score is None else score(state.params)
                    # The row comes first: a row without its checkpoint is dropped on resume.
                    row = {"step": step, **means, **metrics}
                    processes.on_first(functools.partial(storage.append_jsonl, directory / METRICS_FILE, row))
                    checkpoints.save(state, score=next(iter(metrics.values()), None))
                elif stop:
                    checkpoints.save(state, score=None)
                if stop:
                    checkpoints.wait()
                    raise SystemExit(terminal.EXIT_PREEMPTED)
        checkpoints.wait()
    return state


def finished(directory: Path, steps: int) -> bool:
    """Whether the run in `directory` has the checkpoint of its last step, scored; all processes ask together."""

    def is_scored() -> bool:
        rows = read_metrics(directory)
        return bool(rows) and rows[-1]["step"] == steps

    if not processes.on_first(is_scored):
        return False
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        found = steps in checkpoints.steps()
        return processes.on_first(lambda: found)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`: one per scored checkpoint, by step. A half-written last row is not there."""
    path = directory / METRICS_FILE
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    return [_row(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, where: str) -> dict[str, float]:
    try:
        row = storage.read_json(line.decode("utf-8"))
    except ValueError as error:
        raise UserError(
            f"{where}: not valid JSON ({error}): remove {Path(where).parent} to train this run anew"
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise UserError(f"{where}: expected an object with a step: remove {Path(where).parent} to train this run anew")
    return row


def _resumed(checkpoints: Checkpoints, start: Start, directory: Path, last_step: int) -> TrainState:
    steps = checkpoints.steps()

    def settle() -> int:
        newest = steps[-1] if steps else 0
        rows = [row for row in read_metrics(directory) if row["step"] <= newest]
        storage.write_jsonl(directory / METRICS_FILE, rows)
        if newest and newest >= last_step and (not rows or rows[-1]["step"] != last_step):
            raise UserError(
                f"{directory}: the score of its last step {newest} is lost: remove it to train this run anew"
            )
        return newest

    newest = processes.on_first(settle)
    if not newest:
        return start.initial()
    terminal.log(f"{directory}: goes on from step {newest:,}")
    return checkpoints.restore(newest, start.abstract)


def _means(window: list[Terms], step: int, directory: Path) -> dict[str, float]:
    """Means over the window of the terms that counted something."""
    terms = jax.device_get(window)
    for i, pairs in enumerate(terms):
        if not math.isfinite(float(pairs["loss"][0])):
            bad = step - len(terms) + i + 1
            raise UserError(f"{directory}: the loss of step {bad} is not finite: try a lower learning_rate")
    means = {"loss": 0.0}
    for name in terms[0]:
        total, count = (float(sum(pairs[name][i] for pairs in terms)) for i in (0, 1))
        if count:
            means[name] = total / count
    return means


def _check_finite(params: Any, step: int, directory: Path) -> None:
    # The loss of a step is that of the parameters before it, so it says nothing of the last update.
    if not bool(_all_finite(params)):
        raise UserError(f"{directory}: step {step} made parameters that are not finite: try a lower learning_rate")


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
