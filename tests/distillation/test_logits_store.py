"""The logits store: keys, complete shards, and refusals."""

import json
import os
import tracemalloc

import numpy as np
import pytest

from xtransfer.data.batches.batches import Numbers
from xtransfer.distillation import logits_store
from xtransfer.distillation.logits_store import open_store, store_key
from xtransfer.errors import UserError
from xtransfer.runtime import checksums

FIELDS = {"teacher_fingerprint": "t1", "tokenizer_fingerprint": "k1", "max_length": 64, "data_fingerprint": "d1"}
IDS = tuple(f"reviews/train/en/{i}" for i in range(7))
CLASSES = ("negative", "neutral", "positive")
LOGITS = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)


def make_store(root, **changes):
    settings = {"classes": CLASSES, "ids": IDS, "shard_size": 3} | changes
    return open_store(root, FIELDS, **settings)


def make_full_store(root):
    store = make_store(root)
    for shard in store.missing_shards():
        store.write_shard(shard, LOGITS[store.shard_indices(shard)])
    return store


def test_key_is_stable_and_differs_with_every_field():
    key = "dbc2d5bc6ddc9f87"  # from sha256sum of the canonical JSON
    assert store_key(**FIELDS) == key
    assert store_key(**dict(reversed(FIELDS.items()))) == key
    changed = {store_key(**FIELDS | {name: 65 if name == "max_length" else "other"}) for name in FIELDS}
    assert len(changed | {key}) == 5


def test_written_logits_are_read_by_id(tmp_path):
    store = make_store(tmp_path)
    assert (store.num_shards, store.missing_shards(), store.complete) == (3, [0, 1, 2], False)
    store.write_shard(1, LOGITS[3:6])
    assert make_store(tmp_path).missing_shards() == [0, 2]
    store = make_full_store(tmp_path)
    assert store.complete
    order = [6, 0, 3, 3]
    result = make_store(tmp_path).read([IDS[i] for i in order])
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, LOGITS[order])
    assert store.read([]).shape == (0, 3)


def test_files_have_plain_formats(tmp_path):
    store = make_full_store(tmp_path)
    assert sorted(p.name for p in store.directory.iterdir()) == [
        "checksums.json",
        "ids.txt",
        "manifest.json",
        "shard-00000.npy",
        "shard-00001.npy",
        "shard-00002.npy",
    ]
    assert store.directory == tmp_path / store_key(**FIELDS)
    assert (store.directory / "ids.txt").read_text().split("\n") == [*IDS, ""]
    manifest = json.loads((store.directory / "manifest.json").read_text())
    assert manifest["classes"] == list(CLASSES)
    assert (manifest["count"], manifest["shard_size"], manifest["key"]) == (7, 3, FIELDS)
    np.testing.assert_array_equal(np.load(store.directory / "shard-00002.npy", allow_pickle=False), LOGITS[6:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": CLASSES[::-1]}, "classes: .*'negative', 'neutral', 'positive'.*'positive', 'neutral', 'negative'"),
        ({"ids": IDS[::-1]}, "ids_sha256"),
        ({"ids": IDS[:-1]}, "count: 7 in the store, 6 requested"),
        ({"shard_size": 4}, "shard_size: 3 in the store, 4 requested"),
    ],
)
def test_store_with_other_contents_is_refused_with_the_difference(tmp_path, changes, message):
    make_full_store(tmp_path)
    with pytest.raises(UserError, match=message):
        make_store(tmp_path, **changes)


def test_changed_key_gives_an_empty_store(tmp_path):
    make_full_store(tmp_path)
    for name in FIELDS:
        changed = FIELDS | {name: 65 if name == "max_length" else "other"}
        store = open_store(tmp_path, changed, classes=CLASSES, ids=IDS, shard_size=3)
        assert store.missing_shards() == [0, 1, 2]
        with pytest.raises(UserError, match="missing"):
            store.read(IDS)


@pytest.mark.parametrize("content", ["{", "[]", "", '{"format": 0}', '{"format": 1, "format": 1}', "\xff"])
def test_broken_manifest_is_written_again_and_the_shards_stay(tmp_path, content, caplog):
    store = make_full_store(tmp_path)
    before = {path.name: path.read_bytes() for path in store.directory.iterdir()}
    (store.directory / "manifest.json").write_text(content, encoding="latin-1")
    assert make_store(tmp_path).complete
    assert {path.name: path.read_bytes() for path in store.directory.iterdir()} == before
    assert "manifest.json was damaged, so written again" in caplog.text
    # With other contents, nothing shows that the shards are theirs.
    (store.directory / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="manifest.json.*label again"):
        make_store(tmp_path, classes=CLASSES[::-1])


