"""Attention at once and its hand-written gradient, compared with softmax and einsum differentiated by JAX."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.helpers import attention as helpers
from tests.helpers.attention import Attention, assert_close, reference_attention, with_gradients
from xtransfer.models.attention_at_once import attend_at_once
from xtransfer.models.visibility import segment_bias

R, N, D, S = 3, 2, 4, 6
RATE = 0.25
# Two segments and padding, one segment, and a row of padding.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])

random_inputs = partial(helpers.random_inputs, (R, N, D, S))


def attention(keep: jax.Array | None, bias: jax.Array, rate: float = RATE) -> Attention:
    return lambda q, k, v: attend_at_once(q, k, v, bias, keep, rate)


def random_keep_mask(seed: int = 0) -> jax.Array:
    """Return a random dropout mask, [R, N, S (keys), S (queries)] bool, with every key of one query dropped."""
    keep = np.random.default_rng(seed).random((R, N, S, S)) >= RATE
    keep[0, 0, :, 1] = False
    return jnp.asarray(keep)


@pytest.mark.parametrize("with_dropout", [False, True])
def test_outputs_and_gradients_match_softmax(with_dropout: bool) -> None:
    keep, bias = random_keep_mask() if with_dropout else None, segment_bias(SEGMENTS)
    results = with_gradients(attention(keep, bias))(*random_inputs())
    assert_close(results, with_gradients(reference_attention(bias, keep, RATE))(*random_inputs()), 1e-5)
    assert all(float(jnp.abs(x).max()) > 0.1 for x in results)
    if with_dropout:
        np.testing.assert_array_equal(results[0][0, 0, :, 1], 0)  # this query keeps no key


def test_other_segments_do_not_affect_outputs_or_gradients() -> None:
    """Changing one segment leaves the outputs and gradients of the other bit-identical."""
    run = with_gradients(attention(random_keep_mask(), segment_bias(SEGMENTS)))
    q, k, v, weights = random_inputs()
    changed = [x.at[0, :, :, 3:].set(9.0) for x in (q, k, v, weights)]
    for before, after in zip(run(q, k, v, weights), run(*changed), strict=True):
        np.testing.assert_array_equal(before[0, :, :, :3], after[0, :, :, :3])
        np.testing.assert_array_equal(before[1:], after[1:])
        assert float(jnp.abs(before[0, :, :, 3:] - after[0, :, :, 3:]).max()) > 0.1


@pytest.mark.parametrize("with_dropout", [False, True])
def test_relative_scores_and_their_gradient_match_softmax(with_dropout: bool) -> None:
    keep, bias = random_keep_mask() if with_dropout else None, segment_bias(SEGMENTS)
    relative = jnp.asarray(np.random.default_rng(9).standard_normal((R, N, S, S)), jnp.float32)  # keys before queries
    q, k, v, weights = random_inputs()

    def ours(q: jax.Array, relative: jax.Array) -> jax.Array:
        return jnp.sum(weights * attend_at_once(q, k, v, bias, keep, RATE, relative))

    def reference(q: jax.Array, relative: jax.Array) -> jax.Array:
        return jnp.sum(weights * reference_attention(bias + relative, keep, RATE)(q, k, v))

    for actual, expected in zip(
        jax.tree.leaves(jax.value_and_grad(ours, argnums=(0, 1))(q, relative)),
        jax.tree.leaves(jax.value_and_grad(reference, argnums=(0, 1))(q, relative)),
        strict=True,
    ):
        assert float(jnp.abs(expected).max()) > 0.1
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_huge_scores_select_one_key_and_keep_gradients_finite(dtype: Any) -> None:
    """Scores of about ±10,000 overflow in exp unless the largest is subtracted first."""
    q, k, v, weights = random_inputs(scale=5e3, dtype=dtype)
    bias = segment_bias(SEGMENTS)
    scores = jnp.einsum("rndq,rndk->rnqk", *(x.astype(jnp.float32) for x in (q, k))) + bias
    assert float(jnp.max(scores)) > 1e4 > -1e4 > float(jnp.min(jnp.where(bias == 0, scores, 0)))
    results = with_gradients(attention(None, bias))(q, k, v, weights)
    assert all(bool(jnp.isfinite(x).all()) for x in results)
    for row in (0, 1):  # row 2 is padding
        best = jnp.argmax(scores[row], axis=-1)  # [N, S]
        picked = jnp.take_along_axis(v[row], best[:, None, :], axis=2)
        np.testing.assert_allclose(results[0][row].astype(jnp.float32), picked.astype(jnp.float32), atol=1e-2)


def test_fully_masked_row_stays_finite() -> None:
    """Adding -1e9 absorbs the scores, so that all keys get about the same probability."""
    q, k, v, weights = random_inputs()
    results = with_gradients(attention(None, jnp.full((R, 1, S, S), -1e9)))(q, k, v, weights)
    assert all(bool(jnp.isfinite(x).all()) for x in results)
    np.testing.assert_allclose(results[0], jnp.broadcast_to(v.mean(3, keepdims=True), v.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_dropout", [False, True])
def test_bfloat16_matches_float32_to_within_rounding(with_dropout: bool) -> None:
    """Round the inputs first, so that only the rounding inside attention differs."""
    keep, bias = random_keep_mask() if with_dropout else None, segment_bias(SEGMENTS)
    inputs = random_inputs(dtype=jnp.bfloat16)
    results = with_gradients(attention(keep, bias))(*inputs)
    assert [x.dtype for x in results] == [jnp.bfloat16] * 4
    expected = with_gradients(reference_attention(bias, keep, RATE))(*(x.astype(jnp.float32) for x in inputs))
    assert_close(results[:1], expected[:1], 2**-8)  # half a bfloat16 step is a relative 2**-9
    assert_close(results[1:], expected[1:], 2**-6)


def test_probabilities_sum_to_one_in_bfloat16() -> None:
    """A weighted mean of equal values is that value, although all exponentials but one are rounded down, by 0.35 %."""
    q = jnp.ones((1, 1, 2, 200), jnp.bfloat16)
    k = jnp.array([[-0.6875], [-0.00214]]) * (jnp.arange(200) > 0)  # exp(-0.68964) is 0.50176; a step is 1/256
    out = attend_at_once(q, k[None, None].astype(jnp.bfloat16), q, jnp.zeros((1, 1, 200, 200)), None, 0.0)
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


@pytest.mark.parametrize("with_dropout", [False, True])
def test_gradient_matches_finite_differences(with_dropout: bool) -> None:
    keep, bias = random_keep_mask() if with_dropout else None, segment_bias(SEGMENTS)
    function = jax.jit(lambda q, k, v: attend_at_once(q, k, v, bias, keep, RATE))
    check_grads(function, tuple(random_inputs()[:3]), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_rematerialisation_changes_nothing() -> None:
    plain = attention(random_keep_mask(), segment_bias(SEGMENTS))
    results = with_gradients(jax.checkpoint(plain))(*random_inputs())
    assert_close(results, with_gradients(plain)(*random_inputs()), 1e-6)


def test_rate_has_no_effect_without_a_mask() -> None:
    bias = segment_bias(SEGMENTS)
    for with_rate, without_rate in zip(
        with_gradients(attention(None, bias, RATE))(*random_inputs()),
        with_gradients(attention(None, bias, 0.0))(*random_inputs()),
        strict=True,
    ):
        np.testing.assert_array_equal(with_rate, without_rate)
