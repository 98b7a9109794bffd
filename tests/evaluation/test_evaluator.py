"""The evaluator: which runs it scores, and whether its rows are complete."""

import dataclasses
import json

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import config, experiment
from xtransfer.data.registry import load_task
from xtransfer.errors import UserError
from xtransfer.evaluation import evaluator
from xtransfer.evaluation.paired import Students, load
from xtransfer.evaluation.results import read_rows
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.runtime import checksums
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


def evaluate(workdir, **changes):
    """Score the runs as the evaluate command does, with changes to the config."""
    settings = dataclasses.replace(read_config(workdir), **changes)
    task = load_task(settings.task)
    return evaluator.evaluate(workdir, settings, task, Models(settings, task))


def test_rows_are_not_written_twice(workdir):
    before = workdir.results.read_bytes()
    rows = evaluate(workdir)
    assert workdir.results.read_bytes() == before
    assert [json.loads(line) for line in before.splitlines()] == [checksums.signed(row) for row in rows]


def agreement(rows):
    return {
        (row["objective"], row["selection"], row["language"]): (row["value"], row["count"])
        for row in rows
        if row["metric"] == "teacher_agreement"
    }


def test_agreement_compares_a_student_with_the_selected_checkpoint_of_its_teacher(workdir):
    rows = evaluate(workdir)
    steps = {(row["objective"], row["selection"]): row["step"] for row in rows}

    def predicted(run, step):
        path = workdir.predictions(run, step, "test", "en")
        return [json.loads(line)["prediction"] for line in path.read_text().splitlines()]

    teacher = predicted(workdir.teacher, steps["teacher", "source_dev"])
    expected = {}
    for protocol in ("source_dev", "last"):
        student = predicted(workdir.student("vanilla", 0), steps["vanilla", protocol])
        equal = sum(a == b for a, b in zip(student, teacher, strict=True))
        expected["vanilla", protocol, "en"] = (equal / 17, 17)
    assert agreement(rows) == expected


def test_an_older_workdir_gets_the_agreement_without_predicting_again(workdir, monkeypatch):
    before, rows = workdir.results.read_bytes(), evaluate(workdir)
    older = [line for line in before.splitlines(keepends=True) if b"teacher_agreement" not in line]
    workdir.results.write_bytes(b"".join(older))
    monkeypatch.setattr(Finetuner, "predict", lambda *arguments: pytest.fail("predicted again"))
    try:
        again = evaluate(workdir)
        assert agreement(again) == agreement(rows) and workdir.results.read_bytes().startswith(b"".join(older))
    finally:
        workdir.results.write_bytes(before)


def test_only_the_requested_languages_are_scored(workdir):
    before = workdir.results.read_bytes()
    try:
        settings = dataclasses.replace(read_config(workdir), evaluation_splits=("dev",))
        task = load_task(settings.task)
        rows = evaluator.evaluate(workdir, settings, task, Models(settings, task), ("de",))
        added = rows[before.count(b"\n") :]
        assert {(row["objective"], row["split"], row["language"]) for row in added} == {("vanilla", "dev", "de")}
    finally:
        workdir.results.write_bytes(before)


def test_an_unfinished_run_is_left_out(workdir, capsys):
    metrics = workdir.student("vanilla", 0) / "metrics.jsonl"
    original = metrics.read_text()
    try:
        metrics.write_text(original.splitlines(keepends=True)[0])
        workdir.results.unlink()
        rows, unfinished = evaluate(workdir), evaluator.unfinished(workdir, read_config(workdir))
    finally:
        metrics.write_text(original)
    assert {row["objective"] for row in rows} == {"teacher"}
    assert [run.name for run in unfinished] == ["vanilla seed 0"] and "finished" not in capsys.readouterr().out
    assert {row["objective"] for row in evaluate(workdir)} == {"teacher", "vanilla"}


