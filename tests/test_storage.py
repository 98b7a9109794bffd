"""Atomic files and directories, appended rows, and strict JSON."""

import errno
import fcntl
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer import storage
from xtransfer.errors import MachineError, UserError


def test_writing_text_or_bytes_creates_the_directory(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    storage.write_atomically(path, "Grüße\r\n")
    assert path.read_bytes() == b"Gr\xc3\xbc\xc3\x9fe\r\n"
    storage.write_atomically(path, b"\0\xff")
    assert path.read_bytes() == b"\0\xff"
    assert [entry.name for entry in path.parent.iterdir()] == ["c.txt"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_leaves_only_the_old_file(tmp_path, monkeypatch, call):
    path = tmp_path / "rows.jsonl"
    path.write_text("before")

    def raise_disk_full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, raise_disk_full)
    with pytest.raises(UserError) as caught:
        storage.write_atomically(path, "after")
    assert str(caught.value) == f"{path} cannot be written: No space left on device"
    assert path.read_text() == "before"
    assert [entry.name for entry in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_blocked_path_is_named_in_the_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}/file/x.json cannot be written"):
        storage.write_atomically(tmp_path / "file" / "x.json", "")
    with pytest.raises(UserError, match=f"{tmp_path} cannot be written: Is a directory"):
        storage.append_jsonl(tmp_path, {"a": 1})


def test_the_next_write_removes_the_temporary_file_of_a_killed_writer(tmp_path):
    path = tmp_path / "x.json"
    program = (
        "import os, pathlib, signal\nfrom xtransfer import storage\n"
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"storage.write_atomically(pathlib.Path({str(path)!r}), 'half')"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == -9
    assert not path.exists() and len(list(tmp_path.iterdir())) == 1
    storage.write_atomically(path, "whole")
    assert path.read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_each_row_is_one_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"a": "ü\n\u2028", "b": [1, 0.5, None]}, {}]
    storage.write_jsonl(path, rows)
    storage.append_jsonl(path, {"c": True})
    lines = path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [*rows, {"c": True}] and lines[-1] == ""
    assert "ü" in lines[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_without_a_json_form_are_not_written(tmp_path, value):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(ValueError):
        storage.write_jsonl(path, [{"a": value}])
    with pytest.raises(ValueError):
        storage.append_jsonl(path, {"a": value})
    assert not path.exists() or path.read_bytes() == b""


def test_valid_json_is_read():
    assert storage.read_json('{"a": [1, -2.5e3, null], "b": {"a": "x"}}') == {"a": [1, -2500.0, None], "b": {"a": "x"}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("", "Expecting value"),
        ("[1] 2", "Extra data"),
        ('{"a": 1, "b": 2, "a": 1}', "the key 'a' occurs twice"),
        ('[{"a": {"b": 1, "b": 1}}]', "the key 'b' occurs twice"),
        ("NaN", "NaN is not a JSON number"),
        ("[-Infinity]", "-Infinity is not a JSON number"),
        ("[1e999]", "1e999 is too large a number"),
        ("-1e999", "-1e999 is too large a number"),
        ("9" * 5000, "Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_invalid_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        storage.read_json(text)


def test_an_uncommitted_file_leaves_nothing(tmp_path):
    with storage.AtomicFile(tmp_path / "a") as file:
        file.write(b"half")
        assert not (tmp_path / "a").exists()
    assert list(tmp_path.iterdir()) == []


def test_a_restarted_file_keeps_only_later_writes(tmp_path):
    with storage.AtomicFile(tmp_path / "a") as file:
        file.write(b"first")
        file.restart()
        file.write(b"second")
        file.commit()
    assert (tmp_path / "a").read_bytes() == b"second"


def test_an_exclusive_file_has_one_writer(tmp_path):
    with storage.AtomicFile(tmp_path / "a", exclusive=True) as first:
        with pytest.raises(UserError, match=r"a: another process is writing it; wait, or choose another name"):
            storage.AtomicFile(tmp_path / "a", exclusive=True)
        first.write(b"1")
        first.commit()
    assert (tmp_path / "a").read_bytes() == b"1"


def test_the_temporary_name_of_a_unique_file_has_the_process_id(tmp_path):
    with storage.AtomicFile(tmp_path / "a", unique=True) as file:
        assert file.temporary.name == f".a.{os.getpid()}.tmp"


def test_a_directory_appears_when_its_block_ends(tmp_path):
    with storage.atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "d").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["d"] and (tmp_path / "d" / "x").read_text() == "1"


def test_a_directory_whose_block_fails_never_appears(tmp_path):
    with pytest.raises(KeyError), storage.atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, pathlib, signal
from xtransfer import storage
with storage.atomic_directory(pathlib.Path({path!r})) as temporary:
    (temporary / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_next_writer_removes_the_hidden_directory_of_a_killed_one_and_no_other(tmp_path):
    path = tmp_path / "a [b].d"
    assert subprocess.run([sys.executable, "-c", KILLED.format(path=str(path))], timeout=60).returncode == -9
    (leftover,) = tmp_path.iterdir()
    assert (leftover / "x").read_text() == "half"
    others = [
        tmp_path / name for name in (".a [b].d.tmp", ".a [b].d.mine.tmp", ".a [b].d.x.1.tmp", ".c.1.tmp", "1.tmp")
    ]
    for other in others:
        other.mkdir()
    (tmp_path / f".{path.name}.77.tmp").mkdir()  # left by an older version, which locked nothing
    (tmp_path / f".{path.name}.78.tmp").symlink_to(others[0])
    with storage.atomic_directory(path) as first:
        assert not leftover.exists() and not (tmp_path / f".{path.name}.77.tmp").exists()
        with storage.atomic_directory(path) as second:  # the first is alive
            assert first.is_dir() and second.is_dir() and first != second
        assert path.is_dir()
        os.rmdir(path)
    assert path.is_dir()
    assert {*tmp_path.iterdir()} == {path, *others, tmp_path / f".{path.name}.78.tmp"}


def test_two_writers_of_one_directory_never_mix(tmp_path):
    """The second finds the name taken. What it wrote is removed."""
    with pytest.raises(OSError, match="not empty"), storage.atomic_directory(tmp_path / "d") as late:
        (late / "late").write_text("")
        with storage.atomic_directory(tmp_path / "d") as early:
            (early / "early").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["d", "early"]


def test_a_directory_is_written_on_a_file_system_without_locks(tmp_path, monkeypatch):
    (tmp_path / ".d.77.tmp").mkdir()

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with storage.atomic_directory(tmp_path / "d") as temporary:
        (temporary / "x").write_text("1")
    assert (tmp_path / "d" / "x").exists()
    assert (tmp_path / ".d.77.tmp").exists()  # its process may be alive, on another machine


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=9), max_size=4), st.text(max_size=20), st.integers(1, 9))
def test_a_row_replaces_an_incomplete_last_line(values, cut, block):
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_BLOCK", block)
        path = Path(directory) / "rows.jsonl"
        before = b"".join(storage.jsonl({"a": value} for value in values))
        path.write_bytes(before + cut.encode("utf-8", "surrogatepass").replace(b"\n", b""))
        storage.append_jsonl(path, {"a": "last"})
        assert path.read_bytes() == before + b'{"a": "last"}\n'


