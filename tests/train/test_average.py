"""The average of a run's last checkpoints, and the checkpoints that an oracle keeps."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from tests.train.test_loop import TinyRun, batch_at, steps_on_disk
from xtransfer.config import ModelConfig
from xtransfer.errors import UserError
from xtransfer.runtime import terminal
from xtransfer.train import metrics_log
from xtransfer.train.checkpoints import AVERAGE, Checkpoints
from xtransfer.train.loop import Plan

PLAN = Plan("test", steps=20, evaluations=4, seed=5, average_last=3)  # checkpoints at 5, 10, 15, 20


class RecordingRun(TinyRun):
    """A run that notes the weights of every scored checkpoint."""

    def __init__(self, scores=None):
        super().__init__(scores)
        self.weights = []

    def score(self, params):
        self.weights.append(np.array(jax.tree.leaves(params)[0]))
        return super().score(params)


def average_of(directory, step):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        (values,) = checkpoints.restore_arrays(step, AVERAGE).values()
    return values


def test_the_average_is_over_the_last_planned_checkpoints():
    assert [PLAN.averaged(step) for step in (5, 9, 10, 14, 15, 20)] == [0, 0, 1, 1, 2, 3]
    assert [dataclasses.replace(PLAN, average_last=0).averaged(step) for step in (5, 20)] == [0, 0]
    assert [dataclasses.replace(PLAN, average_last=4).averaged(step) for step in (4, 5, 20)] == [0, 1, 4]


def test_the_average_is_the_mean_of_the_weights(tmp_path):
    run = RecordingRun()
    run.fit(tmp_path, PLAN)
    average = average_of(tmp_path, 20)
    assert average.dtype == np.float32
    np.testing.assert_allclose(average, np.mean(np.float64(run.weights[1:]), axis=0), rtol=1e-6)
    assert np.abs(average - run.weights[-1]).max() > 0.01
    assert [row.get(metrics_log.AVERAGED) for row in metrics_log.read_metrics(tmp_path)] == [None, 1, 2, 3]


def test_without_the_setting_there_is_no_average(tmp_path):
    TinyRun().fit(tmp_path, dataclasses.replace(PLAN, average_last=0))
    assert not (tmp_path / "checkpoints" / "20" / AVERAGE).exists()
    assert all(metrics_log.AVERAGED not in row for row in metrics_log.read_metrics(tmp_path))


@pytest.mark.parametrize("batch", [8, 13, 17])
def test_an_interrupted_run_has_the_same_average_bit_for_bit(tmp_path, batch):
    """The interruptions are before the first averaged checkpoint, after it, and after the second."""
    TinyRun().fit(tmp_path / "whole", PLAN)
    first = TinyRun()

    def fail(i):
        if i == batch:
            raise KeyboardInterrupt
        return batch_at(i)

    first.batch_at = fail
    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "cut", PLAN)
    TinyRun().fit(tmp_path / "cut", PLAN)
    np.testing.assert_array_equal(average_of(tmp_path / "cut", 20), average_of(tmp_path / "whole", 20))
    assert metrics_log.read_metrics(tmp_path / "cut") == metrics_log.read_metrics(tmp_path / "whole")


def test_sigterm_between_two_checkpoints_keeps_the_average(tmp_path, monkeypatch):
    polls = iter([False] * 12 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
        with pytest.raises(SystemExit):
            TinyRun().fit(tmp_path / "cut", PLAN)
    assert steps_on_disk(tmp_path / "cut")[-1] == 13
    TinyRun().fit(tmp_path / "cut", PLAN)
    TinyRun().fit(tmp_path / "whole", PLAN)
    np.testing.assert_array_equal(average_of(tmp_path / "cut", 20), average_of(tmp_path / "whole", 20))


@pytest.mark.parametrize(
    ("average_last", "averaged"),
    [(3, 1), (4, 2)],  # the planned checkpoints are 5, 10, …, 30, and the run stops at 20
)
def test_a_run_that_stops_early_averages_what_it_reached_or_has_its_last_checkpoint(tmp_path, average_last, averaged):
    plan = Plan("test", steps=30, evaluations=6, seed=5, patience=3, average_last=average_last)
    run = RecordingRun(scores=[0.9, 0.8, 0.7, 0.6])
    run.fit(tmp_path, plan)
    last = metrics_log.read_metrics(tmp_path)[-1]
    assert (last["step"], last["stopped_early"], last[metrics_log.AVERAGED]) == (20, True, averaged)
    expected = np.mean(np.float64(run.weights[-averaged:]), axis=0)
    np.testing.assert_allclose(average_of(tmp_path, 20), expected, rtol=1e-6)


def test_an_early_stop_before_the_planned_average_has_the_last_checkpoint_itself(tmp_path):
    plan = Plan("test", steps=40, evaluations=8, seed=5, patience=1, average_last=2)
    run = RecordingRun(scores=[0.9, 0.8])
    run.fit(tmp_path, plan)
    assert metrics_log.read_metrics(tmp_path)[-1][metrics_log.AVERAGED] == 1
    np.testing.assert_array_equal(average_of(tmp_path, 10), run.weights[-1])


def test_more_checkpoints_than_there_are_cannot_be_averaged():
    with pytest.raises(UserError, match=r"student\.average_last is 6: there are only 5 checkpoints"):
        ModelConfig(average_last=6).check("student.")
    ModelConfig(average_last=5).check("student.")


class OracleRun(TinyRun):
    """A run with given scores in the source language and in German."""

    def __init__(self, source, german):
        super().__init__(source)
        self.german = german

    def score(self, params):
        return super().score(params) | {metrics_log.TARGET_DEV_SCORES: {"de": self.german.pop(0)}}


def test_an_oracle_keeps_the_best_checkpoint_of_each_language(tmp_path):
    plan = Plan("test", steps=20, evaluations=4, seed=5)
    OracleRun([0.2, 0.9, 0.3, 0.1], [0.7, 0.3, 0.7, 0.2]).fit(tmp_path, plan)
    assert steps_on_disk(tmp_path) == [5, 10, 20]  # German, with the earlier of two equal scores; source; last
    assert metrics_log.read_metrics(tmp_path)[2][metrics_log.TARGET_DEV_SCORES] == {"de": 0.7}


def test_the_oracles_checkpoint_survives_a_resume(tmp_path):
    plan = Plan("test", steps=20, evaluations=4, seed=5)
    first = OracleRun([0.2, 0.9], [0.7, 0.3])

    def fail(i):
        if i == 13:
            raise RuntimeError("no batch 13")
        return batch_at(i)

    first.batch_at = fail
    with pytest.raises(RuntimeError, match="no batch 13"):
        first.fit(tmp_path, plan)
    OracleRun([0.3, 0.1], [0.6, 0.2]).fit(tmp_path, plan)
    assert steps_on_disk(tmp_path) == [5, 10, 20]
