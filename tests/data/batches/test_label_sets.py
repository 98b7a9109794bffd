"""Label sets in packed batches."""

import numpy as np
import pytest

from xtransfer.data.batches.batches import Dataset, TrainBatches, empty_batch, eval_batches, make_plan
from xtransfer.data.tokens.tokenizer import Tokens, concatenate

LABELS = np.array([[1, 0], [0, 0], [1, 1], [-1, -1]], np.int32)
PLAN = make_plan(4, 16, pad_id=0, position_offset=0, multiple_of=2)


def dataset(labels=LABELS):
    lengths = (3, 5, 4, 6)
    parts = [
        Tokens(np.full(n, n, np.int32), np.zeros(n, np.int32), np.array([0, n], np.int64), np.zeros(1, bool))
        for n in lengths
    ]
    return Dataset(concatenate(parts), labels, None, tuple("abcd"), 2)


def test_every_slot_has_the_label_set_of_its_example_and_empty_slots_have_none():
    for indices, batch in eval_batches(dataset(), PLAN):
        used = batch["weight"] > 0
        np.testing.assert_array_equal(batch["label"][used], LABELS[indices])
        assert (batch["label"][~used] == -1).all()
    batch = TrainBatches(dataset(), PLAN, seed=0)(0)
    assert sorted(batch["label"][batch["weight"] > 0].tolist()) == sorted(LABELS.tolist())
    assert batch["label"].shape == batch["teacher_logits"].shape


def test_an_empty_batch_has_the_shapes_of_a_real_one():
    real = next(eval_batches(dataset(), PLAN))[1]
    empty = empty_batch(PLAN, len(real["weight"]), 2, multi_label=True)
    assert {key: (x.shape, x.dtype) for key, x in empty.items()} == {key: (x.shape, x.dtype) for key, x in real.items()}


@pytest.mark.parametrize("labels", [LABELS[:, :1], LABELS + 1, LABELS[:3]])
def test_label_sets_of_another_form_are_refused(labels):
    with pytest.raises(ValueError, match="labels"):
        dataset(labels)
