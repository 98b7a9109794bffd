"""Attention a block of queries at a time: equal to softmax, isolated between segments, linear, and portable."""

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.helpers import attention as helpers
from tests.helpers.attention import Attention, assert_close, reference_attention, with_gradients
from tests.helpers.jaxprs import equations
from xtransfer.models.attention_at_once import attend_at_once
from xtransfer.models.attention_in_blocks import BLOCK, attend_in_blocks
from xtransfer.models.dropout import DropoutKey, keep_mask
from xtransfer.models.visibility import segment_bias
from xtransfer.runtime.sharding import BATCH_SPEC, make_mesh

R, N, D, S = 3, 2, 4, 601  # a last block of 89 tokens
RATE, WINDOW = 0.25, 64
FIRST, SECOND = 300, 251  # tokens of the segments of row 0: the second one begins within a block
KEY = DropoutKey(jax.random.key(7), jnp.array([4, 0, 9]))
KINDS = pytest.mark.parametrize(
    ("window", "dropout"),
    [(None, False), (None, True), (WINDOW, False), (WINDOW, True)],
    ids=["global", "global-dropout", "local", "local-dropout"],
)

random_inputs = partial(helpers.random_inputs, (R, N, D, S))


def segments() -> jax.Array:
    """Return two segments and padding, one segment, and a row of padding, [R, S] int32."""
    ids = np.zeros((R, S), np.int32)
    ids[0, :FIRST], ids[0, FIRST : FIRST + SECOND], ids[1] = 1, 2, 1
    return jnp.asarray(ids)


def attention(window: int | None, dropout: bool, block: int = BLOCK) -> Attention:
    key = KEY if dropout else None
    return lambda q, k, v: attend_in_blocks(q, k, v, segments(), key, RATE, window, block)


def reference(window: int | None, dropout: bool) -> Attention:
    keep = keep_mask(KEY if dropout else None, RATE, (R, N, S, S))
    return reference_attention(segment_bias(segments(), window), keep, RATE)


@cache
def compiled(window: int | None, dropout: bool) -> Callable[..., list[jax.Array]]:
    return with_gradients(attention(window, dropout))


@KINDS
def test_outputs_and_gradients_match_softmax(window: int | None, dropout: bool) -> None:
    """The dropout mask is the one of attention at once, too."""
    results = compiled(window, dropout)(*random_inputs())
    assert_close(results, with_gradients(reference(window, dropout))(*random_inputs()), 1e-5)
    assert all(float(jnp.abs(x[row]).max()) > 0.1 for x in results for row in range(R))


@KINDS
def test_bfloat16_matches_float32_to_within_rounding(window: int | None, dropout: bool) -> None:
    """Round the inputs first, so that only the rounding inside attention differs."""
    inputs = random_inputs(dtype=jnp.bfloat16)
    results = compiled(window, dropout)(*inputs)
    assert [x.dtype for x in results] == [jnp.bfloat16] * 4
    expected = with_gradients(reference(window, dropout))(*(x.astype(jnp.float32) for x in inputs))
    assert_close(results[:1], expected[:1], 2**-8)  # half a bfloat16 step is a relative 2**-9
    assert_close(results[1:], expected[1:], 2**-6)


