"""Packing loses no token, mixes no examples, and gives the same examples the same layout."""

import importlib.util
import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from xtransfer.data.batches import packing
from xtransfer.data.batches.batches import BatchPlan, Dataset, TrainBatches
from xtransfer.data.tokens.tokenizer import Tokens
from xtransfer.distillation import objectives
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier

PAD = 99
ROW_LENGTH = 12


def make_tokens(lengths: list[int]) -> Tokens:
    """Return examples with tokens 100 · i, 100 · i + 1, …, so that each token identifies its example and position."""
    ids = [i * 100 + t for i, length in enumerate(lengths) for t in range(length)]
    types = [t % 2 for length in lengths for t in range(length)]
    return Tokens(
        np.asarray(ids, np.int32),
        np.asarray(types, np.int32),
        np.cumsum([0, *lengths], dtype=np.int64),
        np.zeros(len(lengths), bool),
    )


def pack(tokens: Tokens, indices: list[int], rows: int, slots: int, **options) -> dict[str, np.ndarray]:
    return packing.pack(tokens, indices, row_length=ROW_LENGTH, rows=rows, slots=slots, pad_id=PAD, **options)


METHODS = (packing.first_fit_decreasing, packing.minimum_slack)
lengths_of_a_dataset = st.lists(st.integers(1, ROW_LENGTH), min_size=1, max_size=30)


@given(lengths_of_a_dataset, st.data())
def test_every_example_is_packed_once_and_contiguously(lengths: list[int], data: st.DataObject):
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=30))
    slots, offset = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    packed = data.draw(st.booleans())
    tokens = make_tokens(lengths)
    needed = packing.rows_needed(tokens.lengths[np.asarray(indices, int)], ROW_LENGTH, slots, packed=packed)
    rows = needed + data.draw(st.integers(0, 2))
    batch = pack(tokens, indices, rows, slots, position_offset=offset, packed=packed)

    assert batch["slot"].shape == (len(indices), 2)
    assert len({(row, slot) for row, slot in batch["slot"].tolist()}) == len(indices)
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
        members = np.flatnonzero(batch["slot"][:, 0] == row)
        segments = batch["segment_ids"][row][batch["segment_ids"][row] > 0]
        assert sorted(batch["slot"][members, 1].tolist()) == list(range(len(members)))
        assert (np.diff(segments) >= 0).all() and (batch["segment_ids"][row, : len(segments)] > 0).all()
        starts = batch["cls_index"][row]
        assert (np.diff(starts[: len(members)]) > 0).all() and not starts[len(members) :].any()


@given(lengths_of_a_dataset, st.integers(1, 5))
def test_layout_is_first_fit_decreasing_and_deterministic(lengths: list[int], slots: int):
    placed = packing.first_fit_decreasing(np.asarray(lengths), ROW_LENGTH, slots)
    np.testing.assert_array_equal(placed, packing.first_fit_decreasing(np.asarray(lengths), ROW_LENGTH, slots))
    rows: list[list[int]] = []  # a direct implementation
    expected = {}
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [r for r, row in enumerate(rows) if sum(row) + lengths[i] <= ROW_LENGTH and len(row) < slots]
        if not fitting:
            rows.append([])
        target = fitting[0] if fitting else len(rows) - 1
        expected[i] = (target, len(rows[target]))
        rows[target].append(lengths[i])
    assert placed.tolist() == [list(expected[i]) for i in range(len(lengths))]


@given(st.lists(st.integers(1, ROW_LENGTH), min_size=1, max_size=10), st.integers(1, 4))
def test_minimum_slack_fills_each_row_optimally(lengths: list[int], slots: int):
    placed = packing.minimum_slack(np.asarray(lengths), ROW_LENGTH, slots)
    np.testing.assert_array_equal(placed, packing.minimum_slack(np.asarray(lengths), ROW_LENGTH, slots))
    remaining = list(range(len(lengths)))
    for row in range(packing.rows_used(placed)):
        members = np.flatnonzero(placed[:, 0] == row)
        assert sorted(placed[members, 1].tolist()) == list(range(len(members))) and len(members) <= slots
        longest = max(lengths[i] for i in remaining)
        assert any(lengths[i] == longest for i in members)
        others = sorted((lengths[i] for i in remaining), reverse=True)[1:]
        sums = [sum(chosen) for count in range(slots) for chosen in itertools.combinations(others, count)]
        best = max(total for total in sums if longest + total <= ROW_LENGTH)
        assert sum(lengths[i] for i in members) == longest + best
        remaining = [i for i in remaining if i not in members]
    assert not remaining


