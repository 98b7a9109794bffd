"""AdamW with the usual settings for fine-tuning encoders, and frozen parameters."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from xtransfer.errors import ConfigError
from xtransfer.runtime.sharding import names_of, path_name
from xtransfer.train.depth import scale_by_depth


def adamw(
    *,
    weight_decay: float,
    clip_norm: float,
    frozen: Sequence[str] = (),
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    layer_decay: float = 1.0,
    num_layers: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW with clipping of the gradient's global norm.

    Its `update` takes the learning rate of the step as the argument `learning_rate`, so that one compiled step serves
    every schedule. Biases and LayerNorm parameters do not decay.

    Args:
      weight_decay: AdamW's weight decay.
      clip_norm: the largest norm of the gradient; 0 turns clipping off.
      frozen: regular expressions of dotted paths. Parameters that one of them matches are not trained and need no
        optimizer state.
      b1: the decay rate of the mean of gradients.
      b2: the decay rate of the mean of their squares.
      eps: added to the root of the mean of squares.
      layer_decay: the factor on the learning rate per level from the head down (see `depth`). Weight decay, which goes
        with the rate, shrinks too.
      num_layers: the number of layers of the encoder, for `layer_decay`.

    Raises:
      UserError: an expression matches no parameter, or they match all; raised when the state is created.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    trained = optax.chain(
        clip,
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, _decays),
        _scale_by_learning_rate(),
    )
    if layer_decay < 1:
        trained = optax.chain(trained, scale_by_depth(layer_decay, num_layers))
    if not frozen:
        return trained
    transforms = {"trained": trained, "frozen": optax.set_to_zero()}
    return optax.partition(transforms, lambda params: _labels(params, frozen))


def _scale_by_learning_rate() -> optax.GradientTransformationExtraArgs:
    def update(updates: Any, state: Any, params: Any = None, *, learning_rate: Any, **_: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda update: -learning_rate * update, updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def _decays(params: Any) -> Any:
    ends = (".kernel", ".embedding", ".adapter.a", ".adapter.b")
    return jax.tree_util.tree_map_with_path(lambda path, leaf: path_name(path).endswith(ends) and leaf.ndim > 1, params)


def _labels(params: Any, patterns: Sequence[str]) -> Any:
    frozen = frozen_names(names_of(params), patterns)
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if path_name(path) in frozen else "trained", params
    )


def frozen_names(names: Sequence[str], patterns: Sequence[str]) -> set[str]:
    """Return the names, of all parameters, that one of the patterns matches.

    Raises:
      UserError: a pattern matches none, or they match all.
    """
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise ConfigError(f"frozen pattern {pattern!r} matches no parameter; they are named like {names[0]}")
    frozen = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    if len(frozen) == len(names):
        shown = ", ".join(map(repr, patterns))
        raise ConfigError(f"frozen patterns {shown} match every parameter, so nothing would be trained: keep one free")
    return frozen
