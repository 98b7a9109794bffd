"""What a function computes, equation by equation, for tests of the precision of its parts."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def equations(function: Callable[..., Any], *args: Any) -> list[Any]:
    """Every equation of a function's jaxpr, those of the functions inside it too."""
    return list(_walk(jax.make_jaxpr(function)(*args).jaxpr))


def float_types(found: list[Any], primitive: str) -> list[str]:
    """The dtype of each floating-point operand and result of this primitive's equations."""
    values = [v.aval for e in found if e.primitive.name == primitive for v in (*e.invars, *e.outvars)]
    return [str(value.dtype) for value in values if jnp.issubdtype(value.dtype, jnp.floating)]


def _walk(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _walk(inner)
