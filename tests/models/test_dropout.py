"""Dropout: random bits, rates, and masks that depend on key and place but not on the device layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from xtransfer.models.dropout import DropoutKey, _positions, _threefry, dropout, keep_mask, keep_mask_part
from xtransfer.runtime.sharding import BATCH_SPEC, make_mesh

KEY = DropoutKey(jax.random.key(0))


def mask(rate: float, *shape: int, seed: int = 0) -> np.ndarray:
    keep = keep_mask(DropoutKey(jax.random.key(seed)), rate, shape)
    assert keep is not None and keep.shape == shape and keep.dtype == bool
    return np.asarray(keep)


def correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Return the correlation of two masks, in standard errors."""
    return float(np.corrcoef(first.ravel(), second.ravel())[0, 1]) * first.size**0.5


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_matches_the_published_test_vectors(
    counter: tuple[int, int], key: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Test vectors of the Random123 library for 13 rounds."""
    outputs = _threefry(jnp.array(key, jnp.uint32), *(jnp.full((2,), word, jnp.uint32) for word in counter))
    for output, word in zip(outputs, expected, strict=True):
        assert output.dtype == jnp.uint32
        np.testing.assert_array_equal(output, np.uint32(word))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_dropped_share_matches_the_rate(rate: float) -> None:
    """Within four standard deviations, overall and for each quarter of the rows, which has its own bits."""
    keep = mask(rate, 20, 400, 250)
    for part in (keep, *np.split(keep, 4, axis=1)):
        assert abs(float(np.mean(~part)) - rate) < 2**-17 + 4 * (rate * (1 - rate) / part.size) ** 0.5


def test_sixteen_bits_decide_each_element() -> None:
    """Decide each element by hand: the first quarter of the rows uses the upper half of the first word."""
    keep = mask(0.3, 2, 8, 3)
    words = jax.random.bits(KEY.key, (2,), jnp.uint32)
    for row, quarter, column in np.ndindex(2, 2, 3):
        position = quarter * 3 + column
        x, y = (int(w) for w in _threefry(words, jnp.uint32(row), jnp.uint32(position)))
        halves = (x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF)
        for number, half in enumerate(halves):
            assert keep[row, 2 * number + quarter, column] == (half >= round(0.3 * 65536)), (row, quarter, number)


def test_dropout_preserves_the_expectation() -> None:
    x = jnp.full((400, 500), 2.0)
    y = dropout(x, 0.1, KEY)
    np.testing.assert_allclose(y[y != 0], 2.0 / 0.9, rtol=1e-6)
    np.testing.assert_array_equal(y != 0, mask(0.1, 400, 500))
    assert abs(float(jnp.mean(y)) - 2.0) < 2.0 / 0.9 * 4 * (0.1 * 0.9 / x.size) ** 0.5


def test_dropout_is_the_identity_without_a_key_or_a_rate() -> None:
    x = jnp.ones((3, 4))
    assert dropout(x, 0.1, None) is x and dropout(x, 0.0, KEY) is x
    assert keep_mask(None, 0.1, (3, 4)) is None and keep_mask(KEY, 0.0, (3, 4)) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_flows_only_through_kept_elements(dtype: jnp.dtype) -> None:
    x, weights = (jnp.asarray(x, dtype) for x in np.random.default_rng(0).standard_normal((2, 6, 9, 10)))
    y, pull = jax.vjp(lambda x: dropout(x, 0.25, KEY), x)
    (gradient,) = pull(weights)
    kept = mask(0.25, 6, 9, 10)
    expected = [np.where(kept, (v.astype(jnp.float32) * np.float32(1 / 0.75)).astype(dtype), 0) for v in (x, weights)]
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


def test_masks_of_different_keys_are_uncorrelated() -> None:
    first = mask(0.5, 8, 64, 128)
    np.testing.assert_array_equal(first, mask(0.5, 8, 64, 128))
    folded = keep_mask(KEY.at(1), 0.5, (8, 64, 128))
    for other in (*(mask(0.5, 8, 64, 128, seed=seed) for seed in (1, 2, 2**31)), np.asarray(folded)):
        assert abs(correlation(first, other)) < 4.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_neighbouring_elements_are_uncorrelated(rate: float) -> None:
    """Along each axis, near and far: elements a quarter of the rows apart use different bits of the same number."""
    keep = mask(rate, 16, 64, 128)
    for axis, length in enumerate(keep.shape):
        for distance in (1, 2, 3, length // 4, length // 2, 3 * length // 4):
            first = np.take(keep, range(length - distance), axis)
            second = np.take(keep, range(distance, length), axis)
            assert abs(correlation(first, second)) < 4.5, (axis, distance)


def test_no_two_rows_are_equal() -> None:
    """The rows of a batch, of a head, and of a token have at least 64 elements, so none should occur twice."""
    keep = mask(0.5, 8, 3, 16, 64)
    for axes in (1, 2, 3):
        rows = keep.reshape(int(np.prod(keep.shape[:axes])), -1)
        assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7, 127])
def test_lengths_need_not_be_multiples_of_four(length: int) -> None:
    keep = mask(0.5, 40, length, 50)
    assert abs(float(np.mean(keep)) - 0.5) < 4 * (0.25 / keep.size) ** 0.5
    assert len(np.unique(keep.transpose(1, 0, 2).reshape(length, -1), axis=0)) == length
    quarter = -(-length // 4)
    for number in range(-(-length // quarter)):  # the last rows are cut off
        np.testing.assert_array_equal(
            keep[:, number * quarter : (number + 1) * quarter],
            mask(0.5, 40, 4 * quarter, 50)[:, number * quarter : min((number + 1) * quarter, length)],
        )


@settings(max_examples=15)
@given(st.data(), st.sampled_from([(3, 7), (2, 3, 8), (2, 2, 5, 6), (2, 3, 13, 4)]), st.booleans(), st.booleans())
def test_part_of_a_mask_is_cut_from_the_whole(
    data: st.DataObject, shape: tuple[int, ...], all_lines: bool, with_rows: bool
) -> None:
    rows = jnp.arange(40, 40 + shape[0]) if with_rows and len(shape) > 2 else None
    key = DropoutKey(jax.random.key(5), rows)
    starts, sizes = [], []
    for size in shape[-2:]:
        starts.append(data.draw(st.integers(0, size - 1)))
        sizes.append(data.draw(st.integers(1, size - starts[-1])))
    if all_lines:
        starts[0], sizes[0] = 0, shape[-2]
    (i, j), (m, n) = starts, sizes
    whole = jax.jit(lambda: keep_mask(key, 0.5, shape))()
    part = jax.jit(lambda i, j: keep_mask_part(key, 0.5, shape, (i, j), (m, n)))(i, j)
    np.testing.assert_array_equal(part, whole[..., i : i + m, j : j + n])


@pytest.mark.parametrize("shape", [(8, 5, 12), (8, 4, 6, 6)])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_draw_the_same_mask_as_one(sizes: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    """Rows are sharded, and for attention the heads too."""
    mesh = make_mesh(sizes)
    rows = NamedSharding(mesh, PartitionSpec(*BATCH_SPEC, *(["tensor"] if len(shape) == 4 else [])))
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def gradient_and_output(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda x: jnp.sum(dropout(x, 0.3, KEY) ** 2))(x)[1], dropout(x, 0.3, KEY)

    sharded = jax.jit(gradient_and_output, in_shardings=rows, out_shardings=rows)(jax.device_put(x, rows))
    for actual, expected in zip(sharded, jax.jit(gradient_and_output)(x), strict=True):
        assert len(actual.sharding.device_set) == 8
        np.testing.assert_array_equal(actual, expected)
    np.testing.assert_array_equal(sharded[1] != 0, mask(0.3, *shape))


def test_every_element_has_a_unique_place() -> None:
    rows, inner = (np.asarray(x, np.int64) for x in _positions((3, 2, 4, 5)))
    assert len(np.unique(rows * 2**32 + inner)) == 3 * 2 * 4 * 5
    np.testing.assert_array_equal(inner[0].ravel(), np.arange(40))
    np.testing.assert_array_equal(_positions((4, 5))[1], np.tile(np.arange(5), (4, 1)))


def test_positions_of_very_long_rows_fit_in_32_bits() -> None:
    """A row's attention has N · S/4 · S places: exactly 2**32 for 16 heads and 32,768 tokens.

    The last place is computed without the array, from the steps that `_positions` multiplies by. A longer row would
    wrap around and repeat its own bits.
    """
    heads, length = 16, 32_768
    assert heads * (length // 4) * length == 2**32
    shape = (1, heads, length // 4, length)
    traced = jax.make_jaxpr(lambda: _positions(shape))()
    steps = {int(v.val) for e in traced.eqns if e.primitive.name == "mul" for v in e.invars if hasattr(v, "val")}
    assert steps == {length // 4 * length, length, 1}
    assert all(str(v.aval.dtype) == "uint32" for e in traced.eqns for v in e.outvars)
    last = sum((size - 1) * step for size, step in zip(shape[1:], sorted(steps, reverse=True), strict=True))
    assert last == 2**32 - 1
