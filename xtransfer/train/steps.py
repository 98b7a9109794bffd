"""One training step, pure and jitted with its layout; what is learnt is the caller's loss."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from xtransfer.distillation.objectives import mean
from xtransfer.runtime import sharding
from xtransfer.train.microbatches import EmbedFn, Terms, TermsFn, accumulated_gradient
from xtransfer.train.state import TrainState, state_shardings, updated_shardings

LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]
GradientFn = Callable[[TermsFn, Any, Any, jax.Array], tuple[Any, Terms]]  # by terms, of parameters, batch, dropout key
TrainStep = Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Terms]]


def whole_gradient(terms_of: TermsFn, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Terms]:
    """The gradient of the mean loss of a batch with respect to `params`, and the loss terms."""

    def loss(params_: Any) -> tuple[jax.Array, Terms]:
        terms = terms_of(params_, batch, key)
        return mean(terms["loss"]), terms

    return jax.grad(loss, has_aux=True)(params)


def train_step(
    graphdef: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: Any,
    *,
    gradient_of: GradientFn = whole_gradient,
    spread: Callable[[Any], Any] = lambda tree: tree,
) -> tuple[TrainState, Terms]:
    """The state after one step on `batch`, and the loss terms of the state before it.

    `loss_fn(model, batch, dropout_key)` gives (sum, count) pairs, of which "loss" is minimised as
    sum / count over the global batch; the count must not depend on the parameters. Dropout is a pure
    function of `key` and the step's number.

    `gradient_of` is called as `whole_gradient`, `spread` lays out a tree of parameters as they are updated.
    """
    dropout_key = jax.random.fold_in(key, state.step)

    def terms_of(params: Any, examples: Any, key_: jax.Array) -> Terms:
        return loss_fn(nnx.merge(graphdef, params), examples, key_)

    gradient, terms = gradient_of(terms_of, state.params, batch, dropout_key)
    params = spread(state.params)
    updates, opt_state = optimizer.update(spread(gradient), state.opt_state, params)
    return TrainState(state.step + 1, optax.apply_updates(params, updates), opt_state), terms


def make_train_step(
    graphdef: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Any,
    *,
    num_microbatches: Callable[[Any], int] = lambda batch: 1,
    embed: EmbedFn | None = None,
) -> TrainStep:
    """`train_step` compiled for `mesh`: state in its shardings and donated, rows of the batch split over devices.

    Args:
      graphdef, loss_fn, optimizer: as of `train_step`.
      mesh: of devices.
      params: may be abstract, only shapes are looked at.
      num_microbatches: the number of microbatches for a batch, from its shapes. They are computed one after the other,
        with the memory of one, of one more gradient, and of what `embed` returns and its gradient.
      embed: of a model, a batch and a dropout key, for `accumulated_gradient`.
    """
    states = state_shardings(params, optimizer, mesh)
    whole = sharding.replicated(mesh)
    layouts = states.params, updated_shardings(params, optimizer, mesh)

    def spread(tree: Any) -> Any:
        # First as the parameters lie: else the compiler takes the split back into the model's own products.
        return functools.reduce(jax.lax.with_sharding_constraint, layouts, tree)

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Terms]:
        gradient_of: GradientFn = whole_gradient
        if (parts := num_microbatches(batch)) > 1:
            looked_up = embed and (lambda params_, *of: embed(nnx.merge(graphdef, params_), *of))
            gradient_of = functools.partial(accumulated_gradient, embed=looked_up, parts=parts, mesh=mesh)
        with sharding.on_mesh(mesh):
            return train_step(graphdef, loss_fn, optimizer, state, batch, key, gradient_of=gradient_of, spread=spread)

    return jax.jit(
        step,
        in_shardings=(states, sharding.batch_sharding(mesh), whole),
        out_shardings=(states, whole),
        donate_argnums=0,
    )
