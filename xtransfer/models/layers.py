"""Layers that encoders are built from: activations, norms, embeddings, and linear layers.

Shapes: R rows, S tokens per row, H hidden size, E embedding size.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from xtransfer.runtime.sharding import BATCH_SPEC, LOOKUP_COLUMNS, LOOKUP_IDS, constrain


@jax.custom_vjp
def exact_gelu(x: jax.Array) -> jax.Array:
    """Return x · Φ(x), computed in float32; only x is kept for the backward pass.

    `jax.nn.gelu` uses erfc, which costs a TPU as much as the matrix product before it. erf does not.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    wide = x.astype(jnp.float32)
    # Keep the rounded array: otherwise the TPU compiler keeps the product's float32 one for the backward pass.
    return (wide * _normal_cdf(wide)).astype(x.dtype), jax.lax.optimization_barrier(x)


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    wide = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * wide * wide) * (1.0 / math.sqrt(2.0 * math.pi))
    return ((dy * (_normal_cdf(wide) + wide * density)).astype(x.dtype),)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5))


exact_gelu.defvjp(_gelu_forward, _gelu_backward)

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": exact_gelu,
    "gelu_python": exact_gelu,
    "gelu_fast": partial(jax.nn.gelu, approximate=True),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class LayerNorm(nnx.LayerNorm):
    """`nnx.LayerNorm` over the last axis, with a hand-written gradient that saves one read of its input."""

    def __call__(self, x: jax.Array) -> jax.Array:  # type: ignore[override]
        """Normalize [..., H] in the compute dtype; the statistics are float32."""
        assert self.scale is not None
        bias = jnp.zeros_like(self.scale[...]) if self.bias is None else self.bias[...]
        return _normalised(x.astype(self.dtype), self.scale[...], bias, self.epsilon)


class RMSNorm(nnx.RMSNorm):
    """Divide by the root mean square of the last axis, computed in float32 (Zhang and Sennrich, NeurIPS 2019)."""

    def __call__(self, x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        """Normalize [..., H] in the compute dtype."""
        assert self.scale is not None
        wide = x.astype(jnp.float32)
        normal = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.epsilon)
        return (self.scale[...] * normal).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normalised(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    return _norm_forward(x, scale, bias, epsilon)[0]


def _norm_forward(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> tuple[jax.Array, Any]:
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)  # [..., 1]
    if x.dtype == jnp.float32:  # E[x²] − E[x]² would cancel if a checkpoint has a large mean
        variance = jnp.mean(jnp.square(wide - mean), axis=-1, keepdims=True)
    else:  # the cancellation is smaller than the rounding error of x, and one pass suffices
        variance = jnp.maximum(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) - jnp.square(mean), 0.0)
    inverse = jax.lax.rsqrt(variance + epsilon)
    return ((wide - mean) * inverse * scale + bias).astype(x.dtype), (x, mean, inverse, scale)


def _norm_backward(epsilon: float, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, mean, inverse, scale = saved
    wide = dy.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    scaled = wide * scale
    along = jnp.mean(scaled * normal, axis=-1, keepdims=True)
    dx = inverse * (scaled - jnp.mean(scaled, axis=-1, keepdims=True) - normal * along)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(wide * normal, axis=rows), jnp.sum(wide, axis=rows)


_normalised.defvjp(_norm_forward, _norm_backward)


class Embed(nnx.Embed):
    """`nnx.Embed` that rounds the vectors after the look-up; `nnx.Embed` rounds the whole table first."""

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Look up ids: [...] int32 -> [..., features]."""
        return jnp.take(self.embedding[...], inputs, axis=0).astype(self.dtype)


class Linear(nnx.Linear):
    """`nnx.Linear` on one matrix of all tokens: XLA's CPU backend computes its gradient several times faster.

    With an attribute `adapter` (see `models.adapter`), its output is added.
    """

    adapter: Any

    def __call__(self, inputs: jax.Array, out_sharding: Any = None) -> jax.Array:
        """Apply the layer: [..., in_features] -> [..., out_features]."""
        tokens = inputs.reshape(-1, self.in_features)
        flat = super().__call__(tokens, out_sharding)
        if hasattr(self, "adapter"):
            flat = flat + self.adapter(tokens)
        return flat.reshape(*inputs.shape[:-1], self.out_features)

    def to_columns(self, inputs: jax.Array) -> jax.Array:
        """Map [R, S, in_features] -> [R, out_features, S]: tokens are columns, so that S fills a TPU's lanes."""
        columns = jnp.einsum("rsh,hk->rks", inputs, self.kernel[...].astype(self.dtype))
        if hasattr(self, "adapter"):
            columns = columns + self.adapter.to_columns(inputs)
        return columns if self.bias is None else columns + self.bias[...].astype(self.dtype)[:, None]

    def from_columns(self, inputs: jax.Array) -> jax.Array:
        """Map [R, in_features, S] -> [R, S, out_features]."""
        rows = jnp.einsum("rhs,hk->rsk", inputs, self.kernel[...].astype(self.dtype))
        if hasattr(self, "adapter"):
            rows = rows + self.adapter.from_columns(inputs)
        return rows if self.bias is None else rows + self.bias[...].astype(self.dtype)


def tokens_at(x: jax.Array, positions: jax.Array | None) -> jax.Array:
    """Return x [R, S, H] at positions [R, Q] as [R, Q, H], or x itself if positions is None."""
    return x if positions is None else jnp.take_along_axis(x, positions[:, :, None], axis=1)


NORMAL = nnx.initializers.normal(0.02)


def linear(
    inputs: int, outputs: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32, use_bias: bool = True
) -> Linear:
    """Return a linear layer with BERT's initialization."""
    return Linear(inputs, outputs, use_bias=use_bias, kernel_init=NORMAL, dtype=dtype, rngs=rngs)


def embed(rows: int, features: int, *, rngs: nnx.Rngs, dtype: DTypeLike = jnp.float32) -> Embed:
    """Return an embedding table with BERT's initialization."""
    return Embed(rows, features, embedding_init=NORMAL, dtype=dtype, rngs=rngs)


def look_up(*tables: tuple[Embed, jax.Array]) -> jax.Array:
    """Return the sum of vectors [R, S, E] from pairs of a table and ids [R, S] int32, laid out by rows."""
    ids = [constrain(ids, LOOKUP_IDS) for _, ids in tables]
    vectors = [table(index) for (table, _), index in zip(tables, ids, strict=True)]
    return constrain(sum(vectors[1:], vectors[0]), LOOKUP_COLUMNS, BATCH_SPEC)  # [R, S, E]
