"""Batches: a pure function of the seed for training, every example once for evaluation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtransfer.data.batches import batches as pipeline
from xtransfer.data.batches import packing
from xtransfer.data.batches.batches import BatchPlan, Dataset, TrainBatches
from xtransfer.data.tokens.tokenizer import Tokens

PLAN = BatchPlan(batch_size=4, row_length=16, slots=3, pad_id=0, position_offset=0, multiple_of=2)
KEYS = {
    "input_ids",
    "segment_ids",
    "position_ids",
    "token_type_ids",
    "cls_index",
    "label",
    "teacher_logits",
    "weight",
}


def make_dataset(n: int, *, classes: int = 3, teacher: bool = True, longest: int = 16, seed: int = 0) -> Dataset:
    """Every token of example i is i + 1, its label i % classes, its teacher's logits i, i + 0.5, …"""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, n)
    ids = np.repeat(np.arange(1, n + 1), lengths).astype(np.int32)
    logits = (np.arange(n)[:, None] + 0.5 * np.arange(classes)).astype(np.float32) if teacher else None
    return Dataset(
        tokens=Tokens(ids, np.zeros_like(ids), np.concatenate([[0], np.cumsum(lengths)])),
        labels=(np.arange(n) % classes).astype(np.int32),
        teacher_logits=logits,
        ids=tuple(f"id-{i}" for i in range(n)),
        num_classes=classes,
    )


def check_batch(dataset: Dataset, batch: dict[str, np.ndarray], plan: BatchPlan) -> list[int]:
    """Checks a batch against its data set; returns the examples in the order of rows and slots."""
    rows = batch["input_ids"].shape[0]
    assert set(batch) == KEYS and rows % plan.multiple_of == 0
    assert batch["input_ids"].shape == (rows, plan.row_length)
    assert batch["teacher_logits"].shape == (rows, plan.slots, dataset.num_classes)
    assert batch["label"].dtype == np.int32
    assert batch["teacher_logits"].dtype == batch["weight"].dtype == np.float32
    found = []
    for row, slot in np.ndindex(rows, plan.slots):
        mine = batch["segment_ids"][row] == slot + 1
        assert batch["weight"][row, slot] == float(mine.any())
        if not mine.any():
            assert batch["label"][row, slot] == -1 and not batch["teacher_logits"][row, slot].any()
            continue
        i = int(batch["input_ids"][row, batch["cls_index"][row, slot]]) - 1
        assert mine.sum() == dataset.tokens.lengths[i] and (batch["input_ids"][row, mine] == i + 1).all()
        assert batch["label"][row, slot] == dataset.labels[i]
        expected = 0 if dataset.teacher_logits is None else dataset.teacher_logits[i]
        np.testing.assert_array_equal(batch["teacher_logits"][row, slot], np.broadcast_to(expected, 3))
        found.append(i)
    return found


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
def test_training_batches_hold_their_examples(packed: bool, teacher: bool):
    dataset, plan = make_dataset(10, teacher=teacher), replace(PLAN, packed=packed)
    batches = TrainBatches(dataset, plan, seed=3)
    for i in range(8):
        batch = batches(i)
        found = check_batch(dataset, batch, plan)
        assert sorted(found) == sorted(batches.indices(i).tolist()) and len(found) == 4
        assert batch["input_ids"].shape[0] in batches.row_sizes


def test_packed_and_unpacked_batches_hold_the_same_examples():
    dataset = make_dataset(50, longest=6)
    packed, unpacked = (TrainBatches(dataset, replace(PLAN, packed=p, batch_size=8), 1) for p in (True, False))
    for i in range(10):
        np.testing.assert_array_equal(packed.indices(i), unpacked.indices(i))
        assert packed(i)["input_ids"].shape[0] < unpacked(i)["input_ids"].shape[0]


