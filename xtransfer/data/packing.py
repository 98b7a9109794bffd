"""Lossless packing: a batch's examples laid out in as few rows as fit.

First-fit decreasing: the examples of one batch are taken longest first and each goes into the first row with
room (Johnson, 1973). The same indices always give the same layout, and no example is ever split, cut or dropped.
"""

from collections.abc import Sequence

import numpy as np

from xtransfer.data.text import Tokens

_SAMPLED_BATCHES = 64
_MAX_ROW_SIZES = 4


def first_fit_decreasing(lengths: np.ndarray, row_length: int, slots: int) -> np.ndarray:
    """Places examples in rows, longest first, each in the first row with room for it.

    Args:
      lengths: [n] tokens of each example, all in 1..row_length.
      row_length: tokens a row holds (S).
      slots: examples a row holds at most (M).

    Returns:
      [n, 2] int32, the (row, slot) of each example; rows are used from 0 without gaps.

    Raises:
      ValueError: an example is empty or longer than a row, or there is no slot.
    """
    lengths = np.asarray(lengths, np.int64)
    _check(lengths, row_length, slots)
    placed = np.zeros((lengths.size, 2), np.int32)
    room = np.full(lengths.size, row_length, np.int64)  # 0 once a row has no free slot
    used = [0] * lengths.size
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = lengths[i]
        row = int(np.argmax(room >= length))
        placed[i] = row, used[row]
        used[row] += 1
        room[row] = room[row] - length if used[row] < slots else 0
    return placed


def place(lengths: np.ndarray, row_length: int, slots: int, *, packed: bool = True) -> np.ndarray:
    """(row, slot) of each example as [n, 2] int32: `first_fit_decreasing`, or unpacked, example i alone in row i."""
    if packed:
        return first_fit_decreasing(lengths, row_length, slots)
    _check(np.asarray(lengths), row_length, slots)
    return np.stack([np.arange(len(lengths)), np.zeros(len(lengths))], axis=1).astype(np.int32)


def rows_used(placed: np.ndarray) -> int:
    """Rows of a layout [n, 2]; 0 for an empty one."""
    return int(placed[:, 0].max()) + 1 if len(placed) else 0


def rows_needed(lengths: np.ndarray, row_length: int, slots: int, *, packed: bool = True) -> int:
    """Rows that `pack` uses for examples of these lengths [n]; 0 for none."""
    return rows_used(place(lengths, row_length, slots, packed=packed))


def row_sizes(
    lengths: np.ndarray, batch_size: int, row_length: int, slots: int, multiple_of: int, *, packed: bool = True
) -> tuple[int, ...]:
    """The few row counts that a data set's batches are rounded up to, smallest first, so that few shapes compile.

    The first holds each of 64 seeded random batches; the last holds any batch, for an example never needs more
    than a row of its own.

    Args:
      lengths: [N] tokens of each example of the data set.
      batch_size: examples in a batch.
      row_length, slots: as in `first_fit_decreasing`.
      multiple_of: every size is a multiple of this (the data shards of the mesh).
      packed: False for one example per row, where there is one size only.

    Raises:
      ValueError: there are no examples, or batch_size or multiple_of is below 1.
    """
    lengths = np.asarray(lengths, np.int64)
    if lengths.size == 0 or batch_size < 1 or multiple_of < 1:
        raise ValueError(f"no row sizes for {lengths.size} examples, batch {batch_size}, multiple of {multiple_of}")
    largest = round_up(batch_size, multiple_of)
    if not packed:
        return (largest,)
    random = np.random.default_rng(0)
    typical = max(
        rows_needed(
            random.choice(lengths, batch_size, replace=batch_size > lengths.size), row_length, slots, packed=True
        )
        for _ in range(_SAMPLED_BATCHES)
    )
    sizes = {round_up(typical, multiple_of), largest}
    for growth in (1.25, 1.6):
        size = round_up(int(np.ceil(typical * growth)), multiple_of)
        if size < largest and len(sizes) < _MAX_ROW_SIZES:
            sizes.add(size)
    return tuple(sorted(sizes))


def pack(
    tokens: Tokens,
    indices: Sequence[int] | np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    pad_id: int,
    position_offset: int = 0,
    packed: bool = True,
) -> dict[str, np.ndarray]:
    """Lays out the examples `indices` (an index may occur more than once) in a batch of rows.

    Slot m of a row holds the row's (m+1)-th example, whose tokens have segment id m+1 and lie next to one another
    from the left; rows that are not needed are empty.

    Args:
      tokens: the data set's token ids.
      indices: [n] examples of this batch.
      row_length: S. rows: R. slots: M.
      pad_id: input id of the padding.
      position_offset: position id of an example's first token.
      packed: False puts example i of the batch alone into row i.

    Returns:
      int32 arrays: input_ids, segment_ids (0 = padding), position_ids, token_type_ids [R, S]; cls_index [R, M], where
      in its row each example starts (0 in empty slots); slot [n, 2], the (row, slot) of each index.

    Raises:
      ValueError: the examples do not fit.
    """
    indices = np.asarray(indices, np.int64)
    lengths = tokens.offsets[indices + 1] - tokens.offsets[indices]
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
    tokens: Tokens,
    indices: np.ndarray,
    placed: np.ndarray,
    *,
    row_length: int,
    rows: int,
    slots: int,
    pad_id: int,
    position_offset: int,
) -> dict[str, np.ndarray]:
    """The arrays of `pack`, without slot, for a layout `placed` [n, 2] that `place` has made of these examples."""
    if rows_used(placed) > rows:
        raise ValueError(f"{len(indices)} examples need {rows_used(placed)} rows of {row_length} tokens, got {rows}")
    starts = tokens.offsets[indices]
    lengths = tokens.offsets[indices + 1] - starts
    row, slot = placed[:, 0].astype(np.int64), placed[:, 1].astype(np.int64)

    widths = np.zeros((rows, slots), np.int64)
    widths[row, slot] = lengths
    cls_index = np.cumsum(widths, axis=1) - widths
    cls_index[widths == 0] = 0

    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    source = np.repeat(starts, lengths) + within
    target = np.repeat(row * row_length + cls_index[row, slot], lengths) + within

    def fill(values: np.ndarray, empty: int) -> np.ndarray:
        flat = np.full(rows * row_length, empty, np.int32)
        flat[target] = values
        return flat.reshape(rows, row_length)

    return {
        "input_ids": fill(tokens.input_ids[source], pad_id),
        "segment_ids": fill(np.repeat(slot + 1, lengths), 0),
        "position_ids": fill(within + position_offset, 0),
        "token_type_ids": fill(tokens.token_type_ids[source], 0),
        "cls_index": cls_index.astype(np.int32),
    }


def round_up(value: int, multiple_of: int) -> int:
    """The smallest multiple of `multiple_of` that is not below `value`."""
    return -(-value // multiple_of) * multiple_of


def _check(lengths: np.ndarray, row_length: int, slots: int) -> None:
    if slots < 1:
        raise ValueError(f"a row needs at least one slot, got {slots}")
    if lengths.size and (lengths.min() < 1 or lengths.max() > row_length):
        raise ValueError(f"lengths {lengths.min()}..{lengths.max()} do not fit in rows of {row_length} tokens")
