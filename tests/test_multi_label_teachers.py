"""Teachers of multi-label tasks that are not trained here, and several of them, from end to end."""

import json

import numpy as np
import pytest

from tests.helpers import label_sets, tiny
from xtransfer import main
from xtransfer.config import load
from xtransfer.describe import __main__ as describe
from xtransfer.errors import UserError
from xtransfer.experiment import run
from xtransfer.export import __main__ as export
from xtransfer.predict import __main__ as predict

FAST = ("--config.student.steps=4", "--config.student.evaluations=1", "--config.teacher.evaluations=1")
FAST += ("--config.objectives=('monox_kd','monox_pl')",)
TRAINED = "--config.teacher.steps=6"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return label_sets.config_file(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def ordinary(config_file, tmp_path_factory):
    """Return the workdir of an experiment that trains its teacher."""
    workdir = tmp_path_factory.mktemp("ordinary") / "run"
    start(config_file, workdir, TRAINED)
    return workdir


@pytest.fixture(scope="module")
def exported(ordinary, tmp_path_factory):
    directory = tmp_path_factory.mktemp("exported") / "classifier"
    export.main(["--workdir", str(ordinary), "--objective", "teacher", "--output", str(directory)])
    return directory


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


def logits(workdir):
    """Return the stored logits by id, of the mean if there are several teachers."""
    directories = list((workdir / "logits").iterdir())
    (directory,) = [one for one in directories if (one / "disagreement.npy").exists()] or directories
    ids = (directory / "ids.txt").read_text().splitlines()
    return dict(zip(ids, np.load(directory / "shard-00000.npy"), strict=True))


def student_rows(workdir):
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    return [row for row in rows if row["objective"] != "teacher" and not row["metric"].startswith("teacher_")]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--config.teacher.logits_file={path}"


@pytest.mark.parametrize("kind", ["export", "run"])
def test_a_ready_made_teacher_teaches_like_the_one_that_was_trained(config_file, ordinary, exported, tmp_path, kind):
    source = exported if kind == "export" else ordinary / "teacher"
    start(config_file, tmp_path / "run", f"--config.teacher.checkpoint={source}", "--config.teacher.steps=0")
    assert json.loads((tmp_path / "run" / "teacher" / "metrics.jsonl").read_text())["digest"]
    expected, actual = logits(ordinary), logits(tmp_path / "run")
    assert expected.keys() == actual.keys() and len(expected) == label_sets.SIZES["train"]
    for name in expected:
        np.testing.assert_array_equal(expected[name], actual[name])
    assert student_rows(tmp_path / "run") == student_rows(ordinary) != []


def test_a_teacher_of_another_kind_of_task_is_refused(config_file, exported, tmp_path):
    one_label = tmp_path / "one_label"
    one_label.mkdir()
    tiny_data = tiny.write_task(tmp_path / "data")
    file = tiny.config_file(
        tmp_path / "tiny.py",
        tiny_data,
        tiny.checkpoint(tmp_path / "a", seed=1),
        tiny.checkpoint(tmp_path / "b", seed=2),
    )
    flags = ["--config.task.labels=('bad','good')", "--config.teacher.steps=2", "--config.teacher.pooling=cls"]
    run(load(str(file), [*FAST, *flags]), one_label)
    labels = f"--config.task.labels={label_sets.LABELS!r}"  # otherwise the teacher's classes are the task's
    asked = [*FAST, labels, f"--config.teacher.checkpoint={one_label / 'teacher'}", "--config.teacher.steps=0"]
    with pytest.raises(UserError, match=r"its classes are bad, good, the task's are books, music, positive"):
        run(load(str(config_file), asked), tmp_path / "run")
    config_json = exported / "config.json"
    description = json.loads(config_json.read_text())
    (tmp_path / "single").mkdir()
    for path in exported.iterdir():
        (tmp_path / "single" / path.name).write_bytes(path.read_bytes())
    del description["problem_type"]
    (tmp_path / "single" / "config.json").write_text(json.dumps(description))
    asked = [*FAST, f"--config.teacher.checkpoint={tmp_path / 'single'}", "--config.teacher.steps=0"]
    with pytest.raises(
        UserError, match=r"it was trained for one label per text, and the task has any number"
    ) as caught:
        run(load(str(config_file), asked), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "config.json").exists()


def test_probabilities_by_class_from_a_file_need_no_sum_and_lists_of_labels_are_sure(
    config_file, ordinary, exported, tmp_path, capsys
):
    texts, soft = tmp_path / "texts.jsonl", tmp_path / "soft.jsonl"
    describe.main(["--config", str(config_file), *FAST, "--transfer-set", str(texts)])
    predict.main(["--model", str(exported), "--input", str(texts), "--output", str(soft), "--max-length", "24"])
    flag = f"--config.teacher.logits_file={soft}"
    start(config_file, tmp_path / "run", flag, "--config.teacher.checkpoint=")
    expected, actual = logits(ordinary), logits(tmp_path / "run")
    for name in expected:
        np.testing.assert_allclose(actual[name], expected[name], atol=1e-3)
    capsys.readouterr()
    describe.main(["--config", str(config_file), *FAST, flag, "--config.teacher.checkpoint="])
    page = capsys.readouterr().out
    assert "nats, at most 2.079; as labelled: the share of labelled texts all of whose labels and no others" in page
    rows = [{"id": row["id"], "labels": row["labels"]} for row in map(json.loads, soft.read_text().splitlines())]
    start(config_file, tmp_path / "labels", write(tmp_path / "labels.jsonl", rows), "--config.teacher.checkpoint=")
    for row in rows:
        values = dict(zip(label_sets.LABELS, logits(tmp_path / "labels")[row["id"]], strict=True))
        assert {name for name, value in values.items() if value > 20} == set(row["labels"])
        assert all(abs(value) == pytest.approx(20.7233, abs=1e-3) for value in values.values())


def test_several_teachers_are_averaged_class_by_class(config_file, ordinary, exported, tmp_path):
    soft = tmp_path / "soft.jsonl"
    write(soft, [{"id": name, "probabilities": {"positive": 0.9, "music": 0.3}} for name in logits(ordinary)])
    file = tmp_path / "several.py"
    entries = {"sure": {"logits_file": str(soft), "weight": 3.0}}
    file.write_text(
        config_file.read_text().replace("    return config", f"    config.teachers = {entries!r}\n    return config")
    )
    flags = [f"--config.teacher.checkpoint={exported}", "--config.teacher.steps=0"]
    start(file, tmp_path / "run", *flags)
    first, actual = logits(ordinary), logits(tmp_path / "run")
    for name in first:
        expected = (1 / (1 + np.exp(-first[name].astype(np.float64))) + 3 * np.array([0, 0.3, 0.9])) / 4
        np.testing.assert_allclose(1 / (1 + np.exp(-actual[name].astype(np.float64))), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"fitted_thresholds is True, but thresholds are fitted to a single teacher"):
        load(str(file), [*FAST, *flags, "--config.transfer.fitted_thresholds=True"])
