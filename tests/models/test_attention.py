"""Attention with its written-out gradient, against softmax and einsum differentiated by JAX."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from xtransfer.models.attention import attend, segment_bias

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
R, N, D, S = 3, 2, 4, 6
RATE = 0.25
# Two segments and padding, one segment, and a row of padding.
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
Function = Callable[..., jax.Array]


def numbers(seed: int = 0, scale: float = 1.0, dtype: Any = jnp.float32) -> list[jax.Array]:
    """Query, key, value and the weights of a loss, each [R, N, D, S]."""
    drawn = np.random.default_rng(seed).standard_normal((4, R, N, D, S))
    drawn[0] *= scale
    return [jnp.asarray(x, dtype) for x in drawn]


def some_kept(seed: int = 0) -> jax.Array:
    """[R, N, S, S]; nothing at all is kept of one query."""
    keep = np.random.default_rng(seed).random((R, N, S, S)) >= RATE
    keep[0, 0, :, 1] = False
    return jnp.asarray(keep)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, bias: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """The same, queries before keys."""
    probs = jax.nn.softmax(jnp.einsum("rndq,rndk->rnqk", q, k) + bias, axis=-1)
    if keep is not None:
        probs = probs * jnp.swapaxes(keep, 2, 3) / (1 - rate)
    return jnp.einsum("rnqk,rndk->rndq", probs, v)


def with_gradients(attention: Function, keep: jax.Array | None, bias: jax.Array, rate: float = RATE) -> Any:
    """Compiled: (q, k, v, weights) -> the output and the gradients of q, k and v."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v, bias, keep, rate)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    def run(*arrays: jax.Array) -> list[jax.Array]:
        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return [out, *gradients]

    return quick_jit(run)


def assert_close(found: list[jax.Array], wanted: list[jax.Array], relative: float) -> None:
    """To this share of the largest number of each array."""
    for one, other in zip(found, wanted, strict=True):
        other = np.asarray(other, np.float64)
        assert one.shape == (R, N, D, S) and np.isfinite(other).all()
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=relative * np.abs(other).max())


@pytest.mark.parametrize("dropping", [False, True])
def test_outputs_and_gradients_are_those_of_softmax(dropping: bool) -> None:
    keep, bias = some_kept() if dropping else None, segment_bias(SEGMENTS)
    found = with_gradients(attend, keep, bias)(*numbers())
    assert_close(found, with_gradients(plain, keep, bias)(*numbers()), 1e-5)
    assert all(float(jnp.abs(x).max()) > 0.1 for x in found)
    if dropping:
        np.testing.assert_array_equal(found[0][0, 0, :, 1], 0)  # of which nothing is kept


def test_nothing_comes_from_another_segment() -> None:
    """Other numbers in a segment leave output and gradients of the other as they are, to the bit."""
    run = with_gradients(attend, some_kept(), segment_bias(SEGMENTS))
    q, k, v, weights = numbers()
    changed = [x.at[0, :, :, 3:].set(9.0) for x in (q, k, v, weights)]
    for one, other in zip(run(q, k, v, weights), run(*changed), strict=True):
        np.testing.assert_array_equal(one[0, :, :, :3], other[0, :, :, :3])
        np.testing.assert_array_equal(one[1:], other[1:])
        assert float(jnp.abs(one[0, :, :, 3:] - other[0, :, :, 3:]).max()) > 0.1


