"""The mesh, the rules that lay parameters out on it, and the placing of a batch.

One mesh with three axes serves every run, from one CPU to a pod: a batch is split over
`data × fsdp`, parameters over `fsdp` and `tensor` by the rules below. On a `n×1×1` mesh (the
default) the rules leave every parameter whole, which is data parallelism; the update of matrices
and the optimizer's state are split over neighbours on `data` all the same, see `update_shardings`.
"""

import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from xtransfer.errors import UserError, one_line

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))
# Embeddings are split by their size over `fsdp`. A device looks up its part of the vectors of all rows of its group,
# then trades parts for whole vectors of its own rows: a table is much larger than what is looked up in it.
LOOKUP_IDS, LOOKUP_PARTS = PartitionSpec("data"), PartitionSpec("data", None, "fsdp")

# More parts of a matrix of 768 rows would not be whole tiles of a TPU's memory, which reduces and gathers tiles.
UPDATE_GROUP = 8

# First match wins; the pattern is searched in the dotted path of a parameter. Kernels that widen are
# split by output over `tensor`, those that narrow by input, so that a layer needs one reduction.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"\.(query|key|value|intermediate)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\.output\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"\.(word|position)_embeddings\.embedding$", PartitionSpec("tensor", "fsdp")),
    (r"(^|\.)(project|dense|transform|head|next_sentence)\.kernel$", PartitionSpec("fsdp", None)),
    (r"", PartitionSpec()),
)


