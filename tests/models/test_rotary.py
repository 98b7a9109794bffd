"""Rotary positions: constants by hand, and scores that depend on distances only."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from xtransfer.models.rotary import rotation


def test_pairs_of_coordinates_are_turned_by_their_own_speed() -> None:
    """With D = 4 and theta 100, pair 0 turns by 1 per position, and pair 1 by 1/10."""
    turn = rotation(jnp.array([[0, 3]]), 4, 100.0)
    x = jnp.asarray(np.array([[1.0, 0.0, 0.0, 2.0]]).T[None, None] * np.ones(2), jnp.float32)  # [1, 1, 4, 2]
    expected = [math.cos(3), -2 * math.sin(0.3), math.sin(3), 2 * math.cos(0.3)]
    np.testing.assert_allclose(turn(x)[0, 0, :, 0], [1, 0, 0, 2], atol=1e-7)
    np.testing.assert_allclose(turn(x)[0, 0, :, 1], expected, atol=1e-6)


def test_divisor_slows_every_pair() -> None:
    slow, fast = rotation(jnp.array([[6]]), 4, 100.0, divisor=3.0), rotation(jnp.array([[2]]), 4, 100.0)
    np.testing.assert_allclose(slow.cos, fast.cos, atol=1e-6)
    np.testing.assert_allclose(slow.sin, fast.sin, atol=1e-6)


def test_scores_depend_on_the_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 2, 6, 1)), jnp.float32) for _ in range(2))

    def score(query: int, key: int) -> np.ndarray:
        turned = [rotation(jnp.array([[position]]), 6, 50.0)(x) for x, position in ((q, query), (k, key))]
        return np.asarray(jnp.sum(turned[0] * turned[1], axis=2))

    np.testing.assert_allclose(score(7, 4), score(103, 100), atol=1e-4)
    assert np.abs(score(7, 4) - score(4, 7)).max() > 0.1


def test_dtype_stays_and_the_arithmetic_is_float32() -> None:
    x = jnp.ones((1, 1, 4, 1), jnp.bfloat16)
    turned = rotation(jnp.array([[4000]]), 4, 10_000.0)(x)
    assert turned.dtype == jnp.bfloat16
    expected = [math.cos(4000) - math.sin(4000), math.cos(40) - math.sin(40)]
    assert turned[0, 0, :2, 0].astype(jnp.float32).tolist() == pytest.approx(expected, abs=8e-3)
