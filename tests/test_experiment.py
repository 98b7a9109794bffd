"""The whole method on tiny files: what it leaves behind, that it goes on after a kill, what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import QUICK_COMPILE
from tests.helpers import tiny
from xtransfer import config, evaluate, experiment, main
from xtransfer.data.registry import load_task
from xtransfer.distillation.transfer_set import gather
from xtransfer.errors import UserError
from xtransfer.runs.workdir import Workdir
from xtransfer.train.checkpoints import Checkpoints

OBJECTIVES = ("vanilla", "monox_kd", "monox_pl", "self_training")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """A config file with its data and two different checkpoints."""
    root = tmp_path_factory.mktemp("setting")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    return tiny.config_file(root / "tiny.py", data, teacher, student)


@pytest.fixture(scope="module")
def finished(setting, tmp_path_factory):
    """The workdir of a whole run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    main.main(["--config", str(setting), "--workdir", str(workdir)])
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]


def final_weights(workdir, objective, seed=0):
    """The arrays of a student's last checkpoint, as they were saved."""
    with Checkpoints(workdir / "students" / objective / f"seed-{seed}" / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_arrays(checkpoints.steps()[-1])


def test_every_checkpoint_is_scored_on_every_language(finished):
    found = {(r["objective"], r["selection"], r["language"], r["metric"]) for r in rows(finished)}
    for objective in OBJECTIVES:
        for selection in ("source_dev", "last"):
            for language in ("en", "de"):
                for metric in ("accuracy", "macro_f1"):
                    assert (objective, selection, language, metric) in found
    assert {language for objective, _, language, _ in found if objective == "teacher"} == {"en"}
    assert {row["count"] for row in rows(finished)} == {17}
    assert len({json.dumps(row, sort_keys=True) for row in rows(finished)}) == len(rows(finished))


def test_accuracy_is_that_of_the_predictions(finished):
    for row in rows(finished):
        if row["metric"] != "accuracy":
            continue
        run = "teacher" if row["objective"] == "teacher" else f"students/{row['objective']}/seed-{row['seed']}"
        path = finished / "predictions" / run / str(row["step"]) / f"test-{row['language']}.jsonl"
        said = [json.loads(line) for line in path.read_text().splitlines()]
        assert [entry["id"] for entry in said] == [f"files/test/{row['language']}/{i}" for i in range(17)]
        assert row["value"] == sum(entry["prediction"] == entry["label"] for entry in said) / 17


def test_the_teacher_learns_what_can_be_learnt(finished):
    best = max(row["value"] for row in rows(finished) if row["objective"] == "teacher" and row["metric"] == "accuracy")
    assert best > 0.9


def test_the_student_agrees_with_the_teacher_it_was_distilled_from(finished):
    last = [json.loads(x) for x in (finished / "students/monox_kd/seed-0/metrics.jsonl").read_text().splitlines()]
    assert last[-1]["soft_kl"] < 0.7 * last[0]["soft_kl"]


def test_logits_are_stored_once_per_teacher(finished):
    manifests = sorted((finished / "logits").glob("*/manifest.json"))
    assert len(manifests) == 2  # the teacher, and the vanilla student as its own
    for path in manifests:
        manifest = json.loads(path.read_text())
        assert (manifest["classes"], manifest["count"]) == (["bad", "good"], 64)
        logits = np.load(path.parent / "shard-00000.npy", allow_pickle=False)
        assert logits.shape == (64, 2) and logits.dtype == np.float32


def test_a_second_start_redoes_nothing(setting, finished):
    def times():
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    skipped = (".run.lock", ".evaluation.lock", "report")
    before = times()
    main.main(["--config", str(setting), "--workdir", str(finished)])
    after = times()
    changed = {path.relative_to(finished).parts[0] for path in after if after[path] != before.get(path)}
    assert changed <= set(skipped)


def test_the_evaluation_binary_makes_the_same_rows(finished):
    before = sorted(map(json.dumps, rows(finished)))
    (finished / "results.jsonl").unlink()
    evaluate.main(["--workdir", str(finished)])
    assert sorted(map(json.dumps, rows(finished))) == before


def test_another_seed_is_added_and_a_changed_setting_refused(setting, finished):
    before = len(rows(finished))
    command = ["--config", str(setting), "--workdir", str(finished)]
    main.main([*command, "--config.seeds=(0,1)", "--config.objectives=('vanilla',)"])
    added = rows(finished)[before:]
    assert {(row["objective"], row["seed"]) for row in added} == {("vanilla", 1)}
    with pytest.raises(UserError, match=r"student\.learning_rate: 0\.01 → 0\.001.*choose another directory"):
        main.main([*command, "--config.student.learning_rate=1e-3"])


def command(setting, workdir):
    return [sys.executable, "-m", "xtransfer.main", "--config", str(setting), "--workdir", str(workdir)]


def start(setting, workdir, *flags):
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": QUICK_COMPILE}
    log = (workdir.parent / f"{workdir.name}.log").open("a")
    return subprocess.Popen([*command(setting, workdir), *flags], env=environment, stdout=log, stderr=log)


def wait_for(condition, process, seconds=240):
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"it did not come to that; exit status {process.poll()}")


LONGER = ("--config.objectives=('monox_kd',)", "--config.student.steps=200", "--config.student.evaluations=10")


