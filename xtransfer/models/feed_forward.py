"""The gated feed-forward network of recent encoders.

Shapes: R rows, S tokens per row, H hidden size, F feed-forward size.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.dropout import DropoutKey, dropout
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.layers import ACTIVATIONS, linear


class GatedFeedForward(nnx.Module):
    """The gated feed-forward network act(gate(x)) · up(x), projected back (Shazeer, "GLU Variants", 2020).

    Args:
      config: H, F, and the activation.
      use_bias: whether `gate` and `up` have biases.
      output_bias: whether `output` has one.
      rate: the dropout rate before `output`.
      rngs: initializes the parameters.
      dtype: the compute dtype.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        use_bias: bool,
        output_bias: bool,
        rate: float,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        size, inner = config.hidden_size, config.intermediate_size
        self.gate = linear(size, inner, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.up = linear(size, inner, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.output = linear(inner, size, use_bias=output_bias, rngs=rngs, dtype=dtype)
        self.act, self.rate = config.hidden_act, rate

    def __call__(self, x: jax.Array, key: DropoutKey | None) -> jax.Array:
        """Transform every token: [R, S, H] -> [R, S, H]."""
        wide = ACTIVATIONS[self.act](self.gate(x)) * self.up(x)  # [R, S, F]
        return self.output(dropout(wide, self.rate, key))  # [R, S, H]
