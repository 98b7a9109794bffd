"""The choice of the way to compute attention: both give the same numbers, with the same dropout masks."""

import jax
import jax.numpy as jnp
import pytest

from tests.helpers.attention import assert_close, random_inputs, with_gradients
from tests.helpers.jaxprs import equations
from xtransfer.models.attention import attend
from xtransfer.models.dropout import DropoutKey
from xtransfer.models.visibility import LONGEST_AT_ONCE, Visibility

KEY, RATE = DropoutKey(jax.random.key(1)), 0.3
SHAPE = (2, 2, 4, LONGEST_AT_ONCE + 1)
SEGMENTS = jnp.asarray(jnp.arange(2 * SHAPE[3]).reshape(2, -1) // 190, jnp.int32)


@pytest.mark.parametrize("window", [None, 3])
def test_long_rows_have_the_results_of_attention_at_once(window: int | None) -> None:
    """Without row numbers in the key, rows are numbered from 0 in both."""
    in_blocks, at_once = (Visibility.of_segments(SEGMENTS, window, at_once=at_once) for at_once in (False, True))
    results = with_gradients(lambda q, k, v: attend(q, k, v, in_blocks, KEY, RATE))(*random_inputs(SHAPE))
    expected = with_gradients(lambda q, k, v: attend(q, k, v, at_once, KEY, RATE))(*random_inputs(SHAPE))
    assert_close(results, expected, 1e-5)


@pytest.mark.parametrize(("length", "loops"), [(LONGEST_AT_ONCE, 0), (LONGEST_AT_ONCE + 1, 1)])
def test_rows_of_up_to_512_tokens_are_computed_at_once(length: int, loops: int) -> None:
    def run(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return attend(x, x, x, Visibility.of_segments(segment_ids), None, 0.0)

    eqns = equations(run, jnp.zeros((1, 1, 2, length)), jnp.zeros((1, length), jnp.int32))
    assert sum(e.primitive.name == "scan" for e in eqns) == loops


def test_no_mask_is_drawn_without_a_rate() -> None:
    x, visibility = jnp.zeros(SHAPE), Visibility.of_segments(SEGMENTS)
    eqns = equations(lambda x: attend(x, x, x, visibility, KEY, 0.0), x)
    assert not any(e.primitive.name == "random_bits" for e in eqns)


def test_relative_scores_need_a_bias() -> None:
    x, relative = jnp.zeros(SHAPE), jnp.zeros((2, 2, SHAPE[3], SHAPE[3]))
    with pytest.raises(AssertionError, match="at_once=True"):
        attend(x, x, x, Visibility.of_segments(SEGMENTS), None, 0.0, relative)
