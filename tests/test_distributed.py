"""What processes tell each other, and how they end together; every group here is of real processes."""

import contextlib
import itertools
import signal
import subprocess
import time

import pytest

from tests.group import Group
from xtransfer import distributed

# Each snippet is a binary's `main` after the flags are read and the processes have met.
BINARY = """
import argparse, functools, os, sys, threading, time
from xtransfer import cli, cluster, distributed
from xtransfer.errors import UserError

def together(x):
    from jax.experimental import multihost_utils
    import numpy as np
    return int(multihost_utils.process_allgather(np.int32(x)).sum())

def main(argv):
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    cli.start(cluster.flags_of(parser.parse_args([*argv, *{flags!r}])))
    me, first = distributed.index(), distributed.first
{body}

cli.run(main)
"""


def group(tmp_path, body, *flags, count=2):
    """Two processes that run a snippet."""
    indented = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    return Group(["-c", BINARY.format(body=indented, flags=list(flags))], count, 1, tmp_path / "log")


def test_what_the_first_decides_all_know_and_only_it_prints(tmp_path):
    body = """
asked = []
found = first(lambda: asked.append(1) or {"me": me, "several": (1, 2)})
assert found == {"me": 0, "several": [1, 2]} and len(asked) == (me == 0)
assert distributed.count() == 3 and distributed.is_first() == (me == 0)
assert together(me) == 3
cli.log(f"process {me} says")
print(f"process {me} prints")
with cli.ticking("work", 2) as ticker:
    ticker.advance(2)
"""
    with group(tmp_path, body, count=3) as three:
        assert three.statuses(60) == [0, 0, 0], three.said()
        assert three.out(0).startswith("process 0 says\nprocess 0 prints\nwork: 2/2")
        assert {three.out(1), three.out(2), *map(three.err, range(3))} == {""}


def test_an_error_of_the_first_is_said_once_and_ends_all(tmp_path):
    with group(tmp_path, "def fail(): raise UserError('a.tsv: no\\nlabel')\nfirst(fail)") as two:
        assert two.statuses(60) == [1, 1]
        assert (two.err(0), two.err(1)) == ("error: a.tsv: no label\n", "")


def test_an_error_that_all_find_is_said_once(tmp_path):
    with group(tmp_path, "together(1)\nraise UserError('no such checkpoint')") as two:
        assert two.statuses(60) == [1, 1]
        assert (two.err(0), two.err(1)) == ("error: no such checkpoint\n", "")


def test_an_error_of_another_names_it_and_ends_those_who_wait(tmp_path):
    with group(tmp_path, "if me: raise UserError('no such file here')\ntogether(1)") as two:
        assert two.statuses(60) == [1, 1]
        assert two.err(1) == "process 1: error: no such file here\n"
        assert two.err(0) == "error: process 1 has ended: no such file here\n"


def test_a_defect_keeps_its_trace_and_ends_all(tmp_path):
    with group(tmp_path, "if not me: raise KeyError('a defect')\nfirst(lambda: 1)") as two:
        assert two.statuses(60) == [1, 1]
        assert "Traceback" in two.err(0) and "a defect" in two.err(0) and two.err(1) == ""


def test_an_error_ends_those_who_want_to_agree_with_its_process(tmp_path):
    """It ends before it can say where it is."""
    body = """
together(1)
if me: distributed._LOOK_SECONDS = 100.0  # it looks for no signs any more
time.sleep(1)
if me:
    time.sleep(0.5)
    raise UserError('no such file here')
distributed.request_stop()
time.sleep(100)
"""
    with group(tmp_path, body) as two:
        assert two.statuses(60) == [1, 1], two.said()
        assert two.err(0) == "error: process 1 has ended: no such file here\n"


def test_a_stall_is_seen_where_the_store_has_gone(monkeypatch):
    class Gone:
        def key_value_dir_get(self, place):
            raise RuntimeError("UNAVAILABLE")

    here = distributed._Group(client=Gone(), moved=-1000.0)
    seen = []
    monkeypatch.setattr(distributed, "_here", here)
    monkeypatch.setattr(distributed, "_stalled", lambda seconds: (seen.append(seconds), here.done.set()))
    looks = itertools.chain([False, False], itertools.repeat(True))
    monkeypatch.setattr(here.done, "wait", lambda seconds: next(looks))
    distributed._watch(1.0)
    assert seen == [1.0, 1.0]


