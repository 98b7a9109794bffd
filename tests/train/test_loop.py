"""The training loop and its checkpoints: resuming is exact, and bad checkpoints are not used."""

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.runtime import checksums, sharding, terminal
from xtransfer.train import loop, metrics_log, state, steps
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.loop import Plan

ROOT = Path(__file__).parents[2]


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


def rates_of(plan):
    """Return another rate for each step. The optimizer of these tests has a constant rate of its own."""
    return np.arange(plan.steps, dtype=np.float32) / 8


class TinyRun:
    """Everything that `fit` needs; the scores may be given in advance."""

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
        start = loop.Start(self.initial, state.abstract(self.params, self.tx, self.mesh))
        final = loop.fit(directory, plan, start, self.step, rates_of(plan), self.batch_at, self.score, self.mesh)
        return np.asarray(jax.tree.leaves(final.params)[0])


PLAN = Plan("test", steps=20, evaluations=4, seed=5)


def steps_on_disk(directory):
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.steps()


def test_last_milestone_is_the_last_step():
    assert sorted(PLAN.milestones()) == [5, 10, 15, 20]
    assert sorted(Plan("", 3, 10, 0).milestones()) == [1, 2, 3]
    assert sorted(Plan("", 10, 3, 0).milestones()) == [3, 7, 10]


def test_metrics_rows_and_kept_checkpoints(tmp_path):
    assert not metrics_log.finished(tmp_path, 20)
    TinyRun(scores=[0.5, 0.9, 0.9, 0.2]).fit(tmp_path, PLAN)
    rows = metrics_log.read_metrics(tmp_path)
    assert [(row["step"], row["dev_accuracy"]) for row in rows] == [(5, 0.5), (10, 0.9), (15, 0.9), (20, 0.2)]
    assert rows[0]["loss"] > rows[-1]["loss"] > 0
    assert steps_on_disk(tmp_path) == [10, 20]  # the earlier of two equal scores, and the last step
    assert metrics_log.finished(tmp_path, 20)
    assert not metrics_log.finished(tmp_path, 30)


def test_every_step_gets_its_own_rate_also_after_a_restart(tmp_path):
    received = []

    def fit(interrupt=None):
        run = TinyRun()
        train_step = run.step

        def step(state_, batch, key, learning_rate):
            if len(received) == interrupt:
                raise KeyboardInterrupt
            received.append(float(learning_rate))
            return train_step(state_, batch, key, learning_rate)

        run.step = step
        run.fit(tmp_path, PLAN)

    with pytest.raises(KeyboardInterrupt):
        fit(interrupt=13)
    fit()
    # The second start resumes from the checkpoint of step 10.
    assert received == [step / 8 for step in (*range(13), *range(10, 20))]


def test_interrupted_run_ends_with_the_same_bits(tmp_path):
    uninterrupted = TinyRun().fit(tmp_path / "whole", PLAN)
    first = TinyRun()

    def interrupt_at_13(i):
        if i == 13:
            raise KeyboardInterrupt
        return batch_at(i)

    first.batch_at = interrupt_at_13
    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "cut", PLAN)
    second = TinyRun()
    np.testing.assert_array_equal(second.fit(tmp_path / "cut", PLAN), uninterrupted)
    assert second.batches == list(range(10, 20))
    rows = [metrics_log.read_metrics(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1]


def test_patience_stops_a_run_after_evaluations_without_a_better_score(tmp_path, capsys):
    plan = Plan("test", steps=40, evaluations=8, seed=5, patience=2)
    # 0.7 at step 15 is the best. An equal score is no better, so the second evaluation in vain is at step 25.
    run = TinyRun(scores=[0.5, 0.4, 0.7, 0.7, 0.6, 0.9])
    run.fit(tmp_path, plan)
    rows = metrics_log.read_metrics(tmp_path)
    assert [row["step"] for row in rows] == [5, 10, 15, 20, 25] and run.scores == [0.9]
    assert ["stopped_early" in row for row in rows] == [False] * 4 + [True]
    assert steps_on_disk(tmp_path) == [15, 25]
    assert metrics_log.finished(tmp_path, 40)
    assert "test: stopped at step 25: 2 evaluations without a better score" in " ".join(capsys.readouterr().out.split())
    TinyRun(scores=[]).fit(tmp_path, plan)  # a second start trains nothing
    assert metrics_log.read_metrics(tmp_path) == rows


def test_a_run_that_ends_by_itself_was_not_stopped(tmp_path):
    TinyRun(scores=[0.5, 0.4, 0.3, 0.2]).fit(tmp_path, Plan("test", 20, 4, 5, patience=3))
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path)] == [5, 10, 15, 20]
    assert "stopped_early" not in metrics_log.read_metrics(tmp_path)[-1]
    assert metrics_log.finished(tmp_path, 20)


