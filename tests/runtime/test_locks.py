"""Directory locks, between real processes and on a full disk."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from xtransfer.errors import UserError
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