def test_training_batches_are_random_access():
    dataset = make_dataset(11)
    forwards = [TrainBatches(dataset, PLAN, seed=5)(i) for i in range(12)]
    again = TrainBatches(dataset, PLAN, seed=5)
    for i in (11, 0, 7, 7, 3):
        batch = again(i)
        for key in KEYS:
            np.testing.assert_array_equal(batch[key], forwards[i][key])
    assert any((again.indices(i) != TrainBatches(dataset, PLAN, seed=6).indices(i)).any() for i in range(3))


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (11, 4), (3, 8), (1, 2)])
def test_every_epoch_has_each_example_once_in_a_new_order(n: int, batch_size: int):
    batches = TrainBatches(make_dataset(n), replace(PLAN, batch_size=batch_size), seed=0)
    stream = np.concatenate([batches.indices(i) for i in range(-(-6 * n // batch_size))])[: 6 * n].reshape(6, n)
    assert (np.sort(stream, axis=1) == np.arange(n)).all()
    assert n < 3 or len({tuple(epoch) for epoch in stream.tolist()}) > 1


def test_a_bad_training_set_is_an_error():
    with pytest.raises(ValueError, match="no row sizes for 0 examples"):
        TrainBatches(make_dataset(0), PLAN, 0)
    with pytest.raises(ValueError, match="seed -1 is outside"):
        TrainBatches(make_dataset(3), PLAN, -1)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(1, 16), st.integers(1, 20))
@settings(max_examples=60)
def test_evaluation_has_every_example_once(n, batch_size, multiple_of, packed, longest, window):
    dataset = make_dataset(n, longest=longest, seed=n)
    plan = replace(PLAN, batch_size=batch_size, multiple_of=multiple_of, packed=packed)
    seen: list[int] = []
    shapes = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_EVAL_WINDOW", window)
        for indices, batch in pipeline.eval_batches(dataset, plan):
            assert indices.dtype == np.int64
            # what makes logits[weight > 0] the logits of `indices`
            assert check_batch(dataset, batch, plan) == indices.tolist()
            seen.extend(indices.tolist())
            shapes.add(batch["input_ids"].shape[0])
    assert sorted(seen) == list(range(n))
    assert len(shapes) <= 2


def test_evaluation_packs_the_whole_data_set_tightly():
    dataset = make_dataset(500, longest=10)
    plan = replace(PLAN, batch_size=8, slots=8)
    batches = [batch for _, batch in pipeline.eval_batches(dataset, plan)]
    used = np.mean([(batch["segment_ids"] > 0).mean() for batch in batches[:-1]])
    assert used > 0.95
    assert {batch["input_ids"].shape[0] for batch in batches} <= {2, 8}


def test_data_sets_of_a_plan_share_their_shapes():
    shapes = {
        batch["input_ids"].shape
        for n in (1, 7, 40, 93)
        for _, batch in pipeline.eval_batches(make_dataset(n, longest=5 + n % 11), replace(PLAN, batch_size=8))
    }
    assert shapes == {(2, 16), (8, 16)}


@settings(max_examples=30)
@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    shards=st.sampled_from([4, 8]),
    packed=st.booleans(),
    i=st.integers(0, 5),
    seed=st.integers(0, 9),
)
def test_the_parts_of_processes_make_up_the_batch(n, batch_size, shards, packed, i, seed):
    dataset = make_dataset(n, seed=seed)
    plan = replace(PLAN, batch_size=batch_size, slots=3 if packed else 1, multiple_of=shards, packed=packed)
    for parts in (1, 2, 4):
        plans = [replace(plan, process_slice=(part, parts)) for part in range(parts)]
        check_parts(TrainBatches(dataset, plan, seed)(i), [TrainBatches(dataset, each, seed)(i) for each in plans])
        rounds = zip(*(pipeline.eval_batches(dataset, each) for each in plans), strict=True)
        for (indices, whole), found in zip(pipeline.eval_batches(dataset, plan), rounds, strict=True):
            assert np.concatenate([own for own, _ in found]).tolist() == indices.tolist()
            check_parts(whole, [batch for _, batch in found])


def check_parts(whole: dict[str, np.ndarray], parts: list[dict[str, np.ndarray]]) -> None:
    """The parts are equally long, and one below the other they are the whole."""
    assert {part["input_ids"].shape for part in parts} == {(len(whole["input_ids"]) // len(parts), PLAN.row_length)}
    for key, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), values)


@pytest.mark.parametrize("part", [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_a_part_that_rows_cannot_be_shared_into_is_an_error(part):
    with pytest.raises(ValueError, match="of batches with a multiple of 2 rows"):
        replace(PLAN, process_slice=part)


def test_some_examples_of_a_data_set_are_a_data_set():
    dataset = make_dataset(9)
    chosen = dataset.take(np.array([7, 0, 7]))
    assert chosen.ids == ("id-7", "id-0", "id-7") and chosen.labels.tolist() == [1, 0, 1]
    assert chosen.teacher_logits.tolist() == dataset.teacher_logits[[7, 0, 7]].tolist()
    for mine, theirs in enumerate((7, 0, 7)):
        assert chosen.tokens.item(mine)[0].tolist() == dataset.tokens.item(theirs)[0].tolist()
    assert len(dataset.take(np.zeros(0, np.int64))) == 0


def test_the_share_of_real_tokens_is_that_of_the_batches():
    batches = TrainBatches(make_dataset(30), PLAN, seed=3)
    found = [batches(i)["segment_ids"] for i in range(5)]
    assert batches.real_share(5) == pytest.approx(sum((ids > 0).sum() for ids in found) / sum(x.size for x in found))


def test_a_data_set_checks_its_parts():
    whole = make_dataset(4)
    with pytest.raises(ValueError, match=r"4 token lists, labels of shape \(3,\), 4 ids"):
        replace(whole, labels=whole.labels[:3])
    with pytest.raises(ValueError, match=r"labels 0\.\.2 with 2 classes"):
        replace(whole, num_classes=2)
    with pytest.raises(ValueError, match=r"teacher logits \(4, 2\) for 4 examples × 3 classes"):
        replace(whole, teacher_logits=np.zeros((4, 2), np.float32))


def test_a_plan_has_a_slot_for_every_eight_tokens():
    settings = {"pad_id": 1, "position_offset": 2, "multiple_of": 4}
    assert pipeline.make_plan(16, 100, **settings) == BatchPlan(16, 100, 12, 1, 2, 4, packed=True)
    assert pipeline.make_plan(16, 5, **settings).slots == 1
    assert pipeline.make_plan(16, 100, packed=False, **settings) == BatchPlan(16, 100, 1, 1, 2, 4, packed=False)


@pytest.mark.parametrize(
    ("max_length", "shapes"),
    [
        (512, [(16, 128), (8, 256), (4, 512)]),
        (12, [(171, 12)]),
        (128, [(16, 128)]),
        (150, [(14, 150)]),
        (200, [(16, 128), (10, 200)]),
        (5000, [(16, 128), (8, 256), (4, 512), (2, 1024), (1, 2048), (1, 5000)]),
    ],
)
def test_plans_by_length_have_equal_batches(max_length: int, shapes: list[tuple[int, int]]):
    plans = pipeline.make_plans(16, max_length, pad_id=0, position_offset=0, multiple_of=1)
    assert [(plan.batch_size, plan.row_length) for plan in plans] == shapes


@given(st.integers(0, 80), st.integers(1, 6), st.integers(1, 3), st.sampled_from([4, 8, 16, 32]), st.integers(0, 5))
@settings(max_examples=80)
def test_batches_by_length_have_every_example_once(n, batch_size, multiple_of, longest, seed):
    dataset = make_dataset(n, longest=longest, teacher=False, seed=seed)
    lengths = dataset.tokens.lengths
    plans = [
        replace(PLAN, row_length=length, batch_size=max(1, batch_size * 8 // length), multiple_of=multiple_of)
        for length in (8, 16, 32)
    ]
    seen, ragged, row_lengths = [], 0, []
    for indices, batch in pipeline.batches_by_length(dataset.tokens, 3, plans):
        rows, row_length = batch["input_ids"].shape
        plan = next(plan for plan in plans if plan.row_length == row_length)
        unlabelled = replace(dataset, labels=np.full(n, -1, np.int32))
        assert (batch["label"] == -1).all()
        found = []
        for row, slot in zip(*np.nonzero(batch["weight"]), strict=True):
            mine = batch["segment_ids"][row] == slot + 1
            i = int(batch["input_ids"][row, batch["cls_index"][row, slot]]) - 1
            assert mine.sum() == unlabelled.tokens.lengths[i] and (batch["input_ids"][row, mine] == i + 1).all()
            found.append(i)
        assert found == indices.tolist()
        full = packing.round_up(plan.batch_size, multiple_of)
        short = packing.round_up(-(-full // 4), multiple_of)
        used = len(set(np.nonzero(batch["weight"])[0].tolist()))
        assert used <= rows and rows == (short if used <= short else full)
        ragged += used < full
        seen += found
        row_lengths.append(row_length)
    assert sorted(seen) == list(range(n)) and ragged <= 1 and row_lengths == sorted(row_lengths)
    needed = {next(length for length in (8, 16, 32) if length >= example) for example in lengths.tolist()}
    assert set(row_lengths) <= needed


def test_an_example_that_is_longer_than_all_rows_is_an_error():
    with pytest.raises(ValueError, match="tokens for rows of up to 8"):
        list(pipeline.batches_by_length(make_dataset(9, longest=16).tokens, 3, [replace(PLAN, row_length=8)]))


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_batch_has_the_shapes_and_dtypes_of_a_real_one(packed: bool) -> None:
    plan = replace(PLAN, packed=packed, slots=3 if packed else 1)
    real = TrainBatches(make_dataset(12), plan, 0)(0)
    empty = pipeline.empty_batch(plan, len(real["label"]), 3)
    assert set(empty) == KEYS and not empty["weight"].any() and (empty["label"] == -1).all()
    assert {key: (x.shape, x.dtype) for key, x in empty.items()} == {key: (x.shape, x.dtype) for key, x in real.items()}


def test_evaluation_has_two_row_counts() -> None:
    plan = replace(PLAN, batch_size=10, multiple_of=4)
    assert pipeline.eval_row_sizes(plan) == (12, 4)
    seen = {len(batch["label"]) for n in (1, 9, 40) for _, batch in pipeline.eval_batches(make_dataset(n), plan)}
    assert seen == {12, 4}
