"""The state that training carries from step to step, and that a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xtransfer.runtime import sharding


class TrainState(NamedTuple):
    """The number of steps done (int32 scalar), the parameters, and the optimizer state, all on the mesh."""

    step: Any
    params: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the state before the first step, laid out by `state_shardings`; `params` may be donated."""
    shardings = state_shardings(params, optimizer, mesh)
    placed = jax.device_put(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(placed)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), placed, opt_state)


def state_shardings(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the sharding of every leaf of a state; `params` may be abstract. Moments are sharded like the updates."""
    opt_state = jax.eval_shape(optimizer.init, params)
    return TrainState(
        sharding.replicated(mesh), sharding.param_shardings(mesh, params), sharding.update_shardings(mesh, opt_state)
    )


def param_update_shardings(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """Return the sharding in which each parameter is updated: its moments', or its own if it is frozen."""
    layouts = (sharding.param_shardings(mesh, params), sharding.update_shardings(mesh, params))
    state = jax.tree_util.tree_leaves_with_path(jax.eval_shape(optimizer.init, params))
    names = tuple(f".{sharding.path_name(path)}" for path, _ in state)

    def choose(path: Any, whole: Any, split: Any) -> Any:
        return split if any(name.endswith(f".{sharding.path_name(path)}") for name in names) else whole

    return jax.tree_util.tree_map_with_path(choose, *layouts)


def abstract(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Return the shapes, dtypes, and shardings of a state, for a restore; `params` may be abstract."""
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda x, sharding_: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_),
        shapes,
        state_shardings(params, optimizer, mesh),
    )