@pytest.mark.parametrize("batch", [7, 17, 24])
def test_an_interrupted_run_runs_out_of_patience_at_the_same_step(tmp_path, batch):
    """The interruptions are before the best score, just after it, and in the last section."""
    plan = Plan("test", steps=40, evaluations=8, seed=5, patience=2)
    scores = {5: 0.5, 10: 0.4, 15: 0.7, 20: 0.7, 25: 0.6}

    def fit(directory, fails_at=None):
        def batch_at_or_fail(i):
            if i == fails_at:
                raise KeyboardInterrupt
            return batch_at(i)

        saved = steps_on_disk(directory) if (directory / "checkpoints").exists() else []
        run = TinyRun(scores=[score for step, score in scores.items() if step > max(saved, default=0)])
        run.batch_at = batch_at_or_fail
        return run.fit(directory, plan)

    uninterrupted = fit(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", batch)
    np.testing.assert_array_equal(fit(tmp_path / "cut"), uninterrupted)
    assert steps_on_disk(tmp_path / "cut") == steps_on_disk(tmp_path / "whole") == [15, 25]
    assert metrics_log.read_metrics(tmp_path / "cut") == metrics_log.read_metrics(tmp_path / "whole")


def test_patience_counts_a_row_only_with_its_checkpoint(tmp_path):
    """After a kill between the last row and its checkpoint, the run is not finished and stops at that step again."""
    plan = Plan("test", steps=20, evaluations=4, seed=5, patience=1)
    TinyRun(scores=[0.9]).fit(tmp_path, Plan("test", 5, 1, 5))
    storage.append_jsonl(
        tmp_path / metrics_log.METRICS_FILE, {"step": 10, "loss": 0.0, "dev_accuracy": 0.1, "stopped_early": True}
    )
    assert not metrics_log.finished(tmp_path, 20)
    TinyRun(scores=[0.2]).fit(tmp_path, plan)
    assert [row["dev_accuracy"] for row in metrics_log.read_metrics(tmp_path)] == [0.9, 0.2]
    assert metrics_log.finished(tmp_path, 20)


def save_scores_as_before(checkpoint):
    """Take the copies of rows out of a checkpoint, which older versions did not save."""
    path = checkpoint / "metrics" / "metrics"
    scores = json.loads(path.read_text())
    path.write_text(json.dumps({key: scores[key] for key in ("score", "step", "targets")}))
    checksums.write_all(checkpoint, skip=("_CHECKPOINT_METADATA", "commit_success.txt"))


def test_a_lost_score_that_patience_counts_is_named(tmp_path):
    TinyRun().fit(tmp_path, Plan("test", 10, 2, 5))
    (tmp_path / metrics_log.METRICS_FILE).write_text('{"step": 10, "loss": 1.0, "dev_accuracy": 0.5}\n')
    save_scores_as_before(tmp_path / "checkpoints" / "10")
    shutil.rmtree(tmp_path / "checkpoints" / "5")
    with pytest.raises(UserError, match="the score of step 5 is lost, and patience counts it: remove checkpoints/ and"):
        TinyRun().fit(tmp_path, Plan("test", 20, 4, 5, patience=2))


def test_the_score_ranks_and_not_the_accuracy(tmp_path):
    run = TinyRun()
    losses = iter([0.5, 0.2, 0.2, 0.4])

    def score(params):
        loss = next(losses)
        return {"dev_accuracy": loss, "dev_log_loss": loss, "dev_score": -loss}

    run.score = score
    run.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == [10, 20]  # the earlier of two equal losses


def test_best_checkpoint_survives_a_resume(tmp_path):
    def fail_at_13(i):
        if i == 13:
            raise RuntimeError("no batch 13")
        return batch_at(i)

    first = TinyRun(scores=[0.9, 0.5])
    first.batch_at = fail_at_13
    with pytest.raises(RuntimeError, match="no batch 13"):
        first.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == [5, 10]
    TinyRun(scores=[0.6, 0.2]).fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path) == [5, 20]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert all(np.isfinite(leaf).all() for leaf in checkpoints.restore_arrays(5).values())


