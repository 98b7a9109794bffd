"""The matrix products of a step: counted by hand, with loops, unused results, and frozen parameters."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtransfer.benchmark import products
from xtransfer.benchmark.products import BareProducts, Product, products_of, total_flops


def test_flops_by_hand() -> None:
    """[2, 3, 5] · [2, 5, 7] with batch axis 0: 2 · 3 · 7 results of 5 products and sums each, 420 in all."""
    product = Product((2, 3, 5), (2, 5, 7), ("float32",) * 3, (((2,), (1,)), ((0,), (0,))))
    assert product.flops == 2 * (2 * 3 * 7) * 5 == 420


def test_products_are_counted_with_shapes_and_types() -> None:
    @jax.jit
    def two(a: jax.Array, b: jax.Array) -> jax.Array:
        return (a @ b) @ b.T

    counts = products_of(two, jnp.ones((4, 3), jnp.bfloat16), jnp.ones((3, 5), jnp.bfloat16))
    assert {(p.left, p.right, p.dtypes) for p in counts} == {
        ((4, 3), (3, 5), ("bfloat16",) * 3),
        ((4, 5), (5, 3), ("bfloat16",) * 3),
    }
    assert total_flops(counts) == 2 * 4 * 3 * 5 + 2 * 4 * 5 * 3 == 240


def test_a_loop_counts_each_time_and_what_nobody_uses_does_not_count() -> None:
    def loop(a: jax.Array) -> jax.Array:
        unused = jnp.ones((7, 2)) @ a  # noqa: F841
        return jax.lax.scan(lambda x, _: (x @ a, None), a, length=6)[0]

    (count,) = products_of(loop, jnp.ones((2, 2))).values()
    assert count == 6


def test_the_gradient_of_a_frozen_matrix_is_not_counted() -> None:
    """Two layers: two products forward, and backward one for each weight and one for the hidden layer."""

    def loss(weights: tuple[jax.Array, jax.Array], x: jax.Array) -> jax.Array:
        return jnp.sum((jnp.tanh(x @ weights[0]) @ weights[1]) ** 2)

    def step(frozen: bool, weights: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        first, second = jax.jit(jax.grad(loss))(weights, x)
        return (weights[0] if frozen else weights[0] - first), weights[1] - second

    weights = jnp.ones((4, 3)), jnp.ones((3, 2))
    counts = {frozen: sum(products_of(partial(step, frozen), weights, jnp.ones((5, 4))).values()) for frozen in (0, 1)}
    assert counts == {0: 5, 1: 3}


def test_bare_products_compute_the_product_and_take_each_one_as_often_as_it_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product = Product((2, 3), (3, 4), ("bfloat16", "bfloat16", "float32"), (((1,), (0,)), ((), ())))
    left, right = np.ones((2, 3)), np.arange(12.0).reshape(3, 4)
    result = products._compile(product)(jnp.asarray(left, jnp.bfloat16), jnp.asarray(right, jnp.bfloat16))
    assert result.dtype == jnp.float32
    np.testing.assert_array_equal(result, left @ right)
    monkeypatch.setattr(products, "_mean_seconds", lambda run, budget: float(run().shape[1]))
    other = Product((2, 3), (3, 5), ("float32",) * 3, (((1,), (0,)), ((), ())))
    assert BareProducts({product: 10, other: 2}).seconds(1.0) == 10 * 4 + 2 * 5
