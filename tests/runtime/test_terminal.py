"""What a user reads when something goes wrong: one line, or the trace of a defect."""

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
def as_before(monkeypatch):
    """A binary's handlers and log levels are its process's."""
    handler, level = signal.getsignal(signal.SIGTERM), logging.getLogger("absl").level
    monkeypatch.setattr(sys, "argv", ["x"])
    yield
    signal.signal(signal.SIGTERM, handler)
    logging.getLogger("absl").setLevel(level)


def raising(error: BaseException):
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
def test_what_a_user_can_mend_is_one_line(error, line, capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(raising(error))
    said = capsys.readouterr().err
    assert caught.value.code == terminal.EXIT_USER_ERROR
    assert said.startswith(line) and said.count("\n") == 1


@pytest.mark.parametrize(
    "error", [UserError("runs/heartbeat: no such file"), OSError(errno.EACCES, "Permission denied", "/Gloo")]
)
def test_a_name_is_not_taken_for_a_lost_process(error, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        terminal.run(raising(error))
    assert caught.value.code == terminal.EXIT_USER_ERROR


def test_a_lost_process_is_known_by_what_jax_says(monkeypatch, capsys):
    monkeypatch.setattr(processes, "count", lambda: 2)
    with pytest.raises(SystemExit) as caught:
        terminal.run(raising(RuntimeError("UNAVAILABLE: Gloo: connection closed by peer")))
    assert caught.value.code == terminal.EXIT_LOST and "cannot be reached (UNAVAILABLE: Gloo" in capsys.readouterr().err


def test_a_signal_after_the_last_poll_ends_behind_the_section(monkeypatch):
    monkeypatch.setattr(terminal, "_stop", threading.Event())
    reached = []
    with pytest.raises(SystemExit) as caught, terminal.deferred_stop():
        with terminal.deferred_stop() as stopping:
            assert not stopping()
            terminal._terminate(signal.SIGTERM, None)
        reached.append("the outer section")
    assert caught.value.code == 143 and reached
    with pytest.raises(UserError), terminal.deferred_stop():
        raise UserError("what failed comes first")


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError("no file is named")])
def test_a_defect_keeps_its_trace(error):
    with pytest.raises(type(error)):
        terminal.run(raising(error))


def test_ctrl_c_says_what_it_leaves(capsys):
    with pytest.raises(SystemExit) as caught:
        terminal.run(raising(KeyboardInterrupt()), interrupted="nothing is written")
    assert caught.value.code == 130 and capsys.readouterr().err == "interrupted: nothing is written\n"


def test_a_real_path_that_may_not_be_read_is_named(tmp_path: Path, capsys):
    with pytest.raises(SystemExit):
        terminal.run(lambda argv: (tmp_path / ("a" * 300)).stat())
    assert "File name too long" in capsys.readouterr().err
