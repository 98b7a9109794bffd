"""SIGHUP, Ctrl-C once and twice, and Ctrl-Z, sent to a real process that works alone."""

import os
import pty
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.group import snippet

SAVING = """
with terminal.deferred_stop() as stopping:
    open({directory!r} + "/ready", "w").close()
    while not stopping(): time.sleep(0.01)
    {save}
    raise SystemExit(Exit.PREEMPTED)
"""
NOTICE = "stopping as soon as the work is saved; run the same command again to resume\n"
INTERRUPTED = "stopping as soon as the work is saved; press Ctrl-C again to stop at once\n"


@pytest.fixture(autouse=True)
def default_handlers():
    """Handle signals as a shell in the foreground; a process started in the background ignores Ctrl-C."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def saving(tmp_path, save="print('saved')"):
    """Return a process that works until it is stopped, and then saves."""
    return snippet(tmp_path, SAVING.format(directory=str(tmp_path), save=save), count=1)


def send(group, tmp_path, *numbers):
    """Wait until the process works, and send it the signals, with time between them."""
    group.wait_for((tmp_path / "ready").exists, 60)
    for position, number in enumerate(numbers):
        if position:
            time.sleep(0.5)
        group.processes[0].send_signal(number)


def test_sighup_saves_and_exits_like_sigterm(tmp_path):
    with saving(tmp_path) as group:
        send(group, tmp_path, signal.SIGHUP)
        assert group.statuses(60) == [143], group.outputs()
        assert (group.out(0), group.err(0)) == ("saved\n", NOTICE)


def test_sighup_that_nohup_ignores_stays_ignored(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with saving(tmp_path) as group:
        send(group, tmp_path, signal.SIGHUP)
        time.sleep(0.5)
        assert group.processes[0].poll() is None and group.err(0) == "", group.outputs()
        group.processes[0].send_signal(signal.SIGTERM)
        assert group.statuses(60) == [143] and group.err(0) == NOTICE


def test_ctrl_c_saves_first(tmp_path):
    with saving(tmp_path) as group:
        send(group, tmp_path, signal.SIGINT)
        assert group.statuses(60) == [130], group.outputs()
        expected = f"{INTERRUPTED}interrupted: run the same command again to resume\n"
        assert (group.out(0), group.err(0)) == ("saved\n", expected)


@pytest.mark.parametrize("save", ["time.sleep(100)", "while True: pass"])
def test_the_second_ctrl_c_ends_it_at_once_without_a_trace(tmp_path, save):
    with saving(tmp_path, save) as group:
        send(group, tmp_path, signal.SIGINT, signal.SIGINT)
        assert group.statuses(60) == [130], group.outputs()
        assert group.err(0) == f"{INTERRUPTED}stopped at once; the work since the last checkpoint is lost\n"


@pytest.mark.parametrize("ending", ["print('done')", "raise DataError('a.tsv: no rows')"])
def test_ctrl_c_while_python_shuts_down_shows_no_trace(tmp_path, ending):
    """Python waits for this thread, after the command has ended."""
    body = f"""
def wait():
    threading.main_thread().join()
    open({str(tmp_path)!r} + "/ready", "w").close()
    time.sleep(100)
threading.Thread(target=wait).start()
{ending}
"""
    with snippet(tmp_path, body, count=1) as group:
        send(group, tmp_path, signal.SIGINT)
        assert group.statuses(60) == [130], group.outputs()
        assert group.err(0) in ("", "error: a.tsv: no rows\n")


def test_a_stopped_process_is_not_stalled_and_keeps_its_lock(tmp_path):
    """It is stopped for longer than the stall timeout, by the signal that needs no terminal."""
    body = f"""
import pathlib
from xtransfer.runtime import locks
with locks.directory_lock(pathlib.Path({str(tmp_path)!r})), terminal.progress_bar("work", 12) as bar:
    start = time.monotonic()
    for i in range(12):
        time.sleep(0.25)
        bar.advance()
        if i == 4: open({str(tmp_path)!r} + "/ready", "w").close()
    print(time.monotonic() - start - (bar._advanced - bar._started))
"""
    with snippet(tmp_path, body, "--stall-timeout", "3", count=1) as group:
        send(group, tmp_path, signal.SIGSTOP)
        time.sleep(4)
        again = snippet(tmp_path, body, count=1)
        again.log = tmp_path / "again"
        with again:
            assert again.statuses(60) == [6], again.outputs()
        group.processes[0].send_signal(signal.SIGCONT)
        assert group.statuses(60) == [0], group.outputs()
        assert group.err(0) == "" and "no progress" not in group.out(0)
        assert float(group.out(0).splitlines()[-1]) > 3, "the stop does not count as the bar's time"


def test_a_run_survives_its_terminal(tmp_path):
    """When the terminal closes, SIGHUP comes and every later output fails."""
    code = f"""
import pathlib, signal, sys, time
from xtransfer.errors import Exit
from xtransfer.runtime import terminal
def main(argv):
    with terminal.deferred_stop() as stopping:
        pathlib.Path({str(tmp_path / "ready")!r}).touch()
        while not stopping(): time.sleep(0.01)
        for _ in range(3):
            terminal.log("saving")
            print("saving", file=sys.stderr)
        pathlib.Path({str(tmp_path / "saved")!r}).touch()
        raise SystemExit(Exit.PREEMPTED)
terminal.run(main)
"""
    controller, terminal = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=terminal, stderr=terminal, start_new_session=True)
    os.close(terminal)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        os.close(controller)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 143 and (tmp_path / "saved").exists()
    finally:
        process.kill()
        process.wait()
