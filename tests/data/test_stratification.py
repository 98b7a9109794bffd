"""Samples of label sets: no class gets lost, sizes are exact, and smaller samples are beginnings of larger ones."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtransfer.config import TaskConfig
from xtransfer.data import stratification
from xtransfer.data.examples import without_labels
from xtransfer.data.sampling import held_out, labelled_subset, train_and_dev
from xtransfer.data.task import Example, gold
from xtransfer.errors import UserError

SETS = st.lists(st.sets(st.integers(0, 4)).map(lambda labels: tuple(sorted(labels))), min_size=1, max_size=40)


def example(number, label_set):
    return Example(f"files/train/en/{number}", f"text {number}", None, -1, "en", label_set)


@settings(max_examples=80, deadline=None)
@given(SETS, st.integers(0, 3), st.data())
def test_a_balanced_sample_covers_every_class_and_is_nested(sets, seed, data):
    n = data.draw(st.integers(0, len(sets)))
    sample = stratification.balanced(sets, n, seed)
    assert len(set(sample)) == n
    assert stratification.balanced(sets, len(sets), seed)[:n] == sample
    present = {label for labels in sets for label in labels}
    if n >= len(present):
        assert {label for index in sample for label in sets[index]} == present


def test_a_balanced_sample_evens_out_frequencies():
    # 90 of class 0 and 10 of class 1, never together, and as many empty sets as class 1: a third of 30 each.
    sets = [(0,)] * 90 + [(1,)] * 10 + [()] * 10
    drawn = Counter(sets[index] for index in stratification.balanced(sets, 30, 0))
    assert drawn == {(0,): 10, (1,): 10, (): 10}
    # Beyond that, only class 0 is left.
    assert Counter(sets[index] for index in stratification.balanced(sets, 60, 0))[(0,)] == 40


@settings(max_examples=80, deadline=None)
@given(SETS, st.integers(0, 3), st.data())
def test_a_held_out_sample_has_its_size_and_leaves_every_class_in_training(sets, seed, data):
    kept = stratification.cover(sets, seed)
    n = data.draw(st.integers(0, len(sets) - len(kept)))
    out = stratification.held_out(sets, n, kept, seed)
    assert len(out) == n and not out & kept
    rest = {label for index, labels in enumerate(sets) if index not in out for label in labels}
    assert rest == {label for labels in sets for label in labels}
    assert stratification.held_out(sets, n, kept, seed) == out


def test_a_held_out_sample_keeps_the_share_of_every_class():
    sets = [(0,)] * 100 + [(0, 1)] * 40 + [(2,)] * 20 + [()] * 40
    out = stratification.held_out(sets, 20, stratification.cover(sets, 0), 0)
    assert Counter(sets[index] for index in out) == {(0,): 10, (0, 1): 4, (2,): 2, (): 4}


def test_samples_of_examples_take_label_sets():
    examples = [example(i, labels) for i, labels in enumerate([(0,), (0, 1), (), (2,), (0,), (0,)])]
    assert {c for x in labelled_subset(examples, 3, 0) for c in x.classes} == {0, 1, 2}
    assert labelled_subset(examples, 0, 0) == examples
    rest, dev = held_out(examples, 2, 0)
    assert len(dev) == 2 and sorted(rest + dev, key=lambda x: x.id) == examples
    _, dev = train_and_dev(examples, TaskConfig(name="files", held_out_dev=1))
    assert dev[0].id.startswith("files/dev/en/")
    assert {x.classes for x in without_labels(examples)} == {None}


def test_too_large_samples_are_refused():
    examples = [example(0, (0,)), example(1, (1,)), example(2, (0, 1))]
    with pytest.raises(UserError, match="task.labelled 4 is more than available: 3"):
        labelled_subset(examples, 4, 0)
    with pytest.raises(UserError, match="task.held_out_dev 3: 3 training examples can spare"):
        held_out(examples, 3, 0)
    with pytest.raises(ValueError, match="without a label"):
        labelled_subset([example(0, None)], 1, 0)


def test_gold_labels_as_an_array():
    examples = [example(0, (0, 2)), example(1, ()), example(2, None)]
    assert gold(examples, 3, multi_label=True).tolist() == [[1, 0, 1], [0, 0, 0], [-1, -1, -1]]
