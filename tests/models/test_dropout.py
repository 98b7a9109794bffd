"""Dropout: its random numbers, its rate, and that a mask belongs to a key and a place, not to a device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from xtransfer.models.dropout import DropoutKey, _places, _threefry, dropout, keep_mask
from xtransfer.runtime.sharding import BATCH_SPEC, make_mesh

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
KEY = DropoutKey(jax.random.key(0))


def mask(rate: float, *shape: int, seed: int = 0) -> np.ndarray:
    keep = keep_mask(DropoutKey(jax.random.key(seed)), rate, shape)
    assert keep is not None and keep.shape == shape and keep.dtype == bool
    return np.asarray(keep)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """In standard errors, of what is kept."""
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1]) * one.size**0.5


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0x00000000, 0x00000000), (0x00000000, 0x00000000), (0x9D1C5EC6, 0x8BD50731)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0xFD36D048, 0x2D17272C)),
        ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xBA3E4725, 0xF27D669E)),
    ],
)
def test_threefry_gives_the_published_answers(
    counter: tuple[int, int], key: tuple[int, int], expected: tuple[int, int]
) -> None:
    """Those of the Random123 library, for 13 rounds."""
    found = _threefry(jnp.array(key, jnp.uint32), *(jnp.full((2,), word, jnp.uint32) for word in counter))
    for words, word in zip(found, expected, strict=True):
        assert words.dtype == jnp.uint32
        np.testing.assert_array_equal(words, np.uint32(word))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_the_rate_is_met(rate: float) -> None:
    """Within four standard deviations, of all and of each quarter of the rows, which are other bits of the numbers."""
    keep = mask(rate, 20, 400, 250)
    for part in (keep, *np.split(keep, 4, axis=1)):
        assert abs(float(np.mean(~part)) - rate) < 2**-17 + 4 * (rate * (1 - rate) / part.size) ** 0.5


def test_an_element_is_kept_where_its_sixteen_bits_say_so() -> None:
    """Worked out from the numbers one by one: the first quarter of the rows takes the upper half of the first word."""
    keep = mask(0.3, 2, 8, 3)
    words = jax.random.bits(KEY.key, (2,), jnp.uint32)
    for row, quarter, column in np.ndindex(2, 2, 3):
        place = quarter * 3 + column
        x, y = (int(w) for w in _threefry(words, jnp.uint32(row), jnp.uint32(place)))
        halves = (x >> 16, x & 0xFFFF, y >> 16, y & 0xFFFF)
        for number, half in enumerate(halves):
            assert keep[row, 2 * number + quarter, column] == (half >= round(0.3 * 65536)), (row, quarter, number)


def test_dropout_keeps_the_expectation() -> None:
    x = jnp.full((400, 500), 2.0)
    y = dropout(x, 0.1, KEY)
    np.testing.assert_allclose(y[y != 0], 2.0 / 0.9, rtol=1e-6)
    np.testing.assert_array_equal(y != 0, mask(0.1, 400, 500))
    assert abs(float(jnp.mean(y)) - 2.0) < 2.0 / 0.9 * 4 * (0.1 * 0.9 / x.size) ** 0.5


def test_without_a_key_or_a_rate_nothing_is_done() -> None:
    x = jnp.ones((3, 4))
    assert dropout(x, 0.1, None) is x and dropout(x, 0.0, KEY) is x
    assert keep_mask(None, 0.1, (3, 4)) is None and keep_mask(KEY, 0.0, (3, 4)) is None


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_passes_what_was_kept(dtype: jnp.dtype) -> None:
    x, weights = (jnp.asarray(x, dtype) for x in np.random.default_rng(0).standard_normal((2, 6, 9, 10)))
    y, pull = jax.vjp(lambda x: dropout(x, 0.25, KEY), x)
    (gradient,) = pull(weights)
    kept = mask(0.25, 6, 9, 10)
    expected = [np.where(kept, (v.astype(jnp.float32) * np.float32(1 / 0.75)).astype(dtype), 0) for v in (x, weights)]
    assert y.dtype == gradient.dtype == dtype
    np.testing.assert_array_equal(y, expected[0])
    np.testing.assert_array_equal(gradient, expected[1])


def test_masks_of_other_keys_have_nothing_to_do_with_each_other() -> None:
    first = mask(0.5, 8, 64, 128)
    np.testing.assert_array_equal(first, mask(0.5, 8, 64, 128))
    folded = keep_mask(KEY.at(1), 0.5, (8, 64, 128))
    for other in (*(mask(0.5, 8, 64, 128, seed=seed) for seed in (1, 2, 2**31)), np.asarray(folded)):
        assert abs(correlation(first, other)) < 4.5


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_elements_have_nothing_to_do_with_their_neighbours(rate: float) -> None:
    """Along each axis, near and far; a quarter of the rows away are the other bits of the same numbers."""
    keep = mask(rate, 16, 64, 128)
    for axis, length in enumerate(keep.shape):
        for distance in (1, 2, 3, length // 4, length // 2, 3 * length // 4):
            one = np.take(keep, range(length - distance), axis)
            other = np.take(keep, range(distance, length), axis)
            assert abs(correlation(one, other)) < 4.5, (axis, distance)


def test_no_two_rows_are_alike() -> None:
    """Rows of a batch, of a head, of a token: 24 elements or more, of which none is likely to be met twice."""
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
    for number in range(-(-length // quarter)):  # the rows that are cut off are the last
        np.testing.assert_array_equal(
            keep[:, number * quarter : (number + 1) * quarter],
            mask(0.5, 40, 4 * quarter, 50)[:, number * quarter : min((number + 1) * quarter, length)],
        )


@pytest.mark.parametrize("shape", [(8, 5, 12), (8, 4, 6, 6)])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2)])
def test_eight_devices_draw_the_mask_of_one(sizes: tuple[int, int, int], shape: tuple[int, ...]) -> None:
    """Rows are spread, and the heads of attention."""
    mesh = make_mesh(sizes)
    rows = NamedSharding(mesh, PartitionSpec(*BATCH_SPEC, *(["tensor"] if len(shape) == 4 else [])))
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)

    def both(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.value_and_grad(lambda x: jnp.sum(dropout(x, 0.3, KEY) ** 2))(x)[1], dropout(x, 0.3, KEY)

    spread = quick_jit(both, in_shardings=rows, out_shardings=rows)(jax.device_put(x, rows))
    for one, other in zip(spread, quick_jit(both)(x), strict=True):
        assert len(one.sharding.device_set) == 8
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(spread[1] != 0, mask(0.3, *shape))


def test_every_element_has_a_place_of_its_own() -> None:
    rows, inner = (np.asarray(x, np.int64) for x in _places((3, 2, 4, 5)))
    assert len(np.unique(rows * 2**32 + inner)) == 3 * 2 * 4 * 5
    np.testing.assert_array_equal(inner[0].ravel(), np.arange(40))
    np.testing.assert_array_equal(_places((4, 5))[1], np.tile(np.arange(5), (4, 1)))


def test_places_of_very_long_rows_fit_their_32_bits() -> None:
    """A row's attention has N · S/4 · S calls: below 2**32 for 16 heads up to 32,768 tokens.

    The last place is computed here without its array, by the steps that `_places` multiplies with; a row that is
    longer would repeat its own bits, for it wraps around.
    """
    heads, length = 16, 32_768
    assert heads * (length // 4) * length == 2**32
    shape = (1, heads, length // 4, length)
    traced = jax.make_jaxpr(lambda: _places(shape))()
    steps = {int(v.val) for e in traced.eqns if e.primitive.name == "mul" for v in e.invars if hasattr(v, "val")}
    assert steps == {length // 4 * length, length, 1}
    assert all(str(v.aval.dtype) == "uint32" for e in traced.eqns for v in e.outvars)
    last = sum((size - 1) * step for size, step in zip(shape[1:], sorted(steps, reverse=True), strict=True))
    assert last == 2**32 - 1
