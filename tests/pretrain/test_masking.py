"""Pretraining batches: their layout, their masks, and the partners within them."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from xtransfer.pretrain.masking import BatchShape, InputFormat, PretrainingBatches

FORMAT = InputFormat(cls=2, sep=3, pad=0, mask=4, vocab_size=200)
SHAPE = BatchShape(rows=8, row_length=32, masks=5)
ONLY_TEXTS = {"pair_fraction": 0.0, "split_texts": 0.5, "split_pairs": 0.5, "seed": 0}


def halves(low, high, count=50, seed=0):
    """Return texts in two halves of 2 to 7 random tokens from `low` to `high`."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.integers(low, high, rng.integers(2, 8)).astype(np.int32) for _ in range(2)) for _ in range(count)]


def batches(*, pair_fraction=0.5, pairs=True, seed=0):
    """Return batches of two languages with different tokens, and of their translation pairs."""
    parallel = {"en-de": halves(100, 150)} if pairs else {}
    return PretrainingBatches(
        {"en": halves(5, 50), "de": halves(50, 100)},
        parallel,
        FORMAT,
        SHAPE,
        pair_fraction=pair_fraction,
        split_texts=0.5,
        split_pairs=0.5,
        seed=seed,
    )


def original(batch):
    """Return the ids before masking."""
    ids = batch["input_ids"].copy()
    np.put_along_axis(ids, batch["mlm_positions"], batch["mlm_targets"], axis=1)
    return ids


def test_random_access():
    batch, same, other = batches()(3), batches()(3), batches()(4)
    assert all(np.array_equal(batch[key], same[key]) for key in batch)
    assert not np.array_equal(batch["input_ids"], other["input_ids"])
    assert not np.array_equal(batch["input_ids"], batches(seed=1)(3)["input_ids"])


def test_layout():
    for i in range(5):
        batch = batches()(i)
        assert batch["input_ids"].shape == batch["position_ids"].shape == (8, 32)
        ids, segments = original(batch), batch["segment_ids"]
        starts = (segments > 0) & (segments != np.pad(segments, ((0, 0), (1, 0)))[:, :-1])
        assert (ids[starts] == FORMAT.cls).all()
        assert starts.sum(axis=1).tolist() == segments.max(axis=1).tolist()
        for row, slot in zip(*np.nonzero(batch["partner"] >= 0), strict=True):
            assert ids[row, batch["cls_index"][row, slot]] == FORMAT.cls
            assert segments[row, batch["cls_index"][row, slot]] == slot + 1
        assert (ids[segments == 0] == FORMAT.pad).all()
        assert (segments > 0).mean() > 0.75


def test_only_ordinary_tokens_are_masked():
    for i in range(5):
        batch = batches()(i)
        used = batch["mlm_weight"] > 0
        targets = batch["mlm_targets"][used]
        assert targets.min() >= 5  # never [CLS], [SEP] or padding
        assert used.sum(axis=1).max() <= SHAPE.masks
        assert all(len(set(row)) == len(row) for row in batch["mlm_positions"])
        untouched = np.ones_like(batch["input_ids"], bool)
        np.put_along_axis(untouched, batch["mlm_positions"], False, axis=1)
        assert (batch["input_ids"] == original(batch))[untouched].all()


def test_shares_of_masked_random_and_unchanged_tokens():
    make_batch, fates = batches(), []
    for i in range(60):
        batch = make_batch(i)
        shown = np.take_along_axis(batch["input_ids"], batch["mlm_positions"], axis=1)
        used = batch["mlm_weight"] > 0
        fates += np.where(shown == FORMAT.mask, 0, np.where(shown == batch["mlm_targets"], 1, 2))[used].tolist()
    shares = np.bincount(fates, minlength=3) / len(fates)
    # In 2,400 draws, three standard deviations of a share of 0.1 are 0.018.
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_rare_tokens_are_masked_more_often():
    common, rare = np.full(6, 10, np.int32), np.array([10, 10, 10, 10, 10, 20], np.int32)
    texts = {"en": [(common, common)] * 30 + [(rare, common)] * 2}
    make_batch = PretrainingBatches(texts, {}, FORMAT, SHAPE, **ONLY_TEXTS)
    masked, total = Counter(), Counter()
    for i in range(60):
        batch = make_batch(i)
        for token in (10, 20):
            masked[token] += ((batch["mlm_targets"] == token) & (batch["mlm_weight"] > 0)).sum()
            total[token] += (original(batch) == token).sum()
    assert masked[20] / total[20] > 1.5 * masked[10] / total[10]


