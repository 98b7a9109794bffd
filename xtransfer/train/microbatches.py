"""The gradient of a batch computed in microbatches, one after the other.

Microbatches need less memory, and they fit the fast memory near a TPU's units. The result equals the whole batch's,
dropout included, up to the order of additions: dropout masks depend on row numbers, and a row has the same number in
any microbatch. Tokens are looked up once, outside the loop, because an embedding table is larger than everything else.
Each shard of `data` adds up a gradient of its own, so gradients cross `data` once per step. Over `fsdp` and `tensor`
they cross once per microbatch.
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

# Values in the largest hidden state that fits a TPU's vector memory beside the weights of a layer. By the compiler's
# estimate for an earlier version, a step of BERT base (768 wide) with 128 rows of 128 tokens on a v5e took 152 Mcycles
# as a whole, and 124 in four microbatches. Narrower encoders fit anyway: with a width of 256, microbatches took longer.
MICROBATCH_VALUES = 4096 * 768
_NARROWEST = 768


def num_microbatches(requested: int, rows: int, length: int, size: int, mesh: Mesh) -> int:
    """Return the number of microbatches for a batch: `requested`, or the number that suits the devices if that is 0.

    On TPUs, if only the batch is split over devices, this is the smallest number for which the hidden state on a device
    has at most `MICROBATCH_VALUES` values, provided that a device's rows divide into microbatches of at least half that
    size. Otherwise it is one.

    Args:
      requested: the setting `accumulation`; 0 lets this function choose.
      rows: the rows of the global batch.
      length: tokens per row.
      size: H, the encoder's width.
      mesh: the device mesh.
    """
    if most_rows(requested, length, size, mesh) is None:
        return requested or 1
    device_rows = rows // sharding.data_shards(mesh)
    values_by_count = {
        count: device_rows // count * length * size for count in range(1, device_rows + 1) if device_rows % count == 0
    }
    count = next((count for count, values in values_by_count.items() if values <= MICROBATCH_VALUES), 1)
    return count if 2 * values_by_count.get(count, 0) >= MICROBATCH_VALUES else 1


def most_rows(requested: int, length: int, size: int, mesh: Mesh) -> int | None:
    """Return the most rows on a device for which `num_microbatches` is one, or None if it does not depend on rows.

    See `num_microbatches` for the arguments.
    """
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    if requested or not on_tpu or mesh.shape["data"] != mesh.devices.size or size < _NARROWEST:
        return None
    return MICROBATCH_VALUES // (length * size) or None  # longer rows are never split


def accumulated_gradient(
    terms_of: TermsFn, params: Any, batch: Any, key: jax.Array, *, embed: EmbedFn | None, microbatches: int, mesh: Mesh
) -> tuple[Any, Terms]:
    """Return the gradient of a batch's mean loss with respect to `params`, float32, and the loss terms.

    It is the gradient of the sum over all microbatches divided by their count. A mean of means would be another loss.

    Args:
      terms_of: returns the loss terms of a microbatch. Its key `row_index`, [r] int32, holds the row numbers.
      params: the parameters.
      batch: arrays [R, ...].
      key: the dropout key.
      embed: returns the batch's key `embedded`, [R, ...], from the parameters; None leaves it out.
      microbatches: the number of microbatches; its product with `sharding.data_shards(mesh)` divides R.
      mesh: the device mesh.
    """
    rows = len(jax.tree.leaves(batch)[0])
    batch = dict(batch) | {"row_index": jnp.arange(rows, dtype=jnp.int32)}
    looked_up, pull_back = {}, None
    if embed is not None:
        looked_up["embedded"], pull_back = jax.vjp(lambda params_: embed(params_, batch, key), params)

    def gradient_of_rows(inputs: Any, embedded: Any) -> tuple[Any, Any]:
        def loss(params_: Any, embedded_: Any) -> tuple[jax.Array, Terms]:
            terms = terms_of(params_, {**inputs, **embedded_}, key)
            return terms["loss"][0], terms

        (gradient, embedded_gradient), terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, embedded)
        return (gradient, terms), embedded_gradient

    gradient_of_microbatch = jax.vmap(gradient_of_rows, spmd_axis_name="data")  # [data, r, ...] -> [data, ...]

    def add(total: Any, microbatch: Any) -> tuple[Any, Any]:
        gradient_and_terms, embedded_gradient = gradient_of_microbatch(*microbatch)
        return jax.tree.map(jnp.add, total, gradient_and_terms), embedded_gradient

    stacked = jax.tree.map(functools.partial(_split, microbatches=microbatches, mesh=mesh), (batch, looked_up))
    shapes, _ = jax.eval_shape(gradient_of_microbatch, *jax.tree.map(lambda x: x[0], stacked))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (total, terms), embedded_gradient = jax.lax.scan(add, zeros, stacked)
    total, terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), (total, terms))
    if pull_back is not None:
        (table_gradient,) = pull_back(_join(embedded_gradient["embedded"], mesh))
        total = jax.tree.map(jnp.add, total, table_gradient)
    scale = mean((jnp.ones(()), terms["loss"][1]))
    return jax.tree.map(lambda x: x * scale, total), terms


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
