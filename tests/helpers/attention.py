"""Softmax attention as JAX differentiates it, and the comparison of attention functions with it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # q, k, v, each [R, N, D, S] -> [R, N, D, S]


def random_inputs(
    shape: tuple[int, int, int, int], seed: int = 0, scale: float = 1.0, dtype: Any = jnp.float32
) -> list[jax.Array]:
    """Return random queries, keys, values, and loss weights, each [R, N, D, S]."""
    arrays = np.random.default_rng(seed).standard_normal((4, *shape))
    arrays[0] *= scale
    return [jnp.asarray(x, dtype) for x in arrays]


def reference_attention(bias: jax.Array, keep: jax.Array | None, rate: float) -> Attention:
    """Return softmax attention with dropout by JAX's softmax, with queries before keys; see `attend_at_once`."""

    def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        probs = jax.nn.softmax(jnp.einsum("rndq,rndk->rnqk", q, k) + jnp.swapaxes(bias, 2, 3), axis=-1)
        if keep is not None:
            probs = probs * jnp.swapaxes(keep, 2, 3) / (1 - rate)
        return jnp.einsum("rnqk,rndk->rndq", probs, v)

    return attention


def with_gradients(attention: Attention, jit: Callable[..., Any] = jax.jit) -> Callable[..., list[jax.Array]]:
    """Return a compiled function: (q, k, v, weights) -> the output, and the gradients of q, k, and v."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
        out = attention(q, k, v)
        return jnp.sum((out * weights).astype(jnp.float32)), out

    def run(*arrays: jax.Array) -> list[jax.Array]:
        gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)
        return [out, *gradients]

    compiled: Callable[..., list[jax.Array]] = jit(run)
    return compiled


def assert_close(actual: list[jax.Array], expected: list[jax.Array], relative: float) -> None:
    """Compare arrays, with an absolute tolerance of `relative` times the largest expected value of each array."""
    for array, reference in zip(actual, expected, strict=True):
        reference = np.asarray(reference, np.float64)
        assert array.shape == reference.shape and np.isfinite(reference).all()
        np.testing.assert_allclose(
            np.asarray(array, np.float64), reference, rtol=0, atol=relative * np.abs(reference).max()
        )
