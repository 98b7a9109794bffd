"""Who sees whom in a packed row: tokens of one segment, in local layers only up to some distance.

Shapes: R rows, S tokens per row, K keys and Q queries, which are tokens of the rows.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

MASKED = -1e9  # added to a float32 score: exp gives exactly 0, and a row that is masked entirely stays finite
LONGEST_AT_ONCE = 512  # tokens of the longest rows whose attention is computed at once; see `attention.attend`


@partial(jax.tree_util.register_dataclass, data_fields=("segment_ids", "bias"), meta_fields=("window",))
@dataclass(frozen=True, eq=False)
class Visibility:
    """Who sees whom in each row. `window` is static, because it decides which arrays attention computes.

    Attributes:
      segment_ids: [R, S] int32. Tokens of different segments do not see each other.
      window: the largest distance over which tokens see each other, in tokens; None is unlimited.
      bias: [R, 1, K, Q] float32, the bias of the scores if attention is computed at once, by default `segment_bias` of
        these two; None if it is computed in blocks.
    """

    segment_ids: jax.Array
    window: int | None
    bias: jax.Array | None

    @classmethod
    def of_segments(cls, segment_ids: jax.Array, window: int | None = None, *, at_once: bool = False) -> "Visibility":
        """Return the visibility within segments, with a bias if rows are short or `at_once` is true."""
        at_once = at_once or segment_ids.shape[1] <= LONGEST_AT_ONCE
        return cls(segment_ids, window, segment_bias(segment_ids, window) if at_once else None)

    def of_queries(self, positions: jax.Array) -> "Visibility":
        """Return what the tokens at positions [R, Q] int32 of each row see, with a bias [R, 1, S, Q]."""
        keys = self.segment_ids, jnp.arange(self.segment_ids.shape[1])
        queries = jnp.take_along_axis(self.segment_ids, positions, axis=1), positions
        return replace(self, bias=bias_between(keys, queries, self.window))


def segment_bias(segment_ids: jax.Array, window: int | None = None) -> jax.Array:
    """Return the bias of the scores, [R, 1, S, S] float32; see `Visibility` for the arguments, and `bias_between`."""
    position = jnp.arange(segment_ids.shape[1])
    return bias_between((segment_ids, position), (segment_ids, position), window)


def bias_between(
    keys: tuple[jax.Array, jax.Array], queries: tuple[jax.Array, jax.Array], window: int | None
) -> jax.Array:
    """Return the bias of scores, [R, 1, K, Q] float32: 0 between tokens that see each other, `MASKED` elsewhere.

    Args:
      keys: the segments [R, K] int32 and the positions in the row [K] int32 of the keys.
      queries: the same of the queries, [R, Q] and [Q], or [R, Q] if each row has its own positions.
      window: the largest distance over which tokens see each other, in tokens; None is unlimited.
    """
    (key_segments, key_positions), (query_segments, query_positions) = keys, queries
    seen = key_segments[:, None, :, None] == query_segments[:, None, None, :]  # [R, 1, K, Q]
    if window is not None:
        seen &= jnp.abs(key_positions[:, None] - query_positions[..., None, None, :]) <= window  # [R, 1, K, Q]
    return jnp.where(seen, 0.0, MASKED).astype(jnp.float32)
