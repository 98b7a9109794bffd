"""Who sees whom: segments, windows, and which rows get a bias."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtransfer.models.visibility import LONGEST_AT_ONCE, Visibility, bias_between, segment_bias


def test_bias_is_zero_within_a_segment_and_masks_other_segments() -> None:
    bias = segment_bias(jnp.array([[1, 1, 2, 0]]))
    inside = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    assert bias.shape == (1, 1, 4, 4) and bias.dtype == jnp.float32
    np.testing.assert_array_equal(bias[0, 0] == 0, inside)
    assert float(jnp.exp(bias[0, 0][~inside] + 1e4).max()) == 0


def test_window_masks_tokens_that_are_too_far_apart() -> None:
    bias = segment_bias(jnp.array([[1, 1, 1, 1, 2]]), window=1)
    inside = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]], bool)
    np.testing.assert_array_equal(bias[0, 0] == 0, inside)


def test_bias_between_some_keys_and_queries_is_a_part_of_the_whole() -> None:
    segment_ids = jnp.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 3, 3]])
    for window in (None, 2):
        keys, queries = ((segment_ids[:, part], jnp.arange(8)[part]) for part in (slice(1, 6), slice(3, 7)))
        part = bias_between(keys, queries, window)
        np.testing.assert_array_equal(part, segment_bias(segment_ids, window)[:, :, 1:6, 3:7])
        assert len(np.unique(part)) == 2


@pytest.mark.parametrize("window", [None, 3])
def test_only_short_rows_have_a_bias_unless_it_is_needed(window: int | None) -> None:
    assert LONGEST_AT_ONCE == 512
    short, long = jnp.ones((2, 512), jnp.int32), jnp.ones((2, 513), jnp.int32)
    assert Visibility.of_segments(long, window).bias is None
    for segment_ids, at_once in ((short, False), (long, True)):
        visibility = Visibility.of_segments(segment_ids, window, at_once=at_once)
        assert visibility.segment_ids is segment_ids and visibility.window == window
        np.testing.assert_array_equal(visibility.bias, segment_bias(segment_ids, window))


def test_window_stays_an_integer_where_arrays_are_traced() -> None:
    visibility = Visibility.of_segments(jnp.ones((1, 600), jnp.int32), 3)
    assert jax.jit(lambda v: jnp.zeros(v.window))(visibility).shape == (3,)
    assert len(jax.tree.leaves(visibility)) == 1
