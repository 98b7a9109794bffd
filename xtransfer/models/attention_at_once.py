"""Attention that computes all scores of a row at once, with a hand-written gradient: for short rows or few queries.

Shapes: R rows, S tokens per row, N heads, D the width of a head; k counts keys and q queries, K and Q in all. All S
tokens are keys. They are all queries too, unless the last layer computes only the tokens that the head reads.

The forward pass keeps exp(score − max) in the compute dtype and the reciprocals of its sums, and no float32 array of
S × S numbers. The backward pass needs no second softmax, because the sum over keys of p · dp equals the sum over D of
o · do (Dao et al., "FlashAttention", 2022, appendix B). Keys come before queries, so that sums over keys add whole
vectors. The sum is taken over the rounded numbers, so probabilities add up to one in bfloat16 too.

The arithmetic below `attend_at_once` takes any keys and queries, and `attention_in_blocks` shares it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xtransfer.models.rowwise import rowwise


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend_at_once(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    keep: jax.Array | None,
    rate: float,
    relative: jax.Array | None = None,
) -> jax.Array:
    """Return softmax attention with dropout of its probabilities, [R, N, D, Q].

    Args:
      query: [R, N, D, Q], scaled already.
      key: [R, N, D, S].
      value: [R, N, D, S].
      bias: [R, 1, S (keys), Q] float32, added to the scores. It has no gradient.
      keep: [R, N, S (keys), Q] bool, the probabilities that are kept; None keeps all.
      rate: the share of probabilities that is dropped; the kept ones are divided by 1 − rate.
      relative: [R, N, S (keys), Q], further scores, which have a gradient; None adds none.
    """
    return _forward(query, key, value, bias, keep, rate, relative)[0]


def _forward(q, k, v, bias, keep, rate, relative=None):  # type: ignore[no-untyped-def]
    out, saved = rowwise(partial(_forward_of_rows, rate))(q, k, v, bias, keep, relative)
    return out, (saved, None if relative is None else jnp.zeros((0,), relative.dtype))


def _forward_of_rows(rate, q, k, v, bias, keep, relative):  # type: ignore[no-untyped-def]
    scores = scores_of(q, k, bias)  # [R, N, S, Q]
    if relative is not None:
        scores = scores + relative  # [R, N, S, Q]
    exps = exponentials(scores, largest_score(scores), q.dtype)  # [R, N, S, Q]
    inverse = inverse_sum(exps)  # [R, N, Q]
    # Keep the rounded array: otherwise the compiler keeps the float32 one for the backward pass.
    out = jax.lax.optimization_barrier(mixture(exps, inverse, v, keep, rate))  # [R, N, D, Q]
    return out, (q, k, v, exps, inverse, out, keep)


def _backward(rate, residuals, dout):  # type: ignore[no-untyped-def]
    saved, relative = residuals
    dq, dk, dv, dscores = rowwise(partial(_backward_of_rows, rate))(saved, dout)
    return dq, dk, dv, None, None, None if relative is None else dscores.astype(relative.dtype)


def _backward_of_rows(rate, saved, dout):  # type: ignore[no-untyped-def]
    q, k, v, exps, inverse, out, keep = saved
    return gradients(q, k, v, exps, inverse, out, keep, rate, dout)


attend_at_once.defvjp(_forward, _backward)


def scores_of(q: jax.Array, k: jax.Array, bias: jax.Array) -> jax.Array:
    """Return the scores of queries [R, N, D, Q] and keys [R, N, D, K] plus a bias, [R, N, K, Q] float32."""
    return jnp.einsum("rndq,rndk->rnkq", q, k, preferred_element_type=jnp.float32) + bias


def largest_score(scores: jax.Array) -> jax.Array:
    """Return each query's largest score: [R, N, K, Q] -> [R, N, Q] float32."""
    return jnp.max(scores, axis=2)


def exponentials(scores: jax.Array, largest: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return exp(score − largest) of scores [R, N, K, Q] and largest [R, N, Q], [R, N, K, Q] in the compute dtype."""
    return jnp.exp(scores - largest[:, :, None]).astype(dtype)


def inverse_sum(exps: jax.Array) -> jax.Array:
    """Return the reciprocal of each query's sum: [R, N, K, Q] -> [R, N, Q] float32."""
    return 1.0 / jnp.sum(exps, axis=2, dtype=jnp.float32)


def mixture(exps: jax.Array, inverse: jax.Array, v: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """Return the values [R, N, D, K] mixed by the probabilities exps · inverse, [R, N, D, Q] in the compute dtype."""
    mixed = jnp.einsum("rnkq,rndk->rndq", _kept(exps, keep), v, preferred_element_type=jnp.float32)  # [R, N, D, Q]
    return (mixed * _per_query(inverse, keep, rate)).astype(exps.dtype)


def gradients(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    exps: jax.Array,
    inverse: jax.Array,
    out: jax.Array,
    keep: jax.Array | None,
    rate: float,
    dout: jax.Array,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Return the gradients of queries [R, N, D, Q], keys and values [R, N, D, K], and scores [R, N, K, Q].

    Args:
      q, k, v: the inputs of the forward pass.
      exps, inverse, out: its `exponentials`, `inverse_sum`, and `mixture`.
      keep: [R, N, K, Q] bool, the probabilities that dropout kept; None if all.
      rate: the dropout rate.
      dout: the gradient of `out`, [R, N, D, Q].
      dtype: the dtype of the first three results; None is the compute dtype.
    """
    # The sum over keys of p · dp, which dropout does not change: [R, N, Q].
    shift = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=2)
    dprobs = jnp.einsum("rndk,rndq->rnkq", v, dout, preferred_element_type=jnp.float32)  # [R, N, K, Q]
    if keep is not None:
        dprobs = jnp.where(keep, dprobs * (1.0 / (1.0 - rate)), 0.0)
    dscores = (exps * inverse[:, :, None] * (dprobs - shift[:, :, None])).astype(q.dtype)  # [R, N, K, Q]
    scaled = (dout * _per_query(inverse, keep, rate)).astype(q.dtype)  # [R, N, D, Q]
    dq = jnp.einsum("rnkq,rndk->rndq", dscores, k, preferred_element_type=dtype)  # [R, N, D, Q]
    dk = jnp.einsum("rnkq,rndq->rndk", dscores, q, preferred_element_type=dtype)  # [R, N, D, K]
    dv = jnp.einsum("rnkq,rndq->rndk", _kept(exps, keep), scaled, preferred_element_type=dtype)  # [R, N, D, K]
    return dq, dk, dv, dscores


def _kept(exps: jax.Array, keep: jax.Array | None) -> jax.Array:
    return exps if keep is None else jnp.where(keep, exps, jnp.zeros((), exps.dtype))


def _per_query(inverse: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """Return the factor of each query's mixture: [R, N, Q] -> [R, N, 1, Q]."""
    scale = inverse if keep is None else inverse * (1.0 / (1.0 - rate))
    return scale[:, :, None]
