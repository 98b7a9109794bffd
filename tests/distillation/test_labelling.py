"""Labelling can be interrupted anywhere and still ends with the same bytes."""

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
NUM_EXAMPLES, SHARD_SIZE = 50, 4


def make_store(root):
    ids = [f"task/train/en/{i}" for i in range(NUM_EXAMPLES)]
    return open_store(root, FIELDS, classes=("no", "yes"), ids=ids, shard_size=SHARD_SIZE)


def predict(indices):
    """Return fake logits that depend only on the example."""
    return np.sin(np.stack([indices, indices * 3 + 1], axis=1)).astype(np.float32)


def contents(store):
    return {path.name: path.read_bytes() for path in store.directory.iterdir()}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    store = make_store(tmp_path_factory.mktemp("whole"))
    assert label(store, predict) == NUM_EXAMPLES
    return store


def test_every_example_is_labelled_once_and_a_second_run_does_nothing(tmp_path):
    store, labelled, progress = make_store(tmp_path), [], []

    def counting(indices):
        labelled.extend(indices)
        return predict(indices)

    assert label(store, counting, progress.append) == NUM_EXAMPLES
    assert labelled == list(range(NUM_EXAMPLES))
    assert progress == [4] * 12 + [2]
    np.testing.assert_array_equal(store.read(store.ids), predict(np.arange(NUM_EXAMPLES)))
    assert label(store, counting, progress.append) == 0
    assert len(labelled) == NUM_EXAMPLES


def test_interrupted_run_resumes_at_the_missing_shard(tmp_path, uninterrupted):
    batches = []

    def failing(indices):
        if len(batches) == 5:
            raise KeyboardInterrupt
        batches.append(list(indices))
        return predict(indices)

    with pytest.raises(KeyboardInterrupt):
        label(make_store(tmp_path), failing)
    store = make_store(tmp_path)
    assert store.missing_shards() == list(range(5, 13))
    starts = []

    def recording(indices):
        starts.append(indices[0])
        return predict(indices)

    assert label(store, recording) == NUM_EXAMPLES - 20
    assert starts == list(range(20, NUM_EXAMPLES, SHARD_SIZE))
    assert contents(store) == contents(uninterrupted)


@pytest.mark.parametrize("fault", ["is truncated or of another size", "has other bytes than were written"])
def test_only_the_damaged_shard_is_labelled_again_with_a_warning(tmp_path, uninterrupted, caplog, fault):
    store = make_store(tmp_path)
    label(store, predict)
    path = store.directory / "shard-00007.npy"
    content = path.read_bytes()
    path.write_bytes(content[:-3] if "size" in fault else content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    with pytest.raises(UserError, match=rf"shard-00007.npy {fault} \(1 of 13 shards\): run the same command"):
        make_store(tmp_path).read(store.ids)
    assert label(make_store(tmp_path), predict) == SHARD_SIZE
    assert [record.getMessage() for record in caplog.records] == [
        f"{store.directory}: shard-00007.npy {fault}, so labelling its examples again"
    ]
    assert contents(store) == contents(uninterrupted)


CHILD = """
import time
from tests.distillation.test_labelling import label, make_store, predict

def slow(indices):
    time.sleep(0.03)
    return predict(indices)

store = make_store({root!r})
print("ready", flush=True)
label(store, slow)
print("done", flush=True)
"""


def test_repeatedly_killed_run_ends_with_the_same_bytes(tmp_path, uninterrupted):
    script = CHILD.format(root=str(tmp_path))
    rng, partial_runs = random.Random(0), 0
    for attempt in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
        )
        assert child.stdout.readline() == "ready\n"
        if attempt < 5:
            goal = min(13 - len(make_store(tmp_path).missing_shards()) + rng.randrange(3), 12)
            while 13 - len(make_store(tmp_path).missing_shards()) < goal:
                time.sleep(0.01)
            child.kill()
        output, _ = child.communicate(timeout=60)
        partial_runs += 0 < len(make_store(tmp_path).missing_shards()) < 13
    assert output == "done\n" and child.returncode == 0
    assert partial_runs >= 1, "no kill fell into the middle of a run"
    assert contents(make_store(tmp_path)) == contents(uninterrupted)


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
def test_different_classes_are_refused_with_both_lists(teacher, student):
    with pytest.raises(UserError) as error:
        permute_classes(np.zeros((1, len(teacher)), np.float32), teacher, student)
    assert str(list(teacher)) in str(error.value) and str(list(student)) in str(error.value)


def test_logits_of_another_width_are_refused_with_their_shape():
    with pytest.raises(UserError, match=r"\(1, 3\)"):
        permute_classes(np.zeros((1, 3), np.float32), ("a", "b"), ("b", "a"))