def test_positions_restart_only_in_joined_translations():
    translations, texts = batches(pair_fraction=1.0)(0), batches(pair_fraction=0.0)(0)
    for batch, joined in ((translations, True), (texts, False)):
        assert not batch["token_type_ids"].any()
        used, ids = batch["segment_ids"] > 0, original(batch)
        restarts = used & (batch["position_ids"] == 0)
        # A text in the middle of its segment follows a separator.
        after_separator = np.roll(used & (ids == FORMAT.sep), 1, axis=1)
        same_segment = batch["segment_ids"] == np.roll(batch["segment_ids"], 1, axis=1)
        second = used & after_separator & same_segment
        assert (restarts == (used & (ids == FORMAT.cls)) | second).all()
        assert (second.sum() > 3) == joined


def test_partners_are_the_two_halves_of_one_text():
    """The two halves of a text differ by 25 in their token ids."""
    texts = {"en": [(np.full(3, 5 + i, np.int32), np.full(3, 30 + i, np.int32)) for i in range(25)]}
    make_batch = PretrainingBatches(texts, {}, FORMAT, SHAPE, **ONLY_TEXTS)
    split_texts = joined_texts = 0
    for i in range(20):
        batch = make_batch(i)
        ids, partner = original(batch), batch["partner"].reshape(-1)

        def first_token(index, ids=ids, batch=batch):
            row, slot = divmod(int(index), SHAPE.slots)
            return int(ids[row, batch["cls_index"][row, slot] + 1])

        indices = np.flatnonzero(partner >= 0)
        assert (partner[partner[indices]] == indices).all()
        assert (partner[indices] != indices).all()
        assert {abs(first_token(index) - first_token(partner[index])) for index in indices} == {25}
        split_texts += len(indices) // 2
        joined_texts += int(batch["segment_ids"].max(axis=1).sum()) - len(indices)
    assert split_texts / (split_texts + joined_texts) == pytest.approx(0.5, abs=0.08)


def test_all_texts_of_a_batch_are_from_one_group():
    """The tokens of the two languages do not overlap, and a batch has only one of them beside the pairs."""
    make_batch, languages = batches(pair_fraction=0.0), set()
    for i in range(10):
        batch = make_batch(i)
        ids = original(batch)[batch["segment_ids"] > 0]
        is_german = ids[ids >= 5] >= 50
        assert is_german.all() or not is_german.any()
        languages.add(bool(is_german[0]))
    assert languages == {True, False}


def test_a_random_window_of_a_long_text_is_drawn():
    whole = np.arange(5, 105, dtype=np.int32)
    texts = {"en": [(whole[:50], whole[50:])] * 3}
    settings = ONLY_TEXTS | {"split_texts": 0.0}
    make_batch, seen = PretrainingBatches(texts, {}, FORMAT, SHAPE, **settings), set()
    for i in range(30):
        batch = make_batch(i)
        ids = original(batch)
        for row in range(SHAPE.rows):
            window = ids[row, batch["segment_ids"][row] == 1]
            assert (len(window), window[0], window[-1]) == (SHAPE.row_length, FORMAT.cls, FORMAT.sep)
            assert (np.diff(window[1:-1]) == 1).all()
            seen |= set(window[1:-1].tolist())
    assert seen == set(whole.tolist())


def test_long_halves_meet_at_the_middle_of_the_text():
    whole = np.arange(5, 105, dtype=np.int32)
    settings = ONLY_TEXTS | {"split_texts": 1.0}
    batch = PretrainingBatches({"en": [(whole[:50], whole[50:])]}, {}, FORMAT, SHAPE, **settings)(0)
    ids = original(batch)
    rows = {tuple(ids[row, batch["segment_ids"][row] == 1][[1, -2]]) for row in range(SHAPE.rows)}
    assert rows == {(whole[20], whole[49]), (whole[50], whole[79])}


def test_long_pairs_are_truncated_to_the_row():
    long = np.arange(5, 105, dtype=np.int32)
    settings = ONLY_TEXTS | {"pair_fraction": 1.0, "split_pairs": 0.0}
    batch = PretrainingBatches({"en": [(long, long)]}, {"en-de": [(long, long)]}, FORMAT, SHAPE, **settings)(0)
    for row in range(SHAPE.rows):
        assert (batch["segment_ids"][row] == 1).sum() == SHAPE.row_length
        # 29 tokens remain beside the three special ones: 15 of the first text, and 14 of the second.
        assert batch["position_ids"][row].max() == 1 + 15


def test_positions_follow_the_encoder():
    """RoBERTa's positions start after its pad id."""
    roberta = dataclasses.replace(FORMAT, position_offset=2)
    batch = PretrainingBatches({"en": halves(5, 50)}, {}, roberta, SHAPE, **ONLY_TEXTS)(0)
    assert batch["position_ids"][batch["segment_ids"] > 0].min() == 2
    assert (batch["position_ids"][original(batch) == FORMAT.cls] == 2).all()
