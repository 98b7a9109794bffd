"""Parameters in the layout for training: in shards, and word embeddings with rows for every device.

Few vocabularies have a size that 8 divides, and then every device would update the whole table. By the compiler's
estimate, that takes 9.5 of the 15.1 Mcycles of a step with the embeddings and two layers of multilingual BERT base, for
32 rows of 128 tokens on a v5e. So during training, such a table has a few more rows. They are zero and stay zero: no
token looks them up, and a zero does not decay.

What is updated in shards is also kept in shards between steps. Only the training state has these shards and rows. What
is scored or saved has whole parameters, split over `fsdp` and `tensor` at most, so that a run can resume on another
number of devices.
"""

import functools
from collections.abc import Callable, Collection
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


def laid_out_like(abstract: Any) -> Callable[[Any], Any]:
    """Return the function that gives a tree of arrays the layout and the rows of `abstract`.

    Rows are cut from the end, or added as zeros. Arrays on other devices than those of `abstract` get the rows only.
    Arrays that are right already are shared. The function compiles once, however often it is called.

    Args:
      abstract: a tree of shapes and shardings. The arrays' tree has the same structure.
    """
    targets = jax.tree.leaves(abstract)

    @functools.cache
    def changer(indices: tuple[int, ...]) -> Any:
        def change(arrays: list[jax.Array]) -> list[jax.Array]:
            return [_with_rows(array, targets[i].shape[0]) for i, array in zip(indices, arrays, strict=True)]

        return jax.jit(change, out_shardings=[targets[i].sharding for i in indices])

    def laid_out(tree: Any) -> Any:
        arrays, structure = jax.tree.flatten(tree)
        differing = tuple(i for i, array in enumerate(arrays) if not _is_like(targets[i], array))
        if differing:
            for i, array in zip(differing, changer(differing)([arrays[i] for i in differing]), strict=True):
                arrays[i] = array
        return jax.tree.unflatten(structure, arrays)

    return laid_out


def _is_like(target: Any, array: jax.Array) -> bool:
    if array.shape != target.shape:
        return False
    elsewhere = array.sharding.device_set != target.sharding.device_set
    return elsewhere or array.sharding.is_equivalent_to(target.sharding, array.ndim)


def _with_rows(array: jax.Array, rows: int) -> jax.Array:
    missing = max(rows - array.shape[0], 0)
    return jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))[:rows]


def of_whole_params(saving: Saving, whole: TrainState, trained: TrainState) -> Saving:
    """Return a saving that gathers the parameters and cuts additional rows, and that splits and adds them to restore.

    It is `saving` if the trained state has neither shards nor additional rows.

    Args:
      saving: how a state with whole parameters is saved.
      whole: that state, abstract.
      trained: the state as it is trained, abstract.
    """
    if all(map(_is_like, jax.tree.leaves(whole), jax.tree.leaves(trained))):
        return saving
    gathered, split = laid_out_like(whole), laid_out_like(trained)
    return Saving(
        saved=lambda state: saving.saved(gathered(state)),
        restored=lambda state: split(saving.restored(state)),
        abstract=lambda _: saving.abstract(whole),
    )
