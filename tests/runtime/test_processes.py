"""Groups of real processes: shared decisions, errors, and how all of them end together."""

import contextlib
import itertools
import signal
import socket
import subprocess
import time

import pytest

from tests.helpers.group import snippet
from xtransfer.runtime import processes


def test_decisions_of_the_first_process_reach_all_and_only_it_prints(tmp_path):
    body = """
calls = []
def decide():
    calls.append(1)
    return {"me": me, "several": (1, 2)}
decision = first(decide)
assert decision == {"me": 0, "several": [1, 2]} and len(calls) == (1 if me == 0 else 0)
assert processes.count() == 3 and processes.is_first() == (me == 0)
assert together(me) == 3
terminal.log(f"process {me} says")
print(f"process {me} prints")
with terminal.progress_bar("work", 2) as ticker:
    ticker.advance(2)
"""
    with snippet(tmp_path, body, count=3) as group:
        assert group.statuses(60) == [0, 0, 0], group.outputs()
        assert group.out(0).startswith("process 0 says\nprocess 0 prints\nwork: 2/2")
        assert {group.out(1), group.out(2), *map(group.err, range(3))} == {""}


def test_error_of_the_first_process_is_printed_once_and_ends_all(tmp_path):
    with snippet(tmp_path, "def fail(): raise DataError('a.tsv: no\\nlabel')\nfirst(fail)") as group:
        assert group.statuses(60) == [3, 3]
        assert (group.err(0), group.err(1)) == ("error: a.tsv: no label\n", "")


def test_error_in_all_processes_is_printed_once(tmp_path):
    with snippet(tmp_path, "together(1)\nraise DataError('no such checkpoint')") as group:
        assert group.statuses(60) == [3, 3]
        assert (group.err(0), group.err(1)) == ("error: no such checkpoint\n", "")


def test_error_of_another_process_names_it_and_ends_the_waiting_ones(tmp_path):
    with snippet(tmp_path, "if me: raise DataError('no such file here')\ntogether(1)") as group:
        assert group.statuses(60) == [3, 3]
        assert group.err(1) == "process 1: error: no such file here\n"
        assert group.err(0) == "error: process 1 has ended: no such file here\n"


def test_bug_keeps_its_traceback_and_ends_all(tmp_path):
    with snippet(tmp_path, "if not me: raise KeyError('a defect')\nfirst(lambda: 1)") as group:
        assert group.statuses(60) == [1, 1]
        assert "Traceback" in group.err(0) and "a defect" in group.err(0) and group.err(1) == ""


def test_stall_is_detected_without_the_store(monkeypatch):
    class UnavailableStore:
        def key_value_dir_get(self, key):
            raise RuntimeError("UNAVAILABLE")

    group = processes._Group(client=UnavailableStore(), last_progress=-1000.0)
    stalls = []
    monkeypatch.setattr(processes, "_group", group)

    def record_stall(seconds):
        stalls.append(seconds)
        group.done.set()

    monkeypatch.setattr(processes, "_stalled", record_stall)
    waits = itertools.chain([False, False], itertools.repeat(True))
    monkeypatch.setattr(group.done, "wait", lambda seconds: next(waits))
    processes._watch(1.0)
    assert stalls == [1.0, 1.0]


def wait_until_ready(group, directory):
    """Wait until both processes of a group have written their ready files."""
    group.wait_for(lambda: all((directory / f"ready{i}").exists() for i in (0, 1)))


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("waiting", ["together(1)", "first(lambda: 1)"])
def test_other_process_ends_when_one_is_killed(tmp_path, killed, waiting):
    """The survivor waits in a collective or elsewhere, and notices at the latest by a missing heartbeat."""
    if (killed, waiting) == (1, "first(lambda: 1)"):
        waiting = "time.sleep(100)"  # process 0 waits for nobody in `first`
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/ready{{me}}', 'w').close()\n"
    body += f"if me == {killed}: time.sleep(100)\n{waiting}"
    with snippet(tmp_path, body) as group:
        wait_until_ready(group, tmp_path)
        group.processes[killed].send_signal(signal.SIGKILL)
        start = time.monotonic()
        assert group.processes[1 - killed].wait(60) in (134, -signal.SIGABRT), group.outputs()
        assert time.monotonic() - start < 45


