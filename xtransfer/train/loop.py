"""The training loop: from the newest checkpoint, or from the start, to the last step."""

import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xtransfer.data.batches.prefetch import prefetch
from xtransfer.errors import CheckpointError, DivergedError, Exit
from xtransfer.runtime import processes, terminal
from xtransfer.runtime.sharding import place_batch, process_slice
from xtransfer.train import metrics_log
from xtransfer.train.checkpoints import AVERAGE, CHECKPOINTS, Checkpoints
from xtransfer.train.saving import WHOLE, Saving
from xtransfer.train.state import TrainState
from xtransfer.train.steps import Terms, TrainStep
from xtransfer.train.tracking import NOTHING, Tracking, tracked

_WINDOW = 50  # the most steps that a row of metrics.jsonl averages over
_READ_SECONDS = 5.0  # between two reads of the loss for the progress bar; a read waits for the device


@dataclass(frozen=True)
class Plan:
    """The length of a training run, and its checkpoints.

    Attributes:
      title: the run's name, for people.
      steps: the number of steps.
      evaluations: the number of checkpoints, evenly spaced, the last of them at the last step.
      seed: the seed of the dropout masks.
      patience: the number of evaluations without a better score after which training stops; 0 = never.
      average_last: the number of checkpoints at the end whose parameters are averaged; 0 = none.
      records_steps: whether the rows of `metrics.jsonl` hold `PLANNED_STEPS`, because no setting says the number.
    """

    title: str
    steps: int
    evaluations: int
    seed: int
    patience: int = 0
    average_last: int = 0
    records_steps: bool = False

    def milestones(self) -> frozenset[int]:
        """Return the steps after which the model is scored and saved."""
        count = min(self.evaluations, self.steps)
        return frozenset(round(self.steps * (i + 1) / count) for i in range(count))

    def averaged(self, step: int) -> int:
        """Return the number of checkpoints in the average after a step: of the last `average_last`, those up to it."""
        last = sorted(self.milestones())[-self.average_last :] if self.average_last else []
        return sum(milestone <= step for milestone in last)


@dataclass(frozen=True)
class Start:
    """The start of a run.

    Attributes:
      initial: creates the state of step 0.
      abstract: the shapes and shardings of a state.
      saving: what is scored and saved of a state.
    """

    initial: Callable[[], TrainState]
    abstract: TrainState
    saving: Saving = WHOLE


