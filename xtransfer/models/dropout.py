"""Dropout whose random bits cost little, and are the same on any number of devices.

A mask is a function of a key, of a row's number and of an element's place in its row, so neither how the rows are
spread over devices nor in how many parts they are computed changes anything. Bits come from Threefry-2x32 with 13
rounds, the fewest that pass all tests of randomness (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3",
SC 2011), and 16 of them decide on one element: a sixth of the rounds of `jax.random.bernoulli`, which were a fifth of
a whole training step of BERT on a TPU.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_ROUNDS = 13
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_PER_CALL = 4  # elements that the 64 bits of one call decide on
_BITS = 16


class DropoutKey(NamedTuple):
    """What masks are drawn from: a key, and the numbers of the rows, [R] int32, by default 0 to R - 1."""

    key: jax.Array
    rows: jax.Array | None = None

    def at(self, site: int) -> "DropoutKey":
        """The key of one of several places that draw masks."""
        return DropoutKey(jax.random.fold_in(self.key, site), self.rows)


def dropout(x: jax.Array, rate: float, key: DropoutKey | None) -> jax.Array:
    """Inverted dropout: zero with probability `rate`, else x / (1 - rate). No key: x itself. x [..., S, D]."""
    keep = keep_mask(key, rate, x.shape)
    if keep is None:
        return x
    # In float32: 1 / (1 - rate) rounded to bfloat16 would be off by up to a 500th, each time in the same direction.
    return jnp.where(keep, x.astype(jnp.float32) * (1.0 / (1.0 - rate)), 0.0).astype(x.dtype)


def keep_mask(key: DropoutKey | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """What is not dropped, bool of this shape, [R, ...]; None where all is kept: without a key, or with a rate of 0.

    The rate is met to 2**-17. The shape has two axes or more, of which the last but one is not spread over devices.
    """
    if key is None or rate == 0.0:
        return None
    *leading, length, width = shape
    quarter = -(-length // _PER_CALL)
    row, place = _places((*leading, quarter, width))
    if key.rows is not None:
        row = jnp.broadcast_to(key.rows.astype(jnp.uint32).reshape(-1, *[1] * (row.ndim - 1)), row.shape)
    words = _threefry(jax.random.bits(key.key, (2,), jnp.uint32), row, place)
    threshold = jnp.uint32(round(rate * 2**_BITS) << _BITS)
    halves = [half >= threshold for word in words for half in (word, word << _BITS)]
    # A bit of a number for each quarter of the rows. The numbers are kept for the gradient: to draw them again would
    # put their arithmetic into every loop that reads them, and a bool for each element would take as much memory.
    packed = jax.lax.optimization_barrier(sum(jnp.where(half, 1 << i, 0) for i, half in enumerate(halves)))
    spread = jnp.broadcast_to(packed[..., None, :, :], (*leading, _PER_CALL, quarter, width))
    number = jax.lax.broadcasted_iota(jnp.int32, spread.shape, len(leading))
    keep = ((spread >> number) & 1) != 0
    return keep.reshape(*leading, _PER_CALL * quarter, width)[..., :length, :]


def _places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Two numbers that tell every element of an array: its row's, and its place in the row."""
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    inner = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(steps[axis]) for axis in range(1, len(shape))
    ]
    return jax.lax.broadcasted_iota(jnp.uint32, shape, 0), sum(inner[1:], inner[0])


def _threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of two uint32 words under a key [2] uint32."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ jnp.uint32(_PARITY))
    x, y = x + schedule[0], y + schedule[1]
    for number in range(_ROUNDS):
        turn = _ROTATIONS[number // 4 % 2][number % 4]
        x = x + y
        y = ((y << turn) | (y >> (32 - turn))) ^ x
        if number % 4 == 3:
            injection = number // 4 + 1
            x = x + schedule[injection % 3]
            y = y + schedule[(injection + 1) % 3] + jnp.uint32(injection)
    return x, y
