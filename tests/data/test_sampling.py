"""Draws of examples: balanced, nested, disjoint, and the same for the same seed."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import TaskConfig
from xtransfer.data import sampling
from xtransfer.data.task import Example, Task
from xtransfer.errors import UserError


def examples(*counts: int) -> list[Example]:
    """So many examples of each class, the classes mixed."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    order = sorted(range(len(labels)), key=lambda i: (i * 7919) % 104729)
    return [Example(f"t/train/en/{i}", f"text {i}", None, labels[i], "en") for i in order]


@given(st.lists(st.integers(8, 20), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_labelled_subsets_are_balanced_nested_and_deterministic(counts, n, m, seed):
    n, m = sorted((min(n, 8 * len(counts)), min(m, 8 * len(counts))))
    everything = examples(*counts)
    few, many = (sampling.labelled_subset(everything, k, seed) for k in (n, m))
    assert len({example.id for example in many}) == m and set(many) <= set(everything)
    per_class = [Counter(example.label for example in many)[label] for label in range(len(counts))]
    assert max(per_class) - min(per_class) <= 1
    assert many[:n] == few
    assert sampling.labelled_subset(everything, m, seed) == many


def test_labelled_subsets_of_two_seeds_differ():
    everything = examples(50, 50)
    first, second = (sampling.labelled_subset(everything, 20, seed) for seed in (0, 1))
    assert set(first) != set(second)


def test_zero_labelled_means_all_of_them():
    assert sampling.labelled_subset(examples(3, 9), 0, 0) == examples(3, 9)


def test_more_labelled_than_there_are_is_an_error():
    everything = examples(4, 9)
    assert Counter(example.label for example in sampling.labelled_subset(everything, 8, 0)) == {0: 4, 1: 4}
    with pytest.raises(UserError, match="task.labelled 10, .* than there is: bad 4, good 9"):
        sampling.labelled_subset(everything, 10, 0, ("bad", "good"))
    with pytest.raises(UserError, match="than there is: 0 4, 1 9"):
        sampling.labelled_subset(everything, 10, 0)
    with pytest.raises(UserError, match="than there is: bad 4, good 9, mixed 0"):
        sampling.labelled_subset(everything, 3, 0, ("bad", "good", "mixed"))
    with pytest.raises(UserError, match="than there is: nothing"):
        sampling.labelled_subset([], 1, 0)
    with pytest.raises(ValueError, match="without a label"):
        sampling.labelled_subset(sampling.without_labels(everything), 1, 0)


def in_memory(train: list[Example], unlabelled: list[Example]) -> Task:
    splits = {"train": train, "unlabelled": unlabelled}
    return Task(
        name="t",
        labels=("bad", "good"),
        source_language="en",
        target_languages=(),
        load=lambda split, language: splits[split],
        fingerprint=lambda: "",
        synthetic=True,
        pretraining=lambda language: {},
        parallel=lambda first, second: [],
    )


@given(st.integers(0, 12), st.integers(0, 12), st.integers(0, 5))
def test_unlabelled_examples_are_chosen_by_seed_and_never_labelled(n, m, seed):
    n, m = sorted((n, m))
    train = examples(10, 10)
    labelled = train[:8]
    task = in_memory(train, examples(15))
    few, many = (sampling.unlabelled_examples(task, "train_rest", k, seed, labelled) for k in (n or 1, m or 1))
    assert len(many) == (m or 1) and set(few) <= set(many)
    assert all(example.label == -1 for example in many)
    assert not {example.id for example in many} & {example.id for example in labelled}
    assert sampling.unlabelled_examples(task, "train_rest", m or 1, seed, labelled) == many
    rest = sampling.unlabelled_examples(task, "train_rest", 0, seed, labelled)
    assert rest == sampling.without_labels(train[8:])
    assert sampling.unlabelled_examples(task, "split", 0, seed, []) == sampling.without_labels(examples(15))
    assert sampling.unlabelled_examples(task, "none", 0, seed, []) == []


def test_unlabelled_examples_beyond_what_there_is():
    task = in_memory(examples(3, 3), examples(5))
    with pytest.raises(UserError, match="task.unlabelled 6 is more than there is: 5; 0 takes all"):
        sampling.unlabelled_examples(task, "split", 6, 0, [])
    with pytest.raises(ValueError, match="unlabelled kind 'rest'"):
        sampling.unlabelled_examples(task, "rest", 0, 0, [])
    assert {e.id for e in sampling.unlabelled_examples(task, "split", 3, 0, [])} != {
        e.id for e in sampling.unlabelled_examples(task, "split", 3, 1, [])
    }


def test_a_file_stands_for_the_unlabelled_split():
    task = in_memory(examples(3, 3), examples(5))
    assert sampling.unlabelled_examples(task, "file", 0, 0, []) == sampling.without_labels(examples(5))
    assert len(sampling.unlabelled_examples(task, "file", 2, 0, [])) == 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 5))
def test_held_out_examples_are_disjoint_and_every_class_has_its_share(counts, n, seed):
    everything = examples(*counts)
    size = n or -(-len(everything) // 10)
    if size >= len(everything):
        with pytest.raises(
            UserError,
            match=f"{size} leaves none of the {len(everything)} training examples: lower",
        ):
            sampling.held_out(everything, n, seed)
        return
    left, dev = sampling.held_out(everything, n, seed)
    assert len(dev) == size and len(left) == len(everything) - size
    assert not {e.id for e in left} & {e.id for e in dev}
    assert [e for e in everything if e in left] == left and [e for e in everything if e in dev] == dev
    for label, count in Counter(e.label for e in everything).items():
        share = sum(e.label == label for e in dev)
        assert abs(share - count * size / len(everything)) < 1
    assert sampling.held_out(everything, n, seed) == (left, dev)


def test_balanced_examples_give_a_balanced_dev_split():
    left, dev = sampling.held_out(examples(100, 100), 0, 3)
    assert Counter(e.label for e in dev) == {0: 10, 1: 10} and Counter(e.label for e in left) == {0: 90, 1: 90}
    assert set(sampling.held_out(examples(100, 100), 0, 4)[1]) != set(dev)


def test_the_order_of_the_classes_does_not_choose_who_is_held_out():
    """Three classes of 10 share 4 places: who gets the second one is a matter of the seed."""
    extra = Counter()
    for seed in range(60):
        dev = sampling.held_out(examples(10, 10, 10), 4, seed)[1]
        extra[Counter(e.label for e in dev).most_common(1)[0][0]] += 1
    assert set(extra) == {0, 1, 2} and min(extra.values()) > 8


def test_held_out_of_what_has_no_labels():
    with pytest.raises(ValueError, match="without a label"):
        sampling.held_out(sampling.without_labels(examples(5, 5)), 0, 0)


def test_what_is_held_out_says_so_in_its_id():
    config = TaskConfig(name="t", held_out_dev=2, held_out_seed=1)
    everything = examples(5, 5)
    left, dev = sampling.train_and_dev(everything, config)
    assert (left, [replace(e, id=e.id.replace("/dev/", "/train/")) for e in dev]) == sampling.held_out(everything, 2, 1)
    assert all(e.id.startswith("t/dev/en/") for e in dev) and len(dev) == 2
    assert all(e.id.startswith("t/train/en/") for e in left)
