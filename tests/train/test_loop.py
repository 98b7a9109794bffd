"""The loop and its checkpoints: resume is exact, what cannot be trusted is not offered."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.runtime import sharding, terminal
from xtransfer.train import loop, state, steps
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.loop import Plan


class Line(nnx.Module):
    """y = w x."""

    def __init__(self):
        self.w = nnx.Param(jnp.zeros(4))


def loss_fn(model, data, key):
    noise = jax.random.normal(key, (4,))
    error = jnp.sum((model.w * data["x"] + 0.1 * noise - data["y"]) ** 2, axis=-1)
    return {"loss": (jnp.sum(error), jnp.float32(len(error)))}


def batch_at(i):
    rng = np.random.default_rng(i)
    x = rng.normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "y": 3 * x}


class Setting:
    """Everything `fit` needs, with a score that can be told."""

    def __init__(self, scores=None):
        self.mesh = sharding.make_mesh()
        self.graphdef, self.params = nnx.split(Line(), nnx.Param)
        self.tx = optax.adam(0.05)
        self.step = steps.make_train_step(self.graphdef, loss_fn, self.tx, self.mesh, self.params)
        self.scores, self.batches = scores, []

    def initial(self):
        return state.create(jax.tree.map(jnp.copy, self.params), self.tx, self.mesh)

    def score(self, params):
        weight = float(jnp.sum(jax.tree.leaves(params)[0]))
        return {"dev_accuracy": weight if self.scores is None else self.scores.pop(0)}

    def batch_at(self, i):
        self.batches.append(i)
        return batch_at(i)

    def fit(self, directory, plan):
        begin = loop.Start(self.initial, state.abstract(self.params, self.tx, self.mesh))
        final = loop.fit(directory, plan, begin, self.step, self.batch_at, self.score, self.mesh)
        return np.asarray(jax.tree.leaves(final.params)[0])


PLAN = Plan("test", steps=20, evaluations=4, seed=5)


def steps_on_disk(directory):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def test_milestones_end_at_the_end():
    assert sorted(PLAN.milestones()) == [5, 10, 15, 20]
    assert sorted(Plan("", 3, 10, 0).milestones()) == [1, 2, 3]
    assert sorted(Plan("", 10, 3, 0).milestones()) == [3, 7, 10]


def test_rows_and_kept_checkpoints(tmp_path):
    assert not loop.finished(tmp_path, 20)
    Setting(scores=[0.5, 0.9, 0.9, 0.2]).fit(tmp_path, PLAN)
    rows = loop.read_metrics(tmp_path)
    assert [(row["step"], row["dev_accuracy"]) for row in rows] == [(5, 0.5), (10, 0.9), (15, 0.9), (20, 0.2)]
    assert rows[0]["loss"] > rows[-1]["loss"] > 0
    assert steps_on_disk(tmp_path) == [10, 20]  # the earlier of equals, and the last
    assert loop.finished(tmp_path, 20)
    assert not loop.finished(tmp_path, 30)


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    whole = Setting().fit(tmp_path / "whole", PLAN)
    first = Setting()

    def stopping(i):
        if i == 13:
            raise KeyboardInterrupt
        return batch_at(i)

    first.batch_at = stopping
    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "cut", PLAN)
    second = Setting()
    np.testing.assert_array_equal(second.fit(tmp_path / "cut", PLAN), whole)
    assert second.batches == list(range(10, 20))
    rows = [loop.read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1]


def test_the_best_checkpoint_survives_a_resume(tmp_path):
    first = Setting(scores=[0.9, 0.5])
    first.batch_at = lambda i: batch_at(i) if i < 13 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        first.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == [5, 10]
    Setting(scores=[0.6, 0.2]).fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == [5, 20]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert all(np.isfinite(leaf).all() for leaf in checkpoints.restore_arrays(5).values())


def test_parameters_that_are_not_finite_are_not_saved(tmp_path):
    """The last update blows up; its loss is never seen, for it would be that of the step after."""
    setting = Setting()
    setting.tx = optax.sgd(1e38)
    setting.step = steps.make_train_step(setting.graphdef, loss_fn, setting.tx, setting.mesh, setting.params)
    with pytest.raises(UserError, match="step 1 led to parameters that are not finite"):
        setting.fit(tmp_path, Plan("test", 1, 1, 0))
    assert steps_on_disk(tmp_path) == []


def test_a_row_without_its_checkpoint_is_dropped(tmp_path):
    """Killed between the row and the save: the row of step 15 comes again, once."""
    Setting().fit(tmp_path, Plan("test", 10, 2, 5))
    storage.append_jsonl(tmp_path / loop.METRICS_FILE, {"step": 15, "loss": 0.0, "dev_accuracy": 1.0})
    with (tmp_path / loop.METRICS_FILE).open("a") as file:
        file.write('{"step": 2')  # and a half-written one
    Setting().fit(tmp_path, PLAN)
    assert [row["step"] for row in loop.read_metrics(tmp_path)] == [5, 10, 15, 20]
    assert json.loads((tmp_path / loop.METRICS_FILE).read_text().splitlines()[2])["loss"] > 0


def test_a_partial_save_is_not_offered(tmp_path):
    Setting().fit(tmp_path, PLAN)
    (tmp_path / "checkpoints" / "25.orbax-checkpoint-tmp-0").mkdir()
    assert steps_on_disk(tmp_path)[-1] == 20


def test_preemption_saves_and_exits_143(tmp_path, monkeypatch):
    setting = Setting()
    polls = iter([False] * 12 + [True] * 100)
    monkeypatch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
    with pytest.raises(SystemExit) as exit_:
        setting.fit(tmp_path / "cut", PLAN)
    assert exit_.value.code == 143
    assert steps_on_disk(tmp_path / "cut")[-1] == 13
    monkeypatch.undo()
    whole = Setting().fit(tmp_path / "whole", PLAN)
    np.testing.assert_array_equal(Setting().fit(tmp_path / "cut", PLAN), whole)


def test_a_loss_that_is_not_finite_stops_before_saving(tmp_path):
    setting = Setting()
    setting.batch_at = lambda i: {"x": batch_at(i)["x"], "y": np.full((8, 4), np.nan if i == 12 else 1, np.float32)}
    with pytest.raises(UserError, match=r"loss of step 13 is not finite"):
        setting.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path)[-1] == 10


def test_a_truncated_checkpoint_is_named_with_what_to_do(tmp_path):
    setting = Setting()
    setting.fit(tmp_path, PLAN)
    # Several files hold the same small arrays, so all of them are cut.
    for path in (tmp_path / "checkpoints" / "20" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(
            UserError, match=r"checkpoints/20: this checkpoint cannot be read: .*; remove .* to train this run"
        ),
    ):
        checkpoints.restore_params(20, states_of(setting))


@pytest.mark.parametrize("line", ["hello", "{}", "[]", '{"step": "3"}'])
def test_broken_metrics_are_named_with_their_line(tmp_path, line):
    (tmp_path / loop.METRICS_FILE).write_text('{"step": 5, "loss": 1.0}\n' + line + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: .*remove .* to train this run"):
        loop.read_metrics(tmp_path)


def test_a_last_step_whose_score_is_lost_is_named(tmp_path):
    Setting().fit(tmp_path, PLAN)
    (tmp_path / loop.METRICS_FILE).unlink()
    with pytest.raises(UserError, match=r"the score of its last step 20 is lost: remove it"):
        Setting().fit(tmp_path, PLAN)


def test_another_tree_or_shape_is_refused(tmp_path):
    setting = Setting()
    setting.fit(tmp_path, PLAN)
    wrong = jax.tree.map(lambda x: jax.ShapeDtypeStruct((7,), x.dtype, sharding=x.sharding), setting.initial().params)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/20: this checkpoint cannot be read"):
            checkpoints.restore_params(20, wrong)
        with pytest.raises(UserError, match=r"checkpoints/3"):
            checkpoints.restore_params(3, states_of(setting))


def states_of(setting):
    return state.abstract(setting.params, setting.tx, setting.mesh).params


def test_saving_a_step_twice_is_an_error(tmp_path):
    setting = Setting()
    made = setting.initial()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(made, score=0.5)
        checkpoints.wait()
        with pytest.raises(RuntimeError, match="checkpoint 0 was not saved"):
            checkpoints.save(made, score=0.5)
