"""Samples of examples are balanced, nested, disjoint, and the same for the same seed."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import TaskConfig
from xtransfer.data import examples as columns
from xtransfer.data import sampling
from xtransfer.data.examples import without_labels
from xtransfer.data.task import Example, Task
from xtransfer.errors import UserError


def make_examples(*counts: int) -> list[Example]:
    """Return the given number of examples of each class, in mixed order."""
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    order = sorted(range(len(labels)), key=lambda i: (i * 7919) % 104729)
    return [Example(f"t/train/en/{i}", f"text {i}", None, labels[i], "en") for i in order]


@given(st.lists(st.integers(8, 20), min_size=1, max_size=5), st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_labelled_subsets_are_balanced_nested_and_deterministic(counts, n, m, seed):
    n, m = sorted((min(n, 8 * len(counts)), min(m, 8 * len(counts))))
    everything = make_examples(*counts)
    few, many = (sampling.labelled_subset(everything, k, seed) for k in (n, m))
    assert len({example.id for example in many}) == m and set(many) <= set(everything)
    per_class = [Counter(example.label for example in many)[label] for label in range(len(counts))]
    assert max(per_class) - min(per_class) <= 1
    assert many[:n] == few
    assert sampling.labelled_subset(everything, m, seed) == many


def test_labelled_subsets_of_two_seeds_differ():
    everything = make_examples(50, 50)
    first, second = (sampling.labelled_subset(everything, 20, seed) for seed in (0, 1))
    assert set(first) != set(second)


def test_zero_labelled_takes_all_examples():
    assert sampling.labelled_subset(make_examples(3, 9), 0, 0) == make_examples(3, 9)


def test_more_labelled_than_available_is_an_error():
    everything = make_examples(4, 9)
    assert Counter(example.label for example in sampling.labelled_subset(everything, 8, 0)) == {0: 4, 1: 4}
    with pytest.raises(UserError, match="task.labelled 10, .* than available: bad 4, good 9"):
        sampling.labelled_subset(everything, 10, 0, ("bad", "good"))
    with pytest.raises(UserError, match="than available: 0 4, 1 9"):
        sampling.labelled_subset(everything, 10, 0)
    with pytest.raises(UserError, match="than available: bad 4, good 9, mixed 0"):
        sampling.labelled_subset(everything, 3, 0, ("bad", "good", "mixed"))
    with pytest.raises(UserError, match="than available: nothing"):
        sampling.labelled_subset([], 1, 0)
    with pytest.raises(ValueError, match="without a label"):
        sampling.labelled_subset(without_labels(everything), 1, 0)


def make_task(train: list[Example], unlabelled: list[Example]) -> Task:
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
    train = make_examples(10, 10)
    labelled = train[:8]
    task = make_task(train, make_examples(15))
    few, many = (sampling.unlabelled_examples(task, "train_rest", k, seed, labelled) for k in (n or 1, m or 1))
    assert len(many) == (m or 1) and set(few) <= set(many)
    assert all(example.label == -1 for example in many)
    assert not {example.id for example in many} & {example.id for example in labelled}
    assert sampling.unlabelled_examples(task, "train_rest", m or 1, seed, labelled) == many
    rest = sampling.unlabelled_examples(task, "train_rest", 0, seed, labelled)
    assert rest == without_labels(train[8:])
    assert sampling.unlabelled_examples(task, "split", 0, seed, []) == without_labels(make_examples(15))
    assert sampling.unlabelled_examples(task, "none", 0, seed, []) == []


def test_more_unlabelled_than_available_and_unknown_kinds_are_errors():
    task = make_task(make_examples(3, 3), make_examples(5))
    with pytest.raises(UserError, match="task.unlabelled 6 is more than available: 5; 0 takes all"):
        sampling.unlabelled_examples(task, "split", 6, 0, [])
    with pytest.raises(ValueError, match="unlabelled kind 'rest'"):
        sampling.unlabelled_examples(task, "rest", 0, 0, [])
    assert {e.id for e in sampling.unlabelled_examples(task, "split", 3, 0, [])} != {
        e.id for e in sampling.unlabelled_examples(task, "split", 3, 1, [])
    }


def test_a_split_without_labelled_examples_is_taken_without_reading_ids(monkeypatch):
    """Ten million ids take more than a gigabyte."""
    train, split = make_examples(4, 4), [Example(f"t/unlabelled/en/{i}", "x", None, -1, "en") for i in range(3)]
    monkeypatch.setattr(columns, "ids_of", lambda examples: pytest.fail("ids were read"))
    task = make_task(train, split)
    assert sampling.unlabelled_examples(task, "split", 0, 0, train) == split
    with pytest.raises(pytest.fail.Exception, match="ids were read"):
        sampling.unlabelled_examples(task, "train_rest", 0, 0, train[:2])


def test_a_file_replaces_the_unlabelled_split():
    task = make_task(make_examples(3, 3), make_examples(5))
    assert sampling.unlabelled_examples(task, "file", 0, 0, []) == without_labels(make_examples(5))
    assert len(sampling.unlabelled_examples(task, "file", 2, 0, [])) == 2


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 60), st.integers(0, 5))
def test_held_out_examples_are_disjoint_from_train_and_stratified(counts, n, seed):
    everything = make_examples(*counts)
    spare = len(everything) - len(counts)
    if n > spare or not spare:
        with pytest.raises(UserError, match=f"task.held_out_dev {n}: .* can spare {spare}, .* add a dev split"):
            sampling.held_out(everything, n, seed)
        return
    size = n or min(-(-len(everything) // 10), spare)
    train, dev = sampling.held_out(everything, n, seed)
    assert len(dev) == size and len(train) == len(everything) - size
    assert not {e.id for e in train} & {e.id for e in dev}
    assert [e for e in everything if e in train] == train and [e for e in everything if e in dev] == dev
    shares = {label: count * size / len(everything) for label, count in enumerate(counts)}
    is_capped = any(share > counts[label] - 1 for label, share in shares.items())
    for label, count in enumerate(counts):
        held_out_count = sum(e.label == label for e in dev)
        assert held_out_count < count, "the last example of a class was held out"
        if held_out_count < count - 1:
            assert held_out_count > shares[label] - 1
        if not is_capped:
            assert abs(held_out_count - shares[label]) < 1
    assert sampling.held_out(everything, n, seed) == (train, dev)


def test_rare_classes_stay_in_train():
    """120 examples give 12 to dev. Twenty classes have one example, so all 12 come from the large class."""
    train, dev = sampling.held_out(make_examples(100, *[1] * 20), 0, 0)
    assert Counter(e.label for e in dev) == {0: 12}
    assert Counter(e.label for e in train) == {0: 88, **dict.fromkeys(range(1, 21), 1)}


def test_small_classes_give_what_they_can_spare():
    """Shares of 9 among 10, 2, and 2 examples are 6.4, 1.3, and 1.3, and the small classes can spare one each."""
    _, dev = sampling.held_out(make_examples(10, 2, 2), 9, 0)
    assert Counter(e.label for e in dev) == {0: 7, 1: 1, 2: 1}


def test_balanced_classes_give_a_balanced_dev_split():
    train, dev = sampling.held_out(make_examples(100, 100), 0, 3)
    assert Counter(e.label for e in dev) == {0: 10, 1: 10} and Counter(e.label for e in train) == {0: 90, 1: 90}
    assert set(sampling.held_out(make_examples(100, 100), 0, 4)[1]) != set(dev)


def test_the_seed_decides_which_class_gets_the_extra_dev_example():
    """Three classes of 10 examples share 4 places, so the seed must decide which class gets two."""
    classes_with_two = Counter()
    for seed in range(60):
        dev = sampling.held_out(make_examples(10, 10, 10), 4, seed)[1]
        classes_with_two[Counter(e.label for e in dev).most_common(1)[0][0]] += 1
    assert set(classes_with_two) == {0, 1, 2} and min(classes_with_two.values()) > 8


def test_holding_out_unlabelled_examples_is_an_error():
    with pytest.raises(ValueError, match="without a label"):
        sampling.held_out(without_labels(make_examples(5, 5)), 0, 0)


def test_the_ids_of_held_out_examples_name_the_dev_split():
    config = TaskConfig(name="t", held_out_dev=2, held_out_seed=1)
    everything = make_examples(5, 5)
    train, dev = sampling.train_and_dev(everything, config)
    expected_train, expected_dev = sampling.held_out(everything, 2, 1)
    assert train == expected_train
    assert [replace(e, id=e.id.replace("/dev/", "/train/")) for e in dev] == expected_dev
    assert all(e.id.startswith("t/dev/en/") for e in dev) and len(dev) == 2
    assert all(e.id.startswith("t/train/en/") for e in train)
