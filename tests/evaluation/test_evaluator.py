"""The evaluator: which runs it scores, and whether its rows are complete."""

import json

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import config, experiment
from xtransfer.data.registry import load_task
from xtransfer.errors import UserError
from xtransfer.evaluation import evaluator
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.train.finetuning import Finetuner, Models


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return the workdir of a finished run with a teacher and a vanilla student."""
    root = tmp_path_factory.mktemp("evaluator")
    encoder = tiny.checkpoint(root / "encoder")
    file = tiny.config_file(root / "tiny.py", tiny.write_task(root / "data"), encoder, encoder, steps=4)
    flags = ["--config.objectives=('vanilla',)", "--config.teacher.steps=4"]
    experiment.run(config.load(str(file), flags), root / "run")
    return Workdir(root / "run")


def evaluate(workdir):
    """Score the runs as the evaluate command does."""
    settings = read_config(workdir)
    task = load_task(settings.task)
    return evaluator.evaluate(workdir, settings, task, Models(settings, task))


def test_rows_are_not_written_twice(workdir):
    before = workdir.results.read_bytes()
    rows = evaluate(workdir)
    assert workdir.results.read_bytes() == before
    assert [json.loads(line) for line in before.splitlines()] == rows


def test_an_unfinished_run_is_named_and_skipped(workdir, capsys):
    metrics = workdir.student("vanilla", 0) / "metrics.jsonl"
    original = metrics.read_text()
    try:
        metrics.write_text(original.splitlines(keepends=True)[0])
        workdir.results.unlink()
        rows = evaluate(workdir)
    finally:
        metrics.write_text(original)
    assert {row["objective"] for row in rows} == {"teacher"}
    assert "seed-0: not finished, skipped" in " ".join(capsys.readouterr().out.split())
    assert {row["objective"] for row in evaluate(workdir)} == {"teacher", "vanilla"}


def test_a_truncated_results_file_is_refused(workdir):
    original = workdir.results.read_bytes()
    try:
        workdir.results.write_bytes(original[:-10])
        with pytest.raises(UserError, match=r"results\.jsonl:\d+: the last line is cut off"):
            evaluate(workdir)
    finally:
        workdir.results.write_bytes(original)


def test_constant_predictions_are_one_line_at_the_end(workdir, capsys, monkeypatch):
    workdir.results.unlink()

    def always_first(self, params, dataset, on_batch=None):
        return np.eye(self.num_classes, dtype=np.float32)[np.zeros(len(dataset), int)]

    monkeypatch.setattr(Finetuner, "predict", always_first)
    evaluate(workdir)
    lines = [line for line in capsys.readouterr().out.splitlines() if "predict one class for every example" in line]
    (line,) = lines
    assert "teacher step" in line and "vanilla seed 0 step" in line and "on test de (bad)" in line
    workdir.results.unlink()
    monkeypatch.undo()
    evaluate(workdir)
