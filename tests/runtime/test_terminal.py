"""Output of a failed command: one line for errors of the user, and a traceback for bugs."""

import errno
import logging
import signal
import sys
import threading
from pathlib import Path

import pytest

from xtransfer.errors import UserError
from xtransfer.runtime import processes, terminal


@pytest.fixture(autouse=True)
def restore_process_state(monkeypatch):
    """Restore the signal handler and the log level, which a command sets for the whole process."""
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("absl").level
    monkeypatch.setattr(sys, "argv", ["x"])
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("absl").setLevel(level)


def failing_main(error: BaseException):
    def main(argv: list[str]) -> None:
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("a.tsv:3: no\nlabel"), "error: a.tsv:3: no label"),
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
    assert caught.value.code == terminal.EXIT_USER_ERROR
    assert output.startswith(line) and output.count("\n") == 1


@pytest.mark.parametrize(
    "error", [UserError("runs/heartbeat: no such file"), OSError(errno.EACCES, "Permission denied", "/Gloo")]
)
def test_file_name_is_not_mistaken_for_a_lost_process(error, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(error))
    assert caught.value.code == terminal.EXIT_USER_ERROR


def test_lost_process_is_recognised_by_the_error_of_jax(monkeypatch, capsys):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(RuntimeError("UNAVAILABLE: Gloo: connection closed by peer")))
    assert caught.value.code == terminal.EXIT_LOST and "cannot be reached (UNAVAILABLE: Gloo" in capsys.readouterr().err


def test_signal_after_the_last_poll_takes_effect_after_the_section(monkeypatch):
    monkeypatch.setattr(terminal, "_stop", threading.Event())
    reached = []
    with pytest.raises(SystemExit) as caught, terminal.deferred_stop():
        with terminal.deferred_stop() as stopping:
            assert not stopping()
            terminal._terminate(signal.SIGTERM, None)
        reached.append("the outer section")
    assert caught.value.code == 143 and reached
    with pytest.raises(UserError), terminal.deferred_stop():
        raise UserError("the error comes first")


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("no file is named")])
def test_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        terminal.run(failing_main(error))


def test_ctrl_c_prints_the_given_message(capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(failing_main(KeyboardInterrupt()), interrupted="nothing is written")
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted: nothing is written\n"


def test_os_error_of_a_real_path_is_reported(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        terminal.run(lambda argv: (tmp_path / ("a" * 300)).stat())
    assert "File name too long" in capsys.readouterr().err
