"""Examples on disk are the same as in memory, whatever is asked of them, and take no more memory if there are more."""

import errno
import io
import json
import os
import resource
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer import storage
from xtransfer.config import ExperimentConfig, TaskConfig
from xtransfer.data import examples as columns
from xtransfer.data import sampling, text_cache, user_files
from xtransfer.data.example import Example
from xtransfer.data.examples import StoredExamples, TextFile
from xtransfer.distillation import transfer_set
from xtransfer.errors import DataError, MachineError, UserError

ROWS = [
    {"uid": f"a{i}", "text": f"text {i % 7} é", "other": f"pair {i}", "label": ["good", "bad", "odd"][i * i % 3 % 2]}
    for i in range(23)
]
BATCH = 4

Load = Callable[..., tuple[list[Example], StoredExamples]]


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        lines = ["\t".join(rows[0]), *("\t".join(map(str, row.values())) for row in rows)]
        path.write_text("\n".join([*lines, ""]), encoding="utf-8")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "BATCH", BATCH)
    monkeypatch.setattr(columns, "_CHUNK", 2 * BATCH)
    monkeypatch.setattr(text_cache, "BATCH", BATCH)


def config_of(root: Path, **changes: object) -> TaskConfig:
    settings = TaskConfig(name="files", data_dir=str(root), source_language="en", cache_dir=str(root / "cache"))
    return replace(settings, **{"path": "{language}/{split}.jsonl", "labels": ("good", "bad"), **changes})


def both(config: TaskConfig, split: str = "train", language: str = "en") -> tuple[list[Example], StoredExamples]:
    """Return the examples of a split in memory, and from the disk."""
    in_memory = user_files.task(config).load(split, language)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_cache, "LARGE", 0)
        stored = user_files.task(config).load(split, language)
    assert isinstance(in_memory, list) and isinstance(stored, StoredExamples)
    return in_memory, stored


@pytest.fixture(params=(".tsv", ".jsonl", ".parquet"))
def config(request: pytest.FixtureRequest, tmp_path: Path) -> TaskConfig:
    for language, split in (("en", "train"), ("en", "test"), ("de", "test"), ("en", "unlabelled")):
        rows = ROWS if split != "unlabelled" else [{k: v for k, v in row.items() if k != "label"} for row in ROWS]
        write(tmp_path / language / f"{split}{request.param}", rows)
    return config_of(tmp_path, path=f"{{language}}/{{split}}{request.param}", held_out_dev=5)


@pytest.mark.parametrize("split", ["train", "dev", "test", "unlabelled"])
@pytest.mark.parametrize("changes", [{}, {"pair_column": "other", "id_column": "uid"}], ids=["numbers", "ids"])
def test_every_split_is_the_same_on_disk(config: TaskConfig, split: str, changes: dict[str, str]) -> None:
    in_memory, stored = both(replace(config, **changes), split)
    assert list(stored) == in_memory
    assert len(stored) == len(in_memory) > 0
    assert [stored[i] for i in range(-len(stored), len(stored))] == in_memory * 2
    assert list(stored[3:17:2]) == in_memory[3:17:2]
    assert list(columns.ids_of(stored)) == [example.id for example in in_memory]
    assert columns.ids_of(stored)[2:11] == [example.id for example in in_memory[2:11]]
    assert columns.labels_of(stored).tolist() == [example.label for example in in_memory]
    assert [None if side is None else list(side) for side in columns.sides(stored)] == list(columns.sides(in_memory))
    for ask in (columns.languages_of, columns.data_sets, columns.classes_of, columns.has_label_sets):
        assert ask(stored) == ask(in_memory)
    for ask in (columns.are_labelled, columns.text_digests):
        assert ask(stored).tolist() == ask(in_memory).tolist()
    assert transfer_set.fingerprint(stored) == transfer_set.fingerprint(in_memory)
    with pytest.raises(IndexError):
        stored[len(stored)]


def test_samples_are_the_same_on_disk(config: TaskConfig) -> None:
    in_memory, stored = both(config)
    for n, seed in ((0, 0), (6, 1), (10, 7)):
        drawn = [sampling.labelled_subset(train, n, seed, ("good", "bad")) for train in (in_memory, stored)]
        assert list(drawn[1]) == drawn[0]
        assert [list(part) for part in sampling.held_out(stored, n, seed)] == list(
            map(list, sampling.held_out(in_memory, n, seed))
        )
        task = user_files.task(config)
        tasks = [replace(task, load=lambda split, language, train=train: train) for train in (in_memory, stored)]
        for limit in (0, 4):
            left = [
                sampling.unlabelled_examples(task, "train_rest", limit, seed, labelled)
                for task, labelled in zip(tasks, (drawn[0][:6], drawn[1][:6]), strict=True)
            ]
            assert list(left[1]) == left[0]
            assert isinstance(left[1], StoredExamples)
            assert {example.label for example in left[1]} == {-1}


