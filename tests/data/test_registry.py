"""The task registry, and the embedded task minireviews."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pytest

from tests.helpers import archive_writers, tiny
from xtransfer import config as settings
from xtransfer.config import TaskConfig
from xtransfer.data import registry
from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Sources
from xtransfer.data.corpora.minireviews import generator, prepared
from xtransfer.data.sampling import unlabelled_examples
from xtransfer.data.task import Example
from xtransfer.errors import UserError


def test_an_unknown_task_is_an_error_with_a_suggestion():
    with pytest.raises(
        UserError, match="'minireview' is not one of minireviews, files, .*; did you mean 'minireviews'"
    ):
        registry.load_task(TaskConfig(name="minireview"))


def test_every_corpus_declares_the_files_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A change of an undeclared file would go unnoticed."""
    members_read = []

    def record_member(source: Path, ending: str, **limits: int) -> Iterator[tuple[str, BinaryIO]]:
        members_read.append(ending)
        raise UserError("stopped by the test")

    monkeypatch.setattr(archives, "open_member", record_member)
    for corpus in registry.CORPORA:
        folder = tmp_path / corpus.name
        for language in (corpus.source_language, corpus.languages[-1]):
            archive_writers.write_folder(folder, dict.fromkeys(corpus.members(language), ""))
            sources = Sources({download.filename: folder for download in corpus.downloads(language)})
            for split in corpus.splits(language):
                members_read.clear()
                with pytest.raises(UserError, match="stopped by the test"):
                    next(corpus.rows(sources, language, split))
                assert set(members_read) <= set(corpus.members(language)) and len(members_read) == 1


def test_every_registered_corpus_can_be_loaded_by_name():
    """Create each task without reading a file, and check the declared languages, splits, labels, and downloads."""
    names = [corpus.name for corpus in registry.CORPORA]
    assert len(names) == len(set(names)) and set(names) < set(registry.TASKS)
    for corpus in registry.CORPORA:
        task = registry.load_task(TaskConfig(name=corpus.name, source_language=corpus.source_language))
        assert (task.name, task.labels, task.synthetic) == (corpus.name, corpus.labels, False)
        assert task.source_language == corpus.source_language
        assert list(task.target_languages) == [name for name in corpus.languages if name != corpus.source_language]
        assert len(set(corpus.labels)) == len(corpus.labels) >= 2
        assert len(set(corpus.languages)) == len(corpus.languages)
        assert "train" in corpus.splits(corpus.source_language)
        for language in corpus.languages:
            splits = set(corpus.splits(language))
            assert "test" in splits and splits <= {"train", "dev", "test", "unlabelled"}
            for download in corpus.downloads(language):
                assert download.url.startswith("https://") and not Path(download.filename).is_absolute()
                assert len(download.sha256) in (0, 64) and (download.size > 0) == bool(download.sha256)


def test_any_task_can_take_its_unlabelled_text_from_a_file(builder, tmp_path: Path):
    (tmp_path / "u.tsv").write_text("text\nnew\n")
    task = registry.load_task(
        TaskConfig(cache_dir=str(tmp_path), unlabelled_from="file", unlabelled_file=str(tmp_path / "u.tsv"))
    )
    assert unlabelled_examples(task, "file", 0, 0, []) == [
        Example("minireviews/unlabelled/en/0", "new", None, -1, "en"),
    ]
    assert task.fingerprint() not in ("v1", "")


@pytest.mark.parametrize(("kind", "file"), [("file", ""), ("split", "u.tsv"), ("none", "u.tsv")])
def test_unlabelled_file_is_set_if_and_only_if_it_is_used(kind: str, file: str):
    config = settings.default()
    config.task.unlabelled_from, config.task.unlabelled_file = kind, file
    with pytest.raises(UserError, match="config key task.unlabelled_file is .* name a file if, and only if"):
        settings.parse(config)
    config.task.unlabelled_from, config.task.unlabelled_file = "file", "u.tsv"
    assert settings.parse(config).task.unlabelled_file == "u.tsv"


def test_user_files_are_a_task(tmp_path: Path):
    task = registry.load_task(TaskConfig(name="files", data_dir=str(tiny.write_task(tmp_path))))
    assert (task.name, task.labels, task.target_languages) == ("files", ("bad", "good"), ("de",))


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Replace the builder of minireviews, and return the list of its calls."""
    calls: list[tuple] = []
    rows = [{"id": "7", "text": "fine", "label": 1, "domain": "dvd"}, {"id": "8", "text": "dull", "label": 0}]
    monkeypatch.setattr(prepared, "prepare", lambda *call: calls.append(("prepare", *call)))
    monkeypatch.setattr(prepared, "read", lambda *call: calls.append(("read", *call)) or rows)
    monkeypatch.setattr(generator, "FINGERPRINT", "v1")
    return calls


def test_minireviews_is_a_synthetic_task_from_the_builder(builder: list[tuple], tmp_path: Path):
    task = registry.load_task(TaskConfig(cache_dir=str(tmp_path)))
    assert (task.name, task.labels, task.source_language) == ("minireviews", ("negative", "positive"), "en")
    assert task.target_languages == ("de", "fr", "ja") and task.fingerprint() == "v1"
    assert task.synthetic
    assert task.load("test", "ja")[0] == Example("minireviews/test/ja/7", "fine", None, 1, "ja")
    assert builder == [("prepare", "ja", tmp_path), ("read", "ja", "test", tmp_path)]
    assert [e.label for e in task.load("unlabelled", "en")] == [-1, -1]


def test_minireviews_takes_other_source_and_target_languages(builder: list[tuple]):
    task = registry.load_task(TaskConfig(source_language="de", target_languages=("ja",)))
    assert (task.source_language, task.target_languages) == ("de", ("ja",))
    with pytest.raises(UserError, match="without language 'fr'"):
        task.load("test", "fr")
    with pytest.raises(UserError, match="task.target_languages: no data in 'jp'; there are en, de, fr, ja"):
        registry.load_task(TaskConfig(target_languages=("jp",)))
    assert builder == []


def test_the_error_for_an_unwritable_cache_names_it(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file"):
        registry.load_task(TaskConfig(cache_dir=str(tmp_path / "file"))).load("train", "en")
