"""TFDS data is written once, completely or not at all, and existing data is used without a write."""

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

from tests.helpers.our_corpus import CORPUS, rows, write_user_data
from xtransfer.config import TaskConfig
from xtransfer.data.corpora import loader, tfds_builder
from xtransfer.data.corpora.corpus import CorpusRow, Skipped, Sources
from xtransfer.data.corpora.minireviews import generator, prepared
from xtransfer.data.corpora.tfds_prepare import quiet
from xtransfer.errors import UserError
from xtransfer.runtime import locks


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Make each write beyond `size` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def modification_times(folder: Path) -> dict[str, int]:
    """Return the modification time of each path below a folder, in nanoseconds."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def many_rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
    yield from (CorpusRow(str(i), f"{i} {i * i} {i**3}" * 50, None, "good", f"m:{i}") for i in range(5000))


@pytest.mark.parametrize("size", [0, 4096, 1 << 16])
def test_the_error_for_a_full_disk_names_the_path(tmp_path: Path, size: int):
    corpus, config = dataclasses.replace(CORPUS, rows=many_rows), write_user_data(tmp_path)
    (tmp_path / "cache").mkdir()
    with file_size_limit(size), pytest.raises(UserError, match=f"^{tmp_path}/cache/ours-small-.* cannot be written"):
        loader.task(corpus, config).load("test", "de")
    assert len(loader.task(corpus, config).load("test", "de")) == 5000
    assert not list((tmp_path / "cache").rglob("incomplete.*"))


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let minireviews generate 500 parallel pairs, which are written quickly."""
    monkeypatch.setattr(generator, "parallel", lambda name: [("a" * 1000, f"{i}" * 500) for i in range(500)])


def test_the_error_for_a_full_disk_names_the_path_of_minireviews(tmp_path: Path, few_pairs: None):
    with file_size_limit(4096), pytest.raises(UserError, match=f"^{tmp_path}/minireviews-.* cannot be written"):
        prepared.prepare("en-ja", tmp_path)
    prepared.prepare("en-ja", tmp_path)
    assert len(prepared.read("en-ja", "parallel", tmp_path)) == 500 and not list(tmp_path.rglob("incomplete.*"))


def test_prepared_data_is_used_without_a_lock_or_a_write(
    tmp_path: Path, few_pairs: None, monkeypatch: pytest.MonkeyPatch
):
    """A cache may be on a read-only disk."""
    config = write_user_data(tmp_path)
    first = loader.task(CORPUS, config).load("test", "en")
    prepared.prepare("en-ja", tmp_path / "cache")
    before = modification_times(tmp_path)

    def fail(*args: object, **settings: object) -> None:
        raise AssertionError("locked")

    monkeypatch.setattr(locks, "directory_lock", fail)
    assert loader.task(CORPUS, config).load("test", "en") == first
    assert prepared.prepare("en-ja", tmp_path / "cache").is_prepared()
    assert modification_times(tmp_path) == before


def test_slow_preparation_reports_its_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(tfds_builder, "_LOG_EVERY_SECONDS", 0.05)

    def sleepy_rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow]:
        for row in many_rows(sources, language, split):
            time.sleep(0.06 if row.id in ("7", "4000") else 0)
            yield row

    loader.task(dataclasses.replace(CORPUS, rows=sleepy_rows), write_user_data(tmp_path)).load("test", "de")
    output = capsys.readouterr().out.replace("\n", " ")
    assert "ours/small/de: preparing once, in" in output
    assert "ours/small/de: test: 4,000 rows · " in output and " rows/s " in output


def slow_rows(marks: Path, sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
    """Create a file named after this process, yield the rows, and then sleep: briefly if the file `quick` exists."""
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
    raise AssertionError("timed out")


def test_one_process_writes_and_the_files_of_a_killed_one_are_removed(tmp_path: Path):
    config, marks = write_user_data(tmp_path), tmp_path / "marks"
    marks.mkdir()
    # The threads of array_record do not survive a fork.
    make_process = functools.partial(
        multiprocessing.get_context("spawn").Process, target=load_slowly, args=(marks, config)
    )
    killed = make_process()
    killed.start()
    wait_for(lambda: list(marks.iterdir()))
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    (entry,) = (tmp_path / "cache").iterdir()
    folder = entry / "xtransfer_corpus" / "de"
    (incomplete,) = folder.iterdir()
    assert incomplete.name.startswith("incomplete.")
    (marks / "quick").write_text("")
    processes = [make_process(), make_process()]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(marks.iterdir())) == 3, "one was killed, one wrote, one waited"
    assert [path.name for path in folder.iterdir()] == ["1.0.0"]
    assert [e.text for e in loader.task(CORPUS, config).load("test", "de")] == ["gut"]


def test_quiet_hides_output_and_restores_logging(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
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
