"""Every architecture computes its last layer at some positions only, with the values and gradients of all tokens."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xtransfer.models import encoder as encoders
from xtransfer.models import visibility
from xtransfer.models.architectures import ARCHITECTURES

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_heads": 2, "intermediate_size": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "modernbert": {"layer_types": ("full_attention", "sliding_attention"), "window": 4},
    "deberta": {"buckets": 4, "normalizes_distances": True, "convolution_size": 3},
    "eurobert": {"kv_heads": 1},
}
# Two segments and padding, and one segment.
SEGMENTS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0, 0], [1] * 10], np.int32)
POSITIONS = np.array([[5, 0, 0], [2, 9, 6]], np.int32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 8)), jnp.float32)


@pytest.mark.parametrize(
    ("num_layers", "longest_at_once", "block"), [(2, 512, 128), (2, 4, 128), (2, 4, 2), (1, 512, 128)]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_some_positions_have_the_values_and_gradients_of_all_tokens(
    name: str, num_layers: int, longest_at_once: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short rows, long rows with few or many positions, and a last layer that is also the first."""
    monkeypatch.setattr(visibility, "LONGEST_AT_ONCE", longest_at_once)
    monkeypatch.setattr(encoders, "BLOCK", block)
    config = ARCHITECTURES[name].config_class(
        **SIZES, num_layers=num_layers, max_positions=10, architecture=name, **SETTINGS.get(name, {})
    )
    graphdef, params = nnx.split(ARCHITECTURES[name](config, rngs=nnx.Rngs(0)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, params)  # so that attention has peaks
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 20, (2, 10)), jnp.int32)
    numbers = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32), (2, 10))

    def loss(params: nnx.State, *, everywhere: bool) -> tuple[jax.Array, jax.Array]:
        encoder = nnx.merge(graphdef, params)
        inputs = (ids, jnp.zeros_like(ids), numbers, jnp.asarray(SEGMENTS))
        if everywhere:
            states = encoder(*inputs)[np.arange(2)[:, None], POSITIONS]
        else:
            states = encoder(*inputs, positions=jnp.asarray(POSITIONS))
        return jnp.sum(states * WEIGHTS), states

    step = jax.jit(jax.grad(loss, has_aux=True), static_argnames="everywhere")
    (gradient, states), (expected_gradient, expected) = step(params, everywhere=False), step(params, everywhere=True)
    assert states.shape == (2, 3, 8) and float(jnp.std(expected[1], axis=0).min()) > 0.05
    np.testing.assert_allclose(states, expected, atol=1e-5)
    for actual, reference in zip(jax.tree.leaves(gradient), jax.tree.leaves(expected_gradient), strict=True):
        np.testing.assert_allclose(actual, reference, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(reference).max())))
