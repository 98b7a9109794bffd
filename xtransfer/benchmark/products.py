"""The matrix products of a compiled step: their FLOPs, and their time when nothing else runs.

The products are those of the step's jaxpr after removal of unused equations, with forward pass, backward pass, and
anything that is computed again. So frozen parameters have no products for gradients that nobody uses.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval

_LEAST_REPEATS = 2


@dataclass(frozen=True)
class Product:
    """A `dot_general`, by everything that decides its time.

    Attributes:
      left: the shape of the first factor.
      right: the shape of the second factor.
      dtypes: the dtypes of the factors and of the result.
      axes: the contracted and the batch axes, as `lax.dot_general` takes them.
      precision: the precision, as `lax.dot_general` takes it.
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    dtypes: tuple[str, str, str]
    axes: tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
    precision: Any = None

    @property
    def flops(self) -> int:
        """Two operations for each element of the first factor and each free column of the second."""
        (_, contracted), (_, batch) = self.axes
        free = [size for axis, size in enumerate(self.right) if axis not in (*contracted, *batch)]
        return 2 * math.prod(self.left) * math.prod(free)


def products_of(function: Callable[..., Any], *arguments: Any) -> Counter[Product]:
    """Return the products of a function, each with the number of times that it runs.

    A loop whose length is not in the program counts as if it ran once. Of the branches of a condition, all count.

    Args:
      function: a function, perhaps jitted.
      arguments: its arguments, which may be abstract.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    used, _ = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    counts: Counter[Product] = Counter()
    _count(used, 1, counts)
    return counts


def _count(jaxpr: Any, times: int, counts: Counter[Product]) -> None:
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            counts[_product(equation)] += times
        length = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jaxprs_in_params(equation.params):
            _count(getattr(inner, "jaxpr", inner), times * length, counts)


def _product(equation: Any) -> Product:
    left, right = (variable.aval for variable in equation.invars)
    (left_contracted, right_contracted), (left_batch, right_batch) = equation.params["dimension_numbers"]
    return Product(
        left=tuple(left.shape),
        right=tuple(right.shape),
        dtypes=(str(left.dtype), str(right.dtype), str(equation.outvars[0].aval.dtype)),
        axes=(
            (tuple(left_contracted), tuple(right_contracted)),
            (tuple(left_batch), tuple(right_batch)),
        ),
        precision=equation.params["precision"],
    )


def total_flops(products: Mapping[Product, int]) -> int:
    """Return the operations of all products."""
    return sum(product.flops * times for product, times in products.items())


class BareProducts:
    """Products that are compiled one by one and run on one device, with random factors.

    Args:
      products: from `products_of`.
    """

    def __init__(self, products: Mapping[Product, int]):
        self._products = dict(products)
        self._compiled = {product: _compile(product) for product in products}

    def seconds(self, budget: float) -> float:
        """Return the time of all products, one after the other, each as often as it runs.

        Args:
          budget: the seconds to measure for. Each product gets its share, and runs at least twice.
        """
        total = 0.0
        rng = np.random.default_rng(0)
        for product, times in self._products.items():
            left, right = _factor(rng, product.left, product.dtypes[0]), _factor(rng, product.right, product.dtypes[1])
            share = product.flops * times / max(1, total_flops(self._products))
            total += times * _mean_seconds(partial(self._compiled[product], left, right), budget * share)
        return total


def _compile(product: Product) -> Callable[..., jax.Array]:
    return jax.jit(
        partial(
            jax.lax.dot_general,
            dimension_numbers=product.axes,
            precision=product.precision,
            preferred_element_type=product.dtypes[2],
        )
    )


def _factor(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.device_put(rng.standard_normal(shape, np.float32)).astype(dtype)


def _mean_seconds(run: Callable[[], jax.Array], budget: float) -> float:
    run().block_until_ready()  # compiles on the first call
    start = time.perf_counter()
    run().block_until_ready()
    once = time.perf_counter() - start
    repeats = max(_LEAST_REPEATS, int(budget / max(once, 1e-9)))
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    result.block_until_ready()
    return (time.perf_counter() - start) / repeats
