"""Learning rate schedules: linear warm-up, and what follows it. A new one is a new entry in `_AFTER_WARMUP`."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import optax

from xtransfer.config import ModelConfig, PretrainConfig


def learning_rates(settings: ModelConfig | PretrainConfig) -> np.ndarray:
    """Return the learning rate of every step of a run, [steps] float32.

    A training step takes its rate as an argument, so runs with other rates or lengths share one program.

    Args:
      settings: the settings, whose `steps` are known (see `ModelConfig.resolved`).
    """
    rate = schedule(
        settings.schedule,
        peak=settings.learning_rate,
        steps=settings.steps,
        warmup_fraction=settings.warmup_fraction,
    )
    return np.asarray(jax.jit(rate)(np.arange(settings.steps)), np.float32)


def schedule(kind: str, *, peak: float, steps: int, warmup_fraction: float) -> optax.Schedule:
    """Return linear warm-up from 0 to `peak`, followed by one of `xtransfer.config.SCHEDULES`.

    "constant" stays at `peak`, and "linear" and "cosine" fall to 0 at `steps`. "inverse_sqrt" falls with the square
    root of the step: with w steps of warm-up, it is half of `peak` at step 4 · w (Vaswani et al., "Attention Is All You
    Need", 2017, section 5.3). Without warm-up, w is 1.

    Args:
      kind: the schedule.
      peak: the highest rate.
      steps: the number of training steps.
      warmup_fraction: the share of them that is warm-up.
    """
    warmup = round(steps * warmup_fraction)
    if kind == "cosine":
        return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))
    if kind not in _AFTER_WARMUP:
        raise ValueError(f"schedule {kind!r}: one of cosine, {', '.join(_AFTER_WARMUP)}")
    after = _AFTER_WARMUP[kind](peak, steps, warmup)
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warmup, 1)), after], [warmup])


def _linear(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.linear_schedule(peak, 0.0, max(steps - warmup, 1))


def _constant(peak: float, steps: int, warmup: int) -> optax.Schedule:
    return optax.constant_schedule(peak)


def _inverse_sqrt(peak: float, steps: int, warmup: int) -> optax.Schedule:
    first = max(warmup, 1)
    return lambda count: peak * math.sqrt(first) / jnp.sqrt(first + count)


_AFTER_WARMUP: Mapping[str, Callable[[float, int, int], optax.Schedule]] = MappingProxyType(
    {"constant": _constant, "linear": _linear, "inverse_sqrt": _inverse_sqrt}
)
"""From (peak, steps, warm-up steps) to the schedule after warm-up, which counts from 0."""
