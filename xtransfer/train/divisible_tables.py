"""Word embeddings with a number of rows that devices can share.

Few vocabularies have a size that 8 divides, and then every device would update the whole table. By the compiler's
estimate, that takes 9.5 of the 15.1 Mcycles of a step with the embeddings and two layers of multilingual BERT base, for
32 rows of 128 tokens on a v5e. So during training, such a table has a few more rows. They are zero and stay zero: no
token looks them up, and a zero does not decay. Only the training state has them. What is scored or saved does not, so
that a run can resume on another number of devices.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from xtransfer.runtime.sharding import is_table, path_name, update_group
from xtransfer.train.saving import Saving
from xtransfer.train.state import TrainState

_TILE = 8  # rows that a TPU stores, reduces, and gathers at once


def with_divisible_tables(shapes: Any, mesh: Mesh, trained: Collection[str]) -> Any:
    """Return abstract parameters with as many more rows in tables as devices need to share their updates.

    A table holds word embeddings, with more rows than columns. It stays as it is if its rows can be shared already.

    Args:
      shapes: the abstract parameters.
      mesh: the device mesh.
      trained: the names of the parameters that are updated. The others need no more rows.
    """
    group = update_group(mesh)
    if group == 1:
        return shapes
    shards = group * mesh.shape["tensor"]

    def extend(path: Any, leaf: Any) -> Any:
        if not is_table(path, leaf) or path_name(path) not in trained or leaf.shape[0] % shards == 0:
            return leaf
        multiple = shards * _TILE
        return jax.ShapeDtypeStruct((-(-leaf.shape[0] // multiple) * multiple, leaf.shape[1]), leaf.dtype)

    return jax.tree_util.tree_map_with_path(extend, shapes)


def with_rows_of(abstract: Any, tree: Any) -> Any:
    """Return a tree of arrays with the rows of `abstract`: rows are cut from the end, or added as zeros.

    Arrays on the devices of `abstract` also get its layout. Arrays that are right already are shared.

    Args:
      abstract: a tree of shapes and shardings.
      tree: a tree of arrays with the same structure, which may differ in the number of rows.
    """
    targets = jax.tree.leaves(abstract)
    arrays, structure = jax.tree.flatten(tree)
    differing = {i: array for i, array in enumerate(arrays) if not _is_like(targets[i], array)}

    def resize(parts: dict[int, jax.Array]) -> dict[int, jax.Array]:
        return {i: _with_rows(array, targets[i].shape[0]) for i, array in parts.items()}

    if differing:
        resized = jax.jit(resize, out_shardings={i: targets[i].sharding for i in differing})(differing)
        arrays = [resized.get(i, array) for i, array in enumerate(arrays)]
    return jax.tree.unflatten(structure, arrays)


def _is_like(target: Any, array: jax.Array) -> bool:
    if array.shape != target.shape:
        return False
    elsewhere = array.sharding.device_set != target.sharding.device_set
    return elsewhere or array.sharding.is_equivalent_to(target.sharding, array.ndim)


def _with_rows(array: jax.Array, rows: int) -> jax.Array:
    missing = max(rows - array.shape[0], 0)
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))[:rows]


def of_whole_tables(saving: Saving, whole: TrainState, extended: TrainState) -> Saving:
    """Return a saving that saves a state with whole parameters, without additional rows, and restores shards and rows.

    It is `saving` if the trained state has neither shards nor additional rows.

    Args:
      saving: how a state with whole parameters is saved.
      whole: that state, abstract.
      extended: the state that is trained, abstract.
    """
    if all(map(_is_like, jax.tree.leaves(whole), jax.tree.leaves(extended))):
        return saving
    return Saving(
        saved=lambda state: saving.saved(with_rows_of(whole, state)),
        restored=lambda state: with_rows_of(extended, saving.restored(state)),
        abstract=lambda _: saving.abstract(whole),
    )