def test_minimum_slack_matches_a_layout_found_by_hand():
    # 7 leaves room for 5: one example of 5 beats 4 + 1. 6 leaves room for 6 = 4 + 2. Both 1s remain.
    placed = packing.minimum_slack(np.asarray([1, 4, 5, 6, 7, 2, 1]), ROW_LENGTH, 3)
    assert placed.tolist() == [[2, 0], [1, 1], [0, 1], [1, 0], [0, 0], [1, 2], [2, 1]]


@given(lengths_of_a_dataset, st.integers(1, 5))
def test_rows_needed_takes_the_layout_with_fewer_rows(lengths: list[int], slots: int):
    layouts = [method(np.asarray(lengths), ROW_LENGTH, slots) for method in METHODS]
    fewest = min(packing.rows_used(placed) for placed in layouts)
    assert packing.rows_needed(np.asarray(lengths), ROW_LENGTH, slots) == fewest


@pytest.mark.parametrize(("lengths", "rows"), [([5, 5, 4, 4, 3, 3], [3, 2]), ([6, 5, 5, 5, 4, 4, 4, 2], [3, 4])])
def test_either_method_can_need_fewer_rows(lengths: list[int], rows: list[int]):
    assert [packing.rows_used(method(np.asarray(lengths), ROW_LENGTH, 4)) for method in METHODS] == rows
    assert packing.rows_needed(np.asarray(lengths), ROW_LENGTH, 4) == min(rows)


def test_a_layout_matches_one_written_by_hand():
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
def test_examples_that_do_not_fit_are_an_error(packed: bool):
    with pytest.raises(ValueError, match="3 examples need 3 rows of 12 tokens, got 2"):
        pack(make_tokens([12, 12, 12]), [0, 1, 2], rows=2, slots=2, packed=packed)
    with pytest.raises(ValueError, match=r"lengths 3\.\.13 do not fit in rows of 12"):
        pack(make_tokens([3, 13]), [0, 1], rows=2, slots=2, packed=packed)
    with pytest.raises(ValueError, match=r"lengths 0\.\.3 do not fit"):
        pack(make_tokens([3, 0]), [0, 1], rows=2, slots=2, packed=packed)
    with pytest.raises(ValueError, match="at least one slot, got 0"):
        pack(make_tokens([3]), [0], rows=2, slots=0, packed=packed)


@given(lengths_of_a_dataset, st.integers(1, 40), st.integers(1, 5), st.integers(1, 8))
@settings(max_examples=40)
def test_row_sizes_are_few_and_the_largest_fits_any_batch(
    lengths: list[int], batch_size: int, slots: int, multiple_of: int
):
    sizes = packing.row_sizes(np.asarray(lengths), batch_size, ROW_LENGTH, slots, multiple_of)
    assert 1 <= len(sizes) <= 5 and list(sizes) == sorted(set(sizes))
    assert all(size % multiple_of == 0 for size in sizes)
    assert sizes[-1] - multiple_of < batch_size <= sizes[-1]
    worst = [max(lengths)] * batch_size
    assert packing.rows_needed(np.asarray(worst), ROW_LENGTH, slots) <= sizes[-1]
    assert packing.row_sizes(np.asarray(lengths), batch_size, ROW_LENGTH, slots, multiple_of) == sizes


@pytest.mark.parametrize(
    ("rows", "shards", "microbatch_rows", "rounded"),
    [
        (33, 1, 32, 34),  # 2 microbatches of 17 rows
        (37, 1, 32, 38),
        (64, 1, 32, 64),
        (65, 1, 32, 66),  # 3 of 22
        (97, 1, 32, 100),  # 4 of 25
        (257, 8, 32, 272),  # 33 rows of a shard become 2 of 17
        (257, 8, None, 264),
        (5, 1, 1, 5),
        (0, 8, 32, 0),
    ],
)
def test_rows_are_rounded_up_to_equal_microbatches(rows: int, shards: int, microbatch_rows: int | None, rounded: int):
    assert packing.round_up_rows(rows, shards, microbatch_rows) == rounded


