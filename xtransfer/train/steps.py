"""One training step: a pure function, jitted with its layout. The loss is the caller's."""

import functools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from xtransfer.distillation.objectives import mean
from xtransfer.runtime import sharding
from xtransfer.train import averaging
from xtransfer.train.microbatches import EmbedFn, Terms, TermsFn, accumulated_gradient
from xtransfer.train.state import TrainState, overlay, param_update_shardings, select, state_shardings

LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]
GradientFn = Callable[[TermsFn, Any, Any, jax.Array], tuple[Any, Terms]]  # (terms, parameters, batch, dropout key)
TrainStep = Callable[[TrainState, Mapping[str, jax.Array], jax.Array, Any], tuple[TrainState, Terms]]
"""(state, batch, dropout key of the run, learning rate) -> the next state and the loss terms."""


def whole_gradient(terms_of: TermsFn, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Terms]:
    """Return the gradient of a batch's mean loss with respect to `params`, and the loss terms."""

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
    learning_rate: Any,
    *,
    gradient_of: GradientFn = whole_gradient,
    gather: Callable[[Any], Any] = lambda tree: tree,
    spread: Callable[[Any], Any] = lambda tree: tree,
    spread_gradient: Callable[[Any], Any] = lambda tree: tree,
    trained: Collection[str] | None = None,
    ema_decay: float = 0.0,
) -> tuple[TrainState, Terms]:
    """Return the state after one step on `batch`, and the loss terms of the state before it.

    Dropout is a pure function of `key` and the step's number.

    Args:
      graphdef: the model's graphdef.
      loss_fn: (model, batch, dropout key) -> (sum, count) pairs. The step minimizes "loss" as sum / count over the
        global batch; the count must not depend on the parameters.
      optimizer: the gradient transformation.
      state: the state before the step.
      batch: arrays [R, ...].
      key: the run's dropout key.
      learning_rate: the rate of this step, a float32 scalar, for an optimizer whose update takes one.
      gradient_of: computes the gradient, as `whole_gradient` does.
      gather: lays out a tree of trained parameters for the model.
      spread: lays out a tree of trained parameters for their update.
      spread_gradient: lays out their gradient for the update.
      trained: the names of the parameters to differentiate and to update, by which the optimizer knows them; None
        stands for all, as a tree.
      ema_decay: the decay of the state's moving average, if it has one.
    """
    dropout_key = jax.random.fold_in(key, state.step)
    before = state.params if trained is None else select(state.params, trained)

    def whole(params: Any) -> Any:
        return params if trained is None else overlay(state.params, params)

    def terms_of(params: Any, examples: Any, key_: jax.Array) -> Terms:
        return loss_fn(nnx.merge(graphdef, whole(params)), examples, key_)

    gradient, terms = gradient_of(terms_of, gather(before), batch, dropout_key)
    params = spread(before)
    updates, opt_state = optax.with_extra_args_support(optimizer).update(
        spread_gradient(gradient), state.opt_state, params, learning_rate=learning_rate
    )
    params, ema = optax.apply_updates(params, updates), state.ema
    if ema is not None:
        ema = averaging.moved(ema, select(params, ema), state.step + 1, ema_decay)
    return TrainState(state.step + 1, whole(params), opt_state, ema), terms


def make_train_step(
    graphdef: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Any,
    *,
    num_microbatches: Callable[[Any], int] = lambda batch: 1,
    embed: EmbedFn | None = None,
    trained: Collection[str] | None = None,
    averaged: Collection[str] = (),
    ema_decay: float = 0.0,
    split_params: bool = False,
) -> TrainStep:
    """Return `train_step` compiled for `mesh`, with the state donated and the batch's rows split over devices.

    Args:
      graphdef: the model's graphdef.
      loss_fn: see `train_step`.
      optimizer: the gradient transformation.
      mesh: the device mesh.
      params: the parameters, which may be abstract.
      num_microbatches: the number of microbatches for a batch, from its shapes. They run one after the other,
        with the memory of one microbatch, one more gradient, and the output of `embed` with its gradient.
      embed: (model, batch, dropout key) -> the batch's key `embedded`, see `accumulated_gradient`.
      trained: see `train_step`.
      averaged: the names of the parameters whose moving average the state has.
      ema_decay: see `train_step`.
      split_params: see `state_shardings`.
    """
    states = state_shardings(params, optimizer, mesh, averaged, split_params=split_params)
    replicated = sharding.replicated(mesh)
    whole, updated = sharding.param_shardings(mesh, params), param_update_shardings(params, optimizer, mesh)
    # The gradient of a matrix is whole before it is split, or the compiler moves the split into the model's products.
    gradient = jax.tree_util.tree_map_with_path(
        lambda path, leaf, kept, layout: kept if sharding.is_table(path, leaf) else layout, params, states.params, whole
    )
    if trained is not None:
        whole, updated, gradient = (select(layout, trained) for layout in (whole, updated, gradient))

    def spread(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, updated)

    def spread_gradient(tree: Any) -> Any:
        return spread(jax.lax.with_sharding_constraint(tree, gradient))

    def gather(tree: Any) -> Any:
        return jax.lax.with_sharding_constraint(tree, whole)

    def step(state: TrainState, batch: Any, key: jax.Array, learning_rate: jax.Array) -> tuple[TrainState, Terms]:
        embed_params: EmbedFn | None = None
        if embed is not None:

            def embed_params(params_: Any, batch_: Any, key_: jax.Array) -> jax.Array:
                all_params = params_ if trained is None else overlay(state.params, params_)
                return embed(nnx.merge(graphdef, all_params), batch_, key_)

        gradient_of: GradientFn = whole_gradient
        microbatches = num_microbatches(batch)
        # A loop over microbatches runs after everything is gathered anyway.
        with_barrier = microbatches == 1 and sharding.update_group(mesh) > 1
        if microbatches > 1:
            gradient_of = functools.partial(
                accumulated_gradient, embed=embed_params, microbatches=microbatches, mesh=mesh
            )
        with sharding.on_mesh(mesh):
            return train_step(
                graphdef,
                loss_fn,
                optimizer,
                state,
                batch,
                key,
                learning_rate,
                gradient_of=gradient_of,
                gather=(lambda tree: _gathered_first(gather(tree))) if with_barrier else gather,
                spread=spread,
                spread_gradient=spread_gradient,
                trained=trained,
                ema_decay=ema_decay,
            )

    return jax.jit(
        step,
        in_shardings=(states, sharding.batch_sharding(mesh), replicated, replicated),
        out_shardings=(states, replicated),
        donate_argnums=0,
    )


def _gathered_first(tree: Any) -> Any:
    """Make the compiler finish gathering each parameter before a product reads it.

    Otherwise the TPU compiler gathers a matrix piece by piece during its product, as it splits a gradient. By its own
    estimate, a step of BERT base with 32 rows of 128 tokens then takes 38 Mcycles in place of 29. Tables are left
    out, because it rounds them before it gathers them.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if sharding.is_table(path, leaf) else jax.lax.optimization_barrier(leaf), tree
    )