@pytest.mark.parametrize("killed", [0, 1])
@pytest.mark.parametrize("waiting", ["together(1)", "first(lambda: 1)"])
def test_when_one_is_killed_the_other_ends(tmp_path, killed, waiting):
    """In a collective or elsewhere; the slowest way to learn of it is a heartbeat that does not come."""
    if (killed, waiting) == (1, "first(lambda: 1)"):
        waiting = "time.sleep(100)"  # the first waits for nobody there
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\n"
    body += f"if me == {killed}: time.sleep(100)\n{waiting}"
    with group(tmp_path, body) as two:
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
    with group(tmp_path, body, "--stall-timeout", "6") as two:
        assert two.statuses(60) == [124, 124], two.said()
        assert "together" in two.err(0) and "asleep_in_one_of_them" in two.err(1)
        assert "nothing was finished for 6 s" in two.err(0) + two.err(1)


def test_a_process_alone_gives_up_where_it_is_asked_to(tmp_path):
    with group(tmp_path, "time.sleep(100)", "--stall-timeout", "1", count=1) as one:
        assert one.statuses(60) == [124]
        assert "nothing was finished for 1 s" in one.err(0) and "in main" in one.err(0)


SAVING = """
together(1)
open({place!r} + f"/there{{me}}", "w").close()
with cli.deferred_stop() as stopping:
    for step in range(100_000):
        together(step)  # all take the same step at the same time
        if stopping():
            print(f"saved {{step}}")
            open({place!r} + f"/saved{{me}}", "w").write(str(step))
            raise SystemExit(cli.EXIT_PREEMPTED)
"""


@pytest.mark.parametrize("sent", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, sent):
    with group(tmp_path, SAVING.format(place=str(tmp_path))) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        two.processes[sent].send_signal(signal.SIGTERM)
        assert two.statuses(60) == [143, 143], two.said()
        assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()
        assert two.err(0) == two.err(1) == ""


LAST_SAVE = """
together(1)
with cli.deferred_stop() as stopping:
    assert not stopping()
    if me == {sent}: threading.Timer(1.5, os.kill, (os.getpid(), 15)).start()
    time.sleep(0.5 if me == {early} else 3)
    open({place!r} + f"/saved{{me}}", "w").close()
time.sleep(1.5)
open({place!r} + f"/went_on{{me}}", "w").close()
with cli.deferred_stop() as stopping:
    print("began another section")
"""


@pytest.mark.parametrize(("early", "sent"), [(None, 0), (None, 1), (0, 1), (1, 0), (0, 0)])
def test_a_signal_after_the_last_question_stops_all_behind_the_section(tmp_path, early, sent):
    """Also where one has left the section and another still saves: it waits, as process 0 has the store."""
    body = LAST_SAVE.format(place=str(tmp_path), early=early, sent=sent)
    with group(tmp_path, body) as two:
        assert two.statuses(60) == [143, 143], two.said()
        assert two.said().strip() == "[0] \n\n[1]"
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    late = {f"went_on{i}" for i in (0, 1) if i != early}
    assert not late & {path.name for path in tmp_path.glob("went_on*")}


def test_where_nothing_has_to_be_saved_a_signal_ends_all_at_once(tmp_path):
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\nfirst(lambda: time.sleep(0.1))\n"
    body += "while True: together(1)"
    with group(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.statuses(60) == [143, 143], two.said()
        assert two.err(0) == two.err(1) == ""


def test_ctrl_c_in_one_ends_all(tmp_path):
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\nwhile True: together(1)"
    with group(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        for _ in range(4):  # one that comes while Python frees memory inside of JAX is swallowed there: press again
            with contextlib.suppress(subprocess.TimeoutExpired):
                two.processes[0].send_signal(signal.SIGINT)
                two.statuses(30)
                break
        assert two.statuses(1) == [130, 130]
        assert two.err(0).startswith("interrupted: ") and two.err(1) == ""


def test_a_signal_after_the_work_changes_nothing(tmp_path):
    """The watchers agree on nothing any more, and nobody waits for a place to stop."""
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\n"
    body += "distributed.finish()\nif me: time.sleep(2)"
    with group(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        time.sleep(1)
        two.processes[1].send_signal(signal.SIGTERM)
        assert set(two.statuses(60)) <= {0, 143}, two.said()
