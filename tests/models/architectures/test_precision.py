"""Every architecture in bfloat16: the dtypes of matrix products, of softmax, and of the statistics of norms."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.helpers.jaxprs import equations, float_types
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.encoder import Encoder

SIZES = {"vocab_size": 20, "hidden_size": 8, "num_layers": 2, "num_heads": 2, "intermediate_size": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "modernbert": {"layer_types": ("full_attention", "sliding_attention")},
    "deberta": {"buckets": 4, "normalizes_distances": True, "convolution_size": 3, "embedding_size": 4},
    "eurobert": {"kv_heads": 1},
}


def encoder(name: str) -> Encoder:
    config = ARCHITECTURES[name].config_class(**SIZES, max_positions=8, architecture=name, **SETTINGS.get(name, {}))
    return ARCHITECTURES[name](config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_products_are_bfloat16_and_statistics_are_float32(name: str) -> None:
    graphdef, params = nnx.split(nnx.eval_shape(lambda: encoder(name)), nnx.Param)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}
    ids = jax.ShapeDtypeStruct((2, 6), jnp.int32)

    def states(params: nnx.State, ids: jax.Array) -> list[jax.Array]:
        return nnx.merge(graphdef, params).hidden_states(ids, ids, ids, ids)

    assert {(state.shape, str(state.dtype)) for state in jax.eval_shape(states, params, ids)} == {
        ((2, 6, 8), "bfloat16")
    }
    eqns = equations(states, params, ids)
    products = {tuple(float_types([e], "dot_general")) for e in eqns if e.primitive.name == "dot_general"}
    # The scores, and the weighted values before they are divided by their sums, are accumulated in float32.
    assert products == {("bfloat16",) * 3, ("bfloat16", "bfloat16", "float32")}
    for primitive in ("exp", "rsqrt", "square", "cos", "sin", "reduce_max", "reduce_sum"):
        assert set(float_types(eqns, primitive)) <= {"float32"}, primitive
