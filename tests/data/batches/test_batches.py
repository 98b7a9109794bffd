"""Training batches depend only on the seed and the index; evaluation batches contain every example once."""

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
    """Return n examples: example i has tokens i + 1, label i % classes, and teacher logits i, i + 0.5, …"""
    lengths = np.random.default_rng(seed).integers(1, longest + 1, n)
    ids = np.repeat(np.arange(1, n + 1), lengths).astype(np.int32)
    logits = (np.arange(n)[:, None] + 0.5 * np.arange(classes)).astype(np.float32) if teacher else None
    return Dataset(
        tokens=Tokens(ids, np.zeros_like(ids), np.concatenate([[0], np.cumsum(lengths)]), np.zeros(len(lengths), bool)),
        labels=(np.arange(n) % classes).astype(np.int32),
        teacher_logits=logits,
        ids=tuple(f"id-{i}" for i in range(n)),
        num_classes=classes,
    )


def check_batch(dataset: Dataset, batch: dict[str, np.ndarray], plan: BatchPlan) -> list[int]:
    """Check a batch against its dataset, and return the example indices in the order of rows and slots."""
    rows = batch["input_ids"].shape[0]
    assert set(batch) == KEYS and rows % plan.multiple_of == 0
    assert batch["input_ids"].shape == (rows, plan.row_length)
    assert batch["teacher_logits"].shape == (rows, plan.slots, dataset.num_classes)
    assert batch["label"].dtype == np.int32
    assert batch["teacher_logits"].dtype == batch["weight"].dtype == np.float32
    indices = []
    for row, slot in np.ndindex(rows, plan.slots):
        in_segment = batch["segment_ids"][row] == slot + 1
        assert batch["weight"][row, slot] == float(in_segment.any())
        if not in_segment.any():
            assert batch["label"][row, slot] == -1 and not batch["teacher_logits"][row, slot].any()
            continue
        i = int(batch["input_ids"][row, batch["cls_index"][row, slot]]) - 1
        assert in_segment.sum() == dataset.tokens.lengths[i] and (batch["input_ids"][row, in_segment] == i + 1).all()
        assert batch["label"][row, slot] == dataset.labels[i]
        expected = 0 if dataset.teacher_logits is None else dataset.teacher_logits[i]
        np.testing.assert_array_equal(batch["teacher_logits"][row, slot], np.broadcast_to(expected, 3))
        indices.append(i)
    return indices


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("teacher", [True, False])
def test_training_batches_contain_the_drawn_examples(packed: bool, teacher: bool):
    dataset, plan = make_dataset(10, teacher=teacher), replace(PLAN, packed=packed)
    batches = TrainBatches(dataset, plan, seed=3)
    for i in range(8):
        batch = batches(i)
        indices = check_batch(dataset, batch, plan)
        assert sorted(indices) == sorted(batches.indices(i).tolist()) and len(indices) == 4
        assert batch["input_ids"].shape[0] in batches.row_sizes


def test_packed_and_unpacked_batches_contain_the_same_examples():
    dataset = make_dataset(50, longest=6)
    packed, unpacked = (TrainBatches(dataset, replace(PLAN, packed=p, batch_size=8), 1) for p in (True, False))
    for i in range(10):
        np.testing.assert_array_equal(packed.indices(i), unpacked.indices(i))
        assert packed(i)["input_ids"].shape[0] < unpacked(i)["input_ids"].shape[0]


def test_training_batches_can_be_read_in_any_order():
    dataset = make_dataset(11)
    in_order = [TrainBatches(dataset, PLAN, seed=5)(i) for i in range(12)]
    batches = TrainBatches(dataset, PLAN, seed=5)
    for i in (11, 0, 7, 7, 3):
        batch = batches(i)
        for key in KEYS:
            np.testing.assert_array_equal(batch[key], in_order[i][key])
    assert any((batches.indices(i) != TrainBatches(dataset, PLAN, seed=6).indices(i)).any() for i in range(3))


