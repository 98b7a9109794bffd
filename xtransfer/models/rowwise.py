"""Functions that treat each row by itself, under `jax.vmap`."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap


def rowwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` of trees of arrays [R, ...], to such a tree, which does the same to every row.

    Under `jax.vmap` the rows of all are put behind each other, where JAX would give every array one more axis and XLA
    would find less to fuse. What is not mapped is handed on as it is, so it must be a scalar.
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _merged(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        assert all(
            jax.tree.leaves(jax.tree.map(lambda x, batched: batched or x.ndim == 0, arguments, tuple(in_batched)))
        )
        merged = jax.tree.map(
            lambda x, batched: x.reshape(-1, *x.shape[2:]) if batched else x, arguments, tuple(in_batched)
        )
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), mapped(*merged))
        return out, jax.tree.map(lambda _: True, out)

    return mapped
