"""The main command with --tensorboard and --logger: a run that is killed and started again keeps one set of curves."""

import json
import signal

import numpy as np
import pytest

from tests.helpers import events, tiny
from tests.helpers.forkserver import Process

STEPS = 120
# Records its calls, and kills its own process the first time that the student has finished 100 steps.
LOGGER = """
import json, os, signal
from pathlib import Path

class Recorder:
    def start(self, run, settings):
        self.run = run
        self.note("start", run.id, run.resumed_from, settings["student"]["steps"])

    def scalars(self, step, values):
        self.note("scalars", step, sorted(values))
        killed = Path(__file__).with_name("killed")
        if self.run.name == "vanilla seed-0" and step == 100 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    def finish(self, status):
        self.note("finish", status)

    def note(self, *call):
        with Path(__file__).with_name("calls").open("a") as file:
            file.write(json.dumps([self.run.name, *call]) + "\\n")

def get_logger():
    return Recorder()
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Run the experiment until the student kills its process, and then to its end; return the folder of both."""
    root = tmp_path_factory.mktemp("tracked")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    config = tiny.config_file(root / "tiny.py", tiny.write_task(root / "data"), teacher, student, steps=STEPS)
    (root / "recorder.py").write_text(LOGGER)
    flags = ["--config.objectives=('vanilla',)", "--config.student.evaluations=2", "--config.teacher.steps=8"]
    flags += ["--config.teacher.evaluations=1", "--tensorboard", "--logger", str(root / "recorder.py")]
    command = ["-m", "xtransfer.main", "--config", str(config), "--workdir", str(root / "run"), *flags]
    for expected in (-signal.SIGKILL, 0):
        assert Process(command, root / "log").wait() == expected, (root / "log").read_text()
    assert "warning: --" not in (root / "log").read_text()
    return root


def test_curves_of_a_killed_run(root):
    run = root / "run" / "students" / "vanilla" / "seed-0"
    assert len(events.files(run)) == 2
    curves = events.curves(run)
    # Peak 1e-2, warm-up over 12 updates, and then a straight line to 0 after the 120th.
    rates = [(step, 1e-2 * (120 - (step - 1)) / 108) for step in (50, 60, 100, 120)]
    assert [step for step, _ in curves["train/learning_rate"]] == [step for step, _ in rates]
    np.testing.assert_allclose([rate for _, rate in curves["train/learning_rate"]], [rate for _, rate in rates], 1e-5)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [60, 120]
    assert curves["dev/accuracy"] == [(row["step"], float(np.float32(row["dev_accuracy"]))) for row in rows]
    losses = dict(curves["train/loss"])
    assert list(losses) == [50, 60, 100, 120]
    assert [losses[row["step"]] for row in rows] == [float(np.float32(row["loss"])) for row in rows]
    assert all(rate > 0 for _, rate in curves["train/examples_per_second"])
    assert all(0 < share <= 1 for _, share in curves["train/real_token_share"])


def test_every_run_has_curves_of_its_own(root):
    assert [step for step, _ in events.curves(root / "run" / "teacher")["dev/accuracy"]] == [8]
    assert len(events.files(root / "run" / "teacher")) == 1, "a finished run is not logged again"


def test_a_logger_of_the_user_gets_each_start_and_end(root):
    calls = [json.loads(line) for line in (root / "calls").read_text().splitlines()]
    identities = {run: {call[2] for call in calls if call[:2] == [run, "start"]} for run, *_ in calls}
    assert identities.keys() == {"teacher", "vanilla seed-0"} and all(len(ids) == 1 for ids in identities.values())
    starts = [(call[0], *call[3:]) for call in calls if call[1] == "start"]
    assert starts == [("teacher", 0, STEPS), ("vanilla seed-0", 0, STEPS), ("vanilla seed-0", 60, STEPS)]
    assert [call for call in calls if call[1] == "finish"] == [
        ["teacher", "finish", "finished"],
        ["vanilla seed-0", "finish", "finished"],
    ]
    steps = [call[2] for call in calls if call[:2] == ["vanilla seed-0", "scalars"]]
    assert steps == [50, 60, 60, 100, 100, 120, 120]
