"""Pretraining batches: their layout, their masks, and the partners within them."""

from collections import Counter

import numpy as np
import pytest

from xtransfer.pretrain.masking import BatchShape, PretrainingBatches, Vocabulary

VOCABULARY = Vocabulary(cls=2, sep=3, pad=0, mask=4, size=200)
SHAPE = BatchShape(rows=8, row_length=32, masks=5)


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
        VOCABULARY,
        SHAPE,
        pair_fraction=pair_fraction,
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
        assert (ids[starts] == VOCABULARY.cls).all()
        assert starts.sum(axis=1).tolist() == segments.max(axis=1).tolist()
        for row, slot in zip(*np.nonzero(batch["partner"] >= 0), strict=True):
            assert ids[row, batch["cls_index"][row, slot]] == VOCABULARY.cls
            assert segments[row, batch["cls_index"][row, slot]] == slot + 1
        assert (ids[segments == 0] == VOCABULARY.pad).all()
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
        fates += np.where(shown == VOCABULARY.mask, 0, np.where(shown == batch["mlm_targets"], 1, 2))[used].tolist()
    shares = np.bincount(fates, minlength=3) / len(fates)
    # In 2,400 draws, three standard deviations of a share of 0.1 are 0.018.
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)


def test_rare_tokens_are_masked_more_often():
    common, rare = np.full(6, 10, np.int32), np.array([10, 10, 10, 10, 10, 20], np.int32)
    texts = {"en": [(common, common)] * 30 + [(rare, common)] * 2}
    make_batch = PretrainingBatches(texts, {}, VOCABULARY, SHAPE, pair_fraction=0.0, seed=0)
    masked, total = Counter(), Counter()
    for i in range(60):
        batch = make_batch(i)
        for token in (10, 20):
            masked[token] += ((batch["mlm_targets"] == token) & (batch["mlm_weight"] > 0)).sum()
            total[token] += (original(batch) == token).sum()
    assert masked[20] / total[20] > 1.5 * masked[10] / total[10]


def test_positions_restart_only_in_joined_translations():
    translations, texts = batches(pair_fraction=1.0)(0), batches(pair_fraction=0.0)(0)
    second = translations["token_type_ids"] == 1
    starts = second & ~np.roll(second, 1, axis=1)
    assert starts.sum() > 3
    assert (translations["position_ids"][starts] == 0).all()
    assert not texts["token_type_ids"].any()
    for batch in (translations, texts):
        used = batch["segment_ids"] > 0
        restarts = used & (batch["position_ids"] == 0)
        first = original(batch) == VOCABULARY.cls
        assert (restarts == (first | (used & np.where(batch is translations, starts, False)))).all()


def test_partners_are_the_two_halves_of_one_text():
    """The two halves of a text differ by 25 in their token ids."""
    texts = {"en": [(np.full(3, 5 + i, np.int32), np.full(3, 30 + i, np.int32)) for i in range(25)]}
    make_batch = PretrainingBatches(texts, {}, VOCABULARY, SHAPE, pair_fraction=0.0, seed=0)
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


def test_long_halves_are_truncated_to_the_row():
    long = np.arange(5, 105, dtype=np.int32)
    batch = PretrainingBatches({"en": [(long, long)] * 3}, {}, VOCABULARY, SHAPE, pair_fraction=0.0, seed=0)(0)
    lengths = [(batch["segment_ids"][row] == 1).sum() for row in range(SHAPE.rows)]
    assert max(lengths) == SHAPE.row_length
