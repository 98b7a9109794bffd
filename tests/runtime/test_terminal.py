"""Output of a failed command: one line for errors of the user, and a traceback for bugs."""

import argparse
import errno
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xtransfer.errors import KINDS, CheckpointError, ConfigError, DataError
from xtransfer.runtime import processes, terminal


@pytest.fixture(autouse=True)
def restore_process_state(monkeypatch):
    """Restore the log level, which a command sets for the whole process."""
    level = logging.getLogger("absl").level
    monkeypatch.setattr(sys, "argv", ["x"])
    yield
    logging.getLogger("absl").setLevel(level)


def failing_main(error: BaseException):
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "/locked/a.tsv"),
            "error: /locked/a.tsv: Permission denied",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "aaa"), "error: aaa: File name too long"),
        (
            MemoryError("Unable to allocate 9 TiB"),
            "error: out of memory (Unable to allocate 9 TiB): lower",
        ),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory"),
            "error: out of memory (RESOURCE_EXHAUSTED: Out of memory): ",
        ),
    ],
)
def test_user_errors_are_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(error))
    output = capsys.readouterr().err
    assert caught.value.code == 5
    assert output.startswith(line) and output.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_error_has_its_exit_status(kind, capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(kind("a.tsv:3: no\nlabel")))
    assert caught.value.code == kind.exit_status and capsys.readouterr().err == "error: a.tsv:3: no label\n"


def parse_and_fail(error: BaseException):
    def main(argv: list[str]) -> None:
        terminal.parser("main", __doc__).parse_args(argv)
        raise error

    return main


def test_the_traceback_of_a_users_error_is_shown_if_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--traceback"])
    with pytest.raises(SystemExit) as caught:
        terminal.run(parse_and_fail(DataError("a.tsv:3: no label")))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 3 and lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == ["xtransfer.errors.DataError: a.tsv:3: no label", "error: a.tsv:3: no label"]
    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit):
        terminal.run(parse_and_fail(DataError("a.tsv:3: no label")))
    assert capsys.readouterr().err == "error: a.tsv:3: no label\n"


@pytest.mark.parametrize(
    "error", [CheckpointError("runs/heartbeat: no such file"), OSError(errno.EACCES, "Permission denied", "/Gloo")]
)
def test_file_name_is_not_mistaken_for_a_lost_process(error, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(error))
    assert caught.value.code in (4, 5)


def test_lost_process_is_recognised_by_the_error_of_jax(monkeypatch, capsys):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(RuntimeError("UNAVAILABLE: Gloo: connection closed by peer")))
    assert caught.value.code == 134 and "cannot be reached (UNAVAILABLE: Gloo" in capsys.readouterr().err


def test_signal_after_the_last_poll_takes_effect_after_the_section(monkeypatch):
    monkeypatch.setattr(terminal, "_stop", threading.Event())
    reached = []
    with pytest.raises(SystemExit) as caught, terminal.deferred_stop():
        with terminal.deferred_stop() as stopping:
            assert not stopping()
            terminal._terminate(signal.SIGTERM, None)
        reached.append("the outer section")
    assert caught.value.code == 143 and reached
    with pytest.raises(ConfigError), terminal.deferred_stop():
        raise ConfigError("the error comes first")


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("no file is named")])
def test_a_defect_shows_its_traceback_and_one_line(error, capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(error))
    lines = capsys.readouterr().err.splitlines()
    assert caught.value.code == 1 and lines[0] == "Traceback (most recent call last):"
    kind = type(error).__name__
    line = f"error: this is a defect of xtransfer, {kind}: {error} (please report it with the lines above)"
    assert lines[-2:] == [f"{kind}: {error}", line]


def test_ctrl_c_prints_the_given_message(capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(KeyboardInterrupt()), interrupted="nothing is written")
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted: nothing is written\n"


def test_os_error_of_a_real_path_is_reported(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        terminal.run(lambda argv: (tmp_path / ("a" * 300)).stat())
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: Error writing: [OS error 28: ENOSPC No space left on device]"),
        RuntimeError("write failed: Disk quota exceeded"),
    ],
)
def test_a_full_disk_is_not_taken_for_too_little_memory(error, capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(error))
    output = capsys.readouterr().err
    assert caught.value.code == 5 and output.count("\n") == 1
    assert output.startswith("error: the disk is full (") and "memory" not in output


def test_too_many_open_files_are_not_taken_for_too_little_memory(capsys):
    with pytest.raises(SystemExit):
        terminal.run(failing_main(ValueError("RESOURCE_EXHAUSTED: [OS error 24: EMFILE Too many open files]")))
    assert capsys.readouterr().err.startswith("error: too many open files (RESOURCE_EXHAUSTED: ")


def run_with_output(descriptor, monkeypatch, lines=3):
    """Run a command that prints to a file descriptor; return how far it came."""
    reached = []

    def main(argv):
        for number in range(lines):
            terminal.log(f"line {number}")
            print("more", flush=True)
            reached.append(number)

    with open(descriptor, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.run(main)
    return reached


def test_work_goes_on_without_a_reader(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    assert run_with_output(writer, monkeypatch) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_work_goes_on_on_a_full_disk_and_the_status_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit) as caught:
        run_with_output(os.open("/dev/full", os.O_WRONLY), monkeypatch)
    assert caught.value.code == 5
    expected = (
        "error: standard output: No space left on device; part of the output is lost, everything else is finished"
    )
    assert capsys.readouterr().err == f"{expected}\n"


def test_warnings_of_the_package_have_no_python_prefix(monkeypatch, capsys):
    def main(argv):
        logging.getLogger("other").warning("not ours")
        logging.getLogger("xtransfer.models.hf.hub").warning("%s:\nodd", "a.json")

    root = logging.StreamHandler(sys.stderr)  # as logging.basicConfig, which libraries call
    root.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    monkeypatch.setattr(logging.getLogger(), "handlers", [root])
    terminal.run(main)
    assert capsys.readouterr().err == "WARNING:other:not ours\nwarning: a.json: odd\n"
    assert logging.getLogger("xtransfer").propagate


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("", "the path is empty"),
        ("a\udcff", "is not UTF-8"),
        (
            "gs://bucket/runs",
            "^'gs://bucket/runs' is an address and not a path: give a directory of a local or mounted",
        ),
        ("s3://bucket", "is an address"),
        ("hdfs://host:9000/runs", "is an address"),
    ],
)
def test_a_path_that_cannot_be_recorded_is_refused(argument, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        terminal.path_argument(argument)
    for path in ("a/b", "a:b", "/mnt/gs:/x", "C:/x"):
        assert terminal.path_argument(path) == Path(path)


def test_callbacks_of_a_closed_loop_are_silent_and_other_ignored_errors_are_not():
    script = """
from xtransfer.runtime import terminal
class Fails:
    def __init__(self, text): self.text = text
    def __del__(self): raise RuntimeError(self.text)
def main(argv):
    for text in ("Event loop is closed", "another error"):
        Fails(text)
terminal.run(main)
Fails("Event loop is closed")
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stderr.count("Traceback") == 1 and "RuntimeError: another error" in result.stderr
    assert "Event loop is closed" not in result.stderr


@pytest.mark.parametrize(
    ("per_second", "shown"),
    [
        (0.034, "0.03 steps/s"),
        (0.5, "0.50 steps/s"),
        (4.25, "4.2 steps/s"),
        (12.4, "12 steps/s"),
        (1234, "1,234 steps/s"),
    ],
)
def test_a_slow_rate_has_digits(per_second, shown):
    assert terminal._rate(per_second, "steps") == shown
