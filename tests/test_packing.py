"""Packing: nothing is lost, nothing is mixed, and the same examples give the same layout."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.data import packing
from xtransfer.data.text import Tokens

PAD = 99
ROW_LENGTH = 12


def make_tokens(lengths: list[int]) -> Tokens:
    """Example i of tokens i*100, i*100+1, …, so that every token tells where it comes from."""
    ids = [i * 100 + t for i, length in enumerate(lengths) for t in range(length)]
    types = [t % 2 for length in lengths for t in range(length)]
    return Tokens(
        np.asarray(ids, np.int32), np.asarray(types, np.int32), np.cumsum([0, *lengths], dtype=np.int64), clipped=0
    )


def pack(tokens: Tokens, indices: list[int], rows: int, slots: int, **options) -> dict[str, np.ndarray]:
    return packing.pack(tokens, indices, row_length=ROW_LENGTH, rows=rows, slots=slots, pad_id=PAD, **options)


lengths_of_a_dataset = st.lists(st.integers(1, ROW_LENGTH), min_size=1, max_size=30)


@given(lengths_of_a_dataset, st.data())
def test_every_example_stands_once_and_whole(lengths: list[int], data: st.DataObject):
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=30))
    slots, offset = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    packed = data.draw(st.booleans())
    tokens = make_tokens(lengths)
    needed = packing.rows_needed(tokens.lengths[np.asarray(indices, int)], ROW_LENGTH, slots, packed=packed)
    rows = needed + data.draw(st.integers(0, 2))
    batch = pack(tokens, indices, rows, slots, position_offset=offset, packed=packed)

    assert batch["slot"].shape == (len(indices), 2)
    assert len({tuple(place) for place in batch["slot"].tolist()}) == len(indices)
    covered = np.zeros((rows, ROW_LENGTH), bool)
    for index, (row, slot) in zip(indices, batch["slot"].tolist(), strict=True):
        start = batch["cls_index"][row, slot]
        span = slice(start, start + lengths[index])
        input_ids, type_ids = tokens.item(index)
        np.testing.assert_array_equal(batch["input_ids"][row, span], input_ids)
        np.testing.assert_array_equal(batch["token_type_ids"][row, span], type_ids)
        np.testing.assert_array_equal(batch["position_ids"][row, span], offset + np.arange(lengths[index]))
        np.testing.assert_array_equal(
            np.flatnonzero(batch["segment_ids"][row] == slot + 1), np.arange(start, start + lengths[index])
        )
        assert not covered[row, span].any()
        covered[row, span] = True
    np.testing.assert_array_equal(batch["segment_ids"] > 0, covered)
    assert (batch["input_ids"][~covered] == PAD).all()
    assert not batch["position_ids"][~covered].any() and not batch["token_type_ids"][~covered].any()
    assert all(batch[key].dtype == np.int32 for key in batch)


@given(lengths_of_a_dataset, st.integers(1, 5))
def test_rows_are_filled_from_the_left_and_slots_in_order(lengths: list[int], slots: int):
    batch = pack(make_tokens(lengths), list(range(len(lengths))), len(lengths), slots)
    for row in range(len(lengths)):
        mine = np.flatnonzero(batch["slot"][:, 0] == row)
        used = batch["segment_ids"][row][batch["segment_ids"][row] > 0]
        assert sorted(batch["slot"][mine, 1].tolist()) == list(range(len(mine)))
        assert (np.diff(used) >= 0).all() and (batch["segment_ids"][row, : len(used)] > 0).all()
        starts = batch["cls_index"][row]
        assert (np.diff(starts[: len(mine)]) > 0).all() and not starts[len(mine) :].any()


@given(lengths_of_a_dataset, st.integers(1, 5))
def test_layout_is_first_fit_decreasing_and_deterministic(lengths: list[int], slots: int):
    placed = packing.first_fit_decreasing(np.asarray(lengths), ROW_LENGTH, slots)
    np.testing.assert_array_equal(placed, packing.first_fit_decreasing(np.asarray(lengths), ROW_LENGTH, slots))
    rows: list[list[int]] = []  # the plain reading of the algorithm
    expected = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r, row in enumerate(rows) if sum(row) + lengths[i] <= ROW_LENGTH and len(row) < slots]
        if not fitting:
            rows.append([])
        target = fitting[0] if fitting else len(rows) - 1
        expected[i] = (target, len(rows[target]))
        rows[target].append(lengths[i])
    assert [tuple(place) for place in placed.tolist()] == [expected[i] for i in range(len(lengths))]
    assert packing.rows_needed(np.asarray(lengths), ROW_LENGTH, slots) == len(rows)


def test_a_layout_by_hand():
    batch = pack(make_tokens([5, 7, 6, 2]), [0, 1, 2, 3], rows=3, slots=2, position_offset=2)
    assert batch["slot"].tolist() == [[0, 1], [0, 0], [1, 0], [1, 1]]
    assert batch["input_ids"].tolist() == [
        [100, 101, 102, 103, 104, 105, 106, 0, 1, 2, 3, 4],
        [200, 201, 202, 203, 204, 205, 300, 301, PAD, PAD, PAD, PAD],
        [PAD] * 12,
    ]
    assert batch["segment_ids"][1].tolist() == [1] * 6 + [2] * 2 + [0] * 4
    assert batch["position_ids"][1].tolist() == [2, 3, 4, 5, 6, 7, 2, 3, 0, 0, 0, 0]
    assert batch["cls_index"].tolist() == [[0, 7], [0, 6], [0, 0]]


def test_unpacked_puts_example_i_into_row_i():
    batch = pack(make_tokens([5, 1, 6]), [2, 0, 1], rows=4, slots=3, packed=False)
    assert batch["slot"].tolist() == [[0, 0], [1, 0], [2, 0]]
    assert (batch["segment_ids"] > 0).sum(axis=1).tolist() == [6, 5, 1, 0]
    assert batch["cls_index"].shape == (4, 3) and not batch["cls_index"].any()


@pytest.mark.parametrize("packed", [True, False])
def test_what_does_not_fit_is_an_error(packed: bool):
    with pytest.raises(ValueError, match="3 examples need 3 rows of 12 tokens, got 2"):
        pack(make_tokens([12, 12, 12]), [0, 1, 2], rows=2, slots=2, packed=packed)
    with pytest.raises(ValueError, match=r"lengths 3\.\.13 do not fit in rows of 12"):
        pack(make_tokens([3, 13]), [0, 1], rows=2, slots=2, packed=packed)
    with pytest.raises(ValueError, match=r"lengths 0\.\.3 do not fit"):
        pack(make_tokens([3, 0]), [0, 1], rows=2, slots=2, packed=packed)
    with pytest.raises(ValueError, match="at least one slot, got 0"):
        pack(make_tokens([3]), [0], rows=2, slots=0, packed=packed)


@given(lengths_of_a_dataset, st.integers(1, 40), st.integers(1, 5), st.integers(1, 8))
def test_row_sizes_are_few_and_hold_any_batch(lengths: list[int], batch_size: int, slots: int, multiple_of: int):
    sizes = packing.row_sizes(np.asarray(lengths), batch_size, ROW_LENGTH, slots, multiple_of)
    assert 1 <= len(sizes) <= 4 and list(sizes) == sorted(set(sizes))
    assert all(size % multiple_of == 0 for size in sizes)
    assert sizes[-1] - multiple_of < batch_size <= sizes[-1]
    worst = [max(lengths)] * batch_size
    assert packing.rows_needed(np.asarray(worst), ROW_LENGTH, slots) <= sizes[-1]
    assert packing.row_sizes(np.asarray(lengths), batch_size, ROW_LENGTH, slots, multiple_of) == sizes


def test_the_first_row_size_holds_a_typical_batch():
    random = np.random.default_rng(1)
    lengths = random.integers(3, 30, 1000)
    sizes = packing.row_sizes(lengths, 32, 64, 8, 1)
    needed = [packing.rows_needed(random.choice(lengths, 32, replace=False), 64, 8) for _ in range(200)]
    assert np.mean(np.asarray(needed) <= sizes[0]) > 0.95
    assert sizes[0] <= max(needed) + 1 < sizes[-1] == 32


def test_unpacked_has_one_row_size():
    assert packing.row_sizes(np.asarray([3, 4]), 10, 64, 8, 4, packed=False) == (12,)


@pytest.mark.parametrize(("lengths", "batch_size", "multiple_of"), [([], 1, 1), ([3], 0, 1), ([3], 1, 0)])
def test_row_sizes_of_nothing_are_an_error(lengths: list[int], batch_size: int, multiple_of: int):
    with pytest.raises(ValueError, match="no row sizes"):
        packing.row_sizes(np.asarray(lengths, int), batch_size, 64, 8, multiple_of)
