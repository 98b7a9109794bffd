"""Checksums: every difference from what was written is found, and named by its file."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtransfer.runtime import checksums

# From sha256sum.
ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x").write_bytes(b"abc")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "time").write_bytes(b"12")
    checksums.write_all(tmp_path, skip=("time",))
    return tmp_path


def test_the_list_holds_sizes_and_digests(directory):
    assert json.loads((directory / "checksums.json").read_text()) == {
        "empty": {"size": 0, "sha256": EMPTY},
        "sub/x": {"size": 3, "sha256": ABC},
    }
    assert checksums.fault_below(directory) is None
    (directory / "time").write_bytes(b"13")
    (directory / "new").write_bytes(b"")
    assert checksums.fault_below(directory) is None


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"abd", "sub/x has other bytes than were written"),
        (b"ab", "sub/x has 2 bytes, not 3"),
        (b"abcd", "sub/x has 4 bytes, not 3"),
        (None, "sub/x is missing"),
    ],
)
def test_a_damaged_file_is_named(directory, content, fault):
    path = directory / "sub" / "x"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert checksums.fault_below(directory) == fault
    assert checksums.fault_below(directory, only=("sub",)) == fault
    assert checksums.fault_below(directory, only=("empty",)) is None


def test_a_file_that_became_a_folder_is_named(directory):
    (directory / "empty").unlink()
    (directory / "empty").mkdir()
    assert "empty " in checksums.fault_below(directory)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', '{"a": {"size": "3", "sha256": "0"}}', '{"a": {}}'])
def test_a_damaged_list_is_named(directory, content):
    (directory / "checksums.json").write_text(content)
    assert checksums.fault_below(directory).startswith("checksums.json is damaged (")


@settings(max_examples=25)
@given(st.data())
def test_every_flipped_bit_is_found(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("flip")
    contents = data.draw(st.dictionaries(st.sampled_from("abc"), st.binary(min_size=1, max_size=40), min_size=1))
    for name, content in contents.items():
        (directory / name).write_bytes(content)
    checksums.write_all(directory)
    path = directory / data.draw(st.sampled_from([*contents, "checksums.json"]))
    before = path.read_bytes()
    position = data.draw(st.integers(0, 8 * len(before) - 1))
    path.write_bytes(flipped(before, position))
    assert checksums.fault_below(directory) is not None
    path.write_bytes(before)
    assert checksums.fault_below(directory) is None


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_files_are_listed_one_by_one_and_before_they_appear(tmp_path, monkeypatch):
    checksums.write(tmp_path / "a", b"abc")
    checksums.write(tmp_path / "b", b"")
    assert json.loads((tmp_path / "checksums.json").read_text()) == {
        "a": {"size": 3, "sha256": ABC},
        "b": {"size": 0, "sha256": EMPTY},
    }
    commit = checksums.storage.AtomicFile.commit
    monkeypatch.setattr(checksums.storage.AtomicFile, "commit", lambda self: self.path.name == "a" or commit(self))
    checksums.write(tmp_path / "a", b"new")  # killed between the list and the file
    assert checksums.fault_of(tmp_path / "a") == "a has other bytes than were written"
    monkeypatch.undo()
    checksums.write(tmp_path / "a", b"new")
    assert checksums.fault_of(tmp_path / "a") is None


def test_a_file_without_an_entry_is_older_than_the_list(tmp_path):
    (tmp_path / "old").write_bytes(b"1")
    assert checksums.fault_of(tmp_path / "old") is None and checksums.fault_below(tmp_path) is None
    checksums.write(tmp_path / "new", b"2")
    assert checksums.fault_of(tmp_path / "old") is None
    (tmp_path / "checksums.json").write_text("{")
    assert checksums.fault_of(tmp_path / "new") is None
    checksums.write(tmp_path / "more", b"3")
    assert list(json.loads((tmp_path / "checksums.json").read_text())) == ["more"]
