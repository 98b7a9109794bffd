"""Two processes share an experiment: one is preempted, killed, or stalled in each stage, and one alone finishes it.

Process 0 writes all files, so it waits at a file of the stage while something happens to process 1.
"""

import json
import signal
from pathlib import Path

import pytest

from tests.helpers import tiny
from tests.helpers.group import Group
from tests.helpers.group import run as run_group
from tests.test_experiment_processes import scores
from xtransfer.errors import Exit

# The main command. Its first argument says what happens in process 0.
COMMAND = """
import json, sys
from tests.helpers import interruption
from xtransfer import main
from xtransfer.runtime import terminal
stages, event = json.loads(sys.argv.pop(1))
if event and sys.argv[-2:] == ["--process", "0"]:
    interruption.install(stages, interruption.Interruption(**event))
terminal.run(main.main)
"""


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    """Return the flags of a short experiment. The caller appends the workdir."""
    root = tmp_path_factory.mktemp("processes")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    config = tiny.config_file(root / "tiny.py", data, teacher, student, steps=24)
    objectives = ["--config.objectives=('monox_kd',)", "--config.teacher.steps=24"]
    return ["--config", str(config), *objectives, "--stall-timeout=3600", "--workdir"]


def command(workdir: Path, flags: list[str], event: dict | None = None) -> list[str]:
    stages = {
        "teacher": [workdir / "teacher"],
        "labelling": [workdir / "logits"],
        "students": [workdir / "students"],
        "evaluation": [workdir / "predictions"],
    }
    texts = {stage: [str(path) for path in paths] for stage, paths in stages.items()}
    return ["-c", COMMAND, json.dumps([texts, event]), *flags, str(workdir)]


def test_two_processes_survive_what_happens_to_one_in_each_stage(flags, tmp_path):
    workdir = tmp_path / "run"

    def interrupt(stage: str, number: int, event: signal.Signals) -> tuple[list[int], Group]:
        """Send a signal to process 1 while process 0 waits in a stage; return their statuses."""
        release = tmp_path / f"{stage}.{number}"
        hold = {"stage": stage, "number": number, "action": "hold", "release": str(release)}
        with Group(command(workdir, flags, hold), 2, 1, tmp_path / stage) as pair:
            pair.wait_for(Path(f"{release}.held").exists)
            pair.processes[1].send_signal(event)
            release.touch()
            return pair.statuses(), pair

    statuses, pair = interrupt("teacher", 6, signal.SIGTERM)
    assert statuses == [Exit.PREEMPTED] * 2, pair.outputs()
    assert "stopping as soon as the work is saved" in pair.err(0)

    statuses, pair = interrupt("labelling", 3, signal.SIGKILL)
    assert statuses[0] in (Exit.LOST, -signal.SIGABRT) and statuses[1] == -signal.SIGKILL, pair.outputs()

    stall = {"stage": "students", "number": 6, "action": "stall"}
    with Group(command(workdir, flags, stall), 2, 1, tmp_path / "students") as pair:
        assert pair.statuses() == [Exit.STALLED] * 2, pair.outputs()
        assert "error: no progress for 3600 s" in pair.err(0) and "in _stall" in pair.err(0)
        assert "process 0 sees no progress" in pair.err(1)

    statuses, pair = interrupt("evaluation", 2, signal.SIGTERM)
    assert statuses == [Exit.PREEMPTED] * 2, pair.outputs()

    run_group(command(workdir, flags), 1, 2, tmp_path / "last")
    run_group(command(tmp_path / "whole", flags), 1, 2, tmp_path / "whole-log")
    assert scores(workdir) == pytest.approx(scores(tmp_path / "whole"), abs=1e-9)
    assert (workdir / "finished.json").exists()
