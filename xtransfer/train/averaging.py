"""An exponential moving average of the weights, as precise in a short run as in a long one.

The average of t steps weights the parameters after step i by decay^(t − i), and the weights sum to 1. So the parameters
before training never count, unlike in an average that starts from them (bias correction: Kingma and Ba, "Adam", ICLR
2015; averages of weights: Polyak and Juditsky, 1992).
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp


def moved(average: Mapping[str, jax.Array], params: Mapping[str, jax.Array], step: jax.Array, decay: float) -> dict:
    """Return the average after one more step.

    Args:
      average: the average before it, by name; ignored in step 1.
      params: the parameters after it, by name.
      step: the number of this step, from 1; an int32 scalar.
      decay: above 0 and below 1.
    """
    # (1 − decay) / (1 − decay^step); expm1 keeps the precision that the subtraction would lose.
    share = (1 - decay) / -jnp.expm1(step.astype(jnp.float32) * math.log(decay))
    share = jnp.where(step == 1, 1.0, share)
    return {name: old + (params[name] - old) * share.astype(old.dtype) for name, old in average.items()}
