"""A rule of `jax.vmap` for functions that treat every row of a batch alike: microbatches become more rows."""

from collections.abc import Callable
from typing import Any

import jax
from jax.custom_batching import custom_vmap


def rowwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, which treats each row alike, with a `jax.vmap` rule that merges the rows.

    Under `jax.vmap`, JAX would give every array one more axis, and XLA would find less to fuse. Here the rows of the
    mapped axis are put one after the other instead. Arguments that are not mapped must be scalars.

    Args:
      function: maps trees of arrays [R, ...] to a tree of arrays [R, ...].
    """
    mapped = custom_vmap(function)

    @mapped.def_vmap
    def _merged(axis_size: int, in_batched: Any, *arguments: Any) -> tuple[Any, Any]:
        for leaf, batched in zip(jax.tree.leaves(arguments), jax.tree.leaves(tuple(in_batched)), strict=True):
            assert batched or leaf.ndim == 0, "an argument of rowwise that is not mapped must be a scalar"
        merged = jax.tree.map(
            lambda x, batched: x.reshape(-1, *x.shape[2:]) if batched else x, arguments, tuple(in_batched)
        )
        out = jax.tree.map(lambda x: x.reshape(axis_size, -1, *x.shape[1:]), mapped(*merged))
        return out, jax.tree.map(lambda _: True, out)

    return mapped
