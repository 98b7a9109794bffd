"""Directory locks, between real processes, with owners on other machines, and on a full disk."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from xtransfer.errors import UserError
from xtransfer.runtime import locks
from xtransfer.runtime.locks import directory_lock


def test_second_process_is_refused_and_an_ended_one_leaves_no_lock(tmp_path):
    enter = f"with directory_lock(pathlib.Path({str(tmp_path)!r})): print(1)"
    code = f"import pathlib\nfrom xtransfer.runtime.locks import directory_lock\n{enter}"
    command = [sys.executable, "-c", code]
    with directory_lock(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode != 0
        assert f"in use by process {os.getpid()}" in second.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "1\n"


def test_directory_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to"), directory_lock(tmp_path / "file" / "below"):
        pass


def test_full_disk_is_reported_by_the_lock(tmp_path):
    with (tmp_path / ".run.lock").open("w") as file:
        file.write("1\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        message = r"\.run\.lock cannot be written: File too large; free some space"
        with pytest.raises(UserError, match=message), directory_lock(tmp_path):
            raise AssertionError("the lock must not be acquired")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous_handler)


# A process that holds the lock of a directory until it is killed, or gets a line.
HOLD = """
import pathlib, sys
from xtransfer.runtime import locks
locks.HEARTBEAT_SECONDS = 0.05
with locks.directory_lock(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def holding(directory, before=""):
    command = [sys.executable, "-c", before + HOLD, str(directory)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(locks, "WATCH_SECONDS", 0.5)
    monkeypatch.setattr(locks, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(locks, "_SETTLE_SECONDS", 0.05)


def assert_refused(directory, match):
    with pytest.raises(UserError, match=match), directory_lock(directory):
        pass


def lock_file(directory, **changes):
    """Write the lock file of an owner with this process's facts, except `changes`, and return its path."""
    owner = dataclasses.replace(locks._this_process(), **changes)
    locks._write(directory / ".run.lock", owner, 7)
    return directory / ".run.lock"


ELSEWHERE = {"host": "elsewhere", "pid": 1}


def test_the_owner_is_named_with_host_command_and_time(tmp_path):
    with holding(tmp_path) as process, pytest.raises(UserError) as caught, directory_lock(tmp_path):
        pass
    assert re.fullmatch(
        rf"{tmp_path} is in use by process {process.pid} on {socket.gethostname()} since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC \(.*python.* -c .*\); wait, or choose another directory",
        str(caught.value),
    )


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_beats", lambda *_: pytest.fail("watched"))
    with holding(tmp_path) as process:
        process.kill()
        process.wait()
        assert json.loads((tmp_path / ".run.lock").read_text().splitlines()[0])["pid"] == process.pid
        with directory_lock(tmp_path):
            pass


def test_a_waiting_process_gets_the_lock_when_the_owner_is_done(tmp_path):
    with holding(tmp_path) as process:
        threading.Timer(0.3, process.stdin.close).start()
        with directory_lock(tmp_path, wait=True):
            assert process.wait() == 0


def test_a_released_lock_has_no_owner_and_no_heartbeat(tmp_path):
    with directory_lock(tmp_path):
        first = (tmp_path / ".run.lock").read_text()
        while (tmp_path / ".run.lock").read_text() == first:
            time.sleep(0.01)
        second = (tmp_path / ".run.lock").read_text()
        assert len(second) == len(first), "a full disk has no room for more"
        names = [thread.name for thread in threading.enumerate()]
        assert "lock heartbeat" in names
    assert (tmp_path / ".run.lock").read_text() == ""
    assert "lock heartbeat" not in [thread.name for thread in threading.enumerate()]
    time.sleep(0.2)
    assert (tmp_path / ".run.lock").read_text() == ""


def test_a_heartbeat_keeps_no_process_alive(tmp_path):
    code = "import pathlib, sys\nfrom xtransfer.runtime import locks\n"
    code += "lock = locks.directory_lock(pathlib.Path(sys.argv[1]))\nlock.__enter__()"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 0


@pytest.mark.parametrize(
    "changes",
    [
        ELSEWHERE,
        {"boot": "another boot of the same host"},
        {"boot": "another boot", "pid": 1, "namespace": "pid:[1]"},  # a container of the same name, on another machine
    ],
)
def test_a_lock_of_another_machine_that_stays_the_same_is_taken_over(tmp_path, changes, capsys):
    lock_file(tmp_path, **changes)
    with directory_lock(tmp_path):
        assert json.loads((tmp_path / ".run.lock").read_text().splitlines()[0])["pid"] == os.getpid()
    output = " ".join(capsys.readouterr().out.split())
    assert output.count(f"{tmp_path}/.run.lock: left by process") == 1
    assert output.count("no sign of life in 0.5 s, so taking over the lock") == 1


@pytest.mark.parametrize("wait", [False, True])
def test_of_two_machines_that_take_over_a_dead_lock_the_last_to_write_has_it(tmp_path, monkeypatch, wait):
    path, write = lock_file(tmp_path, **ELSEWHERE), locks._write
    rival = dataclasses.replace(locks._this_process(), host="a third one", nonce="another")

    def write_before_the_rival(path, owner, beat):
        write(path, owner, beat)
        monkeypatch.setattr(locks, "_write", write)
        write(path, rival, 0)

    monkeypatch.setattr(locks, "_write", write_before_the_rival)
    if not wait:
        assert_refused(tmp_path, f"{tmp_path} is in use by process .* on a third one ")
        assert locks._read(path)[0] == rival
        return
    with directory_lock(tmp_path, wait=True):  # once the rival is dead too
        assert locks._read(path)[0].host == locks._this_process().host


@contextlib.contextmanager
def beating(directory, **changes):
    """Renew the lock of another machine in a thread of this process."""
    path = lock_file(directory, **changes)
    ended = threading.Event()

    def beat():
        owner, count = locks._read(path)[0], 0
        while not ended.wait(0.05):
            locks._write(path, owner, count := count + 1)
        os.truncate(path, 0)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        yield ended
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize("has_flock", [True, False])
def test_a_lock_of_another_machine_that_changes_is_respected(tmp_path, monkeypatch, has_flock):
    if not has_flock:
        forbid_flock(monkeypatch)
    with beating(tmp_path, **ELSEWHERE):
        assert_refused(tmp_path, f"{tmp_path} is in use by process 1 on elsewhere since")
    with directory_lock(tmp_path):
        pass


def test_a_process_may_wait_for_one_on_another_machine(tmp_path, capsys):
    with beating(tmp_path, **ELSEWHERE) as ended:
        threading.Timer(0.4, ended.set).start()
        with directory_lock(tmp_path, wait=True):
            assert ended.is_set()
    assert " ".join(capsys.readouterr().out.split()).count("left by process 1 on elsewhere") == 1


def forbid_flock(monkeypatch, number=errno.ENOLCK):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", fail)


def test_without_flock_the_process_id_and_start_time_decide_on_this_machine(tmp_path, monkeypatch):
    forbid_flock(monkeypatch)
    monkeypatch.setattr(locks, "_beats", lambda *_: pytest.fail("watched"))
    with holding(tmp_path) as process:
        assert_refused(tmp_path, f"in use by process {process.pid}")
        process.kill()
        process.wait()
        with directory_lock(tmp_path):
            assert_refused(tmp_path, f"in use by process {os.getpid()}")
    lock_file(tmp_path, started="1")  # this process id, given to another process before
    with directory_lock(tmp_path):
        pass


def test_without_flock_a_zombie_and_another_container_are_watched(tmp_path, monkeypatch):
    forbid_flock(monkeypatch)
    with holding(tmp_path) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it stays a zombie
        with directory_lock(tmp_path):
            pass
    lock_file(tmp_path, namespace="pid:[1]")
    with directory_lock(tmp_path):
        pass


def test_other_errors_of_flock_are_named(tmp_path, monkeypatch):
    forbid_flock(monkeypatch, errno.EIO)
    with pytest.raises(UserError, match=r"\.run\.lock cannot be locked: Input/output error"), directory_lock(tmp_path):
        pass


def test_a_deleted_lock_file_lets_nobody_in(tmp_path):
    with holding(tmp_path) as process:
        (tmp_path / ".run.lock").unlink()
        while not (tmp_path / ".run.lock").exists():
            time.sleep(0.01)
        assert_refused(tmp_path, f"in use by process {process.pid}")


def test_a_process_ends_if_its_lock_was_taken_over(tmp_path):
    with holding(tmp_path) as process:
        lock_file(tmp_path, **ELSEWHERE)
        assert process.wait() == 6
        assert re.match(
            f"error: {tmp_path} was taken over by process 1 on elsewhere since .*; this process ends".encode(),
            process.stderr.read(),
        )
    assert json.loads((tmp_path / ".run.lock").read_text().splitlines()[0])["host"] == "elsewhere"


def test_a_full_disk_or_a_removed_directory_ends_no_heartbeat(tmp_path, monkeypatch):
    directory = tmp_path / "run"
    with directory_lock(directory):
        shutil.rmtree(directory)
        time.sleep(0.2)
        assert not directory.exists()
        directory.mkdir()
        while not (directory / ".run.lock").exists():
            time.sleep(0.01)


@pytest.mark.parametrize("content", ["", "1234\n", "{}", "[1]\n", '{"host": "a"', "\x00\xff"])
def test_a_lock_file_of_an_older_version_or_of_none_is_free(tmp_path, content):
    (tmp_path / ".run.lock").write_text(content, encoding="latin-1")
    with directory_lock(tmp_path):
        pass


def test_a_lock_is_held_until_its_process_dies(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_beats", lambda *_: pytest.fail("watched"))
    assert not locks.is_held(tmp_path / "nowhere")
    assert not locks.is_held(tmp_path)
    with holding(tmp_path) as process:
        assert locks.is_held(tmp_path)
        assert not locks.is_held(tmp_path, "watch")
        process.kill()
        process.wait()
        assert not locks.is_held(tmp_path)


def test_a_lock_of_another_machine_is_held_while_it_beats(tmp_path):
    with beating(tmp_path, **ELSEWHERE):
        assert locks.is_held(tmp_path)
    lock_file(tmp_path, **ELSEWHERE)
    assert not locks.is_held(tmp_path)


def test_looking_at_a_lock_keeps_nobody_out(tmp_path):
    done = threading.Event()

    def look():
        while not done.is_set():
            locks.is_held(tmp_path)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        for _ in range(30):
            with directory_lock(tmp_path):
                pass
    finally:
        done.set()
        watcher.join()