@given(st.integers(1, 2000), st.integers(1, 8), st.integers(1, 64))
def test_microbatches_cost_few_rows(rows: int, shards: int, microbatch_rows: int):
    """A shard gets fewer rows than it has microbatches, and they are as few as the limit allows."""
    rounded = packing.round_up_rows(rows, shards, microbatch_rows)
    shard_rows, remainder = divmod(rounded, shards)
    count = next(count for count in range(1, shard_rows + 1) if count * microbatch_rows >= shard_rows)
    assert remainder == 0 and shard_rows % count == 0 and count == -(-rows // (shards * microbatch_rows))
    assert rows <= rounded < rows + shards * count
    assert packing.round_up_rows(rounded, shards, microbatch_rows) == rounded
    assert packing.round_up_rows(rows + 1, shards, microbatch_rows) >= rounded


@given(lengths_of_a_dataset, st.integers(1, 40), st.integers(1, 5), st.integers(1, 3), st.integers(1, 6))
@settings(max_examples=40)
def test_row_sizes_divide_into_microbatches(
    lengths: list[int], batch_size: int, slots: int, shards: int, microbatch_rows: int
):
    options = {"fitted_sizes": 3, "microbatch_rows": microbatch_rows}
    sizes = packing.row_sizes(np.asarray(lengths), batch_size, ROW_LENGTH, slots, shards, **options)
    assert 1 <= len(sizes) <= 5 and list(sizes) == sorted(set(sizes)) and batch_size <= sizes[-1]
    assert all(packing.round_up_rows(size, shards, microbatch_rows) == size for size in sizes)


def test_training_batches_divide_into_microbatches_and_lose_nothing():
    """Ten examples of a whole row each, in microbatches of at most four rows: 3 × 4 rows, two of them empty."""
    tokens = make_tokens([ROW_LENGTH] * 10)
    dataset = Dataset(tokens, np.zeros(10, np.int32), None, tuple(map(str, range(10))), 2)
    plan = BatchPlan(10, ROW_LENGTH, 1, PAD, 0, multiple_of=1)
    split = TrainBatches(dataset, replace(plan, microbatch_rows=4), seed=0)(0)
    whole = TrainBatches(dataset, plan, seed=0)(0)
    assert {key: len(x) for key, x in split.items()} == dict.fromkeys(split, 12)
    assert all((split[key][:10] == whole[key]).all() for key in whole)
    assert (split["segment_ids"][10:] == 0).all() and (split["weight"][10:] == 0).all()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=30), st.integers(1, 4))
def test_fitted_sizes_are_optimal(needed: list[int], count: int):
    rows = np.sort(np.asarray(needed))
    fitted = packing._fitted(rows, count)
    assert len(fitted) == min(count, len(set(needed))) and (np.diff(fitted) > 0).all()

    def total(sizes: tuple[int, ...]) -> int:
        return sum(min(size for size in sizes if size >= row) for row in needed)

    candidates = itertools.combinations(range(1, 13), len(fitted))
    assert total(tuple(fitted)) == min(total(sizes) for sizes in candidates if max(sizes) >= max(needed))


# Mean and standard deviation of the log length: news sentences, and pairs as in XNLI (42 and 40 tokens on average).
KINDS = {"sentences": (3.65, 0.38), "pairs": (3.58, 0.48)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("multiple_of", "share"), [(1, 0.95), (8, 0.93)])
def test_rows_are_filled_and_shapes_are_few(kind: str, multiple_of: int, share: float):
    """Rounding up to a multiple of 8 alone costs 4 of 84 rows on average."""
    random = np.random.default_rng(1)
    lengths = np.clip(random.lognormal(*KINDS[kind], 4000), 6, 128).astype(int)
    sizes = np.asarray(packing.row_sizes(lengths, 256, 128, 16, multiple_of))
    batches = [random.choice(lengths, 256, replace=False) for _ in range(50)]
    rows = sizes[np.searchsorted(sizes, [packing.rows_needed(batch, 128, 16) for batch in batches])]
    assert sum(batch.sum() for batch in batches) / (rows.sum() * 128) >= share
    assert len(set(rows.tolist())) <= 4


