"""Fine-tuning with low-rank adapters: which layers get them, how they start, and how they are merged.

The encoder is frozen, without gradients and optimizer state. Its adapters are trained, and everything outside the
encoder: pooler and head. See `models.adapter` for the source of the method.
"""

import functools
import re
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xtransfer.config import LoraConfig
from xtransfer.errors import ConfigError
from xtransfer.models.adapter import Adapter
from xtransfer.models.layers import Linear
from xtransfer.runtime.sharding import names_of, param_shardings, path_name
from xtransfer.train.state import overlay, select

_ENCODER = "encoder."


def adapted(model: nnx.Module, settings: LoraConfig, frozen: Sequence[str] = ()) -> nnx.Module:
    """Add an adapter to every linear layer of the encoder that is a target, and return the model.

    Args:
      model: a classifier, which may be abstract.
      settings: the rank, the scale, and the targets.
      frozen: regular expressions of dotted paths. A kernel that one of them matches gets no adapter.

    Raises:
      UserError: a target matches no kernel of a linear layer in the encoder, or all of them are frozen.
    """
    layers = {
        f"{'.'.join(map(str, path))}.kernel": module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, Linear) and path[0] == _ENCODER[:-1]
    }
    for pattern in settings.targets:
        if not any(re.search(pattern, name) for name in layers):
            raise ConfigError(
                f"lora.targets {pattern!r} matches no kernel of a linear layer in the encoder; they are named like "
                f"{next(iter(layers))}"
            )
    targets = [name for name in layers if _matches(settings.targets, name) and not _matches(frozen, name)]
    if not targets:
        raise ConfigError("frozen patterns match every kernel that lora.targets names: leave some of them free")
    for name in targets:
        layer = layers[name]
        largest = min(layer.in_features, layer.out_features)
        if settings.rank > largest:
            raise ConfigError(f"lora.rank is {settings.rank}: the largest that makes sense for {name} is {largest}")
        scale = settings.alpha / settings.rank
        layer.adapter = Adapter(layer.in_features, layer.out_features, settings.rank, scale, layer.dtype or jnp.float32)
    return model


def trained_names(names: Collection[str], frozen: Collection[str]) -> frozenset[str]:
    """Return the names of the parameters to train: adapters, and what is neither in the encoder nor frozen."""
    outside = {name for name in names if not name.startswith(_ENCODER)} - set(frozen)
    return frozenset(outside | {name for name in names if _is_adapter(name)})


def attached(params: Any, shapes: Any, mesh: jax.sharding.Mesh, *, seed: int) -> Any:
    """Return the parameters of a classifier with new adapters, which do not change its outputs.

    The first matrix is normal with a variance of 1 / inputs, and the second is zero. A number depends on the seed, the
    adapter's path, and its place in it only, so the mesh does not change it.

    Args:
      params: the parameters of the classifier.
      shapes: the shapes of the parameters with adapters.
      mesh: the mesh that they are laid out on.
      seed: the run's seed.
    """
    plain = select(params, names_of(params))

    def fill(path: tuple[Any, ...], leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
        name = path_name(path)
        if name in plain:
            return plain[name]
        numbers = np.zeros(leaf.shape, np.float32)
        if name.endswith(".a"):
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            numbers = (generator.standard_normal(leaf.shape) / np.sqrt(leaf.shape[0])).astype(np.float32)
        return jax.make_array_from_callback(leaf.shape, sharding, numbers.__getitem__)

    return jax.tree_util.tree_map_with_path(fill, shapes, param_shardings(mesh, shapes))


def merger(shapes: Any, mesh: jax.sharding.Mesh, settings: LoraConfig) -> Callable[[Any], Any]:
    """Return the function from parameters with adapters to those of a plain classifier with the same outputs.

    Only adapted kernels are computed; all other arrays are shared.

    Args:
      shapes: the shapes of the plain classifier's parameters.
      mesh: the mesh that both are laid out on.
      settings: the rank and the scale.
    """
    layout = param_shardings(mesh, shapes)
    scale = settings.alpha / settings.rank

    @functools.cache
    def add(names: tuple[str, ...]) -> Any:
        def sums(parts: dict[str, tuple[jax.Array, jax.Array, jax.Array]]) -> dict[str, jax.Array]:
            return {
                name: kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
                for name, (kernel, a, b) in parts.items()
            }

        return jax.jit(sums, out_shardings=select(layout, names))

    def merge(params: Any) -> Any:
        values = select(params, names_of(params))
        parts = {
            f"{name.removesuffix('.adapter.a')}.kernel": (
                values[f"{name.removesuffix('.adapter.a')}.kernel"],
                values[name],
                values[f"{name.removesuffix('.a')}.b"],
            )
            for name in values
            if name.endswith(".adapter.a")
        }
        return overlay(shapes, values | add(tuple(parts))(parts))

    return merge


def _is_adapter(name: str) -> bool:
    return name.endswith((".adapter.a", ".adapter.b"))


def _matches(patterns: Sequence[str], name: str) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