@pytest.fixture(scope="module")
def undisturbed(setting, tmp_path_factory):
    """The workdir of a run in a process of its own that nobody killed."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "whole"
    assert start(setting, workdir, *LONGER).wait(300) == 0, workdir.with_name("whole.log").read_text()
    return workdir


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_ends_with_the_same_bits(setting, undisturbed, tmp_path, sent):
    """Killed in the middle of a student's training; the same command again ends as an undisturbed run does."""
    metrics = tmp_path / "cut" / "students" / "monox_kd" / "seed-0" / "metrics.jsonl"
    process = start(setting, tmp_path / "cut", *LONGER)
    # A row comes before its checkpoint, and a save waits for the one before: at the third row, the first is whole.
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    process.send_signal(sent)
    status = process.wait(60)
    assert status == (-9 if sent == signal.SIGKILL else 143)
    assert not (tmp_path / "cut" / "results.jsonl").exists()
    assert start(setting, tmp_path / "cut", *LONGER).wait(300) == 0, (tmp_path / "cut.log").read_text()
    assert "resuming from step" in (tmp_path / "cut.log").read_text()

    one, other = (final_weights(workdir, "monox_kd") for workdir in (undisturbed, tmp_path / "cut"))
    assert one.keys() == other.keys() and len(one) > 10
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
    assert rows(undisturbed) == rows(tmp_path / "cut")


def loaded(setting, *flags):
    return config.load(str(setting), flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--config.task.data_dir=/nowhere"], r"task\.data_dir /nowhere: no such directory"),
        (["--config.task.source_language=xx"], r"no data in 'xx'"),
        (["--config.task.target_languages=('de','tlh')"], r"no data in 'tlh'"),
        (["--config.task.label_column=lable"], r"lable"),
        (["--config.task.labels=('bad','superb')"], r"'good' is not one of bad, superb"),
        (["--config.task.name=nothing"], r"task\.name 'nothing' is not one of"),
        (["--config.teacher.checkpoint="], r"teacher\.checkpoint is empty"),
        (["--config.student.checkpoint=/nowhere"], r"/nowhere"),
        (["--config.objectives=('vanila',)"], r"no objective 'vanila'"),
        (["--config.objectives=('self_training',)"], r"self_training learns from the student of 'vanilla'"),
        (["--config.student.max_length=1000"], r"student\.max_length is 1000, but .* has 32 positions"),
        (["--config.student.frozen=('embedings',)"], r"'embedings' matches no parameter"),
        (["--config.task.labelled=1000"], r"task\.labelled 1000"),
    ],
)
def test_what_cannot_work_is_said_in_one_line(setting, tmp_path, flags, said):
    with pytest.raises(UserError, match=said) as caught:
        experiment.run(loaded(setting, *flags), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not Workdir(tmp_path / "run").results.exists()


@pytest.mark.parametrize(
    ("flags", "splits"),
    [
        (["--config.task.unlabelled_from=train_rest"], ["train"]),
        (["--config.task.unlabelled_from=split"], ["train", "unlabelled"]),
        (["--config.task.unlabelled_from=split", "--config.objectives=('vanilla',)"], ["train"]),
    ],
)
def test_what_is_learnt_from_is_drawn_from_whole_splits(setting, tmp_path, flags, splits):
    data = shutil.copytree(Path(loaded(setting).task.data_dir), tmp_path / "data")
    (data / "en" / "unlabelled.tsv").write_text("text\nthe film\nthe great film\n")
    settings = loaded(setting, f"--config.task.data_dir={data}", *flags)
    task = load_task(settings.task)
    transfer_set = gather(settings, task)
    assert list(transfer_set.drawn_from) == [task.load(split, "en") for split in splits]
    ids = {example.id for split in transfer_set.drawn_from for example in split}
    assert {example.id for example in transfer_set.everything} <= ids


def test_evaluation_refuses_other_data_than_the_run_had(setting, tmp_path):
    data = shutil.copytree(Path(loaded(setting).task.data_dir), tmp_path / "data")
    flags = [f"--config.task.data_dir={data}", "--config.objectives=('vanilla',)", "--config.student.steps=1"]
    experiment.run(loaded(setting, *flags, "--config.teacher.steps=1"), tmp_path / "run")
    path = data / "de" / "test.tsv"
    path.write_text(path.read_text().replace("gut", "schlecht"))
    with pytest.raises(UserError, match=r"made with other settings or data \(data: "):
        evaluate.main(["--workdir", str(tmp_path / "run")])


def test_teacher_and_student_with_different_classes(setting, tmp_path):
    """A teacher whose head was trained on other classes cannot teach this task."""
    from flax import nnx

    from xtransfer.data.tokens.tokenizer import load_tokenizer
    from xtransfer.models.heads import Classifier
    from xtransfer.models.hf import checkpoint as hf_checkpoint
    from xtransfer.models.hf import config as hf_config

    source = Path(loaded(setting).teacher.checkpoint)
    architecture = hf_config.read_config(source)
    params = nnx.state(Classifier(architecture, 3, rngs=nnx.Rngs(0)), nnx.Param)
    labels = ("bad", "good", "soso")
    hf_checkpoint.save(tmp_path / "three", architecture, params, tokenizer=load_tokenizer(source), labels=labels)
    with pytest.raises(UserError, match=r"head's classes are bad, good, soso, the task's are bad, good"):
        experiment.run(loaded(setting, f"--config.teacher.checkpoint={tmp_path / 'three'}"), tmp_path / "run")


def test_a_mistake_on_the_command_line_is_one_line_and_status_1(setting, tmp_path):
    flags = ["--config.student.learning_rte=1"]
    done = subprocess.run([*command(setting, tmp_path / "run"), *flags], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: unknown config key student.learning_rte; did you mean 'learning_rate'?\n"
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_fails_before_anything_is_read(setting, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to"):
        experiment.run(loaded(setting), tmp_path / "file" / "run")
