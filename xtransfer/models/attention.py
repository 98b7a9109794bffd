"""Attention within segments: the choice between all scores at once and a block of queries at a time.

Rows of up to 512 tokens, and scores that depend on more than queries and keys (DeBERTa's), go to `attend_at_once`,
whose memory is quadratic in the length of a row. Longer rows go to `attend_in_blocks`, whose memory is linear. Both
draw the same dropout masks. If the last layer computes only the tokens that the head reads, these few queries go to
`attend_at_once` in rows of any length.

Fused kernels, such as those of `jax.nn.dot_product_attention`, would draw other masks or none, and need an accelerator
to be tested.
"""

import jax

from xtransfer.models.attention_at_once import attend_at_once
from xtransfer.models.attention_in_blocks import attend_in_blocks
from xtransfer.models.dropout import DropoutKey, keep_mask
from xtransfer.models.rowwise import rowwise
from xtransfer.models.visibility import Visibility


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    visibility: Visibility,
    dropout_key: DropoutKey | None,
    rate: float,
    relative: jax.Array | None = None,
) -> jax.Array:
    """Return softmax attention with dropout of its probabilities, [R, N, D, Q].

    Args:
      query: [R, N, D, Q], scaled already; Q is S if the visibility has no bias.
      key: [R, N, D, S].
      value: [R, N, D, S].
      visibility: who sees whom; its bias decides how attention is computed.
      dropout_key: the key of the dropout mask; None turns dropout off.
      rate: the dropout rate of the probabilities.
      relative: [R, N, S (keys), Q], further scores, which have a gradient and need a bias; None adds none.
    """
    rows, heads, _, queries = query.shape
    if visibility.bias is not None:
        keep = kept_probabilities(dropout_key, rate, (rows, heads, key.shape[-1], queries))  # [R, N, S, Q]
        return attend_at_once(query, key, value, visibility.bias, keep, rate, relative)
    assert relative is None, "relative scores are computed at once: use Visibility.of_segments(..., at_once=True)"
    numbered = None if dropout_key is None or rate == 0.0 else dropout_key.with_rows(rows)
    return attend_in_blocks(query, key, value, visibility.segment_ids, numbered, rate, visibility.window)


def kept_probabilities(key: DropoutKey | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Return the probabilities that dropout keeps, [R, N, S, Q] bool, for `attend_at_once`; None if it keeps all."""
    if key is None or rate == 0.0:
        return None

    def mask(numbered: DropoutKey) -> jax.Array:
        assert numbered.rows is not None
        drawn = keep_mask(numbered, rate, (len(numbered.rows), *shape[1:]))
        assert drawn is not None  # there is a key, and the rate is not 0
        return drawn

    return rowwise(mask)(key.with_rows(shape[0]))
