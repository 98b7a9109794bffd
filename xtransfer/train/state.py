"""The state that training carries from step to step, and that a checkpoint holds."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xtransfer.runtime import sharding


class TrainState(NamedTuple):
    """The state of training, all on the mesh.

    Attributes:
      step: the number of steps done, an int32 scalar.
      params: the parameters.
      opt_state: the optimizer state.
      ema: the moving average of the trained parameters, by dotted path; None without one.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any = None


def create(
    params: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averaged: Collection[str] = (),
    *,
    split_params: bool = False,
) -> TrainState:
    """Return the state before the first step, laid out by `state_shardings`; `params` may be donated.

    Args:
      params: the parameters.
      optimizer: the gradient transformation.
      mesh: the device mesh.
      averaged: the names of the parameters whose moving average is kept.
      split_params: see `state_shardings`.
    """
    shardings = state_shardings(params, optimizer, mesh, averaged, split_params=split_params)
    placed = jax.device_put(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(placed)
    ema = None
    if averaged:
        ema = jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, select(tree, averaged)), out_shardings=shardings.ema)(
            placed
        )
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), placed, opt_state, ema)


def state_shardings(
    params: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averaged: Collection[str] = (),
    *,
    split_params: bool = False,
) -> TrainState:
    """Return the sharding of every leaf of a state; `params` may be abstract.

    Moments and the moving average are sharded like the updates. With `split_params`, so are the parameters. A step then
    gathers them in float32 before the forward pass, which rounds them, and not after their update. The TPU compiler
    moves the rounding before the gather, so that a device rounds its own shard only and half the bytes cross. Nothing
    here asks other compilers to do so. The gradient of a table is needed in shards only, so that devices can exchange
    token ids and rows instead of whole tables.
    """
    opt_state = jax.eval_shape(optimizer.init, params)
    updates = param_update_shardings(params, optimizer, mesh)
    return TrainState(
        sharding.replicated(mesh),
        updates if split_params else sharding.param_shardings(mesh, params),
        sharding.update_shardings(mesh, opt_state),
        select(updates, averaged) if averaged else None,
    )


def param_update_shardings(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Return the sharding in which each parameter is updated: its moments', or its own if it is frozen."""
    layouts = (sharding.param_shardings(mesh, params), sharding.update_shardings(mesh, params))
    state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, params))
    names = tuple(f".{sharding.path_name(path)}" for path, _ in state)

    def choose(path: Any, whole: Any, split: Any) -> Any:
        suffix = f".{sharding.path_name(path)}"
        return split if any(name.endswith(suffix) for name in names) else whole

    return jax.tree_util.tree_map_with_path(choose, *layouts)


def abstract(
    params: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    averaged: Collection[str] = (),
    *,
    split_params: bool = False,
) -> TrainState:
    """Return the shapes, dtypes, and shardings of a state, for a restore; `params` may be abstract."""
    shapes = TrainState(
        jax.ShapeDtypeStruct((), jnp.int32),
        params,
        jax.eval_shape(optimizer.init, params),
        select(params, averaged) if averaged else None,
    )
    return jax.tree.map(
        lambda x, sharding_: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_),
        shapes,
        state_shardings(params, optimizer, mesh, averaged, split_params=split_params),
    )


def select(tree: Any, names: Collection[str]) -> dict[str, Any]:
    """Return some leaves of a tree by their dotted paths."""
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    return {name: leaf for name, leaf in leaves.items() if name in names}


def overlay(tree: Any, values: Mapping[str, Any]) -> Any:
    """Return a tree with other values of some leaves, by their dotted paths."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: values.get(sharding.path_name(path), leaf), tree)
