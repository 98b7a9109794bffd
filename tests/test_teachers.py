"""Teachers of every kind, from end to end on tiny files: what they need, and that they teach like one trained here."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import ExperimentConfig, ModelConfig, load
from xtransfer.describe import __main__ as describe
from xtransfer.distillation import teachers
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.evaluation.metrics import TEACHER_METRICS
from xtransfer.experiment import run
from xtransfer.export import __main__ as export
from xtransfer.predict import __main__ as predict
from xtransfer.report import __main__ as report
from xtransfer.report.agreement import report_agreement
from xtransfer.runs.costs import read_costs
from xtransfer.runs.workdir import Workdir, read_task
from xtransfer.train.checkpoints import Checkpoints

FAST = ("--config.student.steps=4", "--config.student.evaluations=2", "--config.objectives=('monox_kd','monox_pl')")
FAST += ("--config.task.labelled=24",)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config file, its data, and two different checkpoints. Return the config file."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    # Pool as transformers does, so that an export needs no mark.
    path = tiny.config_file(root / "tiny.py", data, teacher, student)
    path.write_text(
        path.read_text().replace("    return config", "    config.teacher.pooling = 'cls'\n    return config")
    )
    return path


@pytest.fixture(scope="module")
def ordinary(config_file, tmp_path_factory):
    """Return the workdir of an experiment that trains its teacher."""
    workdir = tmp_path_factory.mktemp("ordinary") / "run"
    start(config_file, workdir, "--config.teacher.steps=12")
    return workdir


@pytest.fixture(scope="module")
def exported(ordinary, tmp_path_factory):
    """Return the teacher of that experiment as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("exported") / "classifier"
    export.main(["--workdir", str(ordinary), "--objective", "teacher", "--output", str(directory)])
    return directory


@pytest.fixture
def unlabelled_config(config_file, tmp_path):
    """Return a config file whose source language has no labelled text but test."""
    data = shutil.copytree(Path(load(str(config_file)).task.data_dir), tmp_path / "data")
    texts = [line.partition("\t")[0] for line in (data / "en" / "train.tsv").read_text().splitlines()[1:]]
    (data / "en" / "unlabelled.tsv").write_text("\n".join(["text", *texts]) + "\n")
    for split in ("train", "dev"):
        (data / "en" / f"{split}.tsv").unlink()
    path = tmp_path / "unlabelled.py"
    text = config_file.read_text().replace(str(load(str(config_file)).task.data_dir), str(data))
    path.write_text(text.replace("40, 'train_rest'", "0, 'split'"))
    return path


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


def ready_made(directory):
    return f"--config.teacher.checkpoint={directory}", "--config.teacher.steps=0"