def make_mesh(shape: Sequence[int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with axes `AXES`; by default every device is on `data`.

    A first size of 0 stands for all devices that the other two leave.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(shape or (0, 1, 1), len(devices))
    if math.prod(sizes) != len(devices):
        raise UserError(
            f"config keys mesh.data, mesh.fsdp, mesh.tensor: {'×'.join(map(str, sizes))} does not fit {len(devices)} "
            "devices: their product has to be that; mesh.data = 0 takes what the others leave"
        )
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(shape: Sequence[int], devices: int) -> tuple[int, ...]:
    """Sizes of data, fsdp and tensor, a first one of 0 being what the others leave of so many devices (at least 1)."""
    data, fsdp, tensor = shape
    return data or max(devices // (fsdp * tensor), 1), fsdp, tensor


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) split over `data × fsdp`."""
    return NamedSharding(mesh, BATCH_SPEC)


def data_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into: its number of rows must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def process_slice(mesh: Mesh) -> tuple[int, int]:
    """(p, n): of n equal runs of a batch's rows this process's devices hold the p-th, and need no other.

    (0, 1), the whole batch, where the rows of some process are no such run: TPU meshes follow the wires of the chips,
    not their hosts. Processes along `tensor` share a part.
    """
    rows = mesh.devices.reshape(data_shards(mesh), -1)
    held: dict[int, set[int]] = {}
    for row, devices in enumerate(rows):
        for device in devices:
            held.setdefault(device.process_index, set()).add(row)
    size = len(held[jax.process_index()]) if jax.process_index() in held else len(rows)
    runs = {process: min(own) // size for process, own in held.items()}
    if len(rows) % size or any(own != set(range(runs[p] * size, (runs[p] + 1) * size)) for p, own in held.items()):
        return 0, 1
    return (runs[jax.process_index()] if len(rows) > size else 0), len(rows) // size


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray], parts: int = 1) -> dict[str, jax.Array]:
    """Puts a host batch (arrays [R, ...]) on the mesh, rows split as `batch_sharding` says.

    Each process gives the whole batch or, of `parts` parts, its own (see `process_slice`), of R ÷ parts rows.
    """
    rows = batch_sharding(mesh)
    if rows.is_fully_addressable:
        return jax.device_put(dict(batch), rows)
    if parts == 1:
        return {key: jax.make_array_from_callback(array.shape, rows, array.__getitem__) for key, array in batch.items()}
    return {
        key: jax.make_array_from_process_local_data(rows, array, (parts * array.shape[0], *array.shape[1:]))
        for key, array in batch.items()
    }


def on_host(array: Any) -> np.ndarray:
    """An array as numpy, also where other processes hold parts of it: they all have to call this then."""
    if isinstance(array, jax.Array) and not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding) and isinstance(array.sharding.mesh, Mesh)
        array = jax.jit(_same, out_shardings=replicated(array.sharding.mesh))(array)
    return np.asarray(array)


def _same(x: jax.Array) -> jax.Array:
    return x


def check_platform(wanted: str) -> None:
    """Refuses to work on other devices than were asked for: JAX takes the CPU unasked where an accelerator is absent.

    Raises:
      UserError: JAX took another platform than `config.platform` ("" = any), or has none that JAX_PLATFORMS names.
    """
    try:
        found = jax.default_backend()
    except (RuntimeError, AssertionError) as error:  # the latter where JAX has no package for any of them
        reason = one_line(error)
        raise UserError(f"JAX finds no device of a kind that JAX_PLATFORMS names: {reason}") from error
    if wanted and found != wanted:
        raise UserError(
            f"config key platform is {wanted!r}, but JAX finds only {found} devices here: install JAX's package for "
            f"{wanted} on a machine that has one, or leave platform empty"
        )


def on_mesh(mesh: Mesh) -> contextlib.AbstractContextManager[Any]:
    """While it lasts, `constrain` is about this mesh; for use inside of a function that is jitted."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def constrain(x: jax.Array, *specs: PartitionSpec) -> jax.Array:
    """`x` laid out by one of `specs` after the other on the mesh of `on_mesh`; without one, `x` as it is."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, _fitted(mesh, spec, x.shape))
    return x


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays (parameters, or optimizer state over them).

    A leaf's path is matched against `RULES`. An axis of an array that its mesh axis does not divide
    is left whole.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = next(spec for pattern, spec in RULES if re.search(pattern, path_name(path)))
        return NamedSharding(mesh, _fitted(mesh, spec, np.shape(leaf)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def update_shardings(mesh: Mesh, tree: Any) -> Any:
    """Where every leaf of a tree of parameters, or of optimizer state over them, is updated.

    As `param_shardings`, and the rows of a matrix are split, where they can be, over groups of up to `UPDATE_GROUP`
    neighbours on `data`: what would be the same on all devices of that axis is worked out once a group (Xu et al.,
    "Automatic Cross-Replica Sharding of Weight Update in Data-Parallel Training", 2020).
    """
    group = math.gcd(mesh.shape["data"], UPDATE_GROUP)
    sizes = (mesh.shape["data"] // group, group, mesh.shape["fsdp"], mesh.shape["tensor"])
    groups: Any = AbstractMesh(sizes, ("groups", *AXES), axis_types=(AxisType.Auto,) * 4)
    if isinstance(mesh, Mesh):
        groups = Mesh(mesh.devices.reshape(sizes), groups.axis_names, axis_types=groups.axis_types)

    def split(leaf: Any, layout: NamedSharding) -> NamedSharding:
        if group == 1 or np.ndim(leaf) < 2:
            return layout
        rows, *others = (*layout.spec, None, None)[: np.ndim(leaf)]
        spec = PartitionSpec(("data",) if rows is None else (rows, "data"), *others)
        return NamedSharding(groups, spec) if _fitted(groups, spec, np.shape(leaf)) == spec else layout

    return jax.tree.map(split, tree, param_shardings(mesh, tree))


def path_name(path: tuple[Any, ...]) -> str:
    """`encoder.layers.0.output.kernel` from the path of a leaf as `jax.tree_util` gives it."""
    keys = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))) for entry in path]
    return ".".join(str(key) for key in keys).removesuffix(".value")


def _fitted(mesh: Mesh | AbstractMesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    if len(spec) > len(shape):
        return PartitionSpec()

    def parts(axes: str | tuple[str, ...] | None) -> int:
        return math.prod(mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))

    return PartitionSpec(*(axes if size % parts(axes) == 0 else None for axes, size in zip(spec, shape, strict=False)))
