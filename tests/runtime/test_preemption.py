"""Where many processes stop when one is to be preempted; every group here is of real processes."""

import signal
import time

import pytest

from tests.helpers.group import snippet

SAID = "stopping as soon as the work is saved; run the same command again to resume\n"
SAVING = """
together(1)
open({place!r} + f"/there{{me}}", "w").close()
with terminal.deferred_stop() as stopping:
    for step in range(100_000):
        together(step)  # all take the same step at the same time
        if stopping():
            print(f"saved {{step}}")
            open({place!r} + f"/saved{{me}}", "w").write(str(step))
            raise SystemExit(terminal.EXIT_PREEMPTED)
"""


@pytest.mark.parametrize("sent", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, sent):
    with snippet(tmp_path, SAVING.format(place=str(tmp_path))) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        two.processes[sent].send_signal(signal.SIGTERM)
        assert two.statuses(60) == [143, 143], two.said()
        assert (tmp_path / "saved0").read_text() == (tmp_path / "saved1").read_text()
        assert (two.err(0), two.err(1)) == (SAID, "")


@pytest.mark.parametrize("said", ["", "'mine'"])
def test_a_process_alone_says_at_once_and_only_once_that_it_stops(tmp_path, said):
    body = f"""
with terminal.deferred_stop({said}) as stopping:
    for _ in range(3): os.kill(os.getpid(), 15)
    assert stopping()
    print("saves")
"""
    with snippet(tmp_path, body, count=1) as one:
        assert one.statuses(60) == [143], one.said()
        assert (one.out(0), one.err(0)) == ("saves\n", "mine\n" if said else SAID)


def test_one_that_ends_late_still_ends_with_its_own_status(tmp_path):
    """Between its last word and its end it needs the store, or JAX aborts it."""
    body = """
leave = os._exit
if me: os._exit = lambda status: (time.sleep(0.4), leave(status))
"""
    with snippet(tmp_path, body + SAVING.format(place=str(tmp_path))) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.statuses(60) == [143, 143], two.said()


LAST_SAVE = """
together(1)
with terminal.deferred_stop() as stopping:
    assert not stopping()
    if me == {sent}: threading.Timer(1.5, os.kill, (os.getpid(), 15)).start()
    time.sleep(0.5 if me == {early} else 3)
    open({place!r} + f"/saved{{me}}", "w").close()
time.sleep(1.5)
open({place!r} + f"/went_on{{me}}", "w").close()
with terminal.deferred_stop() as stopping:
    print("began another section")
"""


@pytest.mark.parametrize(("early", "sent"), [(None, 0), (None, 1), (0, 1), (1, 0), (0, 0)])
def test_a_signal_after_the_last_question_stops_all_behind_the_section(tmp_path, early, sent):
    """Also where one has left the section and another still saves: it waits, as process 0 has the store."""
    body = LAST_SAVE.format(place=str(tmp_path), early=early, sent=sent)
    with snippet(tmp_path, body) as two:
        assert two.statuses(60) == [143, 143], two.said()
        assert two.said().strip() == f"[0] \n{SAID}\n[1]"
    assert {path.name for path in tmp_path.glob("saved*")} == {"saved0", "saved1"}
    late = {f"went_on{i}" for i in (0, 1) if i != early}
    assert not late & {path.name for path in tmp_path.glob("went_on*")}


def test_where_nothing_has_to_be_saved_a_signal_ends_all_at_once(tmp_path):
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\nfirst(lambda: time.sleep(0.1))\n"
    body += "while True: together(1)"
    with snippet(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.statuses(60) == [143, 143], two.said()
        assert two.err(0) == two.err(1) == ""


def test_an_error_ends_those_who_want_to_agree_with_its_process(tmp_path):
    """It ends before it can say where it is."""
    body = """
together(1)
if me: processes._LOOK_SECONDS = 100.0  # it looks for no signs any more
time.sleep(1)
if me:
    time.sleep(0.5)
    raise UserError('no such file here')
preemption.request_stop()
time.sleep(100)
"""
    with snippet(tmp_path, body) as two:
        assert two.statuses(60) == [1, 1], two.said()
        assert two.err(0) == "error: process 1 has ended: no such file here\n"


def test_a_signal_after_the_work_changes_nothing(tmp_path):
    """The watchers agree on nothing any more, and nobody waits for a place to stop."""
    body = f"together(1)\nopen({str(tmp_path)!r} + f'/there{{me}}', 'w').close()\n"
    body += "processes.finish()\nif me: time.sleep(2)"
    with snippet(tmp_path, body) as two:
        two.wait_for(lambda: all((tmp_path / f"there{i}").exists() for i in (0, 1)))
        time.sleep(1)
        two.processes[1].send_signal(signal.SIGTERM)
        assert set(two.statuses(60)) <= {0, 143}, two.said()
