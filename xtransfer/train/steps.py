"""One training step, pure and jitted with its layout; what is learnt is the caller's loss."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from xtransfer import sharding
from xtransfer.train.state import TrainState, state_shardings
from xtransfer.transfer.objectives import Pair, mean

Terms = dict[str, Pair]
LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]
TrainStep = Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Terms]]


def train_step(
    graphdef: Any, loss_fn: LossFn, optimizer: optax.GradientTransformation, state: TrainState, batch: Any, key: Any
) -> tuple[TrainState, Terms]:
    """The state after one step on `batch`, and the loss terms of the state before it.

    `loss_fn(model, batch, dropout_key)` gives (sum, count) pairs, of which "loss" is minimised as
    sum / count over the global batch. Dropout is a pure function of `key` and the step's number.
    """
    dropout_key = jax.random.fold_in(key, state.step)

    def mean_loss(params: Any) -> tuple[jax.Array, Terms]:
        terms = loss_fn(nnx.merge(graphdef, params), batch, dropout_key)
        return mean(terms["loss"]), terms

    gradient, terms = jax.grad(mean_loss, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), terms


def make_train_step(
    graphdef: Any, loss_fn: LossFn, optimizer: optax.GradientTransformation, mesh: Mesh, params: Any
) -> TrainStep:
    """`train_step` compiled for `mesh`: state in its shardings and donated, rows of the batch split over devices.

    `params` may be abstract: only its shapes are looked at.
    """
    states = state_shardings(params, optimizer, mesh)
    whole = sharding.replicated(mesh)

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Terms]:
        return train_step(graphdef, loss_fn, optimizer, state, batch, key)

    return jax.jit(
        step,
        in_shardings=(states, sharding.batch_sharding(mesh), whole),
        out_shardings=(states, whole),
        donate_argnums=0,
    )