def test_there_are_no_more_row_sizes_than_useful():
    assert packing.row_sizes(np.full(50, 16), 32, 64, 8, 1) == (8, 9, 32)  # every batch needs 8 rows
    assert packing.row_sizes(np.full(50, 16), 32, 64, 8, 4) == (8, 12, 32)
    assert packing.row_sizes(np.full(50, 64), 32, 64, 8, 4) == (32,)


def test_unpacked_batches_have_one_row_size():
    assert packing.row_sizes(np.asarray([3, 4]), 10, 64, 8, 4, packed=False) == (12,)
    # Three rows per shard in microbatches of at most two are four: 2 × 2.
    assert packing.row_sizes(np.asarray([3, 4]), 10, 64, 8, 4, packed=False, microbatch_rows=2) == (16,)


def test_fewer_fitted_sizes_give_fewer_row_sizes():
    lengths = np.random.default_rng(3).integers(10, 64, 500)
    one, three = (packing.row_sizes(lengths, 64, 128, 16, 1, fitted_sizes=count) for count in (1, 3))
    assert (len(one), len(three)) == (3, 5) and one[-1] == three[-1] == 64
    assert one[0] == three[2], "a single fitted size equals the largest of three"


@pytest.mark.parametrize(("lengths", "batch_size", "multiple_of"), [([], 1, 1), ([3], 0, 1), ([3], 1, 0)])
def test_row_sizes_without_examples_or_with_a_zero_argument_are_an_error(
    lengths: list[int], batch_size: int, multiple_of: int
):
    with pytest.raises(ValueError, match="no row sizes"):
        packing.row_sizes(np.asarray(lengths, int), batch_size, 64, 8, multiple_of)


@pytest.mark.parametrize("pad_id", [0, 1, 3])
def test_a_pad_token_in_a_text_gets_the_position_that_roberta_gives_it(pad_id: int):
    """Compare with the rule of transformers: pad tokens have position pad_id, and counting skips them."""
    rng = np.random.default_rng(pad_id)
    examples = [rng.integers(0, 5, length).tolist() for length in (7, 1, 12, 5, 3, 9)] + [[pad_id] * 4, [4, pad_id]]
    tokens = Tokens(
        np.asarray(sum(examples, []), np.int32),
        np.zeros(sum(map(len, examples)), np.uint8),
        np.cumsum([0, *map(len, examples)], dtype=np.int64),
        np.zeros(len(examples), bool),
    )
    sizes = {"row_length": ROW_LENGTH, "rows": 6, "slots": 4, "pad_id": pad_id}
    roberta = packing.pack(tokens, range(len(examples)), **sizes, position_offset=pad_id + 1)
    bert = packing.pack(tokens, range(len(examples)), **sizes, position_offset=pad_id)
    assert any(pad_id in ids[:-1] for ids in examples[:6])
    for ids, (row_index, slot) in zip(examples, roberta["slot"].tolist(), strict=True):
        start = roberta["cls_index"][row_index, slot]
        positions = roberta["position_ids"][row_index, start : start + len(ids)].tolist()
        counter = iter(range(pad_id + 1, 100))
        assert positions == [pad_id if token == pad_id else next(counter) for token in ids]
        assert roberta["segment_ids"][row_index, start : start + len(ids)].tolist() == [slot + 1] * len(ids)
        bert_positions = bert["position_ids"][row_index, start : start + len(ids)]
        # BERT counts pad tokens like any other.
        np.testing.assert_array_equal(bert_positions, pad_id + np.arange(len(ids)))
        if importlib.util.find_spec("torch"):
            import torch
            from transformers.models.roberta.modeling_roberta import RobertaEmbeddings

            reference = RobertaEmbeddings.create_position_ids_from_input_ids(torch.tensor([ids]), pad_id)
            assert positions == reference[0].tolist()


