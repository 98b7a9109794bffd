"""Watch mode next to real processes: a trainer that is killed, preempted, restarted, stuck, and finished."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.helpers import tiny, tiny_run
from tests.helpers.forkserver import Process
from xtransfer.config import load
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.runs import sweep
from xtransfer.runtime.locks import directory_lock

ROOT = Path(__file__).parents[2]
STEPS, EVALUATIONS = 120, 12
# Holds a workdir as a training run does, and never ends.
STUCK = "import pathlib, sys\nfrom xtransfer.runtime.locks import directory_lock\n"
STUCK += "with directory_lock(pathlib.Path(sys.argv[1])): print(1, flush=True); sys.stdin.read()"


def start(log, *arguments):
    """Start Python with its output in a file."""
    return Process(arguments, log, COLUMNS="200")


def wait_for(condition, *processes, seconds=600):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
        time.sleep(0.02)


def rows(path):
    """Return the rows of a file without their digests."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [{key: value for key, value in json.loads(line).items() if key != "digest"} for line in lines]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a workdir with checkpoints and without an end marker, as a dead trainer leaves it."""
    root = tmp_path_factory.mktemp("root")
    return tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")


def test_a_killed_preempted_and_restarted_run_is_scored_once(tmp_path):
    """Start the watcher first, kill the trainer, start it again, preempt it, and let it finish."""
    root = tmp_path / "run"
    encoder = tiny.checkpoint(tmp_path / "encoder", hidden=8)
    data = tiny.write_task(tmp_path / "data")
    config = tiny.config_file(tmp_path / "tiny.py", data, encoder, encoder, steps=STEPS, evaluations=EVALUATIONS)
    flags = ("--config.objectives=('vanilla',)", "--config.teacher.steps=8")
    train = ("-m", "xtransfer.main", "--config", str(config), "--workdir", str(root), *flags)
    patience = ("--interval", "0.1", "--grace", "600")
    metrics = root / "students/vanilla/seed-0/metrics.jsonl"
    log = tmp_path / "watch.log"
    watcher = start(log, "-m", "xtransfer.evaluate", "--workdir", str(root), "--watch", *patience)
    try:
        for count, number in ((2, signal.SIGKILL), (4, signal.SIGTERM)):
            trainer = start(tmp_path / "train.log", *train)
            wait_for(lambda count=count: len(rows(metrics)) >= count, trainer, watcher)
            trainer.send_signal(number)
            assert trainer.wait(300) == (-9 if number == signal.SIGKILL else 143)
            assert not (root / "finished.json").exists()
        assert start(tmp_path / "train.log", *train).wait(600) == 0, (tmp_path / "train.log").read_text()
        assert watcher.wait(600) == 0, log.read_text()
    finally:
        watcher.kill()
        watcher.wait()
    scored = [(row["objective"], row["step"], row["split"], row["language"], row["metric"]) for row in _by_step(root)]
    assert len(set(scored)) == len(scored)
    for objective, run in (("teacher", root / "teacher"), ("vanilla", metrics.parent)):
        steps = {row["step"] for row in rows(run / "metrics.jsonl")}
        name = "teacher" if objective == "teacher" else f"{objective} seed 0"
        skipped = re.findall(rf"warning: {name} step ([\d,]+): skipped: deleted before", log.read_text())
        taken = {int(step.replace(",", "")) for step in skipped}
        done = {step for other, step, *_ in scored if other == objective}
        assert done | taken == steps and not done & taken and len(taken) == len(skipped)
    last = [row for row in rows(root / "results.jsonl") if row["selection"] == "last"]
    last = [row for row in last if row["metric"] != "teacher_agreement"]
    same_step = [row | {"selection": "last"} for row in _by_step(root) if row["split"] == "test"]
    assert [row for row in same_step if row in last] == last and {row["step"] for row in last} == {8, STEPS}
    assert f"| vanilla | 0 | {STEPS} | " in log.read_text() and "a training run has started" in log.read_text()
    assert not list((root / ".snapshots").iterdir())


def _by_step(root):
    return rows(root / "watch.jsonl")


def watch(workdir, *flags):
    evaluate.main(["--workdir", str(workdir.root), "--watch", "--interval", "0.05", *flags])


def stuck(workdir):
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(workdir.root)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"1\n"
    return process


def test_a_trainer_that_dies_ends_the_watch_after_the_grace_period(workdir, capsys):
    trainer = stuck(workdir)

    def kill_once_everything_is_scored():
        wait_for(lambda: len({(row["objective"], row["step"]) for row in _by_step(workdir.root)}) == 4, trainer)
        trainer.kill()
        trainer.wait()  # as a shell would: a zombie looks alive for a while

    killer = threading.Thread(target=kill_once_everything_is_scored)
    killer.start()
    with pytest.raises(UserError) as caught:
        watch(workdir, "--grace", "0.3")
    killer.join()
    trainer.communicate()
    message = f"{workdir.root}: the training run has died or has not started, and none came within 0.3 s (--grace): "
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert "no training run; waiting up to 0.3 s for one" in capsys.readouterr().out


def test_a_trainer_without_news_ends_the_watch_after_the_time_out(workdir):
    trainer = stuck(workdir)
    try:
        with pytest.raises(UserError, match=r"no new checkpoint for 0\.3 s \(--timeout\): see the log"):
            watch(workdir, "--timeout", "0.3")
    finally:
        trainer.kill()
        trainer.communicate()


def test_a_finished_run_is_scored_and_the_watch_ends(workdir, capsys):
    workdir.finished.write_text("{}")
    try:
        watch(workdir, "--grace", "0")
    finally:
        workdir.finished.unlink()
    out = capsys.readouterr().out
    assert "| teacher | – | 2 | " in out and "| vanilla | 0 | 6 | " in out and "4 checkpoints scored" in out
    assert not workdir.results.exists()


def test_a_second_watcher_is_refused(workdir):
    with directory_lock(workdir.root, "watch"), pytest.raises(UserError, match="is in use by process"):
        watch(workdir, "--grace", "60")


def test_the_directory_of_a_sweep_is_refused_at_once_and_its_points_are_named(tmp_path):
    config = load(str(ROOT / "configs" / "quickstart.py"))
    names = ("transfer.temperature=0.5", "transfer.temperature=2")
    sweep.record(tmp_path, [sweep.Point(name, {"transfer.temperature": 1.0}, config) for name in names])
    with pytest.raises(UserError) as caught:
        evaluate.main(["--workdir", str(tmp_path), "--watch", "--grace", "600", "--interval", "60"])
    assert str(caught.value) == (
        f"{tmp_path} holds a sweep: watch one of its points: --workdir {tmp_path}/points/transfer.temperature=0.5, "
        f"or another one in {tmp_path}/points"
    )


def test_other_metrics_are_scored_after_a_first_watch(workdir, capsys):
    workdir.finished.write_text("{}")
    try:
        watch(workdir, "--grace", "0")
        capsys.readouterr()
        watch(workdir, "--grace", "0", "--metrics", "ece,accuracy")
    finally:
        workdir.finished.unlink()
    out = capsys.readouterr().out
    assert "ece in % of each checkpoint" in out and "| vanilla | 0 | 6 | " in out and "4 checkpoints scored" in out


def test_a_workdir_that_never_starts_is_refused(tmp_path):
    with pytest.raises(UserError, match="has not started, and none came within 0 s"):
        evaluate.main(["--workdir", str(tmp_path / "run"), "--watch", "--grace", "0", "--interval", "0"])
    assert not (tmp_path / "run").exists()
