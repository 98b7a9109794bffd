"""The mesh, the rules that lay parameters out on it, and the placing of a batch.

One mesh with three axes serves every run, from one CPU to a pod: a batch is split over
`data × fsdp`, parameters over `fsdp` and `tensor` by the rules below. On a `n×1×1` mesh (the
default) the rules leave every parameter whole, which is plain data parallelism.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from xtransfer.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_SPEC = PartitionSpec(("data", "fsdp"))

# First match wins; the pattern is searched in the dotted path of a parameter. Kernels that widen are
# split by output over `tensor`, those that narrow by input, so that a layer needs one reduction.
RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"\.(query|key|value|intermediate)\.kernel$", PartitionSpec("fsdp", "tensor")),
    (r"\.output\.kernel$", PartitionSpec("tensor", "fsdp")),
    (r"\.(word|position)_embeddings\.embedding$", PartitionSpec("tensor", "fsdp")),
    (r"kernel$", PartitionSpec("fsdp", None)),
    (r"", PartitionSpec()),
)


def make_mesh(shape: Sequence[int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with axes `AXES`; by default every device is on `data`.

    A first size of 0 stands for all devices that the other two leave.
    """
    devices = jax.devices() if devices is None else devices
    data, *others = (0, 1, 1) if shape is None else shape
    sizes = (data or max(len(devices) // math.prod(others), 1), *others)
    if len(sizes) != len(AXES) or math.prod(sizes) != len(devices):
        raise UserError(f"mesh {'×'.join(map(str, sizes))} does not fit {len(devices)} devices: axes are {AXES}")
    return jax.make_mesh(sizes, AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (the leading axis) split over `data × fsdp`."""
    return NamedSharding(mesh, BATCH_SPEC)


def data_shards(mesh: Mesh) -> int:
    """How many parts a batch is split into: its number of rows must be a multiple of this."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def place_batch(mesh: Mesh, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts a host batch (arrays [R, ...]) on the mesh, rows split as `batch_sharding` says."""
    return jax.device_put(dict(batch), batch_sharding(mesh))


def param_shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every leaf of a tree of arrays (parameters, or optimizer state over them).

    A leaf's path is matched against `RULES`. An axis of an array that its mesh axis does not divide
    is left whole.
    """

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        spec = next(spec for pattern, spec in RULES if re.search(pattern, path_name(path)))
        return NamedSharding(mesh, _fitted(mesh, spec, np.shape(leaf)))

    return jax.tree_util.tree_map_with_path(leaf_sharding, tree)


def path_name(path: tuple[Any, ...]) -> str:
    """`encoder.layers.0.output.kernel` from the path of a leaf as `jax.tree_util` gives it."""
    keys = [getattr(entry, "key", getattr(entry, "name", getattr(entry, "idx", entry))) for entry in path]
    return ".".join(str(key) for key in keys).removesuffix(".value")


def _fitted(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]) -> PartitionSpec:
    if len(spec) > len(shape):
        return PartitionSpec()
    fitted = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, shape, strict=False)]
    return PartitionSpec(*fitted)
