"""The depth of each parameter in an encoder, and learning rates that shrink from the head down to the embeddings.

Lower layers hold what any task needs, and should move less: Howard and Ruder, "Universal Language Model Fine-tuning for
Text Classification", ACL 2018; Clark et al., "ELECTRA", ICLR 2020.
"""

import re

import jax
import optax

from xtransfer.runtime.sharding import path_name

_EMBEDDINGS = re.compile(r"^encoder\.(embeddings|relative_embeddings|relative_norm)\.")  # DeBERTa's are of distances
_LAYER = re.compile(r"^encoder\.layers\.(\d+)\.")
_AFTER_LAYERS = re.compile(r"^encoder\.final_norm\.")


def depth(name: str, num_layers: int) -> int:
    """Return the depth of a parameter: 0 in the embeddings, i + 1 in layer i, and `num_layers` + 1 in the head.

    The norm after the last layer belongs to that layer, and the pooler to the head.

    Args:
      name: the parameter's dotted path in a classifier.
      num_layers: the number of layers of the encoder.

    Raises:
      ValueError: a part of an encoder that has no depth here.
    """
    if _EMBEDDINGS.match(name):
        return 0
    if match := _LAYER.match(name):
        return int(match[1]) + 1
    if _AFTER_LAYERS.match(name):
        return num_layers
    if name.startswith("encoder."):
        raise ValueError(f"parameter {name} has no depth: add it to xtransfer/train/depth.py")
    return num_layers + 1


def scale_by_depth(decay: float, num_layers: int) -> optax.GradientTransformation:
    """Return the transformation that multiplies updates by `decay` for each level between them and the head.

    Args:
      decay: the factor per level.
      num_layers: the number of layers of the encoder.
    """

    def scale(path: tuple[object, ...], update: jax.Array) -> jax.Array:
        return update * decay ** (num_layers + 1 - depth(path_name(path), num_layers))

    return optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(scale, updates))
