"""The equations of a function's jaxpr, for tests of numerical precision."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def equations(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return every equation of a function's jaxpr, including nested ones."""
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr))


def float_types(eqns: list[Any], primitive: str) -> list[str]:
    """Return the dtype of each floating-point operand and result of this primitive's equations."""
    values = [v.aval for e in eqns if e.primitive.name == primitive for v in (*e.invars, *e.outvars)]
    return [str(value.dtype) for value in values if jnp.issubdtype(value.dtype, jnp.floating)]


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _walk(inner)