DAMAGE = {
    "another value": lambda lines: [lines[0].replace(b'"value": 0.', b'"value": 0.1', 1), *lines[1:]],
    "another selection": lambda lines: b"".join(lines).replace(b'"last"', b'"lasu"', 1).splitlines(keepends=True),
    "cut off": lambda lines: [*lines[:-1], lines[-1][:-10]],
    "no row": lambda lines: [b"\xff\n", *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_row_is_scored_again_and_alone(workdir, caplog, monkeypatch, damage):
    original = workdir.results.read_bytes()
    lines, scored, predict = original.splitlines(keepends=True), [], Finetuner.predict

    def counted(self, params, dataset, on_batch=None):
        scored.append(dataset)
        return predict(self, params, dataset, on_batch)

    monkeypatch.setattr(Finetuner, "predict", counted)
    workdir.results.write_bytes(b"".join(DAMAGE[damage](lines)))
    with pytest.raises(UserError, match=r"results\.jsonl:\d+: .*: run python -m xtransfer.evaluate, which drops"):
        read_rows(workdir.results)
    evaluate(workdir)
    assert sorted(workdir.results.read_bytes().splitlines(keepends=True)) == sorted(lines)
    assert len(scored) == 1 and "so this row is left out" in caplog.text
    evaluate(workdir)
    assert len(scored) == 1


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


def test_more_metrics_are_added_to_the_rows_that_exist(workdir):
    before = workdir.results.read_bytes()
    try:
        names = ("accuracy", "macro_f1", "log_loss", "class_f1", "auroc")
        rows = evaluate(workdir, metrics=names)
        after = workdir.results.read_bytes()
        assert after.startswith(before)
        assert [row["metric"] for row in rows[: before.count(b"\n")]].count("log_loss") == 0
        for protocol in ("source_dev", "last"):
            scored = [
                row["metric"]
                for row in rows
                if (row["objective"], row["selection"], row["language"]) == ("vanilla", protocol, "de")
            ]
            new = ["log_loss", "class_f1/bad", "class_f1/good", "auroc"]
            assert scored == ["accuracy", "macro_f1", "majority_share", *new]
        assert evaluate(workdir, metrics=names) == rows and workdir.results.read_bytes() == after
    finally:
        workdir.results.write_bytes(before)


def test_the_score_on_dev_is_larger_for_the_better_checkpoint():
    labels = np.array([0, 1])
    assert evaluator.dev_scores(np.eye(2), labels, ("a", "b"), "accuracy") == {"dev_accuracy": 1}
    sure, unsure = (evaluator.dev_scores(x * np.eye(2), labels, ("a", "b"), "log_loss") for x in (9.0, 1.0))
    # −log of e/(e + 1)
    assert unsure == {
        "dev_accuracy": 1,
        "dev_log_loss": pytest.approx(np.log1p(np.exp(-1))),
        "dev_score": pytest.approx(-np.log1p(np.exp(-1))),
    }
    assert sure["dev_score"] > unsure["dev_score"]
    row = evaluator.dev_scores(np.eye(2), labels, ("a", "b"), "class_f1/b")
    assert row == {"dev_accuracy": 1, "dev_class_f1/b": 1, "dev_score": 1}


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_predictions_are_written_again_and_the_rows_stay(workdir, caplog, damage):
    rows, step = workdir.results.read_bytes(), max(row["step"] for row in evaluate(workdir))
    path = workdir.predictions(workdir.student("vanilla", 0), step, "test", "de")
    content, times = path.read_bytes(), {p: p.stat().st_mtime_ns for p in workdir.root.glob("predictions/**/*.jsonl")}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content.replace(b'"good"', b'"gooe"', 1))
        other = Students(workdir, "vanilla")
        with pytest.raises(UserError) as caught:
            load(other, other, split="test", selection="last")
        assert str(caught.value) == (
            f"{path} is damaged: test-de.jsonl has other bytes than were written: "
            f"run python -m xtransfer.evaluate --workdir {workdir.root} to write it again"
        )
    caplog.clear()
    evaluate(workdir)
    assert path.read_bytes() == content and workdir.results.read_bytes() == rows
    assert caplog.text.count(f"{path} is damaged, so predicting again: ") == (damage == "flipped")
    assert {p for p, time in times.items() if p.stat().st_mtime_ns != time} == {path}