VOCABULARY, CLASSES = 60, 3


def make_pairs(rules: str) -> Dataset:
    """Return 40 random pairs: [CLS] a [SEP] b [SEP] with type ids for BERT, <s> a </s></s> b </s> for RoBERTa."""
    random = np.random.default_rng(0)
    ids, types = [], []
    for _ in range(40):
        a, b = (random.integers(4, VOCABULARY, random.integers(1, longest)).tolist() for longest in (12, 7))
        first, second = ([2, *a, 3], [*b, 3]) if rules == "bert" else ([0, *a, 2], [2, *b, 2])
        ids.append(first + second)
        types.append([0] * len(first) + [int(rules == "bert")] * len(second))
    tokens = Tokens(
        np.asarray(sum(ids, []), np.int32),
        np.asarray(sum(types, []), np.uint8),
        np.cumsum([0, *map(len, ids)], dtype=np.int64),
        np.zeros(len(ids), bool),
    )
    labels = random.integers(-1, CLASSES, 40).astype(np.int32)
    logits = random.standard_normal((40, CLASSES)).astype(np.float32)
    return Dataset(tokens, labels, logits, tuple(map(str, range(40))), CLASSES)


def make_model(config: EncoderConfig, pooling: str):
    """Return (graphdef, params). All parameters are random, so that each of them affects the logits."""
    graphdef, abstract = nnx.split(
        nnx.eval_shape(lambda: Classifier(config, CLASSES, rngs=nnx.Rngs(0), pooling=pooling))
    )
    random = np.random.default_rng(1)

    def draw(path, leaf):
        centre = 1.0 if "'scale'" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.3 * random.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, abstract)


@pytest.mark.parametrize(("rules", "pooling"), [("bert", "cls"), ("roberta", "mean")])
def test_packed_and_padded_batches_have_the_same_logits_loss_and_gradient(rules: str, pooling: str):
    pad_id, offset = (0, 0) if rules == "bert" else (1, 2)  # RoBERTa's positions begin at pad_id + 1
    config = EncoderConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=24,
        max_positions=32 + offset,
        type_vocab_size=2 if rules == "bert" else 1,
        pad_id=pad_id,
        position_offset=offset,
    )
    graphdef, params = make_model(config, pooling)
    objective = objectives.Objective("both", hard_weight=0.5, soft_weight=0.5, temperature=2.0, teacher="monolingual")

    def loss(params, batch):
        logits = nnx.merge(graphdef, params)(batch)
        terms = objectives.loss_terms(objective, logits, batch["teacher_logits"], batch["label"], batch["weight"])
        return objectives.mean(terms["loss"]), logits

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    dataset = make_pairs(rules)

    def run(packed: bool):
        plan = BatchPlan(12, 32, 4 if packed else 1, pad_id, offset, multiple_of=4, packed=packed)
        batches = TrainBatches(dataset, plan, seed=4)
        batch = batches(3)
        (value, logits), gradient = step(params, batch)
        indices = batches.indices(3)
        placed = packing.place(dataset.tokens.lengths[indices], 32, plan.slots, packed=packed)
        return indices, value, np.asarray(logits)[placed[:, 0], placed[:, 1]], gradient, len(logits)

    indices, value, logits, gradient, rows = run(packed=True)
    padded_indices, padded_value, padded_logits, padded_gradient, padded_rows = run(packed=False)
    assert indices.tolist() == padded_indices.tolist() and rows < padded_rows
    assert np.std(logits, axis=0).min() > 0.05 and 0.1 < value < 10
    np.testing.assert_allclose(logits, padded_logits, atol=1e-5)
    np.testing.assert_allclose(value, padded_value, atol=1e-5)
    for packed_leaf, padded_leaf in zip(jax.tree.leaves(gradient), jax.tree.leaves(padded_gradient), strict=True):
        np.testing.assert_allclose(packed_leaf, padded_leaf, atol=1e-5)
    word = gradient["encoder"]["embeddings"]["word_embeddings"]["embedding"][...]
    assert np.abs(word).max() > 1e-3 and not np.abs(word[pad_id]).any()  # padding contributes nothing
