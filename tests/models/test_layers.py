"""The parts of encoders against NumPy in float64, SciPy and Flax's own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import ndtr
from scipy.stats import norm as normal

from xtransfer.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, exact_gelu

quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
POINTS = np.array([-1e4, -100.0, -10.0, -6.0, -2.0, -1.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 1.0, 2.0, 6.0, 10.0, 100.0, 1e4])
EPS = 1e-12
SIZE = 48


def test_gelu_is_exact_and_gelu_new_is_not() -> None:
    # x Φ(x) and its tanh approximation at 1 and -2
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.array([1.0, -2.0])), [0.8413447, -0.0455003], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_new"](jnp.array([1.0, -2.0])), [0.8411920, -0.0454023], atol=1e-6)


@pytest.mark.parametrize(("dtype", "step"), [(jnp.float32, 2e-7), (jnp.bfloat16, 2**-8)])
def test_exact_gelu_and_its_gradient_are_those_of_the_normal_distribution(dtype: Any, step: float) -> None:
    """x Φ(x) and Φ(x) + x φ(x), everywhere to the steps of the dtype, and of Φ in float32."""
    points = np.concatenate([POINTS, np.linspace(-9, 9, 1001)])
    x = jnp.asarray(points, dtype)
    exact = np.asarray(x, np.float64)
    y, slope = quick_jit(lambda x: (exact_gelu(x), jax.vjp(exact_gelu, x)[1](jnp.ones_like(x))[0]))(x)
    assert y.dtype == slope.dtype == dtype
    wanted = exact * ndtr(exact)
    error = np.abs(np.asarray(y, np.float64) - wanted) - step * np.abs(wanted) - 2e-7 * np.abs(exact)
    assert error.max() <= 0, exact[error.argmax()]
    wanted = ndtr(exact) + exact * normal.pdf(exact)
    np.testing.assert_allclose(np.asarray(slope, np.float64), wanted, rtol=4 * step, atol=1e-6)
    assert exact_gelu(jnp.zeros((), dtype)) == 0 and exact_gelu(jnp.asarray(100.0, dtype)) == 100


def layer_norm(dtype: Any = jnp.float32, size: int = SIZE, seed: int = 0) -> LayerNorm:
    """With a scale and a bias that are not one and zero."""
    rng = np.random.default_rng(seed)
    made = LayerNorm(size, epsilon=EPS, dtype=dtype, rngs=nnx.Rngs(0))
    made.scale[...] = jnp.asarray(rng.normal(1, 0.3, size), jnp.float32)
    made.bias[...] = jnp.asarray(rng.normal(0, 0.3, size), jnp.float32)
    return made


def in_float64(made: LayerNorm, x: jax.Array) -> np.ndarray:
    """The definition, of the numbers that the norm is given."""
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + EPS)
    return exact * np.asarray(made.scale[...], np.float64) + np.asarray(made.bias[...], np.float64)


def rows(mean: float, dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1.0, (4, 16, SIZE)), dtype)


@pytest.mark.parametrize(("mean", "atol"), [(0.0, 2e-6), (1000.0, 5e-4)])
def test_a_float32_layer_norm_is_that_of_float64(mean: float, atol: float) -> None:
    """Around 1,000 a step of float32 is 6e-5; with E[x²] - E[x]² the variance, 1, would be wrong by about 0.1."""
    made, x = layer_norm(), rows(mean)
    found = quick_jit(lambda x: made(x))(x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, in_float64(made, x), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("mean", [0.0, 30.0, 100.0])
def test_a_bfloat16_layer_norm_is_exact_of_the_numbers_that_it_is_given(mean: float) -> None:
    """They are rounded, about 100 with steps of 1/2; a result has its own rounding, half a step, and little more."""
    made, x = layer_norm(jnp.bfloat16), rows(mean, jnp.bfloat16)
    found = quick_jit(lambda x: made(x))(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(found, np.float64), in_float64(made, x), rtol=2**-8, atol=1e-4 if mean < 100 else 2e-3
    )


def test_float32_numbers_are_rounded_first_in_a_bfloat16_layer_norm() -> None:
    made, x = layer_norm(jnp.bfloat16), rows(30.0)
    np.testing.assert_array_equal(made(x).astype(jnp.float32), made(x.astype(jnp.bfloat16)).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 100.5, -3.25])
def test_rows_of_one_number_are_the_bias_and_their_gradient_is_finite(value: float, dtype: Any) -> None:
    made, x = layer_norm(dtype), jnp.full((2, SIZE), value, dtype)
    y, pull = jax.vjp(lambda x: made(x), x)
    (gradient,) = pull(rows(0.0, dtype)[0, :2])
    np.testing.assert_array_equal(y.astype(jnp.float32), [made.bias[...].astype(dtype).astype(jnp.float32)] * 2)
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)])
def test_the_gradients_of_a_layer_norm_are_those_of_its_definition(dtype: Any, relative: float) -> None:
    """Of x, scale and bias, differentiated by JAX in float32 from the numbers that the norm is given."""
    made, x, weights = layer_norm(dtype), rows(2.0, dtype), rows(0.0, dtype, seed=3)

    def defined(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + EPS) * scale + bias

    graphdef, state = nnx.split(made)
    inputs = (made.scale[...], made.bias[...])
    dx, of_state = quick_jit(lambda: jax.vjp(lambda x, s: nnx.merge(graphdef, s)(x), x, state)[1](weights))()
    found = (dx, of_state["scale"][...], of_state["bias"][...])
    wide = x.astype(jnp.float32)
    wanted = quick_jit(lambda: jax.vjp(defined, wide, *inputs)[1](weights.astype(jnp.float32)))()
    assert [g.dtype for g in found] == [dtype, jnp.float32, jnp.float32]
    for one, other in zip(found, wanted, strict=True):
        other = np.asarray(other, np.float64)
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=relative * np.abs(other).max())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embed_looks_up_what_flax_does(dtype: Any) -> None:
    """To the bit: rounding what was looked up or the whole table first is the same. The gradient has no rounding."""
    ours = Embed(11, SIZE, dtype=dtype, rngs=nnx.Rngs(0))
    flax = nnx.Embed(11, SIZE, dtype=dtype, rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 3, 3], [10, 1, 3]])
    found = ours(ids)
    assert found.shape == (2, 3, SIZE) and found.dtype == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), flax(ids).astype(jnp.float32))
    table = nnx.grad(lambda m: jnp.sum(m(ids).astype(jnp.float32)))(ours)["embedding"][...]
    np.testing.assert_array_equal(table, np.array([1, 1, 0, 3, 0, 0, 0, 0, 0, 0, 1])[:, None] * np.ones((1, SIZE)))
    assert table.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("way", ["to", "from"])
def test_columns_are_transposed_rows(way: str, dtype: Any, relative: float) -> None:
    """Outputs, and gradients of input, kernel and bias, of [R, S, inputs] <-> [R, inputs, S]."""
    made = Linear(12, 20, dtype=dtype, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    x, weights = (jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, n)), dtype) for n in (12, 20))

    def turned(m: Linear, x: jax.Array) -> jax.Array:
        if way == "to":
            return m.to_columns(x).swapaxes(1, 2)
        return m.from_columns(x.swapaxes(1, 2))

    def plain(m: Linear, x: jax.Array) -> jax.Array:
        return x @ m.kernel[...].astype(dtype) + m.bias[...].astype(dtype)

    def run(function: Any) -> list[jax.Array]:
        def loss(m: Linear, x: jax.Array) -> jax.Array:
            return jnp.sum((function(m, x) * weights).astype(jnp.float32))

        of_linear, of_input = nnx.grad(loss, argnums=(0, 1))(made, x)
        return [function(made, x), of_input, of_linear["kernel"][...], of_linear["bias"][...]]

    for called in (turned, lambda m, x: m(x)):
        for one, other in zip(run(called), run(plain), strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            other = np.asarray(other, np.float64)
            np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=0, atol=relative * np.abs(other).max())
