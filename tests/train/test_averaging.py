"""The moving average of the weights: by hand, saved, resumed, and the same on every mesh."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.train.test_loop import Line, TinyRun, batch_at, loss_fn, rates_of
from tests.train.test_meshes import BERT, batch, compiled_steps, params
from xtransfer.config import ModelConfig, parse
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.runtime import sharding, terminal
from xtransfer.train import averaging, loop, metrics_log, state, steps
from xtransfer.train.checkpoints import AVERAGE, PARAMS, RESUME, Checkpoints
from xtransfer.train.loop import Plan
from xtransfer.train.saving import WHOLE, of_average

PLAN = Plan("test", steps=20, evaluations=4, seed=5)
DECAY = 0.9


@pytest.mark.parametrize(("decay", "expected"), [(0.5, (0.25 * 1 + 0.5 * 2 + 4) / 1.75), (0.999999, 7 / 3)])
def test_the_average_by_hand(decay: float, expected: float) -> None:
    """The parameters are 1, 2, and 4 after three steps; what was there before does not count."""
    average = {"w": jnp.float32(100.0)}
    for step, value in enumerate((1.0, 2.0, 4.0), 1):
        average = averaging.moved(average, {"w": jnp.float32(value)}, jnp.int32(step), decay)
    np.testing.assert_allclose(average["w"], expected, rtol=1e-6)


class AveragedRun(TinyRun):
    """A run whose weights are averaged; it notes the parameters after each step, and the scored weights."""

    def __init__(self) -> None:
        super().__init__()
        self.graphdef, self.params = nnx.split(Line(), nnx.Param)
        step = steps.make_train_step(
            self.graphdef, loss_fn, self.tx, self.mesh, self.params, averaged=("w",), ema_decay=DECAY
        )
        self.after: list[np.ndarray] = []
        self.scored: list[np.ndarray] = []

        def noted(*arguments: Any) -> Any:
            new, terms = step(*arguments)
            self.after.append(np.array(jax.tree.leaves(new.params)[0]))
            return new, terms

        self.step = noted

    def score(self, params: Any) -> dict[str, float]:
        self.scored.append(np.array(jax.tree.leaves(params)[0]))
        return super().score(params)

    def fit(self, directory: Path, plan: Plan) -> np.ndarray:
        abstract = state.abstract(self.params, self.tx, self.mesh, ("w",))
        start = loop.Start(
            lambda: state.create(jax.tree.map(jnp.copy, self.params), self.tx, self.mesh, ("w",)),
            abstract,
            of_average(abstract, ("w",)),
        )
        final = loop.fit(directory, plan, start, self.step, rates_of(plan), self.batch_at, self.score, self.mesh)
        return np.asarray(final.ema["w"])


def saved(directory: Path, step: int, item: str) -> dict[str, np.ndarray]:
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_arrays(step, item)


def test_the_average_is_scored_and_kept_instead_of_the_parameters(tmp_path: Path) -> None:
    run = AveragedRun()
    average = run.fit(tmp_path, PLAN)
    weights = DECAY ** np.arange(19, -1, -1)
    expected = (weights[:, None] * np.float64(run.after)).sum(0) / weights.sum()
    np.testing.assert_allclose(average, expected, rtol=1e-5)
    assert np.abs(average - run.after[-1]).max() > 0.01
    np.testing.assert_array_equal(run.scored[-1], average)
    np.testing.assert_array_equal(saved(tmp_path, 20, PARAMS)["w"], average)
    np.testing.assert_array_equal(saved(tmp_path, 20, RESUME)["trained.w"], run.after[-1])


@pytest.mark.parametrize("average_last", [0, 3])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, average_last: int) -> None:
    plan = dataclasses.replace(PLAN, average_last=average_last, patience=4)
    expected = AveragedRun().fit(tmp_path / "whole", plan)
    first = AveragedRun()

    def fail(i: int) -> dict[str, np.ndarray]:
        if i == 13:
            raise KeyboardInterrupt
        return batch_at(i)

    first.batch_at = fail
    with pytest.raises(KeyboardInterrupt):
        first.fit(tmp_path / "cut", plan)
    np.testing.assert_array_equal(AveragedRun().fit(tmp_path / "cut", plan), expected)
    assert metrics_log.read_metrics(tmp_path / "cut") == metrics_log.read_metrics(tmp_path / "whole")
    for item in (PARAMS, RESUME, *([AVERAGE] if average_last else [])):
        whole, cut = (saved(tmp_path / name, 20, item) for name in ("whole", "cut"))
        for name in whole:
            np.testing.assert_array_equal(cut[name], whole[name], err_msg=name)


def test_a_run_stopped_by_a_signal_between_checkpoints_resumes_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = AveragedRun().fit(tmp_path / "whole", PLAN)
    polls = iter([False] * 12 + [True] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(terminal, "deferred_stop", lambda: contextlib.nullcontext(lambda: next(polls)))
        with pytest.raises(SystemExit):
            AveragedRun().fit(tmp_path / "cut", PLAN)
    np.testing.assert_array_equal(AveragedRun().fit(tmp_path / "cut", PLAN), expected)


def averaged_steps(shape: tuple[int, int, int], **settings: Any) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Train three steps, and return the weights and the parameters.

    With a large eps, Adam's update is proportional to the gradient, and does not magnify rounding.
    """
    settings = {"adam_eps": 1.0, "ema_decay": 0.5} | settings
    compiled = compiled_steps(shape, **settings)
    current = compiled.initial_state(params(BERT), 0)
    step = compiled.train_step(OBJECTIVES["monox_kd"])
    for _ in range(3):
        current, _ = step(current, sharding.place_batch(compiled.mesh, batch()), jax.random.key(5), np.float32(1.0))
    saving = compiled.saving(lambda: params(BERT), 0)
    restored = saving.restored(saving.saved(current))
    for mine, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(current), strict=True):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.sharding == theirs.sharding
    return tuple(
        {name: np.asarray(leaf) for name, leaf in state.select(tree, sharding.names_of(tree)).items()}
        for tree in (saving.saved(current).params, current.params)
    )


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_the_average_matches_one_device(shape: tuple[int, int, int]) -> None:
    frozen = (r"word_embeddings", r"layers\.0\.output")
    expected, raw = averaged_steps((1, 1, 1), frozen=frozen)
    actual, _ = averaged_steps(shape, frozen=frozen, accumulation=2)
    start = state.select(params(BERT), expected)
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], atol=2e-5, rtol=0, err_msg=name)
        if "word_embeddings" in name or "layers.0.output." in name:
            np.testing.assert_array_equal(actual[name], start[name])
    assert max(np.abs(expected[name] - raw[name]).max() for name in raw) > 1e-3


def test_the_average_takes_no_space_for_frozen_parameters_and_none_by_default() -> None:
    frozen = compiled_steps((1, 1, 1), ema_decay=0.9, frozen=("embeddings",)).abstract_state
    assert frozen.ema and not any("embeddings" in name for name in frozen.ema)
    default = compiled_steps((1, 1, 1))
    assert default.abstract_state.ema is None and default.saving(dict, 0) is WHOLE


def test_an_impossible_decay_is_refused() -> None:
    with pytest.raises(UserError, match=r"student\.ema_decay is 1\.0: it must be between 0 and 0\.999999"):
        parse({"student": {"ema_decay": 1.0}})
    assert ModelConfig().ema_decay == 0