def test_the_bias_is_nothing_inside_a_segment_and_no_probability_between_two() -> None:
    bias = segment_bias(jnp.array([[1, 1, 2, 0]]))
    inside = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    assert bias.shape == (1, 1, 4, 4) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[0, 0] == 0, inside)
    assert float(jnp.exp(bias[0, 0][~inside] + 1e4).max()) == 0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_huge_scores_leave_one_key_and_finite_gradients(dtype: Any) -> None:
    """Scores about ±10,000, whose exponentials overflow unless the largest is taken off first."""
    q, k, v, weights = numbers(scale=5e3, dtype=dtype)
    bias = segment_bias(SEGMENTS)
    scores = jnp.einsum("rndq,rndk->rnqk", *(x.astype(jnp.float32) for x in (q, k))) + bias
    assert float(jnp.max(scores)) > 1e4 > -1e4 > float(jnp.min(jnp.where(bias == 0, scores, 0)))
    found = with_gradients(attend, None, bias)(q, k, v, weights)
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    for row in (0, 1):  # in the row of padding scores tie within the steps of float32 only by their own numbers
        best = jnp.argmax(scores[row], axis=-1)  # [N, S]
        picked = jnp.take_along_axis(v[row], best[:, None, :], axis=2)
        np.testing.assert_allclose(found[0][row].astype(jnp.float32), picked.astype(jnp.float32), atol=1e-2)


def test_a_row_with_every_score_masked_is_finite() -> None:
    """As -1e9 swallows the scores, all keys count about as much."""
    q, k, v, weights = numbers()
    found = with_gradients(attend, None, jnp.full((R, 1, S, S), -1e9))(q, k, v, weights)
    assert all(bool(jnp.isfinite(x).all()) for x in found)
    np.testing.assert_allclose(found[0], jnp.broadcast_to(v.mean(3, keepdims=True), v.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dropping", [False, True])
def test_bfloat16_is_within_its_rounding_of_float32(dropping: bool) -> None:
    """Inputs are rounded first, so that what differs is what attention rounds itself."""
    keep, bias = some_kept() if dropping else None, segment_bias(SEGMENTS)
    coarse = numbers(dtype=jnp.bfloat16)
    found = with_gradients(attend, keep, bias)(*coarse)
    assert [x.dtype for x in found] == [jnp.bfloat16] * 4
    wanted = with_gradients(plain, keep, bias)(*(x.astype(jnp.float32) for x in coarse))
    assert_close(found[:1], wanted[:1], 2**-8)  # half a step of bfloat16 is 2**-9 of a number
    assert_close(found[1:], wanted[1:], 2**-6)


def test_probabilities_add_up_to_one_in_bfloat16() -> None:
    """What is mixed of equal values is that value, though all exponentials but one are rounded down, by 0.35 %."""
    q = jnp.ones((1, 1, 2, 200), jnp.bfloat16)
    k = jnp.array([[-0.6875], [-0.00214]]) * (jnp.arange(200) > 0)  # exp(-0.68964) is 0.50176, of steps of 1/256
    out = attend(q, k[None, None].astype(jnp.bfloat16), q, jnp.zeros((1, 1, 200, 200)), None, 0.0)
    np.testing.assert_array_equal(out.astype(jnp.float32), 1.0)


@pytest.mark.parametrize("dropping", [False, True])
def test_the_gradient_is_that_of_finite_differences(dropping: bool) -> None:
    keep, bias = some_kept() if dropping else None, segment_bias(SEGMENTS)
    function = jax.jit(lambda q, k, v: attend(q, k, v, bias, keep, RATE))
    check_grads(function, tuple(numbers()[:3]), order=1, modes=["rev"], atol=2e-2, rtol=2e-2, eps=1e-2)


def test_computing_it_again_for_the_gradient_changes_nothing() -> None:
    keep, bias = some_kept(), segment_bias(SEGMENTS)

    def again(q: jax.Array, k: jax.Array, v: jax.Array, *rest: Any) -> jax.Array:
        return jax.checkpoint(lambda *qkv: attend(*qkv, *rest))(q, k, v)

    assert_close(with_gradients(again, keep, bias)(*numbers()), with_gradients(attend, keep, bias)(*numbers()), 1e-6)


def test_without_a_mask_the_rate_does_nothing() -> None:
    bias = segment_bias(SEGMENTS)
    for one, other in zip(
        with_gradients(attend, None, bias, RATE)(*numbers()),
        with_gradients(attend, None, bias, 0.0)(*numbers()),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