def test_the_transfer_set_and_its_places_are_the_same_on_disk(config: TaskConfig, monkeypatch) -> None:
    settings = replace(config, labelled=6, unlabelled_from="split", unlabelled=11)
    experiment = ExperimentConfig(task=settings, objectives=("vanilla", "monox_kd"))
    in_memory = transfer_set.gather(experiment, user_files.task(settings))
    monkeypatch.setattr(text_cache, "LARGE", 0)
    stored = transfer_set.gather(experiment, user_files.task(settings))
    assert list(stored.everything) == in_memory.everything
    expected = columns.places(in_memory.everything, in_memory.drawn_from)
    for one, other in zip(columns.places(stored.everything, stored.drawn_from), expected, strict=True):
        assert one.tolist() == other.tolist()
    mixed = columns.join(in_memory.labelled, stored.unlabelled)
    assert list(mixed) == in_memory.everything
    places = columns.places(mixed, (in_memory.drawn_from[0], stored.drawn_from[1]))
    assert [place.tolist() for place in places] == [place.tolist() for place in expected]
    assert list(transfer_set.rows([stored])) == list(transfer_set.rows([in_memory, in_memory]))


def test_label_sets_and_languages_in_a_column_are_the_same_on_disk(tmp_path: Path) -> None:
    rows = [
        {"text": f"t{i}", "label": [["a"], ["b", "a"], []][i % 3], "lang": "de" if i % 4 == 1 else "en"}
        for i in range(30)
    ]
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.jsonl", rows)
    config = config_of(
        tmp_path, path="{split}.jsonl", language_column="lang", multi_label=True, labels=("a", "b"), labelled=4
    )
    for language in ("en", "de"):
        in_memory, stored = both(config, "test", language)
        assert list(stored) == in_memory
        assert (
            columns.gold(stored, 2, multi_label=True).tolist() == columns.gold(in_memory, 2, multi_label=True).tolist()
        )
        assert columns.are_labelled(stored).all()
        assert columns.classes_of(stored) == {0, 1}


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": "x", "label": "god", "uid": "z"}, {}, "train.jsonl:24: label 'god' is not one of good, bad"),
        ({"text": " ", "label": "good", "uid": "z"}, {}, "train.jsonl:24: column 'text' is empty"),
        ({"text": "x", "label": "good", "uid": "a3"}, {"id_column": "uid"}, "24: id 'a3' already occurs in line 4"),
    ],
)
def test_an_error_is_the_same_on_disk_and_leaves_nothing(tmp_path: Path, row, changes, message, monkeypatch) -> None:
    for split in ("train", "dev", "test"):
        for language in ("en", "de"):
            write(tmp_path / language / f"{split}.jsonl", [*ROWS, row] if split == "train" else ROWS)
    config = config_of(tmp_path, **changes)
    for large in (1 << 60, 0):
        monkeypatch.setattr(text_cache, "LARGE", large)
        with pytest.raises(UserError, match=message):
            user_files.task(config).load("train", "en")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def test_a_disk_that_fills_up_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    class FullDisk(io.RawIOBase):
        """A file that takes a hundred bytes and no more, not even the end that a writer adds."""

        def __init__(self) -> None:
            self.written = 0

        def writable(self) -> bool:
            return True

        def write(self, data) -> int:
            self.written += len(data)
            if self.written > 100:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

    write(tmp_path / "en" / "unlabelled.jsonl", ROWS)
    monkeypatch.setattr(text_cache, "LARGE", 0)
    monkeypatch.setattr(text_cache.pa, "OSFile", lambda *_: pa.PythonFile(FullDisk(), mode="w"))
    with pytest.raises(MachineError, match="texts/[0-9a-f]{16}: the text cannot be written: No space left on device"):
        user_files.text_source(config_of(tmp_path)).pretraining("en")
    assert [path.name for path in (tmp_path / "cache" / "texts").iterdir()] == [".reading text.lock"]


def test_a_batch_may_have_more_text_than_32_bits_count(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "en" / "unlabelled.jsonl", [{"text": "x", "other": "y"}])
    monkeypatch.setattr(text_cache, "LARGE", 0)
    user_files.text_source(config_of(tmp_path, pair_column="other")).pretraining("en")
    (path,) = (tmp_path / "cache" / "texts").glob("*/examples.arrow")
    schema = pa.ipc.open_file(pa.OSFile(str(path))).schema
    assert [schema.field(name).type for name in ("text", "pair")] == [pa.large_string()] * 2