@pytest.mark.parametrize("content", ["{", "[]", "", '{"format": 0}', '{"format": 1, "format": 1}', "\xff"])
def test_broken_manifest_of_an_older_store_is_refused(tmp_path, content):
    store = make_full_store(tmp_path)
    listed = checksums.read(store.directory)
    del listed["manifest.json"]
    checksums.write_list(store.directory, listed)
    (store.directory / "manifest.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match="manifest.json.*label again"):
        make_store(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:40]),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
        lambda path: np.save(path, LOGITS[:3].astype(np.float64)),
        lambda path: np.save(path, LOGITS[:3].T),
        lambda path: np.save(path, LOGITS[:2]),
    ],
)
def test_damaged_shard_counts_as_missing_and_is_not_read(tmp_path, damage):
    store = make_full_store(tmp_path)
    path = store.directory / "shard-00000.npy"
    original = path.read_bytes()
    damage(path)
    store = make_store(tmp_path)
    assert store.missing_shards() == [0]
    with pytest.raises(UserError, match="shard-00000.npy.*1 of 3"):
        store.read([IDS[6]])
    store.write_shard(0, LOGITS[:3])
    assert path.read_bytes() == original
    assert store.complete


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (LOGITS[:2], "shape"),
        (LOGITS[:3, :2], "shape"),
        (LOGITS[:3].astype(np.float64), "float64"),
        (np.where(np.arange(9).reshape(3, 3) == 4, np.nan, LOGITS[:3]).astype(np.float32), "reviews/train/en/1"),
        (np.full((3, 3), np.inf, np.float32), "3 examples"),
    ],
)
def test_bad_logits_are_not_written(tmp_path, logits, message):
    store = make_store(tmp_path)
    with pytest.raises(UserError, match=message):
        store.write_shard(0, logits)
    assert store.missing_shards() == [0, 1, 2]


def test_a_shard_that_is_older_than_the_checksums_is_used(tmp_path):
    store = make_full_store(tmp_path)
    (store.directory / "checksums.json").unlink()
    np.testing.assert_array_equal(make_store(tmp_path).read(IDS), LOGITS)
    store.write_shard(1, LOGITS[3:6])
    assert store.complete


def test_unknown_id_is_named(tmp_path):
    with pytest.raises(UserError, match="'elsewhere/9'.*1 ids"):
        make_full_store(tmp_path).read([IDS[0], "elsewhere/9"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ids": ()}, "no examples"),
        ({"ids": ("a", "b", "a")}, "'a' occurs twice"),
        ({"ids": ("a", "b\nc")}, "one non-empty line"),
        ({"ids": ("a", "")}, "one non-empty line"),
        ({"ids": ("a", "\ud800")}, "Unicode"),
        ({"classes": ("yes",)}, "classes"),
        ({"classes": ("yes", "yes")}, "classes"),
        ({"shard_size": 0}, "shard_size"),
    ],
)
def test_invalid_ids_classes_and_sizes_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_store(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_shard_number_out_of_range_is_an_error(tmp_path):
    with pytest.raises(IndexError):
        make_store(tmp_path).write_shard(3, LOGITS[:1])


def test_failed_write_is_a_one_line_error_that_names_the_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="ids.txt cannot be written"):
        make_store(tmp_path / "file")


def test_interrupted_replace_leaves_the_old_state(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    store = make_store(tmp_path)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match=f"^{store.directory}/.* cannot be written: No space left on device"):
        store.write_shard(0, LOGITS[:3])
    monkeypatch.undo()
    assert store.missing_shards() == [0, 1, 2]
    make_full_store(tmp_path)
    assert not list(store.directory.glob(".*"))


def test_large_stores_have_few_shards_and_existing_ones_keep_theirs(tmp_path):
    assert [logits_store.default_shard_size(n) for n in (1, 1 << 20, (1 << 20) + 1)] == [1024, 1024, 65_536]
    assert open_store(tmp_path / "new", FIELDS, classes=CLASSES, ids=IDS).shard_size == 1024
    open_store(tmp_path / "old", FIELDS, classes=CLASSES, ids=IDS, shard_size=3)
    assert open_store(tmp_path / "old", FIELDS, classes=CLASSES, ids=IDS).shard_size == 3


def test_logits_are_read_in_the_order_of_the_ids(tmp_path):
    store = open_store(tmp_path, FIELDS, classes=CLASSES, ids=IDS, shard_size=2)
    logits = np.arange(len(IDS) * len(CLASSES), dtype=np.float32).reshape(len(IDS), len(CLASSES))
    for shard in store.missing_shards():
        store.write_shard(shard, logits[store.shard_indices(shard)])
    np.testing.assert_array_equal(store.read(list(IDS)), logits)
    np.testing.assert_array_equal(store.read(IDS[::-1]), logits[::-1])


def test_a_few_logits_are_read_without_the_ids_of_all(tmp_path):
    """50,000 ids take 3.5 MB as strings and 2.5 MB as a dictionary. The logits take 0.4 MB, and twice that to read."""
    ids = Numbers(50_000)
    store = open_store(tmp_path, FIELDS, classes=CLASSES[:2], ids=ids, shard_size=len(ids))
    logits = np.arange(2 * len(ids), dtype=np.float32).reshape(len(ids), 2)
    store.write_shard(0, logits)
    tracemalloc.start()
    few = store.read(["7", "49999"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(few, logits[[7, 49_999]])
    assert peak < 2_000_000
