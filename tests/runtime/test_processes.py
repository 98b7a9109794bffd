"""What processes tell each other, and how they end together; every group here is of real processes."""

import contextlib
import itertools
import signal
import socket
import subprocess
import time

import pytest

from tests.helpers.group import snippet
from xtransfer.runtime import processes


def test_what_the_first_decides_all_know_and_only_it_prints(tmp_path):
    body = """
asked = []
found = first(lambda: asked.append(1) or {"me": me, "several": (1, 2)})
assert found == {"me": 0, "several": [1, 2]} and len(asked) == (me == 0)
assert processes.count() == 3 and processes.is_first() == (me == 0)
assert together(me) == 3
terminal.log(f"process {me} says")
print(f"process {me} prints")
with terminal.progress_bar("work", 2) as ticker:
    ticker.advance(2)
"""
    with snippet(tmp_path, body, count=3) as three:
        assert three.statuses(60) == [0, 0, 0], three.said()
        assert three.out(0).startswith("process 0 says\nprocess 0 prints\nwork: 2/2")
        assert {three.out(1), three.out(2), *map(three.err, range(3))} == {""}


def test_an_error_of_the_first_is_said_once_and_ends_all(tmp_path):
    with snippet(tmp_path, "def fail(): raise UserError('a.tsv: no\\nlabel')\nfirst(fail)") as two:
        assert two.statuses(60) == [1, 1]
        assert (two.err(0), two.err(1)) == ("error: a.tsv: no label\n", "")


def test_an_error_that_all_find_is_said_once(tmp_path):
    with snippet(tmp_path, "together(1)\nraise UserError('no such checkpoint')") as two:
        assert two.statuses(60) == [1, 1]
        assert (two.err(0), two.err(1)) == ("error: no such checkpoint\n", "")


def test_an_error_of_another_names_it_and_ends_those_who_wait(tmp_path):
    with snippet(tmp_path, "if me: raise UserError('no such file here')\ntogether(1)") as two:
        assert two.statuses(60) == [1, 1]
        assert two.err(1) == "process 1: error: no such file here\n"
        assert two.err(0) == "error: process 1 has ended: no such file here\n"


def test_a_defect_keeps_its_trace_and_ends_all(tmp_path):
    with snippet(tmp_path, "if not me: raise KeyError('a defect')\nfirst(lambda: 1)") as two:
        assert two.statuses(60) == [1, 1]
        assert "Traceback" in two.err(0) and "a defect" in two.err(0) and two.err(1) == ""


def test_a_stall_is_seen_where_the_store_has_gone(monkeypatch):
    class Gone:
        def key_value_dir_get(self, place):
            raise RuntimeError("UNAVAILABLE")

    here = processes._Group(client=Gone(), last_progress=-1000.0)
    seen = []
    monkeypatch.setattr(processes, "_group", here)
    monkeypatch.setattr(processes, "_stalled", lambda seconds: (seen.append(seconds), here.done.set()))
    looks = itertools.chain([False, False], itertools.repeat(True))
    monkeypatch.setattr(here.done, "wait", lambda seconds: next(looks))
    processes._watch(1.0)
    assert seen == [1.0, 1.0]


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("waiting", ["together(1)", "first(lambda: 1)"])
def test_when_one_is_killed_the_other_ends(tmp_path, killed, waiting):
    """In a collective or elsewhere; the slowest way to learn of it is a heartbeat that does not come."""
    if (killed, waiting) == (1, "first(lambda: 1)"):
        waiting = "time.sleep(100)"  # the first waits for nobody there
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\n"
    body += f"if me == {killed}: time.sleep(100)\n{waiting}"
    with snippet(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        two.processes[killed].send_signal(signal.SIGKILL)
        begun = time.monotonic()
        assert two.processes[1 - killed].wait(60) in (134, -signal.SIGABRT), two.said()
        assert time.monotonic() - begun < 45


def test_a_stall_shows_all_stacks_and_ends_all(tmp_path):
    body = """
together(1)
def asleep_in_one_of_them(): time.sleep(100)
if me: asleep_in_one_of_them()
together(2)
"""
    with snippet(tmp_path, body, "--stall-timeout", "6") as two:
        assert two.statuses(60) == [124, 124], two.said()
        assert "together" in two.err(0) and "asleep_in_one_of_them" in two.err(1)
        assert "no progress for 6 s" in two.err(0) + two.err(1)


def test_a_process_alone_gives_up_where_it_is_asked_to(tmp_path):
    with snippet(tmp_path, "time.sleep(100)", "--stall-timeout", "1", count=1) as one:
        assert one.statuses(60) == [124]
        assert "no progress for 1 s" in one.err(0) and "in main" in one.err(0)


@pytest.fixture
def heeding_ctrl_c():
    """What is started in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_in_one_ends_all(tmp_path, heeding_ctrl_c):
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\nwhile True: together(1)"
    with snippet(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        for _ in range(4):  # one that comes while Python frees memory inside of JAX is swallowed there: press again
            with contextlib.suppress(subprocess.TimeoutExpired):
                two.processes[0].send_signal(signal.SIGINT)
                two.statuses(30)
                break
        assert two.statuses(1) == [130, 130]
        assert two.err(0).startswith("interrupted: ") and two.err(1) == ""


def test_a_process_with_other_devices_is_named_before_anything_is_computed(tmp_path):
    with snippet(tmp_path, "print('joined')", count=3, devices=(2, 1, 2)) as three:
        assert three.statuses(60) == [1, 1, 1], three.said()
        said = "error: the processes have different numbers of devices (2 in process 0, 2; 1 in process 1): "
        assert three.err(0).startswith(said) and three.err(0).count("\n") == 1
        assert {three.err(1), three.err(2), *map(three.out, range(3))} == {""}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_process_that_waits_for_the_others(tmp_path, heeding_ctrl_c, number, status):
    """JAX waits outside of Python, where no handler is run."""
    with snippet(tmp_path, "pass") as two:
        two.processes[1].kill()

        def listens():
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", two.port)):
                return True

        while not listens():
            assert two.processes[0].poll() is None, two.said()
            time.sleep(0.02)
        time.sleep(1)
        two.processes[0].send_signal(number)
        assert two.statuses(30) == [status, -signal.SIGKILL], two.said()
        assert two.said().strip() == "[0] \n\n[1]"


def test_where_one_does_not_come_the_others_say_so(tmp_path):
    with snippet(tmp_path, "pass", "--start-timeout", "3") as two:
        two.processes[1].kill()
        assert two.statuses(60) == [1, -signal.SIGKILL]
        assert two.err(0) == (
            f"error: not all processes met at 127.0.0.1:{two.port} within 3 s: see their logs, and start all of "
            "them, each with its own --process\n"
        )


def test_a_malformed_variable_of_slurm_is_named(tmp_path, monkeypatch):
    slurm = {"JOB_ID": "7", "STEP_NODELIST": "node1", "NTASKS": "2 tasks", "PROCID": "0", "LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    with snippet(tmp_path, "print('joined')", count=1) as one:
        assert one.statuses(60) == [1]
        assert one.err(0).startswith("error: SLURM_NTASKS is '2 tasks', but SLURM sets a number: ")
        assert one.err(0).count("\n") == 1 and one.out(0) == ""
