"""The gradient of a batch computed in microbatches, one after the other.

Microbatches need less memory, and they fit the fast memory near a TPU's units. The result is the whole batch's, dropout
included, up to the order of additions: rows keep their numbers, and dropout masks depend on those. Tokens are looked up
once, outside the loop, because an embedding table is larger than everything else. Each shard of `data` adds up a
gradient of its own, so gradients cross `data` once per step. Over `fsdp` and `tensor` they cross once per microbatch.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from xtransfer.distillation.objectives import Pair, mean
from xtransfer.runtime import sharding

Terms = dict[str, Pair]
TermsFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]  # (parameters, batch, dropout key) -> loss terms
EmbedFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], jax.Array]  # (parameters or model, batch, dropout key)

# How many numbers of a microbatch's hidden state fit a TPU's vector memory beside the weights of a layer. By the
# compiler's estimate, a step of BERT base (768 wide) with 128 rows of 128 tokens on a v5e takes 152 Mcycles as a whole,
# and 124 in four microbatches. Narrower encoders fit anyway: with a width of 256, microbatches took longer.
MICROBATCH_NUMBERS = 4096 * 768
_NARROWEST = 768


def num_microbatches(requested: int, rows: int, length: int, size: int, mesh: Mesh) -> int:
    """Return the number of microbatches for a batch: `requested`, or the number that suits the devices if that is 0.

    On TPUs, if only the batch is split over devices, this is the smallest number for which the hidden state on a device
    has at most `MICROBATCH_NUMBERS` numbers, provided that the rows of a device divide into such microbatches with at
    least half as many. Otherwise it is one.

    Args:
      requested: the setting `accumulation`; 0 lets this function choose.
      rows: the rows of the global batch.
      length: tokens per row.
      size: H, the encoder's width.
      mesh: the device mesh.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    if requested or not on_tpu or mesh.shape["data"] != mesh.devices.size or size < _NARROWEST:
        return requested or 1
    device_rows = rows // sharding.data_shards(mesh)
    numbers = {
        count: device_rows // count * length * size for count in range(1, device_rows + 1) if device_rows % count == 0
    }
    count = next((count for count, size_ in numbers.items() if size_ <= MICROBATCH_NUMBERS), 1)
    return count if 2 * numbers.get(count, 0) >= MICROBATCH_NUMBERS else 1


def accumulated_gradient(
    terms_of: TermsFn, params: Any, batch: Any, key: jax.Array, *, embed: EmbedFn | None, microbatches: int, mesh: Mesh
) -> tuple[Any, Terms]:
    """Return the gradient of a batch's mean loss with respect to `params`, float32, and the loss terms.

    It is the gradient of the sum over all microbatches divided by their count. A mean of means would be another loss.

    Args:
      terms_of: gives the loss terms of a microbatch, whose key `row_index`, [r] int32, holds its rows' numbers.
      params: the parameters.
      batch: arrays [R, ...].
      key: the dropout key.
      embed: gives the batch's key `embedded`, [R, ...], from the parameters; None leaves it out.
      microbatches: how many; times `sharding.data_shards(mesh)` it divides R.
      mesh: the device mesh.
    """
    rows = len(jax.tree.leaves(batch)[0])
    batch = dict(batch) | {"row_index": jnp.arange(rows, dtype=jnp.int32)}
    looked_up, pull = {}, None
    if embed is not None:
        looked_up["embedded"], pull = jax.vjp(lambda params_: embed(params_, batch, key), params)

    def gradient_of_rows(fixed: Any, learnt: Any) -> tuple[Any, Any]:
        def loss(params_: Any, learnt_: Any) -> tuple[jax.Array, Terms]:
            terms = terms_of(params_, {**fixed, **learnt_}, key)
            return terms["loss"][0], terms

        (gradient, learnt_gradient), terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, learnt)
        return (gradient, terms), learnt_gradient

    gradient_of_microbatch = jax.vmap(gradient_of_rows, spmd_axis_name="data")  # [data, r, ...] -> [data, ...]

    def add(total: Any, microbatch: Any) -> tuple[Any, Any]:
        gradient_and_terms, learnt_gradient = gradient_of_microbatch(*microbatch)
        return jax.tree.map(jnp.add, total, gradient_and_terms), learnt_gradient

    stacked = jax.tree.map(functools.partial(_split, microbatches=microbatches, mesh=mesh), (batch, looked_up))
    shapes, _ = jax.eval_shape(gradient_of_microbatch, *jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (total, terms), looked_up_gradient = jax.lax.scan(add, zeros, stacked)
    total, terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), (total, terms))
    if pull is not None:
        (table_gradient,) = pull(_join(looked_up_gradient["embedded"], mesh))
        total = jax.tree.map(jnp.add, total, table_gradient)
    share = mean((jnp.ones(()), terms["loss"][1]))
    return jax.tree.map(lambda x: x * share, total), terms


def _split(x: jax.Array, microbatches: int, mesh: Mesh) -> jax.Array:
    """Split [R, ...] -> [microbatches, data, R / microbatches / data, ...], an equal share of each on every device."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    by_shard = x.reshape(data, fsdp, microbatches, -1, *x.shape[1:])
    by_microbatch = jnp.moveaxis(by_shard, 2, 0).reshape(microbatches, data, -1, *x.shape[1:])
    return jax.lax.with_sharding_constraint(by_microbatch, NamedSharding(mesh, PartitionSpec(None, "data", "fsdp")))


def _join(x: jax.Array, mesh: Mesh) -> jax.Array:
    """Undo `_split`."""
    microbatches, data, _, *rest = x.shape
    by_microbatch = x.reshape(microbatches, data, mesh.shape["fsdp"], -1, *rest)
    joined = jnp.moveaxis(by_microbatch, 0, 2).reshape(-1, *rest)
    return jax.lax.with_sharding_constraint(joined, sharding.batch_sharding(mesh))
