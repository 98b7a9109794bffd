"""AdamW as encoders are fine-tuned with it, and the parameters it leaves alone."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax

from xtransfer.errors import UserError
from xtransfer.runtime.sharding import path_name

SCHEDULES = ("linear", "cosine")


def schedule(kind: str, *, peak: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """Linear warm-up from 0 to `peak`, then a linear or cosine way down to 0 at `steps`."""
    warmup = round(steps * warmup_fraction)
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    if kind != "linear":
        raise ValueError(f"schedule {kind!r}: one of {', '.join(SCHEDULES)}")
    down = optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), down], [warmup])


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float,
    clip_norm: float,
    frozen: Sequence[str] = (),
    b2: float = 0.999,
) -> optax.GradientTransformation:
    """AdamW with clipping of the gradient's global norm (0 = off).

    Biases and LayerNorm parameters do not decay. Parameters whose dotted path one of the regular
    expressions `frozen` matches are not trained and cost no optimizer state; an expression that
    matches none is a `UserError` when the state is made.
    """
    clip = optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity()
    trained = optax.chain(clip, optax.adamw(learning_rate, b2=b2, weight_decay=weight_decay, mask=_decays))
    if not frozen:
        return trained
    parts = {"trained": trained, "frozen": optax.set_to_zero()}
    return optax.partition(parts, lambda params: _frozen_labels(params, frozen))


def _decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: path_name(path).endswith((".kernel", ".embedding")) and leaf.ndim > 1, params
    )


def _frozen_labels(params: Any, patterns: Sequence[str]) -> Any:
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"frozen pattern {pattern!r} matches no parameter; they are named like {names[0]}")
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "frozen" if any(re.search(p, path_name(path)) for p in patterns) else "trained", params
    )
