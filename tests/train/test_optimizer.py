"""Learning rate schedules computed by hand, weight decay, and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xtransfer.errors import UserError
from xtransfer.train import optimizer

PARAMS = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}


def test_linear_schedule():
    rate = optimizer.schedule("linear", peak=1.0, steps=10, warmup_fraction=0.2)
    assert [round(float(rate(i)), 6) for i in (0, 1, 2, 6, 10)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_cosine_schedule():
    rate = optimizer.schedule("cosine", peak=1.0, steps=10, warmup_fraction=0.2)
    assert [round(float(rate(i)), 6) for i in (0, 1, 2, 6, 10)] == [0.0, 0.5, 1.0, 0.5, 0.0]


def test_no_warmup_starts_at_the_peak():
    assert float(optimizer.schedule("linear", peak=1.0, steps=10, warmup_fraction=0.0)(0)) == 1.0


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="'step'"):
        optimizer.schedule("step", peak=1.0, steps=10, warmup_fraction=0.0)


def apply_update(tx, gradient):
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS)
    return optax.apply_updates(PARAMS, updates)


def test_only_matrices_decay():
    after = apply_update(optimizer.adamw(0.1, weight_decay=0.5, clip_norm=0.0), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(after["a"]["kernel"], 0.95)  # 1 − 0.1 · 0.5
    np.testing.assert_array_equal(after["a"]["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["scale"], 1.0)


def test_first_adam_step_equals_the_learning_rate():
    after = apply_update(optimizer.adamw(0.1, weight_decay=0.0, clip_norm=0.0), jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_allclose(after["a"]["bias"], 0.9, rtol=1e-6)


def test_frozen_parameters_do_not_change_and_have_no_state():
    tx = optimizer.adamw(0.1, weight_decay=0.5, clip_norm=1.0, frozen=(r"^a\.",))
    after = apply_update(tx, jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_array_equal(after["a"]["kernel"], 1.0)
    assert float(after["norm"]["scale"][0]) < 1.0
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(tx.init(PARAMS)))
    assert max(sizes) == 2  # moments of the scale, none of the 2 × 2 kernel


def test_frozen_parameters_do_not_count_in_the_gradient_norm():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    gradient["a"]["kernel"] = jnp.full((2, 2), 1e6)
    tx = optimizer.adamw(0.1, weight_decay=0.0, clip_norm=1.0, frozen=(r"^a\.kernel",))
    moments = jax.tree.leaves(tx.update(gradient, tx.init(PARAMS), PARAMS)[1])
    # The norm of four ones, 2, is clipped to 1, so the first moment is 0.1 · 0.5.
    assert any(leaf.shape == (2,) and np.allclose(leaf, 0.05) for leaf in moments)


def test_frozen_pattern_without_a_match_is_refused():
    with pytest.raises(UserError, match=r"'embedings' matches no parameter"):
        optimizer.adamw(0.1, weight_decay=0.0, clip_norm=0.0, frozen=("embedings",)).init(PARAMS)


def test_freezing_everything_is_refused():
    with pytest.raises(
        UserError, match=r"frozen patterns '\^a', 'b' match every parameter, so nothing would be trained"
    ):
        optimizer.adamw(0.1, weight_decay=0.0, clip_norm=0.0, frozen=("^a", "b")).init(
            {"a": jnp.ones(2), "b": jnp.ones(2)}
        )