def test_a_locked_directory_removes_the_leftovers_of_killed_processes(tmp_path):
    (tmp_path / ".other.1.tmp").mkdir()
    with storage.atomic_directory(tmp_path / "d"):
        assert (tmp_path / ".other.1.tmp").exists()  # another process may be writing it
    with storage.atomic_directory(tmp_path / "e", locked=True):
        assert not (tmp_path / ".other.1.tmp").exists()


def test_sha256_of_a_file(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, appendix B.1
    assert storage.sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


WRITER = """
import sys
from pathlib import Path
from xtransfer import storage
for number in range(150):
    storage.write_atomically(Path(sys.argv[1]), sys.argv[2] * 140_000)
"""


def test_two_processes_that_write_one_file_wait_for_each_other(tmp_path):
    path = tmp_path / "results.md"
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, letter]) for letter in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_text())
    assert [writer.wait() for writer in writers] == [0, 0]
    assert seen <= {"a" * 140_000, "b" * 140_000}
    assert os.listdir(tmp_path) == ["results.md"]


def test_a_path_is_tested_before_it_is_written(tmp_path):
    path = tmp_path / "new" / "file"
    storage.check_creatable(path)
    storage.check_creatable(path)
    assert list(path.parent.iterdir()) == []
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file" / "x", tmp_path / "file" / "y" / "x", tmp_path / ("x" * 300), Path("/proc/1/none/x")):
        with pytest.raises(MachineError, match=f"^{bad} cannot be written: "):
            storage.check_creatable(bad)
