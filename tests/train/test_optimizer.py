"""AdamW computed by hand: weight decay, its rates, and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from xtransfer.config import ModelConfig
from xtransfer.errors import UserError
from xtransfer.train import optimizer

PARAMS = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
RATE = 0.1


def apply_update(tx, gradient):
    updates, _ = optax.with_extra_args_support(tx).update(gradient, tx.init(PARAMS), PARAMS, learning_rate=RATE)
    return optax.apply_updates(PARAMS, updates)


def test_only_matrices_decay():
    after = apply_update(optimizer.adamw(weight_decay=0.5, clip_norm=0.0), jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(after["a"]["kernel"], 0.95)  # 1 − 0.1 · 0.5
    np.testing.assert_array_equal(after["a"]["bias"], 1.0)
    np.testing.assert_array_equal(after["norm"]["scale"], 1.0)


def test_first_adam_step_equals_the_learning_rate():
    after = apply_update(optimizer.adamw(weight_decay=0.0, clip_norm=0.0), jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_allclose(after["a"]["bias"], 0.9, rtol=1e-6)


def test_the_decay_rates_and_eps_by_hand():
    """Gradients 1 and then 3, with b1 = 0.5, b2 = 0.75, and eps = 1.

    The corrected means of the second step are m = (0.25 · 1 + 0.5 · 3) / 0.75 = 7/3 and
    v = (0.1875 · 1 + 0.25 · 9) / 0.4375 = 39/7. The first step takes 1 / (1 + 1).
    """
    tx = optimizer.adamw(weight_decay=0.0, clip_norm=0.0, b1=0.5, b2=0.75, eps=1.0)
    moments, params = tx.init(PARAMS), PARAMS
    for gradient in (1.0, 3.0):
        gradients = jax.tree.map(lambda x, g=gradient: jnp.full_like(x, g), params)
        updates, moments = tx.update(gradients, moments, params, learning_rate=RATE)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["a"]["bias"], 1 - 0.1 * (0.5 + 7 / 3 / (np.sqrt(39 / 7) + 1)), rtol=1e-6)


def test_the_default_rates_are_the_usual_ones_bit_for_bit():
    gradient = jax.tree.map(lambda x: 0.3 * x, PARAMS)
    settings = ModelConfig()
    rates = {"b1": settings.adam_b1, "b2": settings.adam_b2, "eps": settings.adam_eps}
    after = apply_update(optimizer.adamw(weight_decay=0.0, clip_norm=0.0, **rates), gradient)
    expected = apply_update(optax.adamw(RATE, weight_decay=0.0), gradient)
    jax.tree.map(np.testing.assert_array_equal, after, expected)


def test_frozen_parameters_do_not_change_and_have_no_state():
    tx = optimizer.adamw(weight_decay=0.5, clip_norm=1.0, frozen=(r"^a\.",))
    after = apply_update(tx, jax.tree.map(jnp.ones_like, PARAMS))
    np.testing.assert_array_equal(after["a"]["kernel"], 1.0)
    assert float(after["norm"]["scale"][0]) < 1.0
    sizes = sorted(leaf.size for leaf in jax.tree.leaves(tx.init(PARAMS)))
    assert max(sizes) == 2  # moments of the scale, none of the 2 × 2 kernel


def test_frozen_parameters_do_not_count_in_the_gradient_norm():
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    gradient["a"]["kernel"] = jnp.full((2, 2), 1e6)
    tx = optimizer.adamw(weight_decay=0.0, clip_norm=1.0, frozen=(r"^a\.kernel",))
    moments = jax.tree.leaves(tx.update(gradient, tx.init(PARAMS), PARAMS, learning_rate=RATE)[1])
    # The norm of four ones, 2, is clipped to 1, so the first moment is 0.1 · 0.5.
    assert any(leaf.shape == (2,) and np.allclose(leaf, 0.05) for leaf in moments)


def test_frozen_pattern_without_a_match_is_refused():
    with pytest.raises(UserError, match=r"'embedings' matches no parameter"):
        optimizer.adamw(weight_decay=0.0, clip_norm=0.0, frozen=("embedings",)).init(PARAMS)


def test_freezing_everything_is_refused():
    with pytest.raises(
        UserError, match=r"frozen patterns '\^a', 'b' match every parameter, so nothing would be trained"
    ):
        optimizer.adamw(weight_decay=0.0, clip_norm=0.0, frozen=("^a", "b")).init({"a": jnp.ones(2), "b": jnp.ones(2)})
