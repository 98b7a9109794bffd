"""An experiment that is killed at random in every stage ends with the same bits as one that is not.

One round kills once in each stage, in processes that resume each other; `chance` says how to ask for more rounds. The
same holds for an experiment that stalls in every stage, and for the weights of one that is preempted in every stage.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest

from tests.helpers import contents, forked, tiny
from tests.helpers.contents import Contents
from tests.helpers.interruption import Interruption
from tests.kill.chance import ROUNDS, Kills
from xtransfer.errors import Exit
from xtransfer.report.workdir_report import report
from xtransfer.runs.workdir import Workdir

STAGES = ("records", "tokenising", "teacher", "labelling", "students", "evaluation", "report")
IGNORED = {
    ".run.lock": "names the last process to hold it, and is emptied at the end",
    ".evaluation.lock": "names the last process to hold it, and is emptied at the end",
    "costs.jsonl": "seconds and memory, and only of stages that were not killed",
    "report/report.html": "shows the costs, so it is made again with those of the uninterrupted run and then compared",
}
LOSSES = {
    "teacher/metrics.jsonl": "a saved step ends a window of the loss",
    "students/monox_kd/seed-0/metrics.jsonl": "a saved step ends a window of the loss",
}
FLAGS = ("--config.objectives=('monox_kd',)", "--config.student.patience=5")


@dataclass(frozen=True)
class Experiment:
    """An experiment, and what it leaves when nothing interrupts it.

    Attributes:
      root: the directory of everything below.
      config: its config file.
      expected: the contents of the workdir of an uninterrupted run, without `IGNORED`.
      costs: its costs.jsonl.
      page: its report.html.
      operations: the number of operations of each stage.
    """

    root: Path
    config: Path
    expected: Contents
    costs: bytes
    page: bytes
    operations: dict[str, int]

    @property
    def workdir(self) -> Path:
        """The workdir, the same for all runs, because files record it."""
        return self.root / "run"

    @property
    def log(self) -> str:
        """The output of all processes since the last fresh start."""
        return forked.log(self.root / "home")

    def run(self, interrupted: Interruption | None = None, *flags: str) -> int:
        """Start the command, and return its exit status."""
        return start(self.root, self.config, interrupted, *flags)[0]

    def clear(self) -> None:
        """Remove the workdir and the stored tokens."""
        shutil.rmtree(self.workdir, ignore_errors=True)
        shutil.rmtree(self.root / "home" / ".cache" / "xtransfer" / "tokens", ignore_errors=True)
        (self.root / "home" / "log").unlink(missing_ok=True)


def start(root: Path, config: Path, interrupted: Interruption | None = None, *flags: str) -> tuple[int, dict[str, int]]:
    """Run the main command; return its exit status, and the number of operations of each stage."""
    workdir = root / "run"
    stages = {
        "records": [workdir],
        "tokenising": [root / "home" / ".cache" / "xtransfer" / "tokens"],
        "teacher": [workdir / "teacher"],
        "labelling": [workdir / "logits"],
        "students": [workdir / "students"],
        "evaluation": [workdir / "predictions", workdir / "results.jsonl", workdir / ".results.jsonl.tmp"],
        "report": [workdir / "report"],
    }
    arguments = ["--config", str(config), "--workdir", str(workdir), *FLAGS, *flags]
    return forked.run("xtransfer.main", arguments, stages, root / "home", interrupted)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Run an experiment without interruption."""
    root = tmp_path_factory.mktemp("killed")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    config = tiny.config_file(root / "tiny.py", data, teacher, student)
    forked.home(root)
    status, operations = start(root, config)
    workdir = root / "run"
    assert status == 0, forked.log(root / "home")
    assert operations.keys() == {*STAGES}
    expected, costs = contents.of(workdir, IGNORED), (workdir / "costs.jsonl").read_bytes()
    return Experiment(root, config, expected, costs, (workdir / "report" / "report.html").read_bytes(), operations)


@pytest.mark.parametrize("number", range(ROUNDS))
def test_an_experiment_killed_in_every_stage_ends_with_the_same_bits(experiment, number):
    experiment.clear()
    kills = Kills(f"experiment {number}", experiment.run, experiment.clear)
    for stage in STAGES:
        kills.kill(stage, experiment.operations[stage])
    check_same(experiment, kills.story)


def check_same(experiment: Experiment, story: str, ignored: Mapping[str, str] = MappingProxyType({})) -> None:
    """Let the command end, and compare everything that it leaves with the uninterrupted run, but `ignored` files."""
    status = experiment.run()
    assert status == 0, f"{story}\n{experiment.log}"
    expected = {name: content for name, content in experiment.expected.items() if name not in ignored}
    found = contents.differences(contents.of(experiment.workdir, {**IGNORED, **ignored}), expected)
    assert not found, "\n".join([story, *found, experiment.log])
    if ignored:
        return
    # With the costs of the uninterrupted run, the page is the same too.
    (experiment.workdir / "costs.jsonl").write_bytes(experiment.costs)
    report(Workdir(experiment.workdir))
    assert (experiment.workdir / "report" / "report.html").read_bytes() == experiment.page, story


def test_an_experiment_that_stalls_in_every_stage_prints_its_stacks_and_ends_with_the_same_bits(experiment):
    """The watchdog does not ask a stage: it ends the process wherever it is, and the next one resumes."""
    experiment.clear()
    for stage in STAGES:
        # Starts with the same flags are recorded once, so the last start has them too.
        status = experiment.run(Interruption(stage, 1, action="stall"), "--stall-timeout=3600")
        assert status == Exit.STALLED, experiment.log
        stacks = experiment.log.rpartition("error: no progress for 3600 s")[2]
        assert "in _stall" in stacks and "in hook" in stacks, (stage, stacks)
    starts = (experiment.workdir / "starts.jsonl").read_text()
    assert starts.count("\n") == 1 and "--stall-timeout=3600" in starts
    (experiment.workdir / "starts.jsonl").unlink()
    check_same(experiment, "stalled in every stage")


def test_an_experiment_preempted_in_every_stage_saves_it_and_ends_with_the_same_weights(experiment):
    """SIGTERM comes early in each stage. Then the step that it saves is gone at the end."""
    experiment.clear()
    for stage in STAGES:
        number = max(1, experiment.operations[stage] // 4)
        assert experiment.run(Interruption(stage, number, action="terminate")) == Exit.PREEMPTED, (
            stage,
            experiment.log,
        )
    assert experiment.log.count("stopping as soon as the work is saved") == 2  # teacher and student
    assert experiment.log.count("resuming from step") >= 2
    check_same(experiment, "preempted in every stage", ignored=LOSSES)
