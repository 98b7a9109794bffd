"""One training step, pure and jitted with its layout; what is learnt is the caller's loss."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xtransfer import sharding
from xtransfer.train.state import TrainState, state_shardings
from xtransfer.transfer.objectives import Pair, mean

Terms = dict[str, Pair]
LossFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]
TermsFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]  # of parameters, batch and dropout key
TrainStep = Callable[[TrainState, Mapping[str, jax.Array], jax.Array], tuple[TrainState, Terms]]


def train_step(
    graphdef: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    batch: Any,
    key: Any,
    *,
    split: Callable[[Any], Any] | None = None,
) -> tuple[TrainState, Terms]:
    """The state after one step on `batch`, and the loss terms of the state before it.

    `loss_fn(model, batch, dropout_key)` gives (sum, count) pairs, of which "loss" is minimised as
    sum / count over the global batch; the count must not depend on the parameters. Dropout is a pure
    function of `key` and the step's number.

    `split(batch)` gives the batch in parts, arrays [parts, R / parts, ...], to be computed one after the other. The
    result is that of the whole batch, but for dropout, whose key is then of the part too.
    """
    dropout_key = jax.random.fold_in(key, state.step)

    def terms_of(params: Any, examples: Any, key_: jax.Array) -> Terms:
        return loss_fn(nnx.merge(graphdef, params), examples, key_)

    if split is None:
        gradient, terms = _gradient(terms_of, state.params, batch, dropout_key)
    else:
        gradient, terms = _accumulated_gradient(terms_of, state.params, split(batch), dropout_key)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state), terms


def _gradient(terms_of: TermsFn, params: Any, batch: Any, key: jax.Array) -> tuple[Any, Terms]:
    def loss(params_: Any) -> tuple[jax.Array, Terms]:
        terms = terms_of(params_, batch, key)
        return mean(terms["loss"]), terms

    return jax.grad(loss, has_aux=True)(params)


def _accumulated_gradient(terms_of: TermsFn, params: Any, parts: Any, key: jax.Array) -> tuple[Any, Terms]:
    """The gradient of the sum over parts divided by the count over parts: a mean of means would be another loss."""

    def gradient_of_sum(part: Any, index: jax.Array) -> tuple[Any, Terms]:
        def loss(params_: Any) -> tuple[jax.Array, Terms]:
            terms = terms_of(params_, part, jax.random.fold_in(key, index))
            return terms["loss"][0], terms

        return jax.grad(loss, has_aux=True)(params)

    def add(so_far: Any, part_and_index: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, so_far, gradient_of_sum(*part_and_index)), None

    indices = jnp.arange(len(jax.tree.leaves(parts)[0]))
    shapes = jax.eval_shape(gradient_of_sum, jax.tree.map(lambda x: x[0], parts), indices[0])
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (total, terms), _ = jax.lax.scan(add, nothing, (parts, indices))
    share = mean((jnp.ones(()), terms["loss"][1]))
    return jax.tree.map(lambda x: x * share, total), terms


def split_rows(batch: Any, parts: int, mesh: Mesh) -> Any:
    """The batch's arrays [R, ...] as [parts, R / parts, ...], where row r is in part r % parts.

    So every device has as many rows of each part, and they are rows that it had: nothing is sent.
    """
    layout = NamedSharding(mesh, PartitionSpec(None, *sharding.BATCH_SPEC))

    def of_array(x: jax.Array) -> jax.Array:
        by_part = jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)
        return jax.lax.with_sharding_constraint(by_part, layout)

    return jax.tree.map(of_array, batch)


def make_train_step(
    graphdef: Any,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    params: Any,
    *,
    accumulation: int = 1,
) -> TrainStep:
    """`train_step` compiled for `mesh`: state in its shardings and donated, rows of the batch split over devices.

    Args:
      graphdef, loss_fn, optimizer: as of `train_step`.
      mesh: of devices.
      params: may be abstract, only shapes are looked at.
      accumulation: parts that a batch is computed in, one after the other. It takes the memory of one part and of one
        gradient more; `sharding.data_shards(mesh)` times this has to divide the rows.
    """
    states = state_shardings(params, optimizer, mesh)
    whole = sharding.replicated(mesh)
    split = functools.partial(split_rows, parts=accumulation, mesh=mesh) if accumulation > 1 else None

    def step(state: TrainState, batch: Any, key: jax.Array) -> tuple[TrainState, Terms]:
        with sharding.traced_for(mesh):
            return train_step(graphdef, loss_fn, optimizer, state, batch, key, split=split)

    return jax.jit(
        step,
        in_shardings=(states, sharding.batch_sharding(mesh), whole),
        out_shardings=(states, whole),
        donate_argnums=0,
    )