def weights(workdir, objective):
    with Checkpoints(workdir / "students" / objective / "seed-0" / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_arrays(checkpoints.steps()[-1])


def logits(workdir):
    (directory,) = (workdir / "logits").iterdir()
    return (directory / "ids.txt").read_text().splitlines(), np.load(directory / "shard-00000.npy")


def assert_same_students(first, second):
    for objective in ("monox_kd", "monox_pl"):
        expected, actual = weights(first, objective), weights(second, objective)
        assert expected.keys() == actual.keys() and len(expected) > 10
        for name in expected:
            np.testing.assert_array_equal(expected[name], actual[name], err_msg=name)
    # A file is no model that students could agree with.
    left_out = () if (second / "teacher").exists() else TEACHER_METRICS
    students = [
        [row for row in tiny.rows_of(workdir) if row["objective"] != "teacher" and row["metric"] not in left_out]
        for workdir in (first, second)
    ]
    assert students[0] == students[1] and students[0]


@pytest.mark.parametrize("kind", ["export", "run"])
def test_a_ready_made_teacher_teaches_like_the_one_that_was_trained(
    config_file, ordinary, exported, tmp_path, capsys, kind
):
    source = exported if kind == "export" else ordinary / "teacher"
    start(config_file, tmp_path / "run", *ready_made(source))
    np.testing.assert_array_equal(logits(tmp_path / "run")[1], logits(ordinary)[1])
    assert_same_students(ordinary, tmp_path / "run")
    scores = [
        {
            row["value"]
            for row in tiny.rows_of(workdir)
            if row["objective"] == "teacher" and row["selection"] == "source_dev"
        }
        for workdir in (ordinary, tmp_path / "run")
    ]
    assert scores[0] == scores[1]
    assert {row["step"] for row in tiny.rows_of(tmp_path / "run") if row["objective"] == "teacher"} == {0}
    origin = f"The teacher is ready-made and was not trained here: {source}."
    assert origin in " ".join(capsys.readouterr().out.split())
    assert origin in (tmp_path / "run" / "report" / "results.md").read_text()
    assert origin in (tmp_path / "run" / "report" / "report.html").read_text()


def test_a_ready_made_teacher_may_move_once_it_was_taken_over(config_file, exported, tmp_path):
    moved = shutil.copytree(exported, tmp_path / "classifier")
    flags = ready_made(moved)
    start(config_file, tmp_path / "run", *flags)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    shutil.rmtree(moved)
    start(config_file, tmp_path / "run", *flags)
    (tmp_path / "run" / "results.jsonl").unlink()
    evaluate.main(["--workdir", str(tmp_path / "run")])
    assert sorted(before.splitlines()) == sorted((tmp_path / "run" / "results.jsonl").read_bytes().splitlines())


def test_without_labels_the_classes_come_from_the_teacher_and_the_last_step_is_used(
    unlabelled_config, exported, tmp_path, capsys
):
    start(unlabelled_config, tmp_path / "run", *ready_made(exported), "--config.task.labelled=0")
    task = read_task(Workdir(tmp_path / "run"))
    assert task.labels == ("bad", "good") and not task.has_dev and not task.has_train
    assert "no dev split in en: no checkpoint is selected, and the last one is used" in capsys.readouterr().out
    steps = {(row["objective"], row["selection"]): row["step"] for row in tiny.rows_of(tmp_path / "run")}
    assert steps["monox_kd", "source_dev"] == steps["monox_pl", "last"] == 4
    assert "last checkpoint (last)" in (tmp_path / "run" / "report" / "results.md").read_text()
    report.main(["--workdir", str(tmp_path / "run"), "--compare", "monox_kd", "monox_pl"])
    compared = (tmp_path / "run" / "report" / "compare-monox_kd-monox_pl.md").read_text()
    assert "checkpoint: last checkpoint." in compared and "dev" not in compared
    start(unlabelled_config, tmp_path / "run", *ready_made(exported), "--config.task.labelled=0")  # finished
    output = tmp_path / "student"
    arguments = ["--workdir", str(tmp_path / "run"), "--objective", "monox_kd", "--seed", "0", "--output", str(output)]
    export.main(arguments)
    card = (output / "README.md").read_text()
    assert "the last checkpoint (`last`)" in card and "no labelled en texts" in card
    assert "a classifier that was trained before this experiment" in card


def test_a_task_without_labels_is_described_before_training(unlabelled_config, ordinary, capsys):
    flags = [*ready_made(ordinary / "teacher"), "--config.task.labelled=0", "--config.objectives=('monox_kd',)"]
    describe.main(["--config", str(unlabelled_config), *flags])
    page = capsys.readouterr().out
    assert "training text: 0 labelled and 64 unlabelled (U: split) examples in en; no dev split: the last step" in page
    assert "| teacher | en | U | 64 |" in page and "| teacher | L |" not in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.objectives=('vanilla','monox_kd','self_training')"],
            r"objectives: vanilla and self_training need labelled en text, and there is none \(no train split\)",
        ),
        (["--config.student.patience=2"], r"student\.patience needs a dev split in en, and there is none"),
        (["--config.calibration.temperature=True"], r"calibration\.temperature needs a dev split"),
        (["--config.selection_metric=macro_f1"], r"selection_metric needs a dev split"),
        (["--config.oracle=True"], r"oracle needs a dev split"),
        (["--config.teacher.steps=4"], r"en/train\.tsv: no such file; task\.path expects split 'train' of 'en' there"),
        (["--config.task.unlabelled_from=none"], r"no text to learn from in en: .* add some unlabelled text"),
        (["--config.task.labels=('bad','good','soso')"], r"its classes are bad, good, the task's are bad, good, soso"),
        (["--config.teacher.pooling=mean"], r"teacher\.pooling is 'mean', but .* was trained with 'cls': set"),
        (["--config.teacher.average_last=1"], r"teacher\.average_last is 1: there are only 0 checkpoints"),
        (["--config.teacher.patience=1"], r"teacher\.patience is 1, but this teacher is not trained here"),
        (["--config.teacher_seeds=(0,1)"], r"teacher_seeds is \(0, 1\), but the teacher is not trained here"),
    ],
)
def test_what_makes_no_sense_without_labels_is_refused(unlabelled_config, exported, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        settings = load(str(unlabelled_config), [*FAST, *ready_made(exported), "--config.task.labelled=0", *flags])
        run(settings, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_further_student_has_no_patience_without_dev():
    config = ExperimentConfig(students={"small": ModelConfig(patience=1)})
    with pytest.raises(UserError, match=r"students\.small\.patience needs a dev split in en, and there is none"):
        teachers.refuse_without_dev(config, "en")


def test_an_encoder_without_a_trained_head_is_no_ready_made_teacher(config_file, tmp_path):
    with pytest.raises(UserError, match="have no trained classification head"):
        run(load(str(config_file), [*FAST, "--config.teacher.steps=0"]), tmp_path / "run")
    with pytest.raises(UserError, match="have no trained classification head"):
        run(
            load(str(config_file), [*FAST, "--config.teacher.steps=0", "--config.task.labels=('bad','good')"]), tmp_path
        )


def test_a_run_that_pools_in_another_way_is_refused(config_file, ordinary, tmp_path):
    flags = [*FAST, *ready_made(ordinary / "teacher"), "--config.teacher.pooling=mean"]
    with pytest.raises(UserError, match=r"teacher\.pooling is 'mean', but .* was trained with 'cls': set --config"):
        run(load(str(config_file), flags), tmp_path / "run")


def test_the_classes_of_a_run_are_permuted_by_name(config_file, ordinary, tmp_path):
    flags = [*ready_made(ordinary / "teacher"), "--config.task.labels=('good','bad')"]
    start(config_file, tmp_path / "run", *flags)
    by_id, permuted = (dict(zip(*logits(workdir), strict=True)) for workdir in (ordinary, tmp_path / "run"))
    shared = by_id.keys() & permuted.keys()  # the sample depends on the order of the classes
    assert len(shared) > 40
    for name in shared:
        np.testing.assert_array_equal(permuted[name], by_id[name][::-1])


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"--config.teacher.logits_file={path}"


def file_of(workdir, path, *others):
    """Write the stored logits of a teacher as a file, in another order and with further rows; return the flag."""
    ids, values = logits(workdir)
    rows = [{"id": id_, "logits": row.tolist()} for id_, row in zip(ids, values, strict=True)]
    return write_rows(path, [*reversed(rows), *others])


def test_a_file_of_a_teachers_logits_teaches_like_the_teacher(config_file, ordinary, tmp_path, capsys):
    flag = file_of(ordinary, tmp_path / "soft.jsonl", {"id": "other", "logits": [0, 1]})
    start(config_file, tmp_path / "run", flag, "--config.teacher.checkpoint=")
    assert_same_students(ordinary, tmp_path / "run")
    ids, values = logits(tmp_path / "run")
    assert ids == logits(ordinary)[0]
    np.testing.assert_array_equal(values, logits(ordinary)[1])
    assert not (tmp_path / "run" / "teacher").exists() and "teacher" not in {
        row["objective"] for row in tiny.rows_of(tmp_path / "run")
    }
    output = " ".join(capsys.readouterr().out.split())
    assert f"soft.jsonl: 1 of {len(ids) + 1} rows belong to no example, and are not used" in output
    assert f"The teacher's logits come from a file: {tmp_path}/soft.jsonl." in output
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    (tmp_path / "run" / "results.jsonl").unlink()
    (tmp_path / "soft.jsonl").rename(tmp_path / "away.jsonl")
    evaluate.main(["--workdir", str(tmp_path / "run")])  # needs no file
    assert sorted((tmp_path / "run" / "results.jsonl").read_bytes().splitlines()) == sorted(before.splitlines())
    with pytest.raises(UserError, match="no teacher to agree with, because its logits come from a file"):
        report_agreement(Workdir(tmp_path / "run"), metric="teacher_agreement", split=None, selection=None)
    with pytest.raises(UserError, match="there is no teacher here, because its logits come from a file"):
        arguments = ["--workdir", str(tmp_path / "run"), "--objective", "teacher", "--output", str(tmp_path / "out")]
        export.main(arguments)
    flag = file_of(ordinary, tmp_path / "soft.jsonl")
    with pytest.raises(UserError, match=r"made with other settings or data \(teacher_logits: "):
        run(load(str(config_file), [*FAST, flag, "--config.teacher.checkpoint="]), tmp_path / "run")


def test_text_without_labels_is_labelled_by_predict_and_taught_from_the_file(unlabelled_config, exported, tmp_path):
    flags = ("--config.task.labelled=0", "--config.task.labels=('bad','good')", "--config.teacher.checkpoint=")
    flag = f"--config.teacher.logits_file={tmp_path / 'soft.jsonl'}"
    texts = tmp_path / "texts.jsonl"
    describe.main(["--config", str(unlabelled_config), *FAST, *flags, flag, "--transfer-set", str(texts)])
    first = json.loads(texts.read_text().splitlines()[0])
    assert first.keys() == {"id", "language", "text"} and first["id"] == "files/unlabelled/en/0"
    arguments = ["--model", str(exported), "--input", str(texts), "--output", str(tmp_path / "soft.jsonl")]
    predict.main(arguments)
    start(unlabelled_config, tmp_path / "run", *flags, flag)
    ids, values = logits(tmp_path / "run")
    assert len(ids) == 64
    opinions = {row["id"]: row for row in map(json.loads, (tmp_path / "soft.jsonl").read_text().splitlines())}
    for id_, row in zip(ids, np.exp(values), strict=True):
        np.testing.assert_allclose(row, list(opinions[id_]["probabilities"].values()), atol=1e-5)


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (None, [], r"teacher\.logits_file .*soft\.jsonl: no such file"),
        ([{"id": "files/train/en/0", "label": "bad"}], [], r"soft\.jsonl: no row for 63 of 64 examples"),
        ([{"id": "files/train/en/0", "label": "great"}], [], r"soft\.jsonl:1: label 'great' is not one of bad, good"),
        ([], ["--config.teacher_seeds=(0,1)"], r"teacher_seeds is \(0, 1\), but the teacher is not trained here"),
        ([], ["--config.teacher.average_last=1"], r"teacher\.average_last is 1, but this teacher is not trained here"),
    ],
)
def test_a_file_of_logits_is_checked_before_anything_is_trained(config_file, tmp_path, content, flags, message):
    flag = write_rows(tmp_path / "soft.jsonl", content or [])
    if content is None:
        (tmp_path / "soft.jsonl").unlink()
    with pytest.raises(UserError, match=message) as caught:
        run(load(str(config_file), [*FAST, flag, "--config.teacher.checkpoint=", *flags]), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_sweep_over_files_shares_what_does_not_read_them(config_file, ordinary, tmp_path):
    ids = logits(ordinary)[0]
    files = [tmp_path / f"{name}.jsonl" for name in ("one", "two")]
    for path, label in zip(files, ("bad", "good"), strict=True):
        write_rows(path, [{"id": id_, "label": label} for id_ in ids])
    flags = ("--config.teacher.checkpoint=", "--config.objectives=('vanilla','monox_kd')")
    start(config_file, tmp_path / "sweep", *flags, "--sweep", f"teacher.logits_file={files[0]},{files[1]}")
    points = [point["name"] for point in json.loads((tmp_path / "sweep" / "sweep.json").read_text())["points"]]
    first, second = (Workdir(tmp_path / "sweep" / "points" / name) for name in points)
    assert {cost.run for cost in read_costs(second) if cost.stage == "students"} == {"students/monox_kd/seed-0"}
    assert any(
        (weights(first.root, "monox_kd")[k] != weights(second.root, "monox_kd")[k]).any() for k in ("head.bias",)
    )
    assert "monox_kd" in (tmp_path / "sweep" / "report" / "sweep.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config.objectives=('mix',)", "--config.objective.mix.base=monox_pl"]
            + ["--config.objective.mix.class_weights=('balanced',)"],
            r"objective 'mix': class_weights \('balanced',\) need labelled en text, and there is none",
        ),
        (
            ["--config.objectives=('monox_kd','gold')", "--config.objective.gold.base=vanilla"],
            r"objectives: gold needs labelled en text, and there is none",
        ),
        (["--config.transfer.fitted_thresholds=True"], r"fitted_thresholds is True, but only a multi-label task"),
    ],
)
def test_objectives_of_your_own_that_need_labels_are_refused_without_them(
    unlabelled_config, exported, tmp_path, flags, message
):
    with pytest.raises(UserError, match=message) as caught:
        settings = load(str(unlabelled_config), [*FAST, *ready_made(exported), "--config.task.labelled=0", *flags])
        run(settings, tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run" / "config.json").exists()


def test_an_objective_of_your_own_learns_from_a_ready_made_teacher_without_labels(
    unlabelled_config, exported, tmp_path
):
    flags = [
        "--config.objectives=('mix',)",
        "--config.objective.mix.base=monox_pl",
        "--config.objective.mix.soft_weight=1",
    ]
    flags += ["--config.student.steps=0", "--config.student.epochs=0.5", "--config.student.ema_decay=0.5"]
    start(unlabelled_config, tmp_path / "run", *ready_made(exported), "--config.task.labelled=0", *flags)
    assert {row["step"] for row in tiny.rows_of(tmp_path / "run") if row["objective"] == "mix"} == {4}  # 64 / 2 / 8


def test_a_damaged_score_of_a_ready_made_teacher_is_restored_from_its_checkpoint(config_file, exported, tmp_path):
    start(config_file, tmp_path / "run", *ready_made(exported))
    path = tmp_path / "run" / "teacher" / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before.replace(b"0.", b"1.", 1))
    start(config_file, tmp_path / "run", *ready_made(exported))
    assert path.read_bytes() == before