def fit(
    directory: Path,
    plan: Plan,
    start: Start,
    train_step: TrainStep,
    learning_rates: np.ndarray,
    batch_at: Callable[[int], Mapping[str, np.ndarray]],
    score: Callable[[Any], dict[str, Any]] | None,
    mesh: jax.sharding.Mesh,
    tracking: Tracking = NOTHING,
) -> TrainState:
    """Train to `plan.steps`, or resume, with checkpoints and `metrics.jsonl` in `directory`.

    Patience counts the rows of `metrics.jsonl`, so a run that is interrupted stops at the same step as one that is not.
    SIGTERM saves the current step and exits.

    The average is a running mean over the last planned checkpoints, so that one extra set of parameters is enough. A
    run that stops early has averaged those it reached. If it reached none, its average is its last checkpoint.

    Args:
      directory: the run's directory.
      plan: the length of the run, and its checkpoints.
      start: the start of a run without a checkpoint.
      train_step: from `make_train_step`.
      learning_rates: the rate of each step, [plan.steps] float32.
      batch_at: returns this process's slice (see `sharding.process_slice`) of the batch of step i. It is a pure
        function, so an interrupted run ends with the same weights.
      score: returns metrics of parameters on source dev (see `metrics_log.mean_over_languages`), whose
        `metrics_log.dev_score` ranks the checkpoints. Without it, only the newest checkpoint is kept. For an oracle,
        `metrics_log.TARGET_DEV_SCORES` holds the scores on target dev by language, and the best checkpoint in each
        language is kept too. `metrics_log.TARGET_DEV_METRICS` holds the metrics there.
      mesh: the device mesh.
      tracking: the loggers that receive the loss and the learning rate of every window of steps, and the scores.

    Raises:
      UserError: a loss or a parameter is not finite. Nothing of that step is saved.
    """
    directory.mkdir(parents=True, exist_ok=True)
    processes.on_first(functools.partial(metrics_log.mend, directory))
    milestones = plan.milestones()
    key = jax.random.key(plan.seed)
    with (
        Checkpoints(directory / CHECKPOINTS) as checkpoints,
        terminal.deferred_stop() as stop_requested,
        tracked(tracking, plan.title, directory) as tracker,
    ):
        state, average = _resume(checkpoints, start, directory, plan)
        rows = processes.on_first(functools.partial(metrics_log.read_metrics, directory))
        history = processes.on_first(functools.partial(_history, directory)) if plan.patience else []
        if _out_of_patience(history, plan.patience):
            return state
        first = int(state.step)
        window: list[Terms] = []
        reads = _Reads(first)
        _, num_slices = process_slice(mesh)
        tracker.start(first, num_slices)
        host_batches = (tracker.counted(i + 1, batch_at(i)) for i in range(first, plan.steps))
        batches = prefetch(place_batch(mesh, batch, num_slices) for batch in host_batches)
        with closing(batches), terminal.progress_bar(plan.title, plan.steps - first) as progress:
            for step, batch in enumerate(batches, first + 1):
                learning_rate = learning_rates[step - 1]
                state, terms = train_step(state, batch, key, learning_rate)
                window.append(terms)
                processes.note_progress()
                stop, due = stop_requested(), step in milestones
                # The windows depend on the step alone, so that rows do not depend on the machine's speed.
                ends_window = due or stop or step % _WINDOW == 0
                if ends_window or reads.is_due(step):
                    means = _means(window, step, directory, plan.seed)
                    progress.advance(reads.note(step), note=f"loss {means['loss']:.4f}")
                if ends_window:
                    window.clear()
                    tracker.window(step, {**means, "learning_rate": float(learning_rate)})
                if due or stop:
                    saved = start.saving.saved(state)
                    _check_finite(saved.params, step, directory)
                if due:
                    metrics = {} if score is None else dict(score(saved.params))
                    target_metrics = metrics.pop(metrics_log.TARGET_DEV_METRICS, {})
                    target_scores = metrics.get(metrics_log.TARGET_DEV_SCORES)
                    source_metrics = metrics.get(metrics_log.SOURCE_DEV_METRICS, {})
                    tracker.scores(
                        step, _values(metrics), _values_by_language(target_metrics), _values_by_language(source_metrics)
                    )
                    rank = metrics_log.dev_score(metrics) if metrics else None
                    history += [] if rank is None else [rank]
                    # Process 0 decides for all, because other hosts may round a score differently.
                    gives_up = step < plan.steps and processes.on_first(
                        functools.partial(_out_of_patience, history, plan.patience)
                    )
                    averaged = plan.averaged(step) or int(gives_up and plan.average_last > 0)
                    if averaged:
                        average = _running_mean(average, saved.params, averaged)
                    # The row comes first: resuming drops a row without its checkpoint.
                    row = {"step": step, **means, **metrics} | ({metrics_log.AVERAGED: averaged} if averaged else {})
                    row |= {metrics_log.PLANNED_STEPS: plan.steps} if plan.records_steps else {}
                    row |= {metrics_log.STOPPED: True} if gives_up else {}
                    rows.append(row)
                    processes.on_first(functools.partial(metrics_log.append, directory, row))
                    checkpoints.save(saved, score=rank, target_scores=target_scores, average=average, rows=rows)
                elif stop:
                    checkpoints.save(saved, score=None, average=average)
                if due or stop:
                    _free(saved, kept=state)
                if stop:
                    checkpoints.wait()
                    raise SystemExit(Exit.PREEMPTED)
                if due and gives_up:
                    reason = f"{plan.patience} evaluations without a better score"
                    terminal.log(f"{plan.title}: stopped at step {step:,}: {reason}")
                    break
        checkpoints.wait()
    return state


def _free(saved: TrainState, *, kept: TrainState) -> None:
    """Free the arrays of a saved state, except those that it shares with the state that training continues from.

    On several devices, these are whole parameters on each of them. `Checkpoints.save` has copied them to the host when
    it returns, but its thread refers to them until everything is written, so letting go of them is not enough.
    """
    shared = {id(array) for array in jax.tree.leaves(kept)}
    for array in jax.tree.leaves(saved):
        if id(array) not in shared:
            array.delete()


