"""Encoder layers compared with float64 NumPy, SciPy, and Flax's own layers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import ndtr
from scipy.stats import norm as normal

from xtransfer.models.layers import ACTIVATIONS, Embed, LayerNorm, Linear, exact_gelu

POINTS = np.array([-1e4, -100.0, -10.0, -6.0, -2.0, -1.0, -0.5, -1e-3, 0.0, 1e-3, 0.5, 1.0, 2.0, 6.0, 10.0, 100.0, 1e4])
EPS = 1e-12
SIZE = 48


def test_gelu_is_exact_and_gelu_new_is_not() -> None:
    # x Φ(x) and its tanh approximation at 1 and -2
    np.testing.assert_allclose(ACTIVATIONS["gelu"](jnp.array([1.0, -2.0])), [0.8413447, -0.0455003], atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu_new"](jnp.array([1.0, -2.0])), [0.8411920, -0.0454023], atol=1e-6)


@pytest.mark.parametrize(("dtype", "step"), [(jnp.float32, 2e-7), (jnp.bfloat16, 2**-8)])
def test_exact_gelu_and_its_gradient_match_the_normal_distribution(dtype: Any, step: float) -> None:
    """Compare with x Φ(x) and Φ(x) + x φ(x), to the precision of the dtype and of Φ in float32."""
    points = np.concatenate([POINTS, np.linspace(-9, 9, 1001)])
    x = jnp.asarray(points, dtype)
    exact = np.asarray(x, np.float64)
    y, slope = jax.jit(lambda x: (exact_gelu(x), jax.vjp(exact_gelu, x)[1](jnp.ones_like(x))[0]))(x)
    assert y.dtype == slope.dtype == dtype
    expected = exact * ndtr(exact)
    error = np.abs(np.asarray(y, np.float64) - expected) - step * np.abs(expected) - 2e-7 * np.abs(exact)
    assert error.max() <= 0, exact[error.argmax()]
    expected = ndtr(exact) + exact * normal.pdf(exact)
    np.testing.assert_allclose(np.asarray(slope, np.float64), expected, rtol=4 * step, atol=1e-6)
    assert exact_gelu(jnp.zeros((), dtype)) == 0 and exact_gelu(jnp.asarray(100.0, dtype)) == 100


def layer_norm(dtype: Any = jnp.float32, size: int = SIZE, seed: int = 0) -> LayerNorm:
    """Return a LayerNorm whose scale is not one and whose bias is not zero."""
    rng = np.random.default_rng(seed)
    layer = LayerNorm(size, epsilon=EPS, dtype=dtype, rngs=nnx.Rngs(0))
    layer.scale[...] = jnp.asarray(rng.normal(1, 0.3, size), jnp.float32)
    layer.bias[...] = jnp.asarray(rng.normal(0, 0.3, size), jnp.float32)
    return layer


def in_float64(layer: LayerNorm, x: jax.Array) -> np.ndarray:
    """Return the layer's output by the definition of LayerNorm, in float64."""
    x64 = np.asarray(x, np.float64)
    x64 = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + EPS)
    return x64 * np.asarray(layer.scale[...], np.float64) + np.asarray(layer.bias[...], np.float64)


def rows(mean: float, dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(mean, 1.0, (4, 16, SIZE)), dtype)


@pytest.mark.parametrize(("mean", "atol"), [(0.0, 2e-6), (1000.0, 5e-4)])
def test_float32_layer_norm_matches_float64(mean: float, atol: float) -> None:
    """Near 1,000 a float32 step is 6e-5; E[x²] - E[x]² would get the variance, 1, wrong by about 0.1."""
    layer, x = layer_norm(), rows(mean)
    output = jax.jit(lambda x: layer(x))(x)
    assert output.dtype == jnp.float32
    np.testing.assert_allclose(output, in_float64(layer, x), rtol=1e-6, atol=atol)


@pytest.mark.parametrize("mean", [0.0, 30.0, 100.0])
def test_bfloat16_layer_norm_is_exact_for_its_rounded_inputs(mean: float) -> None:
    """Inputs near 100 are rounded to steps of 1/2. The output adds little more than its own rounding, half a step."""
    layer, x = layer_norm(jnp.bfloat16), rows(mean, jnp.bfloat16)
    output = jax.jit(lambda x: layer(x))(x)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(output, np.float64), in_float64(layer, x), rtol=2**-8, atol=1e-4 if mean < 100 else 2e-3
    )


def test_bfloat16_layer_norm_rounds_float32_inputs_first() -> None:
    layer, x = layer_norm(jnp.bfloat16), rows(30.0)
    np.testing.assert_array_equal(layer(x).astype(jnp.float32), layer(x.astype(jnp.bfloat16)).astype(jnp.float32))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [0.0, 1.0, 100.5, -3.25])
