"""Lossless packing: the examples of a batch laid out in as few rows as fit.

The same indices always give the same layout, and no example is ever split, cut, or dropped.
"""

import functools
import itertools
from collections.abc import Sequence

import numpy as np

from xtransfer.data.tokens.samples import AnyTokens

_SAMPLED_BATCHES = 128  # random batches that `row_sizes` fits sizes to
FITTED_SIZES = 3  # a fourth gained less than 1 % in all measurements, and each size is a step to compile
_ENOUGH = 0.96  # share of real tokens beyond which another size is not worth compiling


def first_fit_decreasing(lengths: np.ndarray, row_length: int, slots: int) -> np.ndarray:
    """Return the layout in which examples, longest first, each go into the first row with room.

    See `place` for arguments, result, and errors. Source: Johnson, "Near-optimal bin packing algorithms", 1973.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(lengths, row_length, slots)
    placed = np.zeros((lengths.size, 2), np.int32)
    room, used = [row_length] * lengths.size, [0] * lengths.size  # room is 0 once a row has no free slot
    row = previous = 0
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        if length < previous:
            row = 0  # a row without room for one length has none for another example of it, but for a shorter one
        previous = length
        while room[row] < length:
            row += 1
        placed[i] = row, used[row]
        used[row] += 1
        room[row] = room[row] - length if used[row] < slots else 0
    return placed


def minimum_slack(lengths: np.ndarray, row_length: int, slots: int) -> np.ndarray:
    """Return the layout in which the longest remaining example opens a row, and the best-fitting others fill it.

    It leaves almost nothing empty if examples are short relative to a row. It may be worse than first fit if few fit
    into one. See `place` for arguments, result, and errors. Source: Gupta and Ho, "A new heuristic algorithm for the
    one-dimensional bin-packing problem", 1999.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(lengths, row_length, slots)
    remaining: list[list[int]] = [[] for _ in range(row_length + 1)]  # examples by length, the first one last
    for i in range(lengths.size - 1, -1, -1):
        remaining[lengths[i]].append(i)
    placed = np.zeros((lengths.size, 2), np.int32)
    row = 0
    for longest in range(row_length, 0, -1):
        while remaining[longest]:
            members = [remaining[longest].pop()]
            members += [remaining[length].pop() for length in _best_fill(remaining, row_length - longest, slots - 1)]
            placed[members, 0], placed[members, 1] = row, np.arange(len(members))
            row += 1
    return placed


def _best_fill(remaining: Sequence[Sequence[int]], room: int, most: int) -> list[int]:
    """Return at most `most` of the remaining lengths whose sum comes nearest to `room`: few and long, longest first.

    The reachable sums are the bits of one integer: bit c · (room + 1) + s stands for a sum s of c lengths.
    """
    lane = room + 1
    may_grow, counts = _lanes(most, lane), _lanes(most + 1, lane)
    sums, steps = 1, []
    for length in range(room, 0, -1):
        if not remaining[length]:
            continue
        grows = may_grow * ((1 << (lane - length)) - 1)  # sums with room for this length
        for _ in range(min(len(remaining[length]), most)):
            longer = sums | (sums & grows) << (lane + length)
            if longer == sums:
                break
            steps.append((length, sums))
            sums = longer
        if sums & (counts << room):
            break
    best = next(s for s in range(room, -1, -1) if sums & (counts << s))
    fewest = sums & (counts << best)
    at = (fewest & -fewest).bit_length() - 1
    fill = []
    for length, before in reversed(steps):
        if not before >> at & 1:  # reached only by this step
            fill.append(length)
            at -= lane + length
    return fill[::-1]


@functools.cache
def _lanes(count: int, width: int) -> int:
    """Return the integer whose bits 0, width, …, (count − 1) · width are set."""
    return sum(1 << (c * width) for c in range(count))