def test_what_stands_in_the_place_of_an_entry_is_replaced(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "en" / "unlabelled.jsonl", ROWS)
    monkeypatch.setattr(text_cache, "LARGE", 0)

    def texts() -> list[str]:
        return user_files.text_source(config_of(tmp_path)).pretraining("en")["en"]

    expected = texts()
    (entry,) = (tmp_path / "cache" / "texts").glob("[0-9a-f]*")
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").touch()
    (entry.parent / ".mine.tmp").touch()
    for target in (tmp_path / "nowhere", other):
        shutil.rmtree(entry)
        entry.symlink_to(target)
        assert texts() == expected
        assert entry.is_dir() and not entry.is_symlink()
    assert (other / "mine").exists() and (entry.parent / ".mine.tmp").exists()


def test_an_entry_that_cannot_take_its_name_is_named(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "en" / "unlabelled.jsonl", ROWS)
    monkeypatch.setattr(text_cache, "LARGE", 0)
    monkeypatch.setattr(storage, "write_atomically", lambda path, _: shutil.rmtree(path.parent))
    with pytest.raises(MachineError, match="texts/[0-9a-f]{16}: the text cannot be written: No such file"):
        user_files.text_source(config_of(tmp_path)).pretraining("en")


def test_rows_without_text_are_skipped_and_keep_their_numbers(tmp_path: Path, caplog) -> None:
    rows = [{"text": text, "label": "good"} for text in ("a", "", "b", " ", "c")]
    for split in ("train", "dev", "test"):
        for language in ("en", "de"):
            write(tmp_path / language / f"{split}.jsonl", rows)
    in_memory, stored = both(config_of(tmp_path, empty_text="skip"), "test")
    assert list(stored) == in_memory
    assert [example.id for example in stored] == ["files/test/en/0", "files/test/en/2", "files/test/en/4"]
    assert caplog.text.count("2 rows without text were skipped") == 2


def test_a_file_without_text_is_refused_on_disk_too(tmp_path: Path, monkeypatch) -> None:
    for language in ("en", "de"):
        for split in ("train", "dev", "test"):
            write(tmp_path / language / f"{split}.jsonl", ROWS)
    (tmp_path / "en" / "dev.jsonl").write_text("")
    monkeypatch.setattr(text_cache, "LARGE", 0)
    with pytest.raises(UserError, match=r"dev.jsonl: no rows with text"):
        user_files.task(config_of(tmp_path)).load("dev", "en")


def test_an_entry_is_read_again_until_its_file_changes_or_is_damaged(config: TaskConfig, monkeypatch, caplog) -> None:
    monkeypatch.setattr(text_cache, "LARGE", 0)
    stored = user_files.task(config).load("test", "en")
    (entry,) = (Path(config.cache_dir) / "texts").glob("*/examples.arrow")
    expected, before = list(stored), entry.stat().st_mtime_ns
    assert list(user_files.task(config).load("test", "en")) == expected
    assert entry.stat().st_mtime_ns == before
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 1
    entry.write_bytes(content)
    assert list(user_files.task(config).load("test", "en")) == expected
    assert "damaged, so reading the text again" in caplog.text


def test_an_entry_belongs_to_the_ending_of_its_file(tmp_path: Path, monkeypatch) -> None:
    """Quotes are characters of a .tsv file, and syntax in a .csv file with the same bytes."""
    monkeypatch.setattr(text_cache, "LARGE", 0)
    texts = {}
    for ending in (".tsv", ".csv"):
        for split in ("train", "dev", "test"):
            for language in ("en", "de"):
                path = tmp_path / language / f"{split}{ending}"
                path.parent.mkdir(exist_ok=True)
                path.write_text('text\tlabel\n"a"\tgood\nb\tbad\n', encoding="utf-8")
        config = config_of(tmp_path, path=f"{{language}}/{{split}}{ending}", delimiter="tab")
        texts[ending] = [example.text for example in user_files.task(config).load("test", "en")]
    assert texts == {".tsv": ['"a"', "b"], ".csv": ["a", "b"]}


def test_a_file_that_changes_while_it_is_read_leaves_no_entry(tmp_path: Path, monkeypatch) -> None:
    for split in ("train", "dev", "test"):
        for language in ("en", "de"):
            write(tmp_path / language / f"{split}.jsonl", ROWS)
    path = tmp_path / "en" / "test.jsonl"
    facts, content = path.stat(), path.read_bytes()
    monkeypatch.setattr(text_cache, "LARGE", 0)
    read = user_files.tables.stream_records

    def change_and_read(*arguments, **options):
        path.write_bytes(content.replace(b"text 1", b"TEXT 1"))
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))  # so that only its bytes differ
        return read(*arguments, **options)

    task = user_files.task(config_of(tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(user_files.tables, "stream_records", change_and_read)
        with pytest.raises(DataError, match=r"test\.jsonl: changed while it was read; run the same command again"):
            task.load("test", "en")
    assert not list((tmp_path / "cache").rglob("*.arrow"))
    assert task.load("test", "en")[1].text == "TEXT 1 é"
    path.write_bytes(content)
    assert task.load("test", "en")[1].text == "text 1 é"


@pytest.mark.parametrize("missing", [1, 300, 1 << 20], ids=["end", "footer", "batches"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, missing: int) -> None:
    def stored(directory: Path) -> StoredExamples:
        rows = (Example(f"t/{i}", "word " * 40, None, 0, "en") for i in range(10_000))
        return text_cache.stored(directory, "key", "t/", "en", lambda: rows, has_numbers=True)

    stored(tmp_path / "whole")
    (whole,) = (tmp_path / "whole").glob("*/examples.arrow")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal, so that a write fails
    resource.setrlimit(resource.RLIMIT_FSIZE, (whole.stat().st_size - missing, limits[1]))
    try:
        with pytest.raises(MachineError, match=r": the text cannot be written: File too large; free some space, or"):
            stored(tmp_path / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".reading text.lock"]


def test_a_batch_that_another_thread_reads_does_not_take_the_place_of_ours(stored_file: StoredExamples) -> None:
    class Shared(TextFile):
        """A file of which another thread always reads the first batch right after this one has read any."""

        @property
        def _recent(self):
            return self._last

        @_recent.setter
        def _recent(self, value):
            self._last = value and (0, self._reader.get_batch(0))

    file = stored_file.parts[0].source
    shared = Shared(file.path, file.prefix, file.language)
    for start in range(0, len(file), BATCH):
        assert shared.column("text", range(start, start + 1)) == file.column("text", range(start, start + 1))


def test_labels_keep_no_texts_in_memory(tmp_path: Path) -> None:
    rows = (Example(f"t/{i}", "x" * 1000, None, i % 3, "en") for i in range(5_000))
    stored = text_cache.stored(tmp_path, "key", "t/", "en", lambda: rows, has_numbers=True)
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        (part,) = stored.parts
        labels = TextFile(part.source.path, "t/", "en").labels()
    finally:
        pa.set_memory_pool(default)
    assert labels.tolist() == [i % 3 for i in range(5_000)]
    assert 0 < pool.max_memory() < 100_000  # the texts take 5,000,000 bytes


@given(st.data())
def test_selections_of_joined_sets_are_those_of_lists(stored_file: StoredExamples, data: st.DataObject) -> None:
    in_memory = [Example(f"m/{i}", f"m{i}", None, i % 2, "fr") for i in range(5)]
    sets = data.draw(st.lists(st.sampled_from([in_memory, stored_file, stored_file[3:9]]), min_size=1, max_size=4))
    joined, expected = columns.join(*sets), [example for examples in sets for example in examples]
    for _ in range(2):
        rows = np.array(data.draw(st.lists(st.integers(0, len(expected) - 1), max_size=20)), np.int64)
        joined, expected = columns.select(joined, rows), [expected[row] for row in rows]
        assert list(joined) == expected
        assert columns.labels_of(joined).tolist() == [example.label for example in expected]
        assert columns.in_languages(joined, ("fr",)).tolist() == [
            row for row, example in enumerate(expected) if example.language == "fr"
        ]
        if not expected:
            return


@pytest.fixture(scope="module")
def stored_file(tmp_path_factory: pytest.TempPathFactory) -> StoredExamples:
    root = tmp_path_factory.mktemp("stored")
    for language in ("en", "de"):
        for split in ("train", "dev", "test"):
            write(root / language / f"{split}.jsonl", ROWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "BATCH", BATCH)
        patch.setattr(text_cache, "BATCH", BATCH)
        return both(config_of(root), "test")[1]


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path: Path, monkeypatch) -> None:
    """The peak of reading, sampling, and iterating grows by a few bytes per row, and a text has 200."""
    monkeypatch.setattr(text_cache, "LARGE", 0)
    monkeypatch.setattr(columns, "BATCH", 256)
    monkeypatch.setattr(columns, "_CHUNK", 512)
    monkeypatch.setattr(text_cache, "BATCH", 256)
    peaks = []
    for n in (2_000, 12_000):
        root = tmp_path / str(n)
        for split in ("train", "test"):
            for language in ("en", "de"):
                write(root / language / f"{split}.jsonl", ROWS)
        write(root / "en" / "unlabelled.jsonl", [{"text": f"{i} " + "word " * 40} for i in range(n)])
        settings = config_of(root, unlabelled_from="split", labelled=4, held_out_dev=2)
        experiment = ExperimentConfig(task=settings, objectives=("vanilla", "monox_kd"))
        tracemalloc.start()
        sample = transfer_set.gather(experiment, user_files.task(settings))
        assert sum(len(example.text) for example in sample.everything) > 200 * n
        transfer_set.fingerprint(sample.everything)
        assert len(columns.places(sample.everything, sample.drawn_from)[0]) == n + 4
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 10_000 * 100
