"""The device mesh, the rules that lay parameters out on it, and the placing of batches.

One mesh with three axes serves every run, from one CPU to a pod. A batch is split over `data × fsdp`, and parameters
over `fsdp` and `tensor` by the rules below. On an `n×1×1` mesh, the default, the rules leave every parameter whole,
which is data parallelism. Even then, the update of matrices and the optimizer state are split over neighbours on
`data` (see `update_shardings`), and during training, the matrices themselves are kept in the shards of their update.
"""

import contextlib
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xtransfer.errors import ConfigError, MachineError, one_line

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))
# The columns of embedding tables are split over `fsdp`. A device looks up its columns for all rows of its group, and
# then exchanges them for whole vectors of its own rows, because a table is much larger than the vectors looked up.
LOOKUP_IDS, LOOKUP_COLUMNS = PartitionSpec("data"), PartitionSpec("data", None, "fsdp")

# Splitting a matrix of 768 rows further would give less than whole tiles, and TPUs reduce and gather tiles.
UPDATE_GROUP = 8

# The first match wins. The pattern is searched in a parameter's dotted path. Kernels that widen are split by output
# over `tensor`, and kernels that narrow by input, so that a layer needs one reduction.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"\.((position_)?(query|key)|value|intermediate|gate|up)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\.output\.kernel$", PartitionSpec("tensor", "fsdp")),
    # An adapter's two matrices are split like the rows and the columns of the kernel beside them.
    (r"\.((position_)?(query|key)|value|intermediate|gate|up)\.adapter\.a$", PartitionSpec("fsdp", None)),
    (r"\.((position_)?(query|key)|value|intermediate|gate|up)\.adapter\.b$", PartitionSpec(None, "tensor")),
    (r"\.output\.adapter\.a$", PartitionSpec("tensor", None)),
    (r"\.output\.adapter\.b$", PartitionSpec(None, "fsdp")),
    (r"\.(word|position)_embeddings\.embedding$", PartitionSpec("tensor", "fsdp")),
    (r"(^|\.)relative_embeddings\.embedding$", PartitionSpec(None, "fsdp")),
    (r"\.convolution\.kernel$", PartitionSpec(None, "fsdp", None)),
    (r"(^|\.)(project|dense|transform|head|next_sentence)\.kernel$", PartitionSpec("fsdp", None)),
    (r"", PartitionSpec()),
)