def _values(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return metrics without the scores that only rank checkpoints, in which a loss has the opposite sign."""
    others = (metrics_log.DEV_SCORE, metrics_log.SOURCE_DEV_METRICS, metrics_log.TARGET_DEV_SCORES)
    return {name: value for name, value in metrics.items() if name not in others}


def _values_by_language(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    return {language: _values(values) for language, values in metrics.items()}


class _Reads:
    """The steps after which the loop waits for the device, to show progress every few seconds on any machine."""

    def __init__(self, first: int):
        self._step, self._time, self._next = first, time.monotonic(), first + 1

    def is_due(self, step: int) -> bool:
        """Return whether to read the loss after this step. The first step's loss is always read."""
        return step >= self._next

    def note(self, step: int) -> int:
        """Note that the loss was read, and return the number of steps since the last time."""
        count, now = step - self._step, time.monotonic()
        # The first step includes compilation, so the second one is read too.
        self._next = step + max(1, int(_READ_SECONDS * count / max(now - self._time, 1e-9)))
        self._step, self._time = step, now
        return count


def _remedy(directory: Path) -> str:
    return f"remove {CHECKPOINTS}/ and {metrics_log.METRICS_FILE} in {directory} to train this run again"


def _history(directory: Path) -> list[float]:
    return [metrics_log.dev_score(row) for row in metrics_log.read_scored(directory)]


def _out_of_patience(history: Sequence[float], patience: int) -> bool:
    """Return whether the last `patience` scores, out of all so far, are no better than one before them; 0 = never."""
    return 0 < patience < len(history) and max(history[-patience:]) <= max(history[:-patience])


def _running_mean(mean: Any, params: Any, count: int) -> Any:
    """Return the mean of `count` sets of parameters, of which `params` is the last and `mean` is over the others."""
    # A copy, because the next training step takes the memory of its parameters.
    return jax.tree.map(jnp.copy, params) if count == 1 else _add_to_mean(mean, params, count)


@jax.jit
def _add_to_mean(mean: Any, params: Any, count: jax.Array) -> Any:
    return jax.tree.map(lambda old, new: old + (new - old) / jnp.asarray(count, old.dtype), mean, params)


def _resume(checkpoints: Checkpoints, start: Start, directory: Path, plan: Plan) -> tuple[TrainState, Any]:
    """Return the state to continue from, and the average that belongs to it, which is None before there is one."""
    steps = checkpoints.steps()

    def drop_unsaved_rows() -> int:
        newest = steps[-1] if steps else 0
        rows = [row for row in metrics_log.read_metrics(directory) if row["step"] <= newest]
        metrics_log.write(directory, rows)
        if newest and newest >= plan.steps and (not rows or rows[-1]["step"] != plan.steps):
            raise CheckpointError(f"{directory}: the score of its last step {newest} is lost: {_remedy(directory)}")
        missing = {step for step in plan.milestones() if step <= newest} - {row["step"] for row in rows}
        if plan.patience and missing:
            raise CheckpointError(
                f"{directory}: the score of step {min(missing)} is lost, and patience counts it: {_remedy(directory)}"
            )
        return newest

    newest = processes.on_first(drop_unsaved_rows)
    if not newest:
        return start.initial(), None
    terminal.log(f"{directory}: resuming from step {newest:,}")
    has_average, abstract = plan.averaged(newest) > 0, start.saving.abstract(start.abstract)
    average = checkpoints.restore_params(newest, abstract.params, AVERAGE) if has_average else None
    return start.saving.restored(checkpoints.restore(newest, abstract)), average


def _means(window: list[Terms], step: int, directory: Path, seed: int) -> dict[str, float]:
    """Return the means over the window of the terms that counted something."""
    terms = jax.device_get(window)
    for i, pairs in enumerate(terms):
        if not math.isfinite(float(pairs["loss"][0])):
            step_of_loss = step - len(terms) + i + 1
            batch = f"batch {step_of_loss - 1}, from 0, of seed {seed}"
            raise DivergedError(
                f"{directory}: the loss of step {step_of_loss} is not finite ({batch}): try a lower learning_rate"
            )
    means = {"loss": 0.0}
    for name in terms[0]:
        total, count = (float(sum(pairs[name][i] for pairs in terms)) for i in (0, 1))
        if count:
            means[name] = total / count
    return means


def _check_finite(params: Any, step: int, directory: Path) -> None:
    # The loss of a step belongs to the parameters before it, so it says nothing about the last update.
    if not bool(_all_finite(params)):
        raise DivergedError(
            f"{directory}: step {step} led to parameters that are not finite: try a lower learning_rate"
        )


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
