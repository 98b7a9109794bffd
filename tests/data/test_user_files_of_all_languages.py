"""The task `files` with one file per split, which contains all languages."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtransfer.config import TaskConfig
from xtransfer.data import user_files
from xtransfer.data.task import Example
from xtransfer.errors import UserError

Config = Callable[..., TaskConfig]

ROWS = {
    "train": [("1", "nice", "en", "good"), ("2", "poor", "en", "bad"), ("1", "gut", "de", "good")],
    "dev": [("1", "fine", "en", "good"), ("1", "schlecht", "de", "bad")],
    "test": [
        ("1", "great", "en", "good"),
        ("1", "toll", "de", "good"),
        ("2", "mies", "de", "bad"),
        ("1", "bon", "fr", "good"),
    ],
    "unlabelled": [("1", "so so", "en", ""), ("1", "na ja", "de", "")],
}


@pytest.fixture(params=["tsv", "parquet"])
def with_languages(request: pytest.FixtureRequest, tmp_path: Path) -> Config:
    """Return a function that writes one file per split with a language column. `rows` replaces the rows of a split."""

    def make(rows: dict | None = None, **changes) -> TaskConfig:
        names = ("id", "text", "lang", "label")
        for split, content in {**ROWS, **(rows or {})}.items():
            path = tmp_path / f"all-{split}.{request.param}"
            if request.param == "tsv":
                path.write_text("\n".join("\t".join(row) for row in (names, *content)) + "\n")
            else:
                pq.write_table(pa.table(dict(zip(names, map(list, zip(*content, strict=True)), strict=True))), path)
        columns = {"language_column": "lang", "id_column": "id", "path": f"all-{{split}}.{request.param}"}
        return replace(TaskConfig(name="files", data_dir=str(tmp_path), source_language="en"), **columns | changes)

    return make


def test_rows_are_selected_by_the_language_column(with_languages: Config):
    task = user_files.task(with_languages())
    assert task.target_languages == ("de", "fr") and task.labels == ("bad", "good")
    assert task.load("train", "en") == [
        Example("files/train/en/1", "nice", None, 1, "en"),
        Example("files/train/en/2", "poor", None, 0, "en"),
    ]
    assert [(e.id, e.text) for e in task.load("test", "de")] == [
        ("files/test/de/1", "toll"),
        ("files/test/de/2", "mies"),
    ]
    assert task.load("test", "fr") == [Example("files/test/fr/1", "bon", None, 1, "fr")]
    assert task.load("unlabelled", "en") == [Example("files/unlabelled/en/1", "so so", None, -1, "en")]
    with pytest.raises(
        UserError, match=r"all-dev\.\w+: no row with text whose column 'lang' is 'fr'; there are de, en"
    ):
        task.load("dev", "fr")


def test_missing_and_misspelt_languages_are_named(with_languages: Config, caplog):
    with pytest.raises(
        UserError, match="task.target_languages: no data in 'deu'; there are de, en, fr; did you mean 'de'"
    ):
        user_files.task(with_languages(target_languages=("deu",)))
    typo = {"dev": [*ROWS["dev"], ("2", "na", "dee", "bad")]}
    with pytest.raises(UserError, match=r"all-dev\.\w+: 'dee' has dev, but no test: add it to .*did you mean 'de'"):
        user_files.task(with_languages(typo))
    with caplog.at_level(logging.WARNING):
        task = user_files.task(with_languages(typo, target_languages=("de",)))
    assert task.target_languages == ("de",)
    ignored = [m.partition("all-")[2] for m in caplog.messages if "ignored, because task.target_languages" in m]
    assert [(m.partition(".")[0], m.rpartition(": ")[2]) for m in ignored] == [("dev", "dee 1"), ("test", "fr 1")]
    with pytest.raises(UserError, match=r"all-train\.\w+: 'de' has train, but no test"):
        user_files.task(with_languages({"test": [ROWS["test"][0]]}, target_languages=("de",)))
    with pytest.raises(
        UserError, match="no column 'language' among 'id', 'text', 'lang', 'label'; did you mean 'lang'"
    ):
        user_files.task(with_languages(language_column="language"))
    with pytest.raises(UserError, match=r"all-test\.\w+:\d: column 'lang' is empty"):
        user_files.task(with_languages({"test": [*ROWS["test"], ("9", "x", "", "bad")]}))


def test_dev_is_held_out_of_train_if_the_dev_file_lacks_the_language(with_languages: Config):
    train = [(str(i), f"text {i}", "en", ("good", "bad")[i % 2]) for i in range(20)]
    task = user_files.task(with_languages({"train": train, "dev": ROWS["dev"][1:]}))
    assert len(task.load("dev", "en")) == 2 and len(task.load("train", "en")) == 18
    assert [e.text for e in task.load("dev", "de")] == ["schlecht"]


def test_the_fingerprint_covers_the_rows_and_the_settings(with_languages: Config):
    def fingerprint(rows: dict | None = None, **changes) -> str:
        return user_files.task(with_languages(rows, **changes)).fingerprint()

    before = fingerprint()
    moved_row = {"test": [*ROWS["test"][:3], ("3", "bon", "de", "good"), ("1", "bon", "fr", "good")]}
    extra_dev_row = {"dev": [*ROWS["dev"], ("2", "x", "en", "bad")]}
    others = [
        fingerprint(moved_row),
        fingerprint(extra_dev_row),
        fingerprint(id_column=""),
        fingerprint(target_languages=("de",)),
    ]
    assert fingerprint() == before and len({before, *others}) == 5


def test_each_file_is_read_once_for_all_languages(with_languages: Config, monkeypatch: pytest.MonkeyPatch):
    read_records, files_read = user_files.tables.read_records, []

    def record_file(path: Path, *args, **options):
        files_read.append(path.stem)
        return read_records(path, *args, **options)

    monkeypatch.setattr(user_files.tables, "read_records", record_file)
    task = user_files.task(with_languages())
    for language in ("en", "de", "fr"):
        assert task.load("test", language)
    assert files_read == ["all-train", "all-test"]


def unlabelled_texts(settings: TaskConfig) -> list[str]:
    task = user_files.with_unlabelled_file(user_files.task(settings), settings)
    return [example.text for example in task.load("unlabelled", "en")]


def test_an_unlabelled_file_with_languages_gives_the_texts_of_the_source_language(
    with_languages: Config, tmp_path: Path
):
    (tmp_path / "u.tsv").write_text("id\ttext\tlang\n1\tnew\ten\n1\tneu\tde\n")
    settings = with_languages(unlabelled_from="file", unlabelled_file=str(tmp_path / "u.tsv"))
    assert unlabelled_texts(settings) == ["new"]
    (tmp_path / "u.tsv").write_text("id\ttext\n1\tnew\n2\tmore\n")
    assert unlabelled_texts(settings) == ["new", "more"]
    (tmp_path / "u.tsv").write_text("id\ttext\tlang\n1\tneu\tde\n")
    with pytest.raises(UserError, match=r"u\.tsv: no row with text whose column 'lang' is 'en'; there are de"):
        unlabelled_texts(settings)


@pytest.mark.parametrize("name", ["x/../../../escaped", "a\0b", "d" * 260, ".ipynb_checkpoints"])
def test_a_language_that_cannot_be_a_file_is_an_error(with_languages: Config, name: str):
    rows = {"test": [*ROWS["test"], ("7", "x", name, "good")]}
    with pytest.raises(UserError, match=r"all-test\.\w+:\d: column 'lang': .*: rename it"):
        user_files.task(with_languages(rows))


@pytest.mark.parametrize("name", ["DE", "de "])
def test_languages_that_look_alike_are_an_error_unless_they_are_merged(with_languages: Config, name: str):
    rows = {"test": [*ROWS["test"], ("7", "gut", name, "good")]}
    with pytest.raises(UserError, match=r"column 'lang': 'de' \(U\+0064 U\+0065\) .* look alike: .*task.merge_names"):
        user_files.task(with_languages(rows))
    other_split = {"dev": [*ROWS["dev"], ("7", "gut", name, "good")]}
    with pytest.raises(UserError, match="look alike"):
        user_files.task(with_languages(other_split))
    task = user_files.task(with_languages(rows, merge_names=True))
    assert task.target_languages == ("de", "fr")
    assert [example.text for example in task.load("test", "de")] == ["toll", "mies", "gut"]
    same_id = {"test": [*ROWS["test"], ("1", "gut", name, "good")]}
    with pytest.raises(UserError, match=r"all-test\.\w+:\d: id '1' of 'de' already occurs in \d"):
        user_files.task(with_languages(same_id, merge_names=True)).load("test", "de")
