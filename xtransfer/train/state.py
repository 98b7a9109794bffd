"""What training carries from step to step, which is also what a checkpoint holds."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from xtransfer import sharding


class TrainState(NamedTuple):
    """Steps done (int32 scalar), the parameters and the optimizer's state over them, all on the mesh."""

    step: Any
    params: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The state before the first step, laid out by `sharding.RULES`; `params` may be donated."""
    shardings = state_shardings(params, optimizer, mesh)
    placed = jax.device_put(params, shardings.params)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(placed)
    return TrainState(jax.device_put(jnp.zeros((), jnp.int32), shardings.step), placed, opt_state)


def state_shardings(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """The sharding of every leaf of a state; `params` may be abstract. Moments lie where their parameter lies."""
    opt_state = jax.eval_shape(optimizer.init, params)
    return TrainState(
        sharding.replicated(mesh), sharding.param_shardings(mesh, params), sharding.update_shardings(mesh, opt_state)
    )


def abstract(params: Any, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of a state, for a restore; `params` may be abstract."""
    shapes = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, jax.eval_shape(optimizer.init, params))
    return jax.tree.map(
        lambda x, sharding_: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_),
        shapes,
        state_shardings(params, optimizer, mesh),
    )
