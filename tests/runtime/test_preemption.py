"""Where a group of real processes stops when one of them is to be preempted."""

import signal
import time

import pytest

from tests.helpers.group import snippet

NOTICE = "stopping as soon as the work is saved; run the same command again to resume\n"
SAVING = """
together(1)
open({directory!r} + f"/ready{{me}}", "w").close()
with terminal.deferred_stop() as stopping:
    for step in range(100_000):
        together(step)  # all take the same step at the same time
        if stopping():
            print(f"saved {{step}}")
            open({directory!r} + f"/saved{{me}}", "w").write(str(step))
            raise SystemExit(Exit.PREEMPTED)
"""


def wait_until_ready(group, directory):
    """Wait until both processes of a group have written their ready files."""
    group.wait_for(lambda: all((directory / f"ready{i}").exists() for i in (0, 1)))


@pytest.mark.parametrize("target", [0, 1])
def test_signal_to_one_process_stops_all_at_the_same_step(tmp_path, target):
    with snippet(tmp_path, SAVING.format(directory=str(tmp_path))) as group:
        wait_until_ready(group, tmp_path)
        group.processes[target].send_signal(signal.SIGTERM)
        assert group.statuses(60) == [143, 143], group.outputs()
        assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()
        assert (group.err(0), group.err(1)) == (NOTICE, "")


@pytest.mark.parametrize("notice", ["", "'custom notice'"])
def test_single_process_announces_its_stop_once(tmp_path, notice):
    body = f"""
with terminal.deferred_stop({notice}) as stopping:
    for _ in range(3): os.kill(os.getpid(), 15)
    assert stopping()
    print("saves")
"""
    with snippet(tmp_path, body, count=1) as group:
        assert group.statuses(60) == [143], group.outputs()
        assert (group.out(0), group.err(0)) == ("saves\n", "custom notice\n" if notice else NOTICE)


def test_process_that_exits_late_keeps_its_exit_status(tmp_path):
    """JAX would abort a process whose store is gone before it exits."""
    body = """
leave = os._exit
def leave_late(status):
    time.sleep(0.4)
    leave(status)
if me: os._exit = leave_late
"""
    with snippet(tmp_path, body + SAVING.format(directory=str(tmp_path))) as group:
        wait_until_ready(group, tmp_path)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.statuses(60) == [143, 143], group.outputs()


LAST_SAVE = """
together(1)
with terminal.deferred_stop() as stopping:
    assert not stopping()
    if me == {target}: threading.Timer(1.5, os.kill, (os.getpid(), 15)).start()
    time.sleep(0.5 if me == {early} else 3)
    open({directory!r} + f"/saved{{me}}", "w").close()
time.sleep(1.5)
open({directory!r} + f"/continued{{me}}", "w").close()
with terminal.deferred_stop() as stopping:
    print("began another section")
"""


@pytest.mark.parametrize(("early", "target"), [(None, 0), (None, 1), (0, 1), (1, 0), (0, 0)])
def test_signal_after_the_last_poll_stops_all_after_the_section(tmp_path, early, target):
    """A process that has left the section waits while the other still saves, because process 0 runs the store."""
    body = LAST_SAVE.format(directory=str(tmp_path), early=early, target=target)
    with snippet(tmp_path, body) as group:
        assert group.statuses(60) == [143, 143], group.outputs()
        assert group.outputs().strip() == f"[0] \n{NOTICE}\n[1]"
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    forbidden = {f"continued{i}" for i in (0, 1) if i != early}
    assert not forbidden & {path.name for path in tmp_path.glob("continued*")}


def test_signal_ends_all_at_once_if_nothing_must_be_saved(tmp_path):
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/ready{{me}}', 'w').close()\nfirst(lambda: time.sleep(0.1))\n"
    body += "while True: together(1)"
    with snippet(tmp_path, body) as group:
        wait_until_ready(group, tmp_path)
        group.processes[1].send_signal(signal.SIGTERM)
        assert group.statuses(60) == [143, 143], group.outputs()
        assert group.err(0) == group.err(1) == ""


def test_error_ends_a_process_that_waits_to_agree_with_the_failed_one(tmp_path):
    """The failed process ends before it can publish how far it is."""
    body = """
together(1)
if me: processes._LOOK_SECONDS = 100.0  # it stops looking for signs
time.sleep(1)
if me:
    time.sleep(0.5)
    raise DataError('no such file here')
preemption.request_stop()
time.sleep(100)
"""
    with snippet(tmp_path, body) as group:
        assert group.statuses(60) == [3, 3], group.outputs()
        assert group.err(0) == "error: process 1 has ended: no such file here\n"


def test_signal_after_the_work_is_harmless(tmp_path):
    """The watchers no longer agree on a stop, and no process waits for one."""
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/ready{{me}}', 'w').close()\n"
    body += "processes.finish()\nif me: time.sleep(2)"
    with snippet(tmp_path, body) as group:
        wait_until_ready(group, tmp_path)
        time.sleep(1)
        group.processes[1].send_signal(signal.SIGTERM)
        assert set(group.statuses(60)) <= {0, 143}, group.outputs()
