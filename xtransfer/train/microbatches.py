"""The gradient of a batch that is computed in parts, one after the other: in less memory, and near a TPU's units.

The result is that of the whole batch, dropout included, up to the order of additions: rows keep their numbers, which
masks depend on. Tokens are looked up once, outside of the loop, since a table is larger than all the rest; and each
shard of `data` adds up a gradient of its own, so that over `data` gradients travel once a step and not once a part.
What `fsdp` and `tensor` split travels for each part.
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
TermsFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], Terms]  # of parameters, batch and dropout key
EmbedFn = Callable[[Any, Mapping[str, jax.Array], jax.Array], jax.Array]  # of the same, or of a model in their place

# Numbers of a part's hidden state for which a TPU's vector memory has room beside the weights of a layer. By the
# compiler's estimate a step of BERT base (768 wide) with 128 rows of 128 tokens on a v5e takes 152 Mcycles as a whole,
# and 124 in four parts. Narrower encoders have room enough: for one that is 256 wide parts took more.
PART_NUMBERS = 4096 * 768
_NARROWEST = 768


def num_microbatches(wanted: int, rows: int, length: int, size: int, mesh: Mesh) -> int:
    """How many parts to compute `rows` rows of `length` tokens in: `wanted` or, if that is 0, what suits the devices.

    On TPUs that nothing but the batch is split over it is the fewest parts whose hidden state, `size` numbers a token,
    has at most `PART_NUMBERS` on a device, if the rows of a device divide into such parts of at least half that many
    numbers. Otherwise it is one.
    """
    if wanted or mesh.devices.flat[0].platform != "tpu" or mesh.shape["data"] != mesh.devices.size or size < _NARROWEST:
        return wanted or 1
    own = rows // sharding.data_shards(mesh)
    numbers = {parts: own // parts * length * size for parts in range(1, own + 1) if own % parts == 0}
    parts = next((parts for parts, held in numbers.items() if held <= PART_NUMBERS), 1)
    return parts if 2 * numbers.get(parts, 0) >= PART_NUMBERS else 1


def accumulated_gradient(
    terms_of: TermsFn, params: Any, batch: Any, key: jax.Array, *, embed: EmbedFn | None, parts: int, mesh: Mesh
) -> tuple[Any, Terms]:
    """The gradient of the mean loss of a batch (arrays [R, ...]) with respect to `params`, float32, and the loss terms.

    It is the gradient of the sum over parts divided by the count over parts: a mean of means would be another loss.

    Args:
      terms_of: the loss terms; what it is given has the numbers of its rows, [r] int32, as "row_index".
      params, batch, key: what it is called with.
      embed: gives what stands in the batch as "embedded" then, [R, ...]; None where nothing does.
      parts: so many; `sharding.data_shards(mesh)` times this divides R.
      mesh: of the batch.
    """
    rows = len(jax.tree.leaves(batch)[0])
    batch = dict(batch) | {"row_index": jnp.arange(rows, dtype=jnp.int32)}
    looked_up, pull = {}, None
    if embed is not None:
        looked_up["embedded"], pull = jax.vjp(lambda params_: embed(params_, batch, key), params)

    def of_rows(known: Any, learnt: Any) -> tuple[Any, Any]:
        def loss(params_: Any, learnt_: Any) -> tuple[jax.Array, Terms]:
            terms = terms_of(params_, {**known, **learnt_}, key)
            return terms["loss"][0], terms

        (gradient, of_learnt), terms = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, learnt)
        return (gradient, terms), of_learnt

    of_part = jax.vmap(of_rows, spmd_axis_name="data")  # [data, r, ...] -> [data, ...]

    def add(so_far: Any, part: Any) -> tuple[Any, Any]:
        found, of_learnt = of_part(*part)
        return jax.tree.map(jnp.add, so_far, found), of_learnt

    stacked = jax.tree.map(functools.partial(_split, parts=parts, mesh=mesh), (batch, looked_up))
    shapes, _ = jax.eval_shape(of_part, *jax.tree.map(lambda x: x[0], stacked))
    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    (total, terms), of_looked_up = jax.lax.scan(add, nothing, stacked)
    total, terms = jax.tree.map(lambda x: jnp.sum(x, axis=0), (total, terms))
    if pull is not None:
        (of_tables,) = pull(_join(of_looked_up["embedded"], mesh))
        total = jax.tree.map(jnp.add, total, of_tables)
    share = mean((jnp.ones(()), terms["loss"][1]))
    return jax.tree.map(lambda x: x * share, total), terms


def _split(x: jax.Array, parts: int, mesh: Mesh) -> jax.Array:
    """[R, ...] -> [parts, data, R / parts / data, ...]: every device has an equal share of each part."""
    data, fsdp = mesh.shape["data"], mesh.shape["fsdp"]
    by_shard = x.reshape(data, fsdp, parts, -1, *x.shape[1:])
    by_part = jnp.moveaxis(by_shard, 2, 0).reshape(parts, data, -1, *x.shape[1:])
    return jax.lax.with_sharding_constraint(by_part, NamedSharding(mesh, PartitionSpec(None, "data", "fsdp")))


def _join(x: jax.Array, mesh: Mesh) -> jax.Array:
    """`_split` undone."""
    parts, data, _, *rest = x.shape
    by_part = x.reshape(parts, data, mesh.shape["fsdp"], -1, *rest)
    joined = jnp.moveaxis(by_part, 0, 2).reshape(-1, *rest)
    return jax.lax.with_sharding_constraint(joined, sharding.batch_sharding(mesh))