def test_non_finite_parameters_are_not_saved(tmp_path):
    """The last update diverges. No later step would compute a loss that shows it."""
    run = TinyRun()
    run.tx = optax.sgd(1e38)
    run.step = steps.make_train_step(run.graphdef, loss_fn, run.tx, run.mesh, run.params)
    with pytest.raises(UserError, match="step 1 led to parameters that are not finite"):
        run.fit(tmp_path, Plan("test", 1, 1, 0))
    assert steps_on_disk(tmp_path) == []


def test_metrics_row_without_its_checkpoint_is_dropped(tmp_path):
    """After a kill between the row and its checkpoint, the row of step 15 is written again, once."""
    TinyRun().fit(tmp_path, Plan("test", 10, 2, 5))
    storage.append_jsonl(tmp_path / metrics_log.METRICS_FILE, {"step": 15, "loss": 0.0, "dev_accuracy": 1.0})
    with (tmp_path / metrics_log.METRICS_FILE).open("a") as file:
        file.write('{"step": 2')  # an incomplete row
    TinyRun().fit(tmp_path, PLAN)
    assert [row["step"] for row in metrics_log.read_metrics(tmp_path)] == [5, 10, 15, 20]
    assert json.loads((tmp_path / metrics_log.METRICS_FILE).read_text().splitlines()[2])["loss"] > 0


def test_partial_checkpoint_is_ignored(tmp_path):
    TinyRun().fit(tmp_path, PLAN)
    (tmp_path / "checkpoints" / "25.orbax-checkpoint-tmp-0").mkdir()
    assert steps_on_disk(tmp_path)[-1] == 20


def test_preemption_saves_and_exits_143(tmp_path, monkeypatch):
    run = TinyRun()
    polls = iter([False] * 12 + [True] * 100)
    monkeypatch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
    with pytest.raises(SystemExit) as caught:
        run.fit(tmp_path / "cut", PLAN)
    assert caught.value.code == 143
    assert steps_on_disk(tmp_path / "cut")[-1] == 13
    monkeypatch.undo()
    uninterrupted = TinyRun().fit(tmp_path / "whole", PLAN)
    np.testing.assert_array_equal(TinyRun().fit(tmp_path / "cut", PLAN), uninterrupted)


def test_non_finite_loss_stops_before_saving(tmp_path):
    run = TinyRun()
    run.batch_at = lambda i: {"x": batch_at(i)["x"], "y": np.full((8, 4), np.nan if i == 12 else 1, np.float32)}
    with pytest.raises(UserError, match=r"loss of step 13 is not finite"):
        run.fit(tmp_path, PLAN)
    assert steps_on_disk(tmp_path)[-1] == 10


def test_truncated_checkpoint_is_named_with_advice(tmp_path):
    run = TinyRun()
    run.fit(tmp_path, PLAN)
    # Several files hold the same small arrays, so truncate all of them.
    for path in (tmp_path / "checkpoints" / "20" / "params").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with (
        Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints,
        pytest.raises(
            UserError,
            match=r"checkpoints/20: this checkpoint is damaged: params/.* bytes, not .*step 15 is whole: train with",
        ),
    ):
        checkpoints.restore_params(20, abstract_params(run))


def test_lost_score_of_the_last_step_is_named(tmp_path):
    TinyRun().fit(tmp_path, PLAN)
    (tmp_path / metrics_log.METRICS_FILE).unlink()
    for step in (15, 20):  # as older versions saved them, which had no checksums
        shutil.rmtree(tmp_path / "checkpoints" / str(step) / "metrics")
        (tmp_path / "checkpoints" / str(step) / "checksums.json").unlink()
    with pytest.raises(UserError, match=r"the score of its last step 20 is lost: remove checkpoints/ and"):
        TinyRun().fit(tmp_path, PLAN)


def test_wrong_shape_or_missing_step_is_refused(tmp_path):
    run = TinyRun()
    run.fit(tmp_path, PLAN)
    wrong_shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((7,), x.dtype, sharding=x.sharding), run.initial().params
    )
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        with pytest.raises(UserError, match=r"checkpoints/20: this checkpoint cannot be read"):
            checkpoints.restore_params(20, wrong_shapes)
        with pytest.raises(UserError, match=r"checkpoints/3"):
            checkpoints.restore_params(3, abstract_params(run))


def abstract_params(run):
    return state.abstract(run.params, run.tx, run.mesh).params


def test_saving_a_step_twice_is_an_error(tmp_path):
    run = TinyRun()
    train_state = run.initial()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(train_state, score=0.5)
        checkpoints.wait()
        with pytest.raises(RuntimeError, match="checkpoint 0 was not saved"):
            checkpoints.save(train_state, score=0.5)