def test_stall_prints_all_stacks_and_ends_all(tmp_path):
    body = """
together(1)
def asleep_in_one_process(): time.sleep(100)
if me: asleep_in_one_process()
together(2)
"""
    seconds = 20  # on a busy machine, the processes may reach the first line of the body six seconds apart
    with snippet(tmp_path, body, "--stall-timeout", str(seconds)) as group:
        assert group.statuses(60) == [124, 124], group.outputs()
        assert "together" in group.err(0) and "asleep_in_one_process" in group.err(1)
        assert f"no progress for {seconds} s" in group.err(0) + group.err(1)


def test_single_process_ends_at_the_stall_timeout(tmp_path):
    with snippet(tmp_path, "time.sleep(100)", "--stall-timeout", "1", count=1) as group:
        assert group.statuses(60) == [124]
        assert "no progress for 1 s" in group.err(0) and "in main" in group.err(0)


def test_ctrl_c_in_one_process_ends_all(tmp_path, default_ctrl_c):
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/ready{{me}}', 'w').close()\nwhile True: together(1)"
    with snippet(tmp_path, body) as group:
        wait_until_ready(group, tmp_path)
        for _ in range(4):  # Python loses one that arrives while it frees memory inside JAX: press again
            with contextlib.suppress(subprocess.TimeoutExpired):
                group.processes[0].send_signal(signal.SIGINT)
                group.statuses(30)
                break
        assert group.statuses(1) == [130, 130]
        assert group.err(0).startswith("interrupted: ") and group.err(1) == ""


def test_different_device_count_is_reported_before_the_run_starts(tmp_path):
    with snippet(tmp_path, "print('joined')", count=3, devices=(2, 1, 2)) as group:
        assert group.statuses(60) == [5, 5, 5], group.outputs()
        message = "error: the processes have different numbers of devices (2 in process 0, 2; 1 in process 1): "
        assert group.err(0).startswith(message) and group.err(0).count("\n") == 1
        assert {group.err(1), group.err(2), *map(group.out, range(3))} == {""}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_ends_a_process_that_waits_for_the_others(tmp_path, default_ctrl_c, number, status):
    """JAX waits outside Python, where no signal handler runs."""
    with snippet(tmp_path, "pass") as group:
        group.processes[1].kill()

        def coordinator_listens():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", group.port)):
                return True

        while not coordinator_listens():
            assert group.processes[0].poll() is None, group.outputs()
            time.sleep(0.02)
        time.sleep(1)
        group.processes[0].send_signal(number)
        assert group.statuses(30) == [status, -signal.SIGKILL], group.outputs()
        assert group.outputs().strip() == "[0] \n\n[1]"


def test_missing_process_is_reported_by_the_others(tmp_path):
    with snippet(tmp_path, "pass", "--start-timeout", "3") as group:
        group.processes[1].kill()
        assert group.statuses(60) == [5, -signal.SIGKILL]
        assert group.err(0) == (
            f"error: not all processes met at 127.0.0.1:{group.port} within 3 s: see their logs, and start all of "
            "them, each with its own --process\n"
        )


def test_malformed_slurm_variable_is_named(tmp_path, monkeypatch):
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node1", "NTASKS": "2 tasks", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with snippet(tmp_path, "print('joined')", count=1) as group:
        assert group.statuses(60) == [5]
        assert group.err(0).startswith("error: SLURM_NTASKS is '2 tasks', but SLURM sets a number: ")
        assert group.err(0).count("\n") == 1 and group.out(0) == ""
