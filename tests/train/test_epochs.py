"""The length of training in epochs: the number of steps by hand, its limits, and an experiment that resumes."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import tiny
from xtransfer import config as configs
from xtransfer import experiment
from xtransfer.config import ModelConfig, parse
from xtransfer.errors import UserError
from xtransfer.runs import plan
from xtransfer.runs.find import find_run
from xtransfer.runs.workdir import Workdir
from xtransfer.train import metrics_log


@pytest.mark.parametrize(
    ("epochs", "examples", "batch_size", "steps"),
    [
        (3.0, 64, 32, 6),
        (3.0, 65, 32, 7),  # 195 examples in batches of 32: six hold 192
        (0.5, 64, 32, 1),
        (0.1, 3, 32, 1),
        (0.1, 30, 3, 1),  # exactly one batch, although 0.1 is a little more than a tenth
        (2.0, 1, 1, 2),
    ],
)
def test_the_number_of_steps_by_hand(epochs: float, examples: int, batch_size: int, steps: int) -> None:
    settings = ModelConfig(epochs=epochs, batch_size=batch_size).resolved(examples)
    assert (settings.steps, settings.epochs) == (steps, 0)


@given(st.integers(1, 50), st.integers(1, 10_000), st.integers(1, 512))
def test_the_batches_hold_all_passes_and_one_fewer_would_not(epochs: int, examples: int, batch_size: int) -> None:
    steps = ModelConfig(epochs=float(epochs), batch_size=batch_size).resolved(examples).steps
    assert (steps - 1) * batch_size < epochs * examples <= steps * batch_size


def test_without_epochs_nothing_changes() -> None:
    settings = ModelConfig(steps=7)
    assert settings.resolved(1_000) is settings and settings.known_steps == 7
    assert ModelConfig(epochs=1.0).known_steps is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 300, "epochs": 2}, r"student\.steps and student\.epochs are 300 and 2: both say how long"),
        ({"steps": 0}, r"student\.steps is 0: give a number of steps, or student\.epochs"),
        ({"epochs": -1.0}, r"student\.epochs is -1\.0: it must be between 0"),
        ({"epochs": math.inf}, r"student\.epochs is inf: it must be a finite number"),
        ({"epochs": 2, "average_last": 6}, r"student\.average_last is 6: there are only 5 checkpoints"),
    ],
)
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse({"student": settings})
    parse({"student": {"steps": 0, "epochs": 2}})
    parse({"student": {"epochs": 2}})


def test_limits_that_need_the_number_of_examples() -> None:
    with pytest.raises(UserError, match=r"student\.average_last is 3: there are only 2 checkpoints"):
        ModelConfig(epochs=1.0, average_last=3).resolved(64, "student.")
    with pytest.raises(UserError, match=r"student\.epochs is 1e\+09: that is more than 2,147,483,647 steps"):
        ModelConfig(epochs=1e9).resolved(100, "student.")


def test_two_flags_are_refused_even_with_the_default_value(tmp_path: Path) -> None:
    file = tmp_path / "c.py"
    file.write_text("from xtransfer import config\ndef get_config(arg=''):\n    return config.default()\n")
    with pytest.raises(UserError, match=r"--config\.student\.epochs=2 and --config\.student\.steps=1000: both say"):
        configs.load(str(file), ["--config.student.steps=1000", "--config.student.epochs=2"])
    configs.load(str(file), ["--config.student.steps=0", "--config.student.epochs=2"])
    configs.load(str(file), ["--config.student.steps=9", "--config.student.epochs=0"])
    configs.load(str(file), ["--config.teacher.steps=9", "--config.student.epochs=2"])


def test_the_plan_shows_steps_and_epochs() -> None:
    settings = ModelConfig(epochs=1.5)
    assert plan.length([14, 66], settings) == "14 to 66 steps of 32 examples (epochs: 1.5)"
    assert plan.length([1_400, 1_400], dataclasses.replace(settings, epochs=0.0)) == "1,400 steps of 32 examples"


def test_an_experiment_in_epochs_resumes_and_knows_when_it_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """40 labelled examples and 24 more, in batches of 8."""
    data = tiny.write_task(tmp_path / "data")
    teacher, student = tiny.checkpoint(tmp_path / "t", seed=1), tiny.checkpoint(tmp_path / "s", seed=2)
    file = tiny.config_file(tmp_path / "tiny.py", data, teacher, student, steps=0, epochs=2.0, evaluations=1)
    flags = ["--config.objectives=('vanilla','monox_kd')", "--config.teacher.steps=0", "--config.teacher.epochs=1"]
    settings = configs.load(str(file), [*flags, f"--config.task.cache_dir={tmp_path / 'cache'}"])
    experiment.run(settings, tmp_path / "w")
    output = " ".join(capsys.readouterr().out.split())
    assert "teacher 5 steps of 8 examples (epochs: 1)" in output
    assert "students 2 × 10 to 16 steps of 8 examples (epochs: 2)" in output
    assert "monox_kd seed-0: 16 steps of 8 examples, from 64 examples and student.epochs 2" in output
    workdir = Workdir(tmp_path / "w")
    runs = {workdir.teacher: 5, workdir.student("vanilla", 0): 10, workdir.student("monox_kd", 0): 16}
    for directory, steps in runs.items():
        last = metrics_log.read_metrics(directory)[-1]
        assert (last["step"], last[metrics_log.PLANNED_STEPS]) == (steps, steps)
    assert find_run(workdir, "monox_kd", 0, "source_dev").step == 16
    before = (tmp_path / "w" / "results.jsonl").read_bytes()
    experiment.run(settings, tmp_path / "w")
    assert (tmp_path / "w" / "results.jsonl").read_bytes() == before
    rows = metrics_log.read_metrics(workdir.teacher)
    (workdir.teacher / metrics_log.METRICS_FILE).write_text(json.dumps(rows[-1] | {"step": 4}) + "\n")
    assert not metrics_log.finished(workdir.teacher, None)
