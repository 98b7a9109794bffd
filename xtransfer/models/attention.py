"""Attention within segments, with a hand-written gradient.

Shapes: R rows, S tokens per row, N heads, D the width of a head; k counts keys and q queries.

The forward pass keeps exp(score − max) in the compute dtype and the reciprocals of its sums, and no float32 array of
S × S numbers. The backward pass needs no second softmax, because the sum over keys of p · dp equals the sum over D of
o · do (Dao et al., "FlashAttention", 2022, appendix B). Keys come before queries, so that sums over keys add whole
vectors. The sum is taken over the rounded numbers, so probabilities add up to one in bfloat16 too.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from xtransfer.models.dropout import DropoutKey, keep_mask

MASKED = -1e9  # added to a float32 score: exp gives exactly 0, and a row that is masked entirely stays finite


def segment_bias(segment_ids: jax.Array, window: int | None = None) -> jax.Array:
    """Return the bias of the scores, [R, 1, S, S] float32: 0 between tokens that see each other, `MASKED` elsewhere.

    Args:
      segment_ids: [R, S] int32. Tokens of different segments do not see each other.
      window: the largest distance over which tokens see each other, in tokens; None is unlimited.
    """
    seen = segment_ids[:, None, :, None] == segment_ids[:, None, None, :]  # [R, 1, S, S]
    if window is not None:
        position = jnp.arange(segment_ids.shape[1])
        seen &= jnp.abs(position[:, None] - position[None, :]) <= window  # [R, 1, S, S]
    return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)


def kept_probabilities(key: DropoutKey | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Return the probabilities that dropout keeps, [R, N, S, S] bool, for `attend`; None if it keeps all."""
    if key is None or rate == 0.0:
        return None
    row_index = jnp.arange(shape[0], dtype=jnp.int32) if key.rows is None else key.rows

    def mask(rows: jax.Array, key_: jax.Array) -> jax.Array:
        drawn = keep_mask(DropoutKey(key_, rows), rate, (len(rows), *shape[1:]))
        assert drawn is not None  # there is a key, and the rate is not 0
        return drawn

    return rowwise(mask)(row_index, key.key)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array,
    keep: jax.Array | None,
    rate: float,
    relative: jax.Array | None = None,
) -> jax.Array:
    """Return softmax attention with dropout of its probabilities, [R, N, D, S].

    Args:
      query: [R, N, D, S], scaled already.
      key: [R, N, D, S].
      value: [R, N, D, S].
      bias: [R, 1, S, S] float32, added to the scores. It is symmetric in its last two axes and has no gradient.
      keep: [R, N, S (keys), S (queries)] bool, the probabilities that are kept; None keeps all.
      rate: the share of probabilities that is dropped; the kept ones are divided by 1 − rate.
      relative: [R, N, S (keys), S (queries)], further scores, which have a gradient; None adds none.
    """
    return _forward(query, key, value, bias, keep, rate, relative)[0]


def _forward(q, k, v, bias, keep, rate, relative=None):  # type: ignore[no-untyped-def]
    out, saved = rowwise(partial(_forward_of_rows, rate))(q, k, v, bias, keep, relative)
    return out, (saved, None if relative is None else jnp.zeros((0,), relative.dtype))


def _forward_of_rows(rate, q, k, v, bias, keep, relative):  # type: ignore[no-untyped-def]
    scores = jnp.einsum("rndq,rndk->rnkq", q, k, preferred_element_type=jnp.float32) + bias  # [R, N, S, S]
    if relative is not None:
        scores = scores + relative  # [R, N, S, S]
    exps = jnp.exp(scores - jnp.max(scores, axis=2, keepdims=True)).astype(q.dtype)  # [R, N, S, S]
    inverse = 1.0 / jnp.sum(exps, axis=2, dtype=jnp.float32)  # [R, N, S]
    mixed = jnp.einsum("rnkq,rndk->rndq", _kept(exps, keep), v, preferred_element_type=jnp.float32)  # [R, N, D, S]
    # Keep the rounded array: otherwise the compiler keeps the float32 one for the backward pass.
    out = jax.lax.optimization_barrier((mixed * _per_query(inverse, keep, rate)).astype(q.dtype))  # [R, N, D, S]
    return out, (q, k, v, exps, inverse, out, keep)


def _backward(rate, residuals, dout):  # type: ignore[no-untyped-def]
    saved, relative = residuals
    dq, dk, dv, dscores = rowwise(partial(_backward_of_rows, rate))(saved, dout)
    return dq, dk, dv, None, None, None if relative is None else dscores.astype(relative.dtype)


def _backward_of_rows(rate, saved, dout):  # type: ignore[no-untyped-def]
    q, k, v, exps, inverse, out, keep = saved
    # The sum over keys of p · dp, which dropout does not change: [R, N, S].
    shift = jnp.sum(dout.astype(jnp.float32) * out.astype(jnp.float32), axis=2)
    dprobs = jnp.einsum("rndk,rndq->rnkq", v, dout, preferred_element_type=jnp.float32)  # [R, N, S, S]
    if keep is not None:
        dprobs = jnp.where(keep, dprobs * (1.0 / (1.0 - rate)), 0.0)
    dscores = (exps * inverse[:, :, None] * (dprobs - shift[:, :, None])).astype(q.dtype)  # [R, N, S, S]
    scaled = (dout * _per_query(inverse, keep, rate)).astype(q.dtype)  # [R, N, D, S]
    dq = jnp.einsum("rnkq,rndk->rndq", dscores, k)  # [R, N, D, S]
    dk = jnp.einsum("rnkq,rndq->rndk", dscores, q)  # [R, N, D, S]
    dv = jnp.einsum("rnkq,rndq->rndk", _kept(exps, keep), scaled)  # [R, N, D, S]
    return dq, dk, dv, dscores


attend.defvjp(_forward, _backward)


def _kept(exps: jax.Array, keep: jax.Array | None) -> jax.Array:
    return exps if keep is None else jnp.where(keep, exps, jnp.zeros((), exps.dtype))


def _per_query(inverse: jax.Array, keep: jax.Array | None, rate: float) -> jax.Array:
    """Return the factor of each query's mixture: [R, N, S] -> [R, N, 1, S]."""
    scale = inverse if keep is None else inverse * (1.0 / (1.0 - rate))
    return scale[:, :, None]


def rowwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which treats each row alike, with a `jax.vmap` rule that merges the rows.

    Under `jax.vmap`, JAX would give every array one more axis, and XLA would find less to fuse. Here the rows of the
    mapped axis are put one after the other instead. Arguments that are not mapped must be scalars.

    Args:
      function: maps trees of arrays [R, ...] to a tree of arrays [R, ...].
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _merged(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        for leaf, batched in zip(jax.tree.leaves(arguments), jax.tree.leaves(tuple(in_batched)), strict=True):
            assert batched or leaf.ndim == 0, "an argument of rowwise that is not mapped must be a scalar"
        merged = jax.tree.map(
            lambda x, batched: x.reshape(-1, *x.shape[2:]) if batched else x, arguments, tuple(in_batched)
        )
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), mapped(*merged))
        return out, jax.tree.map(lambda _: True, out)

    return mapped