class Clock:
    """A clock on which each step takes some seconds, and the first one compiles for longer."""

    def __init__(self, monkeypatch, compilation, seconds):
        self.now = 0.0
        self._times = [compilation, *[seconds] * 1000]
        monkeypatch.setattr(loop.time, "monotonic", lambda: self.now)

    def steps_read(self, count):
        reads, read = loop._Reads(0), []
        for step, seconds in enumerate(self._times[:count], 1):
            self.now += seconds
            if reads.is_due(step):
                assert reads.note(step) == step - (read[-1] if read else 0)
                read.append(step)
        return read


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (7.0, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]),
        (1.0, [1, 2, 7]),  # every five seconds
        (0.01, [1, 2]),  # and then step 502
    ],
)
def test_the_loss_is_read_every_few_seconds_on_a_slow_machine(monkeypatch, seconds, expected):
    assert Clock(monkeypatch, 60.0, seconds).steps_read(10) == expected


def test_rows_do_not_depend_on_how_often_the_loss_is_read(tmp_path, monkeypatch):
    plan = Plan("test", steps=60, evaluations=2, seed=5)
    TinyRun().fit(tmp_path / "fast", plan)
    monkeypatch.setattr(loop, "_READ_SECONDS", 0.0)  # read every step
    TinyRun().fit(tmp_path / "slow", plan)
    assert metrics_log.read_metrics(tmp_path / "fast") == metrics_log.read_metrics(tmp_path / "slow")


def test_a_full_disk_is_named_with_the_last_whole_step(tmp_path):
    from xtransfer.train.state import TrainState

    full = ValueError("RESOURCE_EXHAUSTED: [OS error 28: ENOSPC No space left on device]")

    def fail(*args, **options):
        raise full

    tiny = TinyRun()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        first = tiny.initial()
        checkpoints.save(TrainState(jnp.int32(3), first.params, first.opt_state), score=None)
        checkpoints.wait()
        checkpoints._manager.save = fail
        with pytest.raises(UserError) as caught:
            checkpoints.save(TrainState(jnp.int32(4), first.params, first.opt_state), score=None)
    assert str(caught.value) == (
        f"{tmp_path}/checkpoints: no space left for a checkpoint; step 3 is intact: free some space and run the same "
        "command again to resume"
    )


FULL = """
import pathlib, resource, sys
import jax.numpy as jnp
import numpy as np
from xtransfer.runtime import terminal
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.state import TrainState

def main(argv):
    directory, limit = sys.argv[1:]
    def state(step):  # 256 kB that cannot be compressed
        values = np.random.default_rng(step).normal(size=(40, 40, 40)).astype(np.float32)
        return TrainState(jnp.int32(step), {f"w{i}": jnp.asarray(values[i]) for i in range(40)}, {"mean": jnp.ones(4)})

    with Checkpoints(pathlib.Path(directory)) as checkpoints:
        if int(limit):
            checkpoints.save(state(1), score=1.0)
            checkpoints.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        for step in range(2, 9):
            checkpoints.save(state(step), score=float(step))

terminal.run(main)
"""


@pytest.mark.parametrize("kind", ["a full disk", "a limit on files"])
def test_a_save_that_fails_in_its_threads_is_one_line(tmp_path, kind):
    """Orbax's threads call back after the failure, which must print nothing."""
    command = [sys.executable, "-c", FULL, str(tmp_path / "run"), "0"]
    if kind == "a full disk":
        mounted = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o size=400k none {tmp_path} && exec "$@"', "-"]
        if subprocess.run([*mounted, "true"], capture_output=True).returncode:
            pytest.skip("this machine lets nobody mount")
        command = [*mounted, *command]
    else:
        command[-1] = "3000"
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 5
    assert re.fullmatch(
        rf"error: {tmp_path}/run: no space left for a checkpoint; step \d+ is intact: free some space and run the same "
        r"command again to resume\n",
        result.stderr,
    ), result.stderr


def test_too_little_memory_does_not_condemn_a_checkpoint(tmp_path):
    TinyRun().fit(tmp_path, PLAN)
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:

        def fail(*args, **options):
            raise ValueError("RESOURCE_EXHAUSTED: Out of memory")

        checkpoints._manager.restore = fail
        with pytest.raises(ValueError, match="RESOURCE_EXHAUSTED"):
            checkpoints.restore_arrays(20)
