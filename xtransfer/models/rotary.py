"""Rotary position embeddings: queries and keys are turned by angles that grow with the position.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. Coordinate i of the first half
of a head is paired with coordinate i of the second half, as in GPT-NeoX.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xtransfer.models.visibility import Visibility


class Rotation(NamedTuple):
    """The cosines and sines of the angles of every token, each [R, 1, D / 2, S] float32."""

    cos: jax.Array
    sin: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Turn queries or keys [R, N, D, S], in float32; the dtype stays the same."""
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=2)  # [R, N, D / 2, S]
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return jnp.concatenate(turned, axis=2).astype(x.dtype)  # [R, N, D, S]

    def at(self, positions: jax.Array | None) -> "Rotation":
        """Return the angles of the tokens at positions [R, Q] int32, or of all tokens for None."""
        if positions is None:
            return self
        index = positions[:, None, None, :]
        return Rotation(*(jnp.take_along_axis(x, index, axis=3) for x in self))  # [R, 1, D / 2, Q]


class RotaryContext(NamedTuple):
    """What a layer with rotary positions reads beside its input.

    Attributes:
      visibility: who sees whom.
      rotation: the rotation of queries and keys.
    """

    visibility: Visibility
    rotation: Rotation


def rotation(position_ids: jax.Array, head_size: int, theta: float, *, divisor: float = 1.0) -> Rotation:
    """Return the rotation of each token by its position.

    Args:
      position_ids: [R, S] int32.
      head_size: D, which is even.
      theta: the base; pair i turns by position · theta^(−2i / D).
      divisor: all angles are divided by this number, so that a model reads longer texts.
    """
    speeds = 1.0 / (theta ** (np.arange(0, head_size, 2, dtype=np.float32) / head_size)) / divisor  # [D / 2]
    angles = position_ids.astype(jnp.float32)[:, None, None, :] * jnp.asarray(speeds, jnp.float32)[:, None]
    return Rotation(jnp.cos(angles), jnp.sin(angles))
