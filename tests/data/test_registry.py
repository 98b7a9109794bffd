"""The registry of tasks, and the embedded one."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.helpers import raw, tiny
from xtransfer import config as settings
from xtransfer.config import TaskConfig
from xtransfer.data import registry
from xtransfer.data.corpora import archives, minireviews
from xtransfer.data.corpora.corpus import Sources
from xtransfer.data.sampling import unlabelled_examples
from xtransfer.data.task import Example
from xtransfer.errors import UserError


def test_an_unknown_task():
    with pytest.raises(
        UserError, match="'minireview' is not one of minireviews, files, .*; did you mean 'minireviews'"
    ):
        registry.load_task(TaskConfig(name="minireview"))


def test_every_file_that_a_corpus_reads_is_declared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A change in any other one is not noticed."""
    read = []

    def note(source: Path, ending: str, **limits: int) -> Iterator[tuple[str, BinaryIO]]:
        read.append(ending)
        raise UserError("that is enough")

    monkeypatch.setattr(archives, "open_member", note)
    for corpus in registry.CORPORA:
        folder = tmp_path / corpus.name
        for language in (corpus.source_language, corpus.languages[-1]):
            raw.write_folder(folder, dict.fromkeys(corpus.members(language), ""))
            sources = Sources({download.filename: folder for download in corpus.downloads(language)})
            for split in corpus.splits(language):
                read.clear()
                with pytest.raises(UserError, match="that is enough"):
                    next(corpus.rows(sources, language, split))
                assert set(read) <= set(corpus.members(language)) and len(read) == 1


def test_every_corpus_of_the_registry_can_be_asked_for():
    """Their languages, splits and files are declared for each language, and each task is made without reading any."""
    assert {corpus.name for corpus in registry.CORPORA} == set(registry.TASKS) - {"minireviews", "files"}
    for corpus in registry.CORPORA:
        task = registry.load_task(TaskConfig(name=corpus.name, source_language=corpus.source_language))
        assert (task.name, task.labels, task.synthetic) == (corpus.name, corpus.labels, False)
        assert (task.source_language, *task.target_languages) == (
            corpus.source_language,
            *(language for language in corpus.languages if language != corpus.source_language),
        )
        assert len(set(corpus.labels)) == len(corpus.labels) >= 2
        assert len(set(corpus.languages)) == len(corpus.languages)
        assert "train" in corpus.splits(corpus.source_language)
        for language in corpus.languages:
            assert "test" in corpus.splits(language) and set(corpus.splits(language)) <= {
                "dev",
                "unlabelled",
                "train",
                "test",
            }
            for download in corpus.downloads(language):
                assert download.url.startswith("https://") and not Path(download.filename).is_absolute()
                assert len(download.sha256) in (0, 64) and (download.size > 0) == bool(download.sha256)


def test_a_file_of_unlabelled_text_is_one_of_any_task(builder, tmp_path: Path):
    (tmp_path / "u.tsv").write_text("text\nnew\n")
    task = registry.load_task(
        TaskConfig(cache_dir=str(tmp_path), unlabelled_from="file", unlabelled_file=str(tmp_path / "u.tsv"))
    )
    assert unlabelled_examples(task, "file", 0, 0, []) == [
        Example("minireviews/unlabelled/en/0", "new", None, -1, "en"),
    ]
    assert task.fingerprint() not in ("v1", "")


@pytest.mark.parametrize(("kind", "file"), [("file", ""), ("split", "u.tsv"), ("none", "u.tsv")])
def test_a_file_is_named_if_it_is_asked_for(kind: str, file: str):
    config = settings.default()
    config.task.unlabelled_from, config.task.unlabelled_file = kind, file
    with pytest.raises(UserError, match="config key task.unlabelled_file is .* name a file if, and only if"):
        settings.parse(config)
    config.task.unlabelled_from, config.task.unlabelled_file = "file", "u.tsv"
    assert settings.parse(config).task.unlabelled_file == "u.tsv"


def test_files_are_a_task(tmp_path: Path):
    task = registry.load_task(TaskConfig(name="files", data_dir=str(tiny.write_task(tmp_path))))
    assert (task.name, task.labels, task.target_languages) == ("files", ("bad", "good"), ("de",))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Stands for the builder; returns its calls."""
    calls: list[tuple] = []
    rows = [{"id": "7", "text": "fine", "label": 1, "domain": "dvd"}, {"id": "8", "text": "dull", "label": 0}]
    monkeypatch.setattr(minireviews, "prepare", lambda *call: calls.append(("prepare", *call)))
    monkeypatch.setattr(minireviews, "read", lambda *call: calls.append(("read", *call)) or rows)
    monkeypatch.setattr(minireviews, "FINGERPRINT", "v1")
    return calls


def test_minireviews(builder: list[tuple], tmp_path: Path):
    task = registry.load_task(TaskConfig(cache_dir=str(tmp_path)))
    assert (task.name, task.labels, task.source_language) == ("minireviews", ("negative", "positive"), "en")
    assert task.target_languages == ("de", "fr", "ja") and task.fingerprint() == "v1"
    assert task.synthetic
    assert task.load("test", "ja")[0] == Example("minireviews/test/ja/7", "fine", None, 1, "ja")
    assert builder == [("prepare", "ja", tmp_path), ("read", "ja", "test", tmp_path)]
    assert [e.label for e in task.load("unlabelled", "en")] == [-1, -1]


def test_minireviews_in_other_languages(builder: list[tuple]):
    task = registry.load_task(TaskConfig(source_language="de", target_languages=("ja",)))
    assert (task.source_language, task.target_languages) == ("de", ("ja",))
    with pytest.raises(UserError, match="no language 'fr' here"):
        task.load("test", "fr")
    with pytest.raises(UserError, match="task.target_languages: no data in 'jp'; there are en, de, fr, ja"):
        registry.load_task(TaskConfig(target_languages=("jp",)))
    assert builder == []


def test_an_unwritable_cache_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file"):
        registry.load_task(TaskConfig(cache_dir=str(tmp_path / "file"))).load("train", "en")