def test_constant_rows_give_the_bias_and_a_finite_gradient(value: float, dtype: Any) -> None:
    layer, x = layer_norm(dtype), jnp.full((2, SIZE), value, dtype)
    y, pull = jax.vjp(lambda x: layer(x), x)
    (gradient,) = pull(rows(0.0, dtype)[0, :2])
    np.testing.assert_array_equal(y.astype(jnp.float32), [layer.bias[...].astype(dtype).astype(jnp.float32)] * 2)
    assert bool(jnp.isfinite(gradient).all())


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2**-7)])
def test_layer_norm_gradients_match_its_definition(dtype: Any, relative: float) -> None:
    """Gradients of x, scale, and bias; JAX differentiates the definition in float32 on the same inputs."""
    layer, x, weights = layer_norm(dtype), rows(2.0, dtype), rows(0.0, dtype, seed=3)

    def definition(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        mean = jnp.mean(x, -1, keepdims=True)
        variance = jnp.mean((x - mean) ** 2, -1, keepdims=True)
        return (x - mean) / jnp.sqrt(variance + EPS) * scale + bias

    graphdef, state = nnx.split(layer)
    inputs = (layer.scale[...], layer.bias[...])
    dx, dstate = jax.jit(lambda: jax.vjp(lambda x, s: nnx.merge(graphdef, s)(x), x, state)[1](weights))()
    gradients = (dx, dstate["scale"][...], dstate["bias"][...])
    x32 = x.astype(jnp.float32)
    expected = jax.jit(lambda: jax.vjp(definition, x32, *inputs)[1](weights.astype(jnp.float32)))()
    assert [g.dtype for g in gradients] == [dtype, jnp.float32, jnp.float32]
    for gradient, reference in zip(gradients, expected, strict=True):
        reference = np.asarray(reference, np.float64)
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), reference, rtol=0, atol=relative * np.abs(reference).max()
        )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embed_matches_flax(dtype: Any) -> None:
    """Bit for bit: rounding the vectors equals rounding the table. The gradient is not rounded."""
    ours = Embed(11, SIZE, dtype=dtype, rngs=nnx.Rngs(0))
    flax = nnx.Embed(11, SIZE, dtype=dtype, rngs=nnx.Rngs(0))
    ids = jnp.array([[0, 3, 3], [10, 1, 3]])
    vectors = ours(ids)
    assert vectors.shape == (2, 3, SIZE) and vectors.dtype == dtype
    np.testing.assert_array_equal(vectors.astype(jnp.float32), flax(ids).astype(jnp.float32))
    gradient = nnx.grad(lambda m: jnp.sum(m(ids).astype(jnp.float32)))(ours)["embedding"][...]
    np.testing.assert_array_equal(gradient, np.array([1, 1, 0, 3, 0, 0, 0, 0, 0, 0, 1])[:, None] * np.ones((1, SIZE)))
    assert gradient.dtype == jnp.float32


@pytest.mark.parametrize(("dtype", "relative"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-7)])
@pytest.mark.parametrize("direction", ["to", "from"])
def test_columns_match_transposed_rows(direction: str, dtype: Any, relative: float) -> None:
    """Compare outputs, and gradients of input, kernel, and bias, for [R, S, inputs] <-> [R, inputs, S]."""
    layer = Linear(12, 20, dtype=dtype, bias_init=nnx.initializers.normal(1.0), rngs=nnx.Rngs(0))
    x, weights = (jnp.asarray(np.random.default_rng(2).standard_normal((2, 5, n)), dtype) for n in (12, 20))

    def via_columns(m: Linear, x: jax.Array) -> jax.Array:
        if direction == "to":
            return m.to_columns(x).swapaxes(1, 2)
        return m.from_columns(x.swapaxes(1, 2))

    def by_rows(m: Linear, x: jax.Array) -> jax.Array:
        return x @ m.kernel[...].astype(dtype) + m.bias[...].astype(dtype)

    def run(function: Any) -> list[jax.Array]:
        def loss(m: Linear, x: jax.Array) -> jax.Array:
            return jnp.sum((function(m, x) * weights).astype(jnp.float32))

        layer_grads, input_grad = nnx.grad(loss, argnums=(0, 1))(layer, x)
        return [function(layer, x), input_grad, layer_grads["kernel"][...], layer_grads["bias"][...]]

    for candidate in (via_columns, lambda m, x: m(x)):
        for actual, expected in zip(run(candidate), run(by_rows), strict=True):
            assert actual.dtype == expected.dtype and actual.shape == expected.shape
            expected = np.asarray(expected, np.float64)
            np.testing.assert_allclose(
                np.asarray(actual, np.float64), expected, rtol=0, atol=relative * np.abs(expected).max()
            )