def make_mesh(shape: Sequence[int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return a mesh over `devices` (default: all) with the axes `AXES`; by default every device is on `data`.

    A first size of 0 stands for all remaining devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(shape or (0, 1, 1), len(devices))
    if math.prod(sizes) != len(devices):
        raise ConfigError(
            f"config keys mesh.data, mesh.fsdp, mesh.tensor: {'×'.join(map(str, sizes))} does not fit {len(devices)} "
            "devices: their product must equal that; mesh.data = 0 takes all remaining devices"
        )
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(shape: Sequence[int], devices: int) -> tuple[int, ...]:
    """Return the sizes of data, fsdp, and tensor; a first size of 0 stands for all remaining devices (at least 1)."""
    data, fsdp, tensor = shape
    return data or max(devices // (fsdp * tensor), 1), fsdp, tensor


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of rows (the leading axis) over `data × fsdp`."""
    return NamedSharding(mesh, BATCH_SPEC)


def data_shards(mesh: Mesh) -> int:
    """Return the number of devices that share a batch; its number of rows must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """Return (p, n): this process's devices hold the p-th of n equal runs of a batch's rows, and nothing else.

    This is (0, 1), the whole batch, if some process's rows do not form such a run: a TPU's mesh follows the wires
    between chips, not the hosts. Processes along `tensor` share a slice.
    """
    rows = mesh.devices.reshape(data_shards(mesh), -1)
    rows_by_process: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            rows_by_process.setdefault(device.process_index, set()).add(row)
    size = len(rows_by_process[jax.process_index()]) if jax.process_index() in rows_by_process else len(rows)
    slices = {process: min(process_rows) // size for process, process_rows in rows_by_process.items()}
    for process, process_rows in rows_by_process.items():
        first = slices[process] * size
        if process_rows != set(range(first, first + size)):
            return 0, 1
    if len(rows) % size:
        return 0, 1
    return (slices[jax.process_index()] if len(rows) > size else 0), len(rows) // size


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], num_slices: int = 1) -> dict[str, jax.Array]:
    """Put a host batch on the mesh, with its rows split as in `batch_sharding`.

    Args:
      mesh: the device mesh.
      batch: arrays [R, ...], the whole batch, or arrays [R / num_slices, ...], this process's slice of it.
      num_slices: the number of slices that processes divide the batch into; see `process_slice`.
    """
    rows = batch_sharding(mesh)
    if rows.is_fully_addressable:
        return jax.device_put(dict(batch), rows)
    if num_slices == 1:
        return {key: jax.make_array_from_callback(array.shape, rows, array.__getitem__) for key, array in batch.items()}
    return {
        key: jax.make_array_from_process_local_data(rows, array, (num_slices * array.shape[0], *array.shape[1:]))
        for key, array in batch.items()
    }


def on_host(array: Any) -> np.ndarray:
    """Return an array as numpy. If other processes hold shards of it, all of them must call this."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
        array = laid_out(array, replicated(array.sharding.mesh))
    return np.asarray(array)


def laid_out(tree: Any, shardings: Any) -> Any:
    """Return arrays in other shardings on the same devices. All processes that hold them must call this."""
    return jax.jit(_identity, out_shardings=shardings)(tree)  # a named function, so that it compiles once


def _identity(tree: Any) -> Any:
    return tree


def check_platform(requested: str) -> None:
    """Refuse to run on other devices than requested: JAX silently takes the CPU if an accelerator is missing.

    Args:
      requested: the setting `platform`; "" is any.

    Raises:
      UserError: JAX runs on another platform, or finds no device of a kind that JAX_PLATFORMS names.
    """
    try:
        actual = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # AssertionError if JAX has no package for any of them
        reason = one_line(error) if str(error) else "no such backend"
        raise MachineError(f"JAX finds no device of a kind that JAX_PLATFORMS names: {reason}") from error
    if requested and actual != requested:
        raise MachineError(
            f"config key platform is {requested!r}, but JAX finds only {actual} devices: install JAX's package for "
            f"{requested} on a machine that has one, or leave platform empty"
        )


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """Make `constrain` use this mesh inside the block; for use inside a jitted function."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: jax.Array, *specs: PartitionSpec) -> jax.Array:
    """Lay out `x` by each of `specs` in turn on the mesh of `on_mesh`; return it unchanged without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, _fit(mesh, spec, x.shape))
    return x


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the sharding of every leaf of a tree of arrays: parameters, or optimizer state over them.

    A leaf's path is matched against `RULES`. An array's axis is left whole if its mesh axis does not divide it.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        spec = next(spec for pattern, spec in RULES if re.search(pattern, name))
        return NamedSharding(mesh, _fit(mesh, spec, np.shape(leaf)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def update_group(mesh: Mesh) -> int:
    """Return the number of neighbours on `data` that share the update of a matrix; see `update_shardings`."""
    return math.gcd(mesh.shape["data"], UPDATE_GROUP)


def update_shardings(mesh: Mesh, tree: Any) -> Any:
    """Return the shardings in which the leaves of a tree of parameters, or of optimizer state, are updated.

    This is `param_shardings`, with the rows of a matrix also split, if possible, over groups of up to `UPDATE_GROUP`
    neighbours on `data`. So a result that is the same on all devices of that axis is computed once per group (Xu et
    al., "Automatic Cross-Replica Sharding of Weight Update in Data-Parallel Training", 2020).
    """
    group = update_group(mesh)
    sizes = (mesh.shape["data"] // group, group, mesh.shape["fsdp"], mesh.shape["tensor"])
    groups: Any = AbstractMesh(sizes, ("groups", *AXES), axis_types=(AxisType.Auto,) * 4)
    if isinstance(mesh, Mesh):
        groups = Mesh(mesh.devices.reshape(sizes), groups.axis_names, axis_types=groups.axis_types)

    def split(leaf: Any, layout: NamedSharding) -> NamedSharding:
        if group == 1 or np.ndim(leaf) < 2:
            return layout
        rows, *others = (*layout.spec, None, None)[: np.ndim(leaf)]
        spec = PartitionSpec(("data",) if rows is None else (rows, "data"), *others)
        return NamedSharding(groups, spec) if _fit(groups, spec, np.shape(leaf)) == spec else layout

    return jax.tree.map(split, tree, param_shardings(mesh, tree))


def is_table(path: tuple[Any, ...], leaf: Any) -> bool:
    """Return whether a leaf is a table of words that is longer than wide.

    Tables of token types, positions, and distances are small. DeBERTa also applies dropout to all of its distances, and
    the mask depends on their number.
    """
    shape = np.shape(leaf)
    return path_name(path).endswith("word_embeddings.embedding") and len(shape) == 2 and shape[0] > shape[1]


def path_name(path: tuple[Any, ...]) -> str:
    """Return a leaf's dotted path, like `encoder.layers.0.output.kernel`, from its `jax.tree_util` path."""
    keys = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))) for entry in path]
    return ".".join(str(key) for key in keys).removesuffix(".value")


def names_of(tree: Any) -> tuple[str, ...]:
    """Return the dotted paths of the leaves of a tree."""
    return tuple(path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree))


@functools.lru_cache(maxsize=1024)  # the layers of an encoder repeat the same few shapes
def _fit(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    """Return the spec without the axes that do not divide the shape."""
    if len(spec) > len(shape):
        return PartitionSpec()

    def shards(axes: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

    return PartitionSpec(*(axes if size % shards(axes) == 0 else None for axes, size in zip(spec, shape, strict=False)))
