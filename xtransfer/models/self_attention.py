"""Multi-head self-attention as a module: projections, attention within segments, and dropout.

Shapes: R rows, S tokens per row, H hidden size, N heads, G heads of keys and values, D the width of a head.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.models.attention import attend
from xtransfer.models.dropout import DropoutKey, at_site, dropout
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.layers import linear, tokens_at
from xtransfer.models.rotary import Rotation
from xtransfer.models.visibility import Visibility


class SelfAttention(nnx.Module):
    """Multi-head self-attention within segments, with an output projection, and dropout; without the residual.

    Args:
      config: H, N, and the dropout rate of the probabilities.
      kv_heads: G, the number of key and value heads, which divides N. Each serves N / G query heads (Ainslie et al.,
        "GQA", EMNLP 2023). None means N.
      head_size: D; None is H / N.
      use_bias: whether the projections have biases.
      output_rate: the dropout rate of the output.
      rngs: initializes the parameters.
      dtype: the compute dtype.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        kv_heads: int | None = None,
        head_size: int | None = None,
        use_bias: bool = True,
        output_rate: float = 0.0,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.float32,
    ):
        size = config.hidden_size
        self.num_heads, self.kv_heads = config.num_heads, kv_heads or config.num_heads
        self.head_size = head_size or size // self.num_heads
        inner, shared = self.num_heads * self.head_size, self.kv_heads * self.head_size
        self.query = linear(size, inner, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.key = linear(size, shared, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.value = linear(size, shared, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.output = linear(inner, size, use_bias=use_bias, rngs=rngs, dtype=dtype)
        self.attention_rate, self.output_rate = config.attention_dropout, output_rate

    def __call__(
        self,
        x: jax.Array,
        visibility: Visibility,
        key: DropoutKey | None,
        *,
        rotation: Rotation | None = None,
        positions: jax.Array | None = None,
    ) -> jax.Array:
        """Mix the tokens that see each other: x [R, S, H] -> [R, S, H], or [R, Q, H] at positions [R, Q] int32."""
        q, k, v = self.project(x, positions)  # [R, N, D, Q], [R, N, D, S], [R, N, D, S]
        if rotation is not None:
            q, k = rotation.at(positions)(q), rotation(k)
        q = q * (self.head_size**-0.5)  # [R, N, D, Q]: scaling q is cheaper than scaling the scores
        return self.mix(q, k, v, visibility if positions is None else visibility.of_queries(positions), key)

    def project(self, x: jax.Array, positions: jax.Array | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return queries, keys, and values of x [R, S, H], each [R, N, D, S], or queries at positions [R, Q] only."""
        rows, length, _ = x.shape
        queries = tokens_at(x, positions)  # [R, Q, H]
        q = self.query.to_columns(queries).reshape(rows, self.num_heads, self.head_size, -1)  # [R, N, D, Q]
        k = self.key.to_columns(x).reshape(rows, self.kv_heads, self.head_size, length)  # [R, G, D, S]
        v = self.value.to_columns(x).reshape(rows, self.kv_heads, self.head_size, length)  # [R, G, D, S]
        if self.kv_heads != self.num_heads:
            copies = self.num_heads // self.kv_heads
            k, v = jnp.repeat(k, copies, axis=1), jnp.repeat(v, copies, axis=1)  # [R, N, D, S]
        return q, k, v

    def mix(
        self,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        visibility: Visibility,
        key: DropoutKey | None,
        relative: jax.Array | None = None,
    ) -> jax.Array:
        """Attend and project back: q [R, N, D, Q] (scaled already), k, v -> [R, Q, H]; see `attention.attend`."""
        rows, heads, width, queries = q.shape
        mixed = attend(q, k, v, visibility, at_site(key, 0), self.attention_rate, relative)  # [R, N, D, Q]
        mixed = mixed.reshape(rows, heads * width, queries)  # [R, N · D, Q]
        return dropout(self.output.from_columns(mixed), self.output_rate, at_site(key, 1))  # [R, Q, H]
