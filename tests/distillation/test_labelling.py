"""Labelling can be stopped anywhere and ends with the same bytes."""

import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from xtransfer.distillation.labelling import label, permute_classes
from xtransfer.distillation.logits_store import open_store
from xtransfer.errors import UserError

FIELDS = {"teacher_fingerprint": "t", "tokenizer_fingerprint": "k", "max_length": 64, "data_fingerprint": "d"}
NUMBER, SHARD = 50, 4


def opened(root):
    ids = [f"task/train/en/{i}" for i in range(NUMBER)]
    return open_store(root, FIELDS, classes=("no", "yes"), ids=ids, shard_size=SHARD)


def predict(indices):
    """Fake logits that depend on the example alone."""
    return np.sin(np.stack([indices, indices * 3 + 1], axis=1)).astype(np.float32)


def contents(store):
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    store = opened(tmp_path_factory.mktemp("whole"))
    assert label(store, predict) == NUMBER
    return store


def test_every_example_is_labelled_once_and_a_second_run_does_nothing(tmp_path):
    store, asked, told = opened(tmp_path), [], []

    def counting(indices):
        asked.extend(indices)
        return predict(indices)

    assert label(store, counting, told.append) == NUMBER
    assert asked == list(range(NUMBER))
    assert told == [4] * 12 + [2]
    np.testing.assert_array_equal(store.read(store.ids), predict(np.arange(NUMBER)))
    assert label(store, counting, told.append) == 0
    assert len(asked) == NUMBER


def test_an_interrupted_run_goes_on_at_the_missing_shard(tmp_path, uninterrupted):
    asked = []

    def failing(indices):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.append(list(indices))
        return predict(indices)

    with pytest.raises(KeyboardInterrupt):
        label(opened(tmp_path), failing)
    store = opened(tmp_path)
    assert store.missing_shards() == list(range(5, 13))
    resumed = []
    assert label(store, lambda indices: resumed.append(indices[0]) or predict(indices)) == NUMBER - 20
    assert resumed == list(range(20, NUMBER, SHARD))
    assert contents(store) == contents(uninterrupted)


def test_only_the_truncated_shard_is_computed_again(tmp_path, uninterrupted):
    store = opened(tmp_path)
    label(store, predict)
    path = store.directory / "shard-00007.npy"
    path.write_bytes(path.read_bytes()[:-3])
    assert label(opened(tmp_path), predict) == SHARD
    assert contents(store) == contents(uninterrupted)


CHILD = """
import time
from tests.distillation.test_labelling import label, opened, predict
store = opened({root!r})
print("ready", flush=True)
label(store, lambda indices: time.sleep(0.03) or predict(indices))
print("done", flush=True)
"""


def test_killed_again_and_again_it_ends_with_the_same_bytes(tmp_path, uninterrupted):
    script = CHILD.format(root=str(tmp_path))
    rng, partial = random.Random(0), 0
    for attempt in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert child.stdout.readline() == "ready\n"
        if attempt < 5:
            time.sleep(rng.uniform(0.0, 0.12))
            child.kill()
        rest, _ = child.communicate(timeout=60)
        partial += 0 < len(opened(tmp_path).missing_shards()) < 13
    assert rest == "done\n" and child.returncode == 0
    assert partial >= 1, "no kill fell into the middle of a run"
    assert contents(opened(tmp_path)) == contents(uninterrupted)


def test_classes_are_permuted_by_name():
    logits = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    permuted = permute_classes(logits, ("a", "b", "c"), ("c", "a", "b"))
    np.testing.assert_array_equal(permuted, np.array([[3, 1, 2], [6, 4, 5]], np.float32))
    assert permuted.dtype == np.float32
    np.testing.assert_array_equal(permute_classes(permuted, ("c", "a", "b"), ("a", "b", "c")), logits)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (("a", "b", "c"), ("a", "b")),
        (("a", "b"), ("a", "c")),
        (("a", "b"), ("A", "B")),
        (("a", "b", "b"), ("a", "b", "b")),
    ],
)
def test_other_classes_are_refused_with_both_lists(teacher, student):
    with pytest.raises(UserError) as error:
        permute_classes(np.zeros((1, len(teacher)), np.float32), teacher, student)
    assert str(list(teacher)) in str(error.value) and str(list(student)) in str(error.value)


def test_logits_of_another_width_are_refused():
    with pytest.raises(UserError, match=r"\(1, 3\)"):
        permute_classes(np.zeros((1, 3), np.float32), ("a", "b"), ("b", "a"))
