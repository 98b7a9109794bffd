"""Scoring checkpoints by step, next to a process that saves and deletes them."""

import dataclasses
import json
import os
import shutil
import time

import pytest

from tests.helpers import tiny_run
from tests.helpers.forkserver import Process
from xtransfer.data.registry import load_task
from xtransfer.evaluation import evaluator, metrics
from xtransfer.evaluation.steps import Landed, Scored, Skipped, StepScorer
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.runtime import checksums
from xtransfer.train.finetuning import Models

STEPS = range(1, 9)
# Saves a checkpoint again and again, as training does: first its row, then the checkpoint. The first one is the best,
# so every other one is deleted when the next is saved.
TRAINER = f"""
import sys
from pathlib import Path
from tests.helpers import tiny_run
from xtransfer.config import ModelConfig
directory = Path(sys.argv[1])
model = ModelConfig(checkpoint=sys.argv[2])
base, mesh = tiny_run.hf_checkpoint.resolve(model.checkpoint), tiny_run.sharding.make_mesh()
with tiny_run.Checkpoints(directory / "checkpoints") as checkpoints:
    for step in range({STEPS.start}, {STEPS.stop}):
        _, params = tiny_run.hf_checkpoint.load_classifier(base, 2, seed=step, mesh=mesh)
        counter = {{"count": tiny_run.jnp.asarray(step, tiny_run.jnp.int32)}}
        row = {{"step": step, "loss": 0.5, "dev_accuracy": 1 / step}}
        tiny_run.storage.append_jsonl(directory / "metrics.jsonl", row)
        checkpoints.save(tiny_run.state.TrainState(tiny_run.np.int32(step), params, counter), score=1 / step)
"""


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Return a workdir with a teacher and a vanilla student, its config with log loss, its task, and its models."""
    root = tmp_path_factory.mktemp("steps")
    workdir = tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")
    config = dataclasses.replace(read_config(workdir), metrics=("accuracy", "log_loss"))
    task = load_task(config.task)
    return workdir, config, task, Models(config, task)


@pytest.fixture
def copy(experiment, tmp_path):
    """Return a copy of the experiment that a test may change."""
    workdir, *others = experiment
    return Workdir(shutil.copytree(workdir.root, tmp_path / "run")), *others


def runs(workdir, config):
    return evaluator.runs(workdir, config)


def written(workdir):
    return [checksums.unsigned(json.loads(line)) for line in workdir.by_step.read_text().splitlines()]


def test_every_checkpoint_is_scored_once_on_dev_and_on_every_language(copy):
    workdir, config, task, models = copy
    scorer = StepScorer(workdir, config, task, models)
    results = list(scorer.score(runs(workdir, config)))
    assert [(result.run.objective, result.step) for result in results] == [
        (objective, step) for objective in ("teacher", "vanilla") for step in (2, 6)
    ]
    places = [(row["split"], row["language"]) for row in results[-1].rows if row["metric"] == "log_loss"]
    assert places == [("dev", "en"), ("test", "en"), ("test", "de")]
    assert {row["language"] for row in results[0].rows} == {"en"} and results[0].rows[0]["selection"] == "step"
    assert written(workdir) == [row for result in results for row in result.rows] == scorer.rows
    assert list(scorer.score(runs(workdir, config))) == []
    again = StepScorer(workdir, config, task, models)
    assert list(again.score(runs(workdir, config))) == [] and again.rows_of(runs(workdir, config)) == scorer.rows


def test_a_damaged_row_is_left_out_and_its_checkpoint_is_scored_again(copy, caplog):
    workdir, config, task, models = copy
    list(StepScorer(workdir, config, task, models).score(runs(workdir, config)))
    rows = written(workdir)
    workdir.by_step.write_bytes(workdir.by_step.read_bytes().replace(b'"task"', b'"tasj"', 1))
    again = StepScorer(workdir, config, task, models)
    assert again.rows == rows[1:] and "watch.jsonl:1: " in caplog.text
    (scored,) = again.score(runs(workdir, config))
    assert (scored.run.objective, scored.step) == (rows[0]["objective"], rows[0]["step"])
    assert written(workdir) == [*rows[1:], rows[0]]


def test_the_values_are_those_of_the_final_evaluation(copy):
    workdir, config, task, models = copy
    list(StepScorer(workdir, config, task, models).score(runs(workdir, config)))
    final = [
        row
        for row in evaluator.evaluate(workdir, config, task, models)
        if row["selection"] == "last" and row["metric"] != "teacher_agreement"
    ]
    by_step = [row for row in written(workdir) if row["step"] == 6 and row["split"] == "test"]
    assert [row | {"selection": "last"} for row in by_step] == final and len(final) == 3 * 3


def test_other_metrics_languages_and_splits_score_a_checkpoint_again_and_keep_its_rows(copy):
    workdir, config, task, models = copy
    run, accuracy = runs(workdir, config)[1], dataclasses.replace(config, metrics=("accuracy",))
    list(StepScorer(workdir, accuracy, task, models).score([run]))
    before = written(workdir)
    scorer = StepScorer(workdir, config, task, models)
    assert [result.step for result in scorer.score([run])] == [2, 6]
    after = written(workdir)
    assert after[: len(before)] == before and scorer.rows == after
    added = [(row["step"], row["metric"]) for row in after[len(before) :]]
    assert added == [(step, "log_loss") for step in (2, 6) for _ in range(3)]
    keys = [(row["step"], row["split"], row["language"], row["metric"]) for row in after]
    assert len(set(keys)) == len(keys)
    assert list(StepScorer(workdir, accuracy, task, models).score([run])) == [], "it has these and more"
    german_dev = dataclasses.replace(config, evaluation_splits=("dev",))
    list(StepScorer(workdir, german_dev, task, models, ("de",)).score([run]))
    assert {(row["split"], row["language"]) for row in written(workdir)[len(after) :]} == {("dev", "de")}


def test_a_deleted_checkpoint_without_the_new_metric_is_reported(copy):
    workdir, config, task, models = copy
    run, accuracy = runs(workdir, config)[1], dataclasses.replace(config, metrics=("accuracy",))
    list(StepScorer(workdir, accuracy, task, models).score([run]))
    shutil.rmtree(run.directory / "checkpoints" / "2")
    results = list(StepScorer(workdir, config, task, models).score([run]))
    assert results[0] == Skipped(run, 2, "deleted before it could be scored in full")
    assert [result.step for result in results[1:]] == [6]


def test_a_checkpoint_that_is_being_saved_is_left_for_later(copy):
    workdir, config, task, models = copy
    student = runs(workdir, config)[1]
    with (student.directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 0.5, "dev_accuracy": 0.5}\n{"step": 12, "loss"')
    os.rename(student.directory / "checkpoints" / "6", student.directory / "checkpoints" / "6.orbax-checkpoint-tmp")
    scorer = StepScorer(workdir, config, task, models)
    assert scorer.look(student) == Landed(steps=(2,), deleted=())
    os.rename(student.directory / "checkpoints" / "6.orbax-checkpoint-tmp", student.directory / "checkpoints" / "6")
    assert scorer.look(student).steps == (2, 6)


def test_a_damaged_checkpoint_is_skipped_at_the_end_only(copy):
    workdir, config, task, models = copy
    student = runs(workdir, config)[1]
    manifest = student.directory / "checkpoints" / "2" / "params" / "manifest.ocdbt"
    manifest.rename(workdir.root / "moved")
    scorer = StepScorer(workdir, config, task, models)
    assert [result.step for result in scorer.score([student])] == [6]
    assert list(scorer.score([student])) == []
    (skipped,) = scorer.score([student], last=True)
    assert (skipped.step, skipped.damaged) == (2, True)
    assert skipped.reason == "is damaged: params/manifest.ocdbt is missing"
    assert list(scorer.score([student], last=True)) == []
    scorer = StepScorer(workdir, config, task, models)
    assert list(scorer.score([student])) == []
    (workdir.root / "moved").rename(manifest)  # a file that a network file system showed late
    assert [result.step for result in scorer.score([student])] == [2]


def test_deletions_never_disturb_a_slow_evaluator(copy, monkeypatch):
    """Race a process that keeps two of its checkpoints, and delay every link, so that deletions fall in between."""
    workdir, config, task, models = copy
    student = runs(workdir, config)[1]
    shutil.rmtree(student.directory)
    link = os.link

    def slow_link(source, target):
        time.sleep(0.004)
        link(source, target)

    monkeypatch.setattr(os, "link", slow_link)
    command = ["-c", TRAINER, str(student.directory), config.student.checkpoint]
    log = workdir.root.with_name("trainer.log")
    trainer = Process(command, log)
    scorer, results = StepScorer(workdir, config, task, models), []
    try:
        while True:
            ended = trainer.poll() is not None
            new = list(scorer.score([student], last=ended))
            results += new
            if ended and not new:
                break
    finally:
        trainer.kill()
        trainer.wait()
    assert trainer.poll() == 0, log.read_text()
    scored = {result.step for result in results if isinstance(result, Scored)}
    skipped = {result.step for result in results if isinstance(result, Skipped)}
    assert len(results) == len(STEPS) and scored | skipped == set(STEPS)
    assert {STEPS[0], STEPS[-1]} <= scored and not any(r.damaged for r in results if isinstance(r, Skipped))
    assert not list(workdir.snapshots.iterdir())
    test, model = task.load("test", "de"), models.student
    for step in scored:
        base = hf_checkpoint.resolve(config.student.checkpoint)
        _, params = hf_checkpoint.load_classifier(base, 2, seed=step, mesh=models.mesh)
        logits = model.predict(params, model.dataset(test))
        expected = metrics.score(logits, [example.label for example in test], task.labels, "log_loss")
        values = [
            row["value"]
            for row in written(workdir)
            if (row["step"], row["language"], row["metric"]) == (step, "de", "log_loss")
        ]
        assert values == [expected]