@pytest.mark.parametrize(("n", "batch_size"), [(12, 4), (11, 4), (3, 8), (1, 2)])
def test_each_epoch_visits_every_example_once_in_a_new_order(n: int, batch_size: int):
    batches = TrainBatches(make_dataset(n), replace(PLAN, batch_size=batch_size), seed=0)
    stream = np.concatenate([batches.indices(i) for i in range(-(-6 * n // batch_size))])[: 6 * n].reshape(6, n)
    assert (np.sort(stream, axis=1) == np.arange(n)).all()
    assert n < 3 or len({tuple(epoch) for epoch in stream.tolist()}) > 1


def test_an_empty_training_set_or_a_negative_seed_is_an_error():
    with pytest.raises(ValueError, match="no row sizes for 0 examples"):
        TrainBatches(make_dataset(0), PLAN, 0)
    with pytest.raises(ValueError, match="seed -1 is outside"):
        TrainBatches(make_dataset(3), PLAN, -1)


@given(st.integers(0, 60), st.integers(1, 9), st.integers(1, 4), st.booleans(), st.integers(1, 16), st.integers(1, 20))
@settings(max_examples=60)
def test_evaluation_visits_every_example_once(n, batch_size, multiple_of, packed, longest, window):
    dataset = make_dataset(n, longest=longest, seed=n)
    plan = replace(PLAN, batch_size=batch_size, multiple_of=multiple_of, packed=packed)
    seen: list[int] = []
    shapes = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_EVAL_WINDOW", window)
        for indices, batch in pipeline.eval_batches(dataset, plan):
            assert indices.dtype == np.int64
            # so logits[weight > 0] are in the order of `indices`
            assert check_batch(dataset, batch, plan) == indices.tolist()
            seen.extend(indices.tolist())
            shapes.add(batch["input_ids"].shape[0])
    assert sorted(seen) == list(range(n))
    assert len(shapes) <= 2


def test_evaluation_batches_are_more_than_95_percent_full():
    dataset = make_dataset(500, longest=10)
    plan = replace(PLAN, batch_size=8, slots=8)
    batches = [batch for _, batch in pipeline.eval_batches(dataset, plan)]
    fill = np.mean([(batch["segment_ids"] > 0).mean() for batch in batches[:-1]])
    assert fill > 0.95
    assert {batch["input_ids"].shape[0] for batch in batches} <= {2, 8}


def test_datasets_with_the_same_plan_have_the_same_batch_shapes():
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
def test_the_process_slices_add_up_to_the_batch(n, batch_size, shards, packed, i, seed):
    dataset = make_dataset(n, seed=seed)
    plan = replace(PLAN, batch_size=batch_size, slots=3 if packed else 1, multiple_of=shards, packed=packed)
    for processes in (1, 2, 4):
        plans = [replace(plan, process_slice=(process, processes)) for process in range(processes)]
        train_slices = [TrainBatches(dataset, process_plan, seed)(i) for process_plan in plans]
        check_slices(TrainBatches(dataset, plan, seed)(i), train_slices)
        eval_slices = zip(*(pipeline.eval_batches(dataset, process_plan) for process_plan in plans), strict=True)
        for (indices, whole), slices in zip(pipeline.eval_batches(dataset, plan), eval_slices, strict=True):
            assert np.concatenate([slice_indices for slice_indices, _ in slices]).tolist() == indices.tolist()
            check_slices(whole, [batch for _, batch in slices])


def check_slices(whole: dict[str, np.ndarray], slices: list[dict[str, np.ndarray]]) -> None:
    """Check that the slices have the same number of rows and concatenate to the whole batch."""
    expected_shape = (len(whole["input_ids"]) // len(slices), PLAN.row_length)
    assert {batch["input_ids"].shape for batch in slices} == {expected_shape}
    for key, values in whole.items():
        np.testing.assert_array_equal(np.concatenate([batch[key] for batch in slices]), values)


@pytest.mark.parametrize("process_slice", [(0, 3), (2, 2), (-1, 2), (0, 0)])
def test_a_process_slice_that_does_not_divide_the_rows_is_an_error(process_slice):
    with pytest.raises(ValueError, match="of batches with a multiple of 2 rows"):
        replace(PLAN, process_slice=process_slice)


def test_take_returns_the_chosen_examples_as_a_dataset():
    dataset = make_dataset(9)
    chosen = dataset.take(np.array([7, 0, 7]))
    assert chosen.ids == ("id-7", "id-0", "id-7") and chosen.labels.tolist() == [1, 0, 1]
    assert chosen.teacher_logits.tolist() == dataset.teacher_logits[[7, 0, 7]].tolist()
    for position, index in enumerate((7, 0, 7)):
        assert chosen.tokens.item(position)[0].tolist() == dataset.tokens.item(index)[0].tolist()
    assert len(dataset.take(np.zeros(0, np.int64))) == 0


def test_real_share_is_the_share_of_real_tokens_in_the_batches():
    batches = TrainBatches(make_dataset(30), PLAN, seed=3)
    segment_ids = [batches(i)["segment_ids"] for i in range(5)]
    real, total = sum((ids > 0).sum() for ids in segment_ids), sum(ids.size for ids in segment_ids)
    assert batches.real_share(5) == pytest.approx(real / total)


def test_a_dataset_with_inconsistent_fields_is_an_error():
    dataset = make_dataset(4)
    with pytest.raises(ValueError, match=r"4 token lists, labels of shape \(3,\), 4 ids"):
        replace(dataset, labels=dataset.labels[:3])
    with pytest.raises(ValueError, match=r"labels 0\.\.2 with 2 classes"):
        replace(dataset, num_classes=2)
    with pytest.raises(ValueError, match=r"teacher logits \(4, 2\) for 4 examples × 3 classes"):
        replace(dataset, teacher_logits=np.zeros((4, 2), np.float32))


def test_a_plan_has_one_slot_per_eight_tokens():
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
def test_plans_by_length_have_batches_of_about_equal_size(max_length: int, shapes: list[tuple[int, int]]):
    plans = pipeline.make_plans(16, max_length, pad_id=0, position_offset=0, multiple_of=1)
    assert [(plan.batch_size, plan.row_length) for plan in plans] == shapes


@given(st.integers(0, 80), st.integers(1, 6), st.integers(1, 3), st.sampled_from([4, 8, 16, 32]), st.integers(0, 5))
@settings(max_examples=80)
def test_batches_by_length_visit_every_example_once(n, batch_size, multiple_of, longest, seed):
    dataset = make_dataset(n, longest=longest, teacher=False, seed=seed)
    lengths = dataset.tokens.lengths
    plans = [
        replace(PLAN, row_length=length, batch_size=max(1, batch_size * 8 // length), multiple_of=multiple_of)
        for length in (8, 16, 32)
    ]
    seen, partial_batches, row_lengths = [], 0, []
    for indices, batch in pipeline.batches_by_length(dataset.tokens, 3, plans):
        rows, row_length = batch["input_ids"].shape
        plan = next(plan for plan in plans if plan.row_length == row_length)
        unlabelled = replace(dataset, labels=np.full(n, -1, np.int32))
        assert (batch["label"] == -1).all()
        batch_indices = []
        for row, slot in zip(*np.nonzero(batch["weight"]), strict=True):
            in_segment = batch["segment_ids"][row] == slot + 1
            i = int(batch["input_ids"][row, batch["cls_index"][row, slot]]) - 1
            assert in_segment.sum() == unlabelled.tokens.lengths[i]
            assert (batch["input_ids"][row, in_segment] == i + 1).all()
            batch_indices.append(i)
        assert batch_indices == indices.tolist()
        full = packing.round_up(plan.batch_size, multiple_of)
        short = packing.round_up(-(-full // 4), multiple_of)
        used_rows = len(set(np.nonzero(batch["weight"])[0].tolist()))
        assert used_rows <= rows and rows == (short if used_rows <= short else full)
        partial_batches += used_rows < full
        seen += batch_indices
        row_lengths.append(row_length)
    assert sorted(seen) == list(range(n)) and partial_batches <= 1 and row_lengths == sorted(row_lengths)
    needed = {next(length for length in (8, 16, 32) if length >= example) for example in lengths.tolist()}
    assert set(row_lengths) <= needed


def test_an_example_longer_than_the_longest_row_is_an_error():
    with pytest.raises(ValueError, match="tokens for rows of up to 8"):
        list(pipeline.batches_by_length(make_dataset(9, longest=16).tokens, 3, [replace(PLAN, row_length=8)]))


@pytest.mark.parametrize("packed", [True, False])
def test_an_empty_batch_has_the_shapes_and_dtypes_of_a_real_one(packed: bool) -> None:
    plan = replace(PLAN, packed=packed, slots=3 if packed else 1)
    real = TrainBatches(make_dataset(12), plan, 0)(0)
    empty = pipeline.empty_batch(plan, len(real["label"]), 3)
    assert set(empty) == KEYS and not empty["weight"].any() and (empty["label"] == -1).all()
    assert {key: (x.shape, x.dtype) for key, x in empty.items()} == {key: (x.shape, x.dtype) for key, x in real.items()}


def test_evaluation_batches_have_one_of_two_row_counts() -> None:
    plan = replace(PLAN, batch_size=10, multiple_of=4)
    assert pipeline.eval_row_sizes(plan) == (12, 4)
    row_counts = {len(batch["label"]) for n in (1, 9, 40) for _, batch in pipeline.eval_batches(make_dataset(n), plan)}
    assert row_counts == {12, 4}