def place(lengths: np.ndarray, row_length: int, slots: int, *, packed: bool = True) -> np.ndarray:
    """Place examples in rows by `first_fit_decreasing`, or by `minimum_slack` if that needs fewer rows.

    Args:
      lengths: [n] tokens per example, all in 1..row_length.
      row_length: tokens per row (S).
      slots: the most examples per row (M).
      packed: False puts example i alone into row i.

    Returns:
      [n, 2] int32, the (row, slot) of each example; rows are used from 0 without gaps.

    Raises:
      ValueError: an example is empty or longer than a row, or there is no slot.
    """
    lengths = np.asarray(lengths, np.int64)
    if not packed:
        _check(lengths, row_length, slots)
        return np.stack([np.arange(len(lengths)), np.zeros(len(lengths))], axis=1).astype(np.int32)
    placed = first_fit_decreasing(lengths, row_length, slots)
    fewest = max(-(-lengths.sum() // row_length), (2 * lengths > row_length).sum(), -(-lengths.size // slots))
    if rows_used(placed) > fewest:
        other = minimum_slack(lengths, row_length, slots)
        if rows_used(other) < rows_used(placed):
            return other
    return placed


def rows_used(placed: np.ndarray) -> int:
    """Return the number of rows in a layout [n, 2]; 0 for an empty one."""
    return int(placed[:, 0].max()) + 1 if len(placed) else 0


def rows_needed(lengths: np.ndarray, row_length: int, slots: int, *, packed: bool = True) -> int:
    """Return the number of rows that `pack` uses for examples of these lengths [n]; 0 for none."""
    return rows_used(place(lengths, row_length, slots, packed=packed))


def row_sizes(
    lengths: np.ndarray,
    batch_size: int,
    row_length: int,
    slots: int,
    multiple_of: int,
    *,
    packed: bool = True,
    fitted_sizes: int = FITTED_SIZES,
    microbatch_rows: int | None = None,
) -> tuple[int, ...]:
    """Return the few row counts that a dataset's batches are rounded up to, smallest first, so that few shapes compile.

    Up to `fitted_sizes` sizes are fitted to 128 seeded random batches: as few as keep the share of real tokens at 0.96,
    or as near to it as possible. One more is for the rare batch beyond those. The last holds any batch, because an
    example never needs more than a row of its own.

    Args:
      lengths: [N] tokens per example of the dataset.
      batch_size: examples per batch.
      row_length: see `place`.
      slots: see `place`.
      multiple_of: every size is a multiple of this, the data shards of the mesh.
      packed: False for one example per row, which needs one size only.
      fitted_sizes: at least 1.
      microbatch_rows: see `round_up_rows`.

    Raises:
      ValueError: there are no examples, or batch_size or multiple_of is below 1.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size == 0 or batch_size < 1 or multiple_of < 1:
        raise ValueError(f"no row sizes for {lengths.size} examples, batch {batch_size}, multiple of {multiple_of}")

    def rounded(rows: int) -> int:
        return round_up_rows(rows, multiple_of, microbatch_rows)

    largest = rounded(batch_size)
    if not packed:
        return (largest,)
    random, replace = np.random.default_rng(0), batch_size > lengths.size
    batches = [random.choice(lengths, batch_size, replace=replace) for _ in range(_SAMPLED_BATCHES)]
    needed = np.sort([rounded(rows_needed(batch, row_length, slots)) for batch in batches])
    full_rows = sum(int(batch.sum()) for batch in batches) / row_length
    for count in range(1, fitted_sizes + 1):
        fitted = _fitted(needed, count)
        if full_rows >= _ENOUGH * fitted[np.searchsorted(fitted, needed)].sum():
            break
    widest = int(fitted[-1])
    spare = rounded(widest + max(widest - int(needed[len(needed) // 2]), multiple_of))
    return tuple(sorted({*fitted.tolist(), min(spare, largest), largest}))


def _fitted(needed: np.ndarray, count: int) -> np.ndarray:
    """Return, of all sets of `count` sizes that hold these batches, the one with the fewest rows in total, sorted."""
    values, batches = np.unique(needed, return_counts=True)
    count = min(count, len(values))
    smaller = list(itertools.combinations(range(len(values) - 1), count - 1))
    choices = np.full((len(smaller), count), len(values) - 1)
    choices[:, :-1] = np.asarray(smaller, np.int64).reshape(len(smaller), count - 1)
    batch_counts = np.diff(np.cumsum(batches)[choices], axis=1, prepend=0)  # batches that each size holds
    return values[choices[np.argmin((values[choices] * batch_counts).sum(axis=1))]]


def pack(
    tokens: AnyTokens,
    indices: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    pad_id: int,
    position_offset: int = 0,
    packed: bool = True,
) -> dict[str, np.ndarray]:
    """Lay out the examples `indices` (an index may occur more than once) in a batch of rows.

    Slot m of a row holds the row's (m+1)-th example, whose tokens have segment id m+1 and are contiguous, from the
    left. Rows that are not needed are empty.

    Args:
      tokens: the dataset's token ids.
      indices: [n] the examples of this batch.
      row_length: S.
      rows: R.
      slots: M.
      pad_id: the input id of padding.
      position_offset: the position id of an example's first token. At pad_id + 1, a pad token within a text gets
        position pad_id and is not counted, as in RoBERTa (Liu et al., 2019).
      packed: False puts example i of the batch alone into row i.

    Returns:
      int32 arrays: input_ids, segment_ids (0 = padding), position_ids, token_type_ids [R, S]; cls_index [R, M], where
      each example starts in its row (0 in empty slots); slot [n, 2], the (row, slot) of each index.

    Raises:
      ValueError: the examples do not fit.
    """
    indices = np.asarray(indices, np.int64)
    lengths = tokens.lengths_of(indices)
    placed = place(lengths, row_length, slots, packed=packed)
    batch = lay_out(
        tokens,
        indices,
        placed,
        row_length=row_length,
        rows=rows,
        slots=slots,
        pad_id=pad_id,
        position_offset=position_offset,
    )
    return batch | {"slot": placed}


def lay_out(
    tokens: AnyTokens,
    indices: np.ndarray,
    placed: np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    pad_id: int,
    position_offset: int,
) -> dict[str, np.ndarray]:
    """Return the arrays of `pack`, without slot, for a layout `placed` [n, 2] of these examples from `place`."""
    if rows_used(placed) > rows:
        raise ValueError(f"{len(indices)} examples need {rows_used(placed)} rows of {row_length} tokens, got {rows}")
    taken = tokens.take(indices)
    lengths = taken.lengths
    row, slot = placed[:, 0].astype(np.int64), placed[:, 1].astype(np.int64)

    widths = np.zeros((rows, slots), np.int64)
    widths[row, slot] = lengths
    cls_index = np.cumsum(widths, axis=1) - widths
    cls_index[widths == 0] = 0

    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    target = np.repeat(row * row_length + cls_index[row, slot], lengths) + within

    input_ids, positions = taken.input_ids, within + position_offset
    is_pad = input_ids == pad_id
    if position_offset == pad_id + 1 and is_pad.any():
        before = np.cumsum(is_pad)  # pad tokens up to here, then up to here in this example
        before -= np.repeat((before - is_pad)[np.cumsum(lengths) - lengths], lengths)
        positions = np.where(is_pad, pad_id, positions - before)

    def fill(values: np.ndarray, empty: int) -> np.ndarray:
        flat = np.full(rows * row_length, empty, np.int32)
        flat[target] = values
        return flat.reshape(rows, row_length)

    return {
        "input_ids": fill(input_ids, pad_id),
        "segment_ids": fill(np.repeat(slot + 1, lengths), 0),
        "position_ids": fill(positions, 0),
        "token_type_ids": fill(taken.token_type_ids, 0),
        "cls_index": cls_index.astype(np.int32),
    }


def round_up(value: int, multiple_of: int) -> int:
    """Return the smallest multiple of `multiple_of` that is at least `value`."""
    return -(-value // multiple_of) * multiple_of


def round_up_rows(rows: int, shards: int, microbatch_rows: int | None = None) -> int:
    """Return the smallest row count of at least `rows` that divides evenly over shards and their microbatches.

    Args:
      rows: the rows that are needed.
      shards: the number of shards of a batch.
      microbatch_rows: the most rows of a shard in one microbatch. A shard has as few microbatches as this allows, all
        of the same size. None stands for one microbatch.
    """
    shard_rows = -(-rows // shards)
    if microbatch_rows is not None:
        shard_rows = round_up(shard_rows, max(1, -(-shard_rows // microbatch_rows)))
    return shard_rows * shards


def _check(lengths: np.ndarray, row_length: int, slots: int) -> None:
    if slots < 1:
        raise ValueError(f"a row needs at least one slot, got {slots}")
    if lengths.size and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(f"lengths {lengths.min()}..{lengths.max()} do not fit in rows of {row_length} tokens")
