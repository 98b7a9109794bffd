"""Attention for long rows, a block of queries at a time: its memory grows linearly with the length of a row.

Shapes: R rows, S tokens per row, N heads, D the width of a head, B queries in a block, n blocks in a row, W the keys
that a block is compared with: all S of them, or in local layers B and a window on each side.

A loop goes over the blocks of queries. It computes the [W, B] scores of a block with the arithmetic of
`attention_at_once`, in bfloat16 too, so the results differ in the order of additions at most. For the backward pass it
keeps q, k, v, the output, and two numbers per query: its largest score, and the reciprocal of the sum of its
exponentials. (The logarithm of the sum, which is usual, would give other rounded exponentials in bfloat16, and
probabilities that do not add up to one.) The backward pass computes the scores of each block again (Dao et al.,
"FlashAttention", 2022), and adds up the gradients of keys and values in float32.

All keys of a block are there at once, so no maximum has to be corrected later, and the dropout mask costs no more than
`keep_mask`. The largest array has W · B numbers per head. In a local layer, time is linear in S as well. A global layer
also computes the scores of padding and of other segments: where they are is only known when the loop runs.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xtransfer.models.attention_at_once import (
    exponentials,
    gradients,
    inverse_sum,
    largest_score,
    mixture,
    scores_of,
)
from xtransfer.models.dropout import DropoutKey, keep_mask_part
from xtransfer.models.rowwise import rowwise
from xtransfer.models.visibility import bias_between

BLOCK = 128  # queries: the lanes of a TPU's vectors


@partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def attend_in_blocks(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    dropout_key: DropoutKey | None,
    rate: float,
    window: int | None = None,
    block: int = BLOCK,
) -> jax.Array:
    """Return softmax attention within segments with dropout of its probabilities, [R, N, D, S].

    Args:
      query: [R, N, D, S], scaled already.
      key: [R, N, D, S].
      value: [R, N, D, S].
      segment_ids: [R, S] int32. Tokens of different segments do not see each other.
      dropout_key: the key of the mask, with its row numbers; None keeps all probabilities. The mask is `keep_mask` of
        the shape [R, N, S (keys), S (queries)], and does not depend on the blocks.
      rate: the share of probabilities that is dropped; the kept ones are divided by 1 − rate.
      window: the largest distance over which tokens see each other, in tokens; None is unlimited.
      block: B. It affects the order of additions only.
    """
    return _forward(query, key, value, segment_ids, dropout_key, rate, window, block)[0]


def _forward(q, k, v, segment_ids, dropout_key, rate, window, block):  # type: ignore[no-untyped-def]
    forward = rowwise(partial(_forward_of_rows, rate, window, block))
    out, largest, inverse = forward(q, k, v, segment_ids, dropout_key)
    return out, (q, k, v, segment_ids, dropout_key, out, largest, inverse)


def _forward_of_rows(rate, window, block, q, k, v, segment_ids, dropout_key):  # type: ignore[no-untyped-def]
    length = q.shape[-1]

    def step(_: None, inputs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        start, q_block, segments = inputs
        seen = _seen(start, segments, k, v, segment_ids, dropout_key, rate, window)
        scores = scores_of(q_block, seen.keys, seen.bias)  # [R, N, W, B]
        largest = largest_score(scores)  # [R, N, B]
        exps = exponentials(scores, largest, q.dtype)  # [R, N, W, B]
        inverse = inverse_sum(exps)  # [R, N, B]
        return None, (mixture(exps, inverse, seen.values, seen.keep, rate), largest, inverse)

    _, outputs = jax.lax.scan(step, None, (_starts(length, block), *_blocks(block, q, segment_ids)))
    return tuple(_joined(x, length) for x in outputs)


def _backward(rate, window, block, residuals, dout):  # type: ignore[no-untyped-def]
    backward = rowwise(partial(_backward_of_rows, rate, window, block))
    return *backward(*residuals, dout), None, None


def _backward_of_rows(rate, window, block, q, k, v, segment_ids, dropout_key, out, largest, inverse, dout):  # type: ignore[no-untyped-def]
    length = q.shape[-1]

    def step(totals: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, ...]) -> Any:
        start, q_block, segments, out_block, largest_block, inverse_block, dout_block = inputs
        seen = _seen(start, segments, k, v, segment_ids, dropout_key, rate, window)
        exps = exponentials(scores_of(q_block, seen.keys, seen.bias), largest_block, q.dtype)  # [R, N, W, B]
        dq, dk_part, dv_part, _ = gradients(
            q_block,
            seen.keys,
            seen.values,
            exps,
            inverse_block,
            out_block,
            seen.keep,
            rate,
            dout_block,
            jnp.float32,
        )
        dk, dv = totals
        totals = _with_part_added(dk, dk_part, seen.first), _with_part_added(dv, dv_part, seen.first)
        return totals, dq.astype(q.dtype)  # [R, N, D, B]

    zeros = jnp.zeros(k.shape, jnp.float32)
    blocks = _blocks(block, q, segment_ids, out, largest, inverse, dout)
    (dk, dv), dq = jax.lax.scan(step, (zeros, zeros), (_starts(length, block), *blocks))
    return _joined(dq, length), dk.astype(k.dtype), dv.astype(v.dtype)


attend_in_blocks.defvjp(_forward, _backward)


class _Seen(NamedTuple):
    """What a block of queries is compared with.

    Attributes:
      first: the position of the first of W consecutive keys.
      keys: [R, N, D, W].
      values: [R, N, D, W].
      bias: [R, 1, W, B] float32.
      keep: [R, N, W, B] bool, the probabilities that dropout keeps; None if all.
    """

    first: jax.Array
    keys: jax.Array
    values: jax.Array
    bias: jax.Array
    keep: jax.Array | None


def _seen(
    start: jax.Array,
    segments: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    dropout_key: DropoutKey | None,
    rate: float,
    window: int | None,
) -> _Seen:
    """Return the keys that queries from position `start` on, of these segments [R, B], may see."""
    (rows, heads, _, length), block = k.shape, segments.shape[1]
    width = length if window is None else min(length, block + 2 * window)
    first = jnp.clip(start - (window or 0), 0, length - width)
    key_segments, keys, values = (
        jax.lax.dynamic_slice_in_dim(x, first, width, axis=x.ndim - 1) for x in (segment_ids, k, v)
    )
    bias = bias_between((key_segments, first + jnp.arange(width)), (segments, start + jnp.arange(block)), window)
    shape = (rows, heads, length, length)
    keep = None if dropout_key is None else keep_mask_part(dropout_key, rate, shape, (first, start), (width, block))
    return _Seen(first, keys, values, bias, keep)


def _with_part_added(total: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    """Add part [R, N, D, W] to the tokens of total [R, N, D, S] from `first` on."""
    axis, width = total.ndim - 1, part.shape[-1]
    updated = jax.lax.dynamic_slice_in_dim(total, first, width, axis) + part
    return jax.lax.dynamic_update_slice_in_dim(total, updated, first, axis)


def _starts(length: int, block: int) -> jax.Array:
    """Return the position of the first query of each block, [n] int32."""
    return jnp.arange(0, length, block, dtype=jnp.int32)


def _blocks(block: int, *arrays: jax.Array) -> list[jax.Array]:
    """Divide the tokens of each array into blocks: [..., S] -> [n, ..., B], with zeros after the last token."""

    def divide(x: jax.Array) -> jax.Array:
        padding = -x.shape[-1] % block
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, block), -2, 0)

    return [divide(x) for x in arrays]


def _joined(blocks: jax.Array, length: int) -> jax.Array:
    """Undo `_blocks`: [n, ..., B] -> [..., S]."""
    x = jnp.moveaxis(blocks, 0, -2)
    return x.reshape(*x.shape[:-2], -1)[..., :length]
