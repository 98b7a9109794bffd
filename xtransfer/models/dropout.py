"""Dropout with cheap random bits that are the same on any number of devices.

A mask is a function of a key, a row's number, and an element's position in its row. So neither the layout over devices
nor the number of microbatches changes it. Bits come from Threefry-2x32 with 13 rounds, the fewest that pass all tests
of randomness (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011); 16 of them decide one element.
This takes a sixth of the rounds of `jax.random.bernoulli`, which were a fifth of a BERT training step on a TPU.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

_ROUNDS = 13
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_PER_CALL = 4  # elements that the 64 bits of one call decide
_BITS = 16


class DropoutKey(NamedTuple):
    """The key of dropout masks, and the row numbers that they depend on, [R] int32, by default 0 to R − 1."""

    key: jax.Array
    rows: jax.Array | None = None

    def at(self, site: int) -> "DropoutKey":
        """Return the key for one of several sites that draw masks."""
        return DropoutKey(jax.random.fold_in(self.key, site), self.rows)

    def with_rows(self, rows: int) -> "DropoutKey":
        """Return the key with the numbers of its `rows` rows spelled out."""
        return self if self.rows is not None else DropoutKey(self.key, jnp.arange(rows, dtype=jnp.int32))


def at_site(key: DropoutKey | None, site: int) -> DropoutKey | None:
    """Return the key for one of several sites that draw dropout masks, or None without dropout."""
    return None if key is None else key.at(site)


def dropout(x: jax.Array, rate: float, key: DropoutKey | None) -> jax.Array:
    """Zero x [..., S, D] with probability `rate`, else divide it by 1 − rate; return x itself without a key."""
    keep = keep_mask(key, rate, x.shape)
    if keep is None:
        return x
    # In float32, because 1 / (1 − rate) in bfloat16 would be off by up to a 500th, always in the same direction.
    return jnp.where(keep, x.astype(jnp.float32) * (1.0 / (1.0 - rate)), 0.0).astype(x.dtype)


def keep_mask(key: DropoutKey | None, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
    """Return a bool mask [R, ...] of the elements to keep, or None without a key or with a rate of 0.

    The rate is exact to 2**-17. The shape has at least two axes, and the second to last is not split over devices.
    """
    if key is None or rate == 0.0:
        return None
    *leading, length, width = shape
    row, position = _positions((*leading, _quarter(length), width))
    if key.rows is not None:
        row = jnp.broadcast_to(key.rows.astype(jnp.uint32).reshape(-1, *[1] * (row.ndim - 1)), row.shape)
    return _spread(_numbers(key, rate, row, position), length)


def keep_mask_part(
    key: DropoutKey, rate: float, shape: tuple[int, ...], starts: tuple[jax.Array, jax.Array], sizes: tuple[int, int]
) -> jax.Array:
    """Return `keep_mask(key, rate, shape)[..., i : i + m, j : j + n]` for starts (i, j) and sizes (m, n), and no more.

    With all lines (m is the second to last size of `shape`), this draws as many numbers as `keep_mask` for as many
    elements, and otherwise four times as many: elements that share a number are a quarter of the lines apart.
    """
    *leading, length, width = shape
    quarter, all_lines = _quarter(length), sizes[0] == length
    line = jnp.arange(quarter) if all_lines else starts[0] + jnp.arange(sizes[0])
    row, index = _positions((*leading, 1, 1))
    if key.rows is not None:
        row = key.rows.astype(jnp.uint32).reshape(-1, *[1] * (row.ndim - 1))
    place = (line % quarter)[:, None] * width + starts[1] + jnp.arange(sizes[1])  # [quarter or m, n]
    numbers = _numbers(key, rate, row, index * jnp.uint32(quarter * width) + place.astype(jnp.uint32))
    return _spread(numbers, length) if all_lines else (numbers >> (line // quarter)[:, None]) & 1 != 0


def _quarter(length: int) -> int:
    """Return the lines of a quarter of the second to last axis, rounded up."""
    return -(-length // _PER_CALL)


def _numbers(key: DropoutKey, rate: float, row: jax.Array, position: jax.Array) -> jax.Array:
    """Return numbers whose bit i says whether to keep an element of the i-th quarter of the second to last axis.

    They are kept for the backward pass: drawing them again would put their arithmetic into every loop that reads them,
    and a bool per element would take as much memory.
    """
    words = _threefry(jax.random.bits(key.key, (2,), jnp.uint32), row, position)
    threshold = jnp.uint32(round(rate * 2**_BITS) << _BITS)
    halves = [half >= threshold for word in words for half in (word, word << _BITS)]
    numbers: jax.Array = jax.lax.optimization_barrier(sum(jnp.where(half, 1 << i, 0) for i, half in enumerate(halves)))
    return numbers


def _spread(numbers: jax.Array, length: int) -> jax.Array:
    """Turn the numbers of a quarter of the lines into a mask: [..., length / 4, D] -> [..., length, D] bool."""
    *leading, quarter, width = numbers.shape
    spread = jnp.broadcast_to(numbers[..., None, :, :], (*leading, _PER_CALL, quarter, width))
    bit = jax.lax.broadcasted_iota(jnp.int32, spread.shape, len(leading))
    sign = spread << (31 - bit)  # the sign is the bit
    # Without the barrier, the TPU compiler reshapes the spread numbers, and writes them out for it.
    keep = jax.lax.optimization_barrier(sign < 0)
    return keep.reshape(*leading, _PER_CALL * quarter, width)[..., :length, :]


def _positions(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Return two numbers that identify each element of an array: its row's number, and its position in the row."""
    steps = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    inner = [
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(steps[axis]) for axis in range(1, len(shape))
    ]
    return jax.lax.broadcasted_iota(jnp.uint32, shape, 0), sum(inner[1:], inner[0])


def _threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Encrypt two uint32 words with Threefry-2x32 under a key [2] uint32."""
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