def test_bfloat16_is_rounded_as_in_attention_at_once() -> None:
    """Both round the same numbers, in both passes. (XLA may leave out a rounding where that gains precision.)"""
    strict = partial(jax.jit, compiler_options={"xla_allow_excess_precision": False})
    bias = segment_bias(segments())

    def at_once(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attend_at_once(q, k, v, bias, None, 0.0)

    inputs = random_inputs(dtype=jnp.bfloat16)
    results = with_gradients(attention(None, False), strict)(*inputs)
    expected = with_gradients(at_once, strict)(*inputs)
    for actual, other in zip(results, expected, strict=True):
        assert float(jnp.mean(actual != other)) < 1e-3  # numbers halfway between two others


@pytest.mark.parametrize(("window", "block"), [(None, 32), (WINDOW, 32), (WINDOW, 1000)])
def test_size_of_a_block_changes_nothing(window: int | None, block: int) -> None:
    """A block may be smaller than the window, or longer than the row."""
    results = with_gradients(attention(window, True, block))(*random_inputs())
    assert_close(results, compiled(window, True)(*random_inputs()), 1e-5)


@pytest.mark.parametrize("window", [1, 300])
def test_any_window_matches_softmax(window: int) -> None:
    results = compiled(window, False)(*random_inputs())
    assert_close(results, with_gradients(reference(window, False))(*random_inputs()), 1e-5)


@KINDS
def test_other_segments_do_not_affect_outputs_or_gradients(window: int | None, dropout: bool) -> None:
    """Change one segment of row 0: outputs and gradients of the others stay bit-identical.

    With a window, the last queries of the first segment have the second segment within their window, and the other way
    round. All three share blocks.
    """
    run = compiled(window, dropout)
    inputs = random_inputs()
    before = run(*inputs)
    for changed in (slice(0, FIRST), slice(FIRST, FIRST + SECOND), slice(FIRST + SECOND, S)):
        same = np.ones(S, bool)
        same[changed] = False
        after = run(*(x.at[0, :, :, changed].set(9.0) for x in inputs))
        for one, other in zip(before, after, strict=True):
            np.testing.assert_array_equal(one[0][..., same], other[0][..., same])
            np.testing.assert_array_equal(one[1:], other[1:])
            assert float(jnp.abs(one[0, :, :, changed] - other[0, :, :, changed]).max()) > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_huge_scores_select_one_key_and_keep_gradients_finite(dtype: Any) -> None:
    """Scores of about ±10,000 overflow in exp unless the largest is subtracted first, in both passes."""
    q, k, v, weights = random_inputs(scale=5e3, dtype=dtype)
    results = compiled(None, False)(q, k, v, weights)
    assert all(bool(jnp.isfinite(x).all()) for x in results)
    scores = jnp.einsum("ndq,ndk->nqk", *(x[1].astype(jnp.float32) for x in (q, k)))  # row 1 is one segment
    assert float(jnp.max(scores)) > 1e4 > -1e4 > float(jnp.min(scores))
    picked = jnp.take_along_axis(v[1], jnp.argmax(scores, axis=-1)[:, None, :], axis=2).astype(jnp.float32)
    assert float(jnp.mean(jnp.abs(results[0][1].astype(jnp.float32) - picked) < 1e-2)) > 0.99  # near ties are mixed


def test_microbatches_have_the_outputs_and_gradients_of_the_batch() -> None:
    """Under vmap, rows keep their numbers, and with them their dropout masks."""
    q, k, v, weights = (x.reshape(R, 1, *x.shape[1:]) for x in random_inputs())
    assert KEY.rows is not None

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        def one(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array, rows: jax.Array) -> jax.Array:
            return attend_in_blocks(q, k, v, ids, DropoutKey(KEY.key, rows), RATE, WINDOW)

        assert KEY.rows is not None
        return jnp.sum(weights * jax.vmap(one)(q, k, v, segments()[:, None], KEY.rows[:, None]))

    results = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)
    expected = compiled(WINDOW, True)(*random_inputs())[1:]
    for actual, gradient in zip(results, expected, strict=True):
        np.testing.assert_array_equal(actual[:, 0], gradient)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_work_and_memory_grow_as_promised(window: int | None) -> None:
    """No array has S · S numbers, and a local layer compares each block with its window alone."""
    length, heads, width = 8192, 2, 4

    def loss(q: jax.Array, ids: jax.Array) -> jax.Array:
        key = DropoutKey(jax.random.key(0), jnp.arange(1))
        return jnp.sum(attend_in_blocks(q, q, q, ids, key, RATE, window))

    shapes = jax.ShapeDtypeStruct((1, heads, width, length), jnp.float32), jax.ShapeDtypeStruct((1, length), jnp.int32)
    eqns = equations(jax.grad(loss), *shapes)
    largest = max(math.prod(getattr(v.aval, "shape", ())) for e in eqns for v in e.outvars)
    keys = length if window is None else BLOCK + 2 * window
    assert largest == max(heads * keys * BLOCK, heads * width * length)
    loops = [e for e in eqns if e.primitive.name == "scan"]
    assert [e.params["length"] for e in loops] == [length // BLOCK] * 2  # forward and backward


def test_lowering_for_accelerators() -> None:
    function = jax.jit(jax.grad(lambda q, ids: jnp.sum(attend_in_blocks(q, q, q, ids, KEY, RATE, WINDOW))))
    shapes = jax.ShapeDtypeStruct((R, N, D, S), jnp.bfloat16), jax.ShapeDtypeStruct((R, S), jnp.int32)
    assert "while" in jax.export.export(function, platforms=["cpu", "cuda", "tpu"])(*shapes).mlir_module()


def test_devices_share_rows_and_heads_without_talking() -> None:
    mesh = make_mesh((2, 2, 2))
    rows, heads = NamedSharding(mesh, BATCH_SPEC), NamedSharding(mesh, PartitionSpec(*BATCH_SPEC, "tensor"))
    arrays = helpers.random_inputs((4, N, D, 520))
    segment_ids = jnp.asarray(np.arange(4 * 520).reshape(4, 520) // 200, jnp.int32)

    def run(q: jax.Array, k: jax.Array, v: jax.Array, weights: jax.Array, ids: jax.Array) -> Any:
        key = DropoutKey(jax.random.key(0), jnp.arange(4))
        attend = lambda q, k, v: attend_in_blocks(q, k, v, ids, key, RATE, WINDOW)  # noqa: E731
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(weights)

    sharded = jax.jit(run, in_shardings=(heads,) * 4 + (rows,), out_shardings=heads)
    text = sharded.lower(*arrays, segment_ids).compile().as_text()
    assert not any(name in text for name in ("all-gather", "all-reduce", "all-to-all", "collective-permute"))
    assert_close(sharded(*arrays, segment_ids), jax.jit(run)(*arrays, segment_ids), 1e-6)
