"""Random starts for the last layers of an encoder, which pretraining has specialised in its own task.

Zhang et al., "Revisiting Few-sample BERT Fine-tuning", ICLR 2021.
"""

import re
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from xtransfer.config import ModelConfig
from xtransfer.errors import ConfigError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.runtime.sharding import path_name


def check(role: str, settings: ModelConfig, architecture: EncoderConfig, names: Sequence[str]) -> None:
    """Refuse more layers than there are, and layers that would stay random because they are frozen.

    Args:
      role: "teacher" or "student".
      settings: the role's settings.
      architecture: the architecture of its checkpoint.
      names: the dotted paths of the parameters.
    """
    count, layers = settings.reinit_layers, architecture.num_layers
    if count > layers:
        raise ConfigError(
            f"config key {role}.reinit_layers is {count}, but {settings.checkpoint} has only {layers} layers"
        )
    for name in names:
        pattern = next((pattern for pattern in settings.frozen if re.search(pattern, name)), None)
        if pattern is not None and _is_drawn(name, layers - count):
            raise ConfigError(
                f"config key {role}.frozen: {pattern!r} matches {name}, which would stay random, because "
                f"{role}.reinit_layers is {count}: leave one of them out"
            )


def reinitialised(params: Any, first: int, *, seed: int, scale: float) -> Any:
    """Return the parameters with new ones in the layers from `first` on: normal kernels, and neutral biases and norms.

    A number depends on the seed, the parameter's path, and its place in it only, so the mesh does not change it.

    Args:
      params: the parameters of a classifier, laid out on their devices.
      first: the first layer to draw.
      seed: the run's seed.
      scale: the standard deviation of kernels, the checkpoint's `initializer_range`.
    """

    def draw(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        if not _is_drawn(name, first):
            return leaf
        numbers = np.full(leaf.shape, 1.0 if name.endswith("scale") else 0.0, np.float32)
        if name.endswith("kernel"):
            generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
            numbers = (scale * generator.standard_normal(leaf.shape)).astype(np.float32)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, numbers.__getitem__)

    return jax.tree_util.tree_map_with_path(draw, params)


def _is_drawn(name: str, first: int) -> bool:
    match = re.match(r"encoder\.layers\.(\d+)\.", name)
    return match is not None and int(match[1]) >= first
