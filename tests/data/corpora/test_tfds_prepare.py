"""What TFDS writes: once, whole or not at all, and nothing where it is there already."""

import contextlib
import dataclasses
import functools
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.our_corpus import CORPUS, bring, rows
from xtransfer.config import TaskConfig
from xtransfer.data.corpora import loader, minireviews, tfds_builder
from xtransfer.data.corpora.corpus import CorpusRow, Skipped, Sources
from xtransfer.data.corpora.minireviews import generator
from xtransfer.data.corpora.tfds_prepare import quiet
from xtransfer.errors import UserError
from xtransfer.runtime import locks


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Every write beyond so many bytes fails, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def many(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
    yield from (CorpusRow(str(i), f"{i} {i * i} {i**3}" * 50, None, "good", f"m:{i}") for i in range(5000))


@pytest.mark.parametrize("size", [0, 4096, 1 << 16])
def test_a_full_disk_is_named(tmp_path: Path, size: int):
    corpus, config = dataclasses.replace(CORPUS, rows=many), bring(tmp_path)
    (tmp_path / "cache").mkdir()
    with files_of_at_most(size), pytest.raises(UserError, match=f"^{tmp_path}/cache/ours-small-.* cannot be written"):
        loader.task(corpus, config).load("test", "de")
    assert len(loader.task(corpus, config).load("test", "de")) == 5000
    assert not list((tmp_path / "cache").rglob("incomplete.*"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quickly written ones."""
    monkeypatch.setattr(generator, "parallel", lambda name: [("a" * 1000, f"{i}" * 500) for i in range(500)])


def test_a_full_disk_is_named_for_minireviews(tmp_path: Path, few: None):
    with files_of_at_most(4096), pytest.raises(UserError, match=f"^{tmp_path}/minireviews-.* cannot be written"):
        minireviews.prepare("en-ja", tmp_path)
    minireviews.prepare("en-ja", tmp_path)
    assert len(minireviews.read("en-ja", "parallel", tmp_path)) == 500 and not list(tmp_path.rglob("incomplete.*"))


def test_what_is_there_is_used_without_a_lock(tmp_path: Path, few: None, monkeypatch: pytest.MonkeyPatch):
    """A cache may be read-only."""
    config = bring(tmp_path)
    first = loader.task(CORPUS, config).load("test", "en")
    minireviews.prepare("en-ja", tmp_path / "cache")
    before = listing(tmp_path)

    def never(*args: object, **settings: object) -> None:
        raise AssertionError("locked")

    monkeypatch.setattr(locks, "directory_lock", never)
    assert loader.task(CORPUS, config).load("test", "en") == first
    assert minireviews.prepare("en-ja", tmp_path / "cache").is_prepared()
    assert listing(tmp_path) == before


def test_what_takes_long_is_heard_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tfds_builder, "_SAY_EVERY_SECONDS", 0.05)

    def slow(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
        for row in many(sources, language, split):
            time.sleep(0.06 if row.id in ("7", "4000") else 0)
            yield row

    loader.task(dataclasses.replace(CORPUS, rows=slow), bring(tmp_path)).load("test", "de")
    heard = capsys.readouterr().out.replace("\n", " ")
    assert "ours/small/de: preparing once, in" in heard
    assert "ours/small/de: test: 4,000 rows · " in heard and " rows/s " in heard


def slow_rows(marks: Path, sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
    (marks / f"{os.getpid()}").write_text("")
    yield from rows(sources, language, split)
    time.sleep(0.2 if (marks / "quick").exists() else 60)


def load_slowly(marks: Path, config: TaskConfig) -> None:
    loader.task(dataclasses.replace(CORPUS, rows=functools.partial(slow_rows, marks)), config).load("test", "de")


def wait_for(condition) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def test_processes_write_once_and_a_killed_one_leaves_nothing_behind(tmp_path: Path):
    config, marks = bring(tmp_path), tmp_path / "marks"
    marks.mkdir()
    # Not fork: array_record's threads do not survive it.
    start = functools.partial(multiprocessing.get_context("spawn").Process, target=load_slowly, args=(marks, config))
    killed = start()
    killed.start()
    wait_for(lambda: list(marks.iterdir()))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    (entry,) = (tmp_path / "cache").iterdir()
    folder = entry / "xtransfer_corpus" / "de"
    (left,) = folder.iterdir()
    assert left.name.startswith("incomplete.")
    (marks / "quick").write_text("")
    both = [start(), start()]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(list(marks.iterdir())) == 3, "one was killed, one wrote, one waited"
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]
    assert [e.text for e in loader.task(CORPUS, config).load("test", "de")] == ["gut"]


def test_quiet_hides_output_and_restores_everything(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(logging.root, "handlers", [])
    absl = logging.getLogger("absl")
    level = absl.level
    with pytest.raises(KeyError), quiet():
        print("bar")
        print("bar", file=sys.stderr)
        absl.warning("a folder yet to be filled")
        logging.warning("the first warning of all")
        raise KeyError
    assert capsys.readouterr() == ("", "")
    logging.getLogger("xtransfer").warning("rows were left out")
    assert capsys.readouterr() == ("", "rows were left out\n")
    assert logging.root.handlers == [] and absl.level == level
