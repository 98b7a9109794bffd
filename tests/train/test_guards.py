"""The guards of the training loop save nothing that is not finite, and do not wait for the device at each step."""

import contextlib

import jax
import numpy as np
import optax
import pytest

from tests.train.test_loop import PLAN, TinyRun, batch_at, loss_fn, steps_on_disk
from xtransfer.errors import DivergedError
from xtransfer.runtime import processes, terminal
from xtransfer.train import loop, metrics_log, steps
from xtransfer.train.loop import Plan


class Pending:
    """A number on the device. Each read of it would wait for the device, and is counted."""

    def __init__(self, value, reads):
        self.value, self.reads = value, reads

    def __array__(self, *args, **kwargs):
        self.reads.append(self)
        return np.asarray(self.value)

    def __float__(self):
        return float(self.__array__())

    __bool__ = __int__ = block_until_ready = None  # any other way to wait is an error


def pending_terms(run, reads):
    """Make a run's training step return terms that count how often they are read, as (step, term) pairs."""
    train_step, steps_done = run.step, []

    def step(*arguments):
        state, terms = train_step(*arguments)
        steps_done.append(len(steps_done) + 1)
        pairs = {name: tuple(Pending(part, reads) for part in pair) for name, pair in terms.items()}
        return state, pairs

    run.step = step
    return steps_done


@pytest.mark.parametrize(("steps_", "evaluations", "expected"), [(120, 2, [1, 50, 60, 100, 120]), (40, 1, [1, 40])])
def test_the_loss_and_the_parameters_are_read_in_windows_and_not_at_each_step(
    tmp_path, monkeypatch, steps_, evaluations, expected
):
    """The clock stands still, so the progress bar asks for the loss of the first step only."""
    monkeypatch.setattr(loop.time, "monotonic", lambda: 0.0)
    run, reads, checked = TinyRun(), [], []
    steps_done = pending_terms(run, reads)
    reads_after, device_get, all_finite = [], jax.device_get, loop._all_finite

    def counted_get(tree):
        reads_after.append(steps_done[-1])
        return device_get(tree)

    def counted_check(params):
        checked.append(steps_done[-1])
        return all_finite(params)

    monkeypatch.setattr(loop.jax, "device_get", counted_get)
    monkeypatch.setattr(loop, "_all_finite", counted_check)
    run.fit(tmp_path, Plan("test", steps_, evaluations, seed=5))
    assert reads_after == expected
    assert checked == [step for step in expected if step % (steps_ // evaluations) == 0]
    # Each loss is read once, as a sum and a count, and the first one twice.
    assert len(reads) == 2 * (steps_ + 1)


def test_the_watchdog_hears_of_each_step_and_asks_nothing_of_the_device(tmp_path, monkeypatch):
    run, reads, noted = TinyRun(), [], []
    steps_done = pending_terms(run, reads)

    def note():
        noted.append((len(steps_done), len(reads)))

    monkeypatch.setattr(processes, "note_progress", note)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 0.0)
    run.fit(tmp_path, Plan("test", 30, 1, seed=5))
    assert {step for step, _ in noted} >= {*range(1, 31)}
    # After the first step, which the progress bar reads, nothing is read before the end.
    assert {count for step, count in noted if 1 < step < 30} == {2}


def test_a_loss_that_is_not_finite_names_the_step_and_its_batch(tmp_path):
    run = TinyRun()
    run.batch_at = lambda i: {"x": batch_at(i)["x"], "y": np.full((8, 4), np.inf if i == 12 else 1, np.float32)}
    with pytest.raises(DivergedError) as caught:
        run.fit(tmp_path, PLAN)
    assert str(caught.value) == (
        f"{tmp_path}: the loss of step 13 is not finite (batch 12, from 0, of seed 5): try a lower learning_rate"
    )
    assert steps_on_disk(tmp_path) == [5, 10]
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path)] == [5, 10]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_preempted_run_does_not_save_a_step_that_is_not_finite(tmp_path, monkeypatch, value):
    """The signal comes at the step whose loss is not finite, between two evaluations."""
    run = TinyRun()
    run.batch_at = lambda i: {"x": batch_at(i)["x"], "y": np.full((8, 4), value if i == 12 else 1, np.float32)}
    polls = iter([False] * 12 + [True] * 100)
    monkeypatch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
    with pytest.raises(DivergedError, match="the loss of step 13 is not finite"):
        run.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == [5, 10]


def test_a_preempted_run_does_not_save_parameters_that_are_not_finite(tmp_path, monkeypatch):
    """The loss of the step is finite, and its update is not."""
    run = TinyRun()
    run.tx = optax.sgd(1e38)
    run.step = steps.make_train_step(run.graphdef, loss_fn, run.tx, run.mesh, run.params)
    monkeypatch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: True))
    with pytest.raises(DivergedError, match="step 1 led to parameters that are not finite"):
        run.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == []
