"""A small corpus is prepared once per language, its examples equal its files, and errors name the cause."""

import dataclasses
import functools
import logging
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import archive_writers
from tests.helpers.our_corpus import CORPUS, FIRST, ONE, TWO, rows, write_user_data
from xtransfer.data import text_cache
from xtransfer.data.corpora import downloads, loader
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Skipped, Sources
from xtransfer.data.examples import StoredExamples
from xtransfer.data.task import Example
from xtransfer.errors import UserError


@pytest.fixture
def config(tmp_path: Path):
    return functools.partial(dataclasses.replace, write_user_data(tmp_path))


@pytest.fixture
def data(config) -> Path:
    return Path(config().data_dir)


def cache_entries(tmp_path: Path) -> set[str]:
    return {path.name for path in (tmp_path / "cache").iterdir()}


def test_examples_equal_the_rows_of_the_files(config, tmp_path: Path, caplog):
    task = loader.task(CORPUS, config())
    assert (task.name, task.labels) == ("ours/small", ("good", "bad"))
    assert (task.source_language, task.target_languages) == ("en", ("de", "fr"))
    with caplog.at_level(logging.WARNING):
        examples = task.load("test", "en")
    assert examples == [
        Example("ours/small/test/en/2", "\u304a\u3044\u3057\u3044", None, 0, "en"),
        Example("ours/small/test/en/4", " bad ", None, 1, "en"),
    ]
    assert "ours/small/en: 2 rows of test left out (label '-'), the first at top/en/test.tsv:3" in caplog.text
    assert task.load("test", "de") == [Example("ours/small/test/de/2", "gut", None, 0, "de")]
    assert [(e.text, e.label) for e in task.load("unlabelled", "en")] == [("who knows", -1), ("not me", -1)]
    assert task.pretraining("en") == {"en": ["who knows", "not me"]} and task.pretraining("de") == {"de": []}
    assert task.parallel("en", "de") == [] and not task.synthetic
    assert len(cache_entries(tmp_path)) == 1


def test_large_splits_are_the_same_on_disk(config, monkeypatch):
    splits = [("train", "en"), ("dev", "en"), ("test", "en"), ("unlabelled", "en"), ("test", "de")]
    expected = [loader.task(CORPUS, config()).load(*split) for split in splits]
    monkeypatch.setattr(text_cache, "LARGE", 0)
    for split, examples in zip(splits, expected, strict=True):
        stored = loader.task(CORPUS, config()).load(*split)
        assert isinstance(stored, StoredExamples)
        assert list(stored) == examples


def test_dev_is_held_out_of_train(config):
    task = loader.task(CORPUS, config())
    train, dev = task.load("train", "en"), task.load("dev", "en")
    assert [len(train), len(dev)] == [36, 4] and sum(e.label for e in dev) == 2
    assert sorted(e.text for e in train + dev) == sorted(f"text {i}" for i in range(40))
    assert {e.id.rsplit("/", 1)[0] for e in dev} == {"ours/small/dev/en"}
    assert len(loader.task(CORPUS, config(held_out_dev=8)).load("dev", "en")) == 8


def test_a_second_run_reads_the_prepared_data(config, data: Path, tmp_path: Path, monkeypatch):
    first = loader.task(CORPUS, config())
    before = [first.load("test", "en"), first.load("train", "en"), first.fingerprint()]

    def fail(*args: object) -> Iterator[CorpusRow]:
        raise AssertionError("parsed again")

    second = loader.task(dataclasses.replace(CORPUS, rows=fail), config())
    assert [second.load("test", "en"), second.load("train", "en"), second.fingerprint()] == before
    assert loader.task(CORPUS, config(target_languages=("de",))).fingerprint() != before[2]
    assert loader.task(CORPUS, config(held_out_seed=1)).fingerprint() != before[2]


def test_changed_files_are_prepared_again(config, data: Path, tmp_path: Path):
    before = loader.task(CORPUS, config()).fingerprint()
    archive_writers.touch(data / "one.zip")
    assert loader.task(CORPUS, config()).fingerprint() == before, "the fingerprint depends only on the rows"
    archive_writers.write_zip(data / "one.zip", ONE | {"top/de/test.tsv": "text\tlabel\nschlecht\tgood\n"})
    task = loader.task(CORPUS, config())
    assert [e.text for e in task.load("test", "de")] == ["schlecht"] and task.fingerprint() != before
    newer = dataclasses.replace(CORPUS, version="1.0.1")
    loader.task(newer, config()).load("test", "de")
    assert len(cache_entries(tmp_path)) == 4


@pytest.mark.parametrize("layout", ["archives", "unpacked", "unpacked by archive", "mixed", "one archive"])
def test_all_layouts_of_the_users_files_give_the_same_task(config, tmp_path: Path, data: Path, layout: str):
    fingerprint = loader.task(CORPUS, config(target_languages=("de",))).fingerprint()
    user_data = tmp_path / "user_data"
    user_data.mkdir()
    if layout == "unpacked":
        archive_writers.write_folder(user_data, ONE | TWO)
    elif layout == "unpacked by archive":
        archive_writers.write_folder(user_data / "one", ONE)
        archive_writers.write_folder(user_data / "two", TWO)
        archive_writers.write_folder(user_data / "old", ONE)  # ignored, because no archive has this name
    elif layout == "mixed":
        archive_writers.write_folder(user_data / "two", TWO)
        archive_writers.write_tar(user_data / "one.zip", ONE)  # a tar file is accepted under the name of the zip
    else:
        archive_writers.write_zip(user_data / "one.zip", ONE)
        archive_writers.write_tar_gz(user_data / "two.tar.gz", TWO)
    if layout == "one archive":
        task = loader.task(CORPUS, config(data_dir=str(user_data / "one.zip")))
        assert len(task.load("test", "fr")) == 1
        with pytest.raises(UserError, match=r"two\.tar\.gz is missing; set task\.data_dir to a folder with"):
            task.load("unlabelled", "en")
    else:
        task = loader.task(CORPUS, config(data_dir=str(user_data), target_languages=("de",)))
        assert task.fingerprint() == fingerprint


def test_missing_user_files_are_named(config, tmp_path: Path):
    with pytest.raises(UserError, match="task.data_dir /nowhere: no such file or folder"):
        loader.task(CORPUS, config(data_dir="/nowhere")).load("test", "en")
    (tmp_path / "other.zip").write_bytes(b"")
    with pytest.raises(UserError, match=r"other\.zip: expected a folder with one\.zip, two\.tar\.gz or their contents"):
        loader.task(CORPUS, config(data_dir=str(tmp_path / "other.zip"))).load("test", "en")


def test_a_missing_language_is_an_error(config, data: Path):
    archive_writers.write_zip(data / "one.zip", {name: content for name, content in ONE.items() if "/fr/" not in name})
    task = loader.task(CORPUS, config())
    with pytest.raises(UserError, match=r"one\.zip: it has no fr/test\.tsv"):
        task.load("test", "fr")
    with pytest.raises(UserError, match=r"it has no fr/test\.tsv"):
        task.fingerprint()
    with pytest.raises(UserError, match="task.target_languages: no data in 'it'; there are en, de, fr"):
        loader.task(CORPUS, config(target_languages=("it",)))
    with pytest.raises(UserError, match="was set up without language 'fr'; it has en, de"):
        loader.task(CORPUS, config(target_languages=("de",))).load("test", "fr")
    with pytest.raises(UserError, match="task.source_language 'de': set it to 'en'; ours/small has train in en"):
        loader.task(CORPUS, config(source_language="de"))


def test_a_missing_split_is_an_error(config):
    task = loader.task(CORPUS, config())
    with pytest.raises(UserError, match="ours/small has no dev split in de, only test"):
        task.load("dev", "de")
    with pytest.raises(UserError, match="no unlabelled split in de, only test; set task.unlabelled_from to"):
        task.load("unlabelled", "de")
    with pytest.raises(ValueError, match="split 'validation' is not one of"):
        task.load("validation", "en")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("ok\tgood\nodd\tgoood\n", "de/test.tsv:3: label 'goood' is not one of good, bad; did you mean 'good'"),
        ("ok\tgood\nodd\t\n", "de/test.tsv:3: the row has no label"),
        ("ok\tgood\n \tgood\n", "de/test.tsv:3: a text is empty; fill it in, or set task.empty_text to 'skip'"),
        ("ok\tgood\nodd\n", "de/test.tsv:3: 1 column, expected 2"),
        ("no\t-\n", "ours/small: no rows of test in de"),
        ("", "ours/small: no rows of test in de"),
    ],
)
def test_errors_for_malformed_rows_name_the_line(config, data: Path, tmp_path: Path, content: str, message: str):
    archive_writers.write_zip(data / "one.zip", ONE | {"top/de/test.tsv": f"text\tlabel\n{content}"})
    for _ in range(2):  # the first failure must not leave data that the second attempt accepts
        with pytest.raises(UserError) as caught:
            loader.task(CORPUS, config()).load("test", "de")
        assert message in str(caught.value)
    archive_writers.write_zip(data / "one.zip", ONE)
    assert len(loader.task(CORPUS, config()).load("test", "de")) == 1


def test_empty_text_is_skipped_and_counted_on_request(config, data: Path, caplog):
    archive_writers.write_zip(
        data / "one.zip", ONE | {"top/de/test.tsv": "text\tlabel\nok\tgood\n \tgood\n\u200b\tgood\n"}
    )
    with caplog.at_level(logging.WARNING):
        examples = loader.task(CORPUS, config(empty_text="skip")).load("test", "de")
    assert len(examples) == 1
    assert "2 rows of test left out (without text), the first at top/de/test.tsv:3" in caplog.text


def corpus_with_row(row: CorpusRow) -> Corpus:
    """Return a corpus with a valid row and this one."""

    def two_rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
        yield CorpusRow("1", "text", None, "good", "m:1")
        yield row

    return dataclasses.replace(CORPUS, rows=two_rows)


def test_duplicate_ids_invalid_text_and_unexpected_pairs_are_errors(config, monkeypatch: pytest.MonkeyPatch):
    cases = {
        "m:2: id '1' occurs twice in test of de": CorpusRow("1", "other", None, "bad", "m:2"),
        "m:2: half of a surrogate pair": CorpusRow("2", "\ud800", None, "bad", "m:2"),
        "m:2: id '2\\\\u2028' is not one line of text": CorpusRow("2\u2028", "b", None, "bad", "m:2"),
    }
    for message, row in cases.items():
        with pytest.raises(UserError, match=message):
            loader.task(corpus_with_row(row), config()).load("test", "de")
    with pytest.raises(ValueError, match="has_pairs is False"):
        loader.task(corpus_with_row(CorpusRow("2", "a", "b", "bad", "m:2")), config()).load("test", "de")


def test_a_corpus_of_pairs_gives_pairs(config):
    def pairs(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
        yield CorpusRow("x1", "one", "two", "bad", "m:1")

    task = loader.task(dataclasses.replace(CORPUS, rows=pairs, has_pairs=True), config())
    assert task.load("test", "de") == [Example("ours/small/test/de/x1", "one", "two", 1, "de")]


def test_the_files_are_downloaded_if_data_dir_is_empty(
    config, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fetched = []

    def fetch(download: Download, directory: Path) -> Path:
        fetched.append((download.filename, directory))
        return data / download.filename

    monkeypatch.setattr(downloads, "fetch", fetch)
    task = loader.task(CORPUS, config(data_dir=""))
    assert [e.text for e in task.load("test", "de")] == ["gut"] and len(task.load("train", "en")) == 36
    folder = tmp_path / "cache" / "downloads" / "ours"
    assert fetched == [("one.zip", folder), ("one.zip", folder), ("two.tar.gz", folder)]
    loader.task(CORPUS, config(data_dir="")).load("test", "de")
    assert len(fetched) == 3, "prepared data is not downloaded again"


def test_downloads_that_are_plain_files_are_read_in_place(config, tmp_path: Path, monkeypatch):
    folder = tmp_path / "cache" / "downloads" / "ours"
    archive_writers.write_folder(folder, {"de/test.tsv": "text\tlabel\nhallo\tgood\n"})
    monkeypatch.setattr(downloads, "fetch", lambda download, directory: directory / download.filename)
    plain = Download("https://example.org/de/test.tsv", "de/test.tsv")

    def plain_rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
        return rows(Sources({FIRST.filename: sources.path("de/test.tsv")}), language, split)

    corpus = dataclasses.replace(CORPUS, downloads=lambda language: (plain,), rows=plain_rows)
    assert [e.text for e in loader.task(corpus, config(data_dir="")).load("test", "de")] == ["hallo"]
    (tmp_path / "cache" / "ours-small").mkdir()
    examples = loader.task(corpus, config(data_dir=str(folder))).load("test", "de")
    assert [e.text for e in examples] == ["hallo"]


def test_an_unwritable_cache_is_an_error(config, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/ours-small-.* cannot be written"):
        loader.task(CORPUS, config(cache_dir=str(tmp_path / "file"))).load("test", "de")


def damage_cache(root: Path, damage: str) -> None:
    name = {"metadata": "metadata.json", "info": "dataset_info.json", "list": "checksums.json"}.get(
        damage, "*train.array_record*"
    )
    (path,) = root.rglob(name)
    data = path.read_bytes()
    if damage == "flip":
        position = data.index(b"text 7")  # small records are not compressed
        path.write_bytes(data[:position] + b"T" + data[position + 1 :])
    elif damage == "delete":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("damage", ["flip", "cut", "delete", "metadata", "info", "list"])
def test_a_damaged_cache_is_written_again_with_a_warning(config, tmp_path: Path, caplog, damage: str):
    before = loader.task(CORPUS, config()).load("train", "en")
    (root,) = (tmp_path / "cache").iterdir()
    damage_cache(root, damage)
    task = loader.task(CORPUS, config())
    task.fingerprint()
    assert task.load("train", "en") == before
    assert caplog.text.count(f"{root}/xtransfer_corpus/en/1.0.0 is damaged, so preparing these data again: ") == 1
    assert sorted(path.name for path in (root / "xtransfer_corpus" / "en").iterdir()) == ["1.0.0"]
    caplog.clear()
    assert loader.task(CORPUS, config()).load("train", "en") == before and "damaged" not in caplog.text


@pytest.mark.parametrize("damage", ["cut", "info"])
def test_a_damaged_cache_that_is_older_than_its_checksums_is_never_read(config, tmp_path: Path, damage: str):
    before = loader.task(CORPUS, config()).load("train", "en")
    (root,) = (tmp_path / "cache").iterdir()
    damage_cache(root, damage)
    (path,) = root.rglob("checksums.json")
    path.unlink()
    if damage == "cut":
        with pytest.raises(UserError, match=f"{path.parent}: the prepared data are damaged .*: delete that folder"):
            loader.task(CORPUS, config()).load("train", "en")
        shutil.rmtree(path.parent)
    assert loader.task(CORPUS, config()).load("train", "en") == before


@pytest.mark.parametrize("damage", ["remove", "cut"])
def test_a_cache_that_is_lost_while_it_is_in_use_is_written_again(config, tmp_path: Path, damage: str):
    task = loader.task(CORPUS, config())
    before = task.load("train", "en")
    (root,) = (tmp_path / "cache").iterdir()
    shutil.rmtree(root) if damage == "remove" else damage_cache(root, damage)
    assert task.load("train", "en") == before


def test_unrelated_files_in_the_data_folder_change_nothing(config, tmp_path: Path):
    """The folder may also contain the cache and workdirs."""
    folder = archive_writers.write_folder(tmp_path / "unpacked", ONE | TWO)
    inside = config(data_dir=str(folder), cache_dir=str(folder / "cache"))
    for number in range(2):
        assert [e.text for e in loader.task(CORPUS, inside).load("test", "de")] == ["gut"]
        archive_writers.write_folder(
            folder, {f"run/{number}/results.jsonl": "{}", "README.tsv": "", f"den/test.tsv.{number}": ""}
        )
        archive_writers.write_folder(folder / "cache", {"downloads/ours/en/test.tsv": f"{number}"})
    assert len(list((folder / "cache").glob("ours-small-*"))) == 1
    archive_writers.touch(folder / "top" / "de" / "test.tsv")
    shutil.rmtree(folder / "cache" / "downloads")
    loader.task(CORPUS, inside).load("test", "de")
    assert len(list((folder / "cache").glob("ours-small-*"))) == 2


@pytest.mark.parametrize("fetched", [False, True])
def test_a_web_page_instead_of_an_archive_is_refused(config, data: Path, monkeypatch, fetched: bool):
    (data / "one.zip").write_text("<!DOCTYPE html><title>Sign in</title>")
    monkeypatch.setattr(downloads, "fetch", lambda download, directory: data / download.filename)
    with pytest.raises(UserError, match=r"one\.zip: neither a zip, .* it looks like a web page"):
        loader.task(CORPUS, config(data_dir="" if fetched else str(data))).load("test", "de")


def test_the_error_for_a_failed_download_includes_the_notes_of_the_corpus(config, monkeypatch: pytest.MonkeyPatch):
    def fetch(download: Download, directory: Path) -> Path:
        raise UserError("HTTP 403")

    monkeypatch.setattr(downloads, "fetch", fetch)
    corpus = dataclasses.replace(CORPUS, notes="Ask for it first.")
    with pytest.raises(UserError, match=r"^HTTP 403\. Ask for it first\.$"):
        loader.task(corpus, config(data_dir="")).load("test", "de")
    with pytest.raises(UserError, match=r"^HTTP 403$"):
        loader.task(CORPUS, config(data_dir="")).load("test", "de")


@pytest.mark.parametrize("language", ["en", "de", "xx"])
def test_the_error_for_a_source_language_without_train_suggests_one(config, language: str):
    corpus = dataclasses.replace(
        CORPUS,
        source_language="fr",
        splits=lambda language: ("train", "test") if language in ("en", "fr") else ("test",),
    )
    if language == "en":
        assert loader.task(corpus, config(source_language=language)).target_languages == ("de", "fr")
    else:
        with pytest.raises(UserError, match=f"task.source_language '{language}': set it to 'fr'; .* train in fr, en$"):
            loader.task(corpus, config(source_language=language))


def test_a_damaged_archive_is_reported_as_damage_and_not_as_a_bad_row(config, data: Path):
    """A flipped byte makes a label invalid before the checksum at the end of the file is reached."""
    with zipfile.ZipFile(data / "one.zip", "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("de/test.tsv", "text\tlabel\ngut\tgood\nnein\tbad\nodd\tworse\n" + "gut\tgood\n" * 10_000)
    with pytest.raises(UserError, match=r"de/test\.tsv:4: label 'worse' is not one of"):
        loader.task(CORPUS, config()).load("test", "de")
    content = (data / "one.zip").read_bytes()
    (data / "one.zip").write_bytes(content.replace(b"nein\tbad", b"nein\tbax"))
    with pytest.raises(
        UserError, match=r"one\.zip: de/test\.tsv: the archive is truncated or corrupt .*: download it again"
    ):
        loader.task(CORPUS, config()).load("test", "de")
