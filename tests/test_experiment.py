"""End-to-end experiments on tiny files: their outputs, resuming after a kill, and settings that are refused."""

import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny
from tests.helpers.forkserver import Process
from xtransfer import config, experiment, main
from xtransfer.data.registry import load_task
from xtransfer.distillation.transfer_set import gather
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.evaluation.token_counts import read_token_counts
from xtransfer.runs.costs import read_costs
from xtransfer.runs.starts import read_starts
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.train.checkpoints import AVERAGE, PARAMS, Checkpoints

OBJECTIVES = ("vanilla", "monox_kd", "monox_pl", "self_training")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config file, its data, and two different checkpoints. Return the config file."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    return tiny.config_file(root / "tiny.py", data, teacher, student)


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """Return the workdir of a finished run."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    main.main(["--config", str(config_file), "--workdir", str(workdir)])
    return workdir


def final_weights(workdir, objective, seed=0, item=PARAMS):
    """Return the arrays in an item of a student's last checkpoint."""
    with Checkpoints(workdir / "students" / objective / f"seed-{seed}" / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_arrays(checkpoints.steps()[-1], item)


def test_every_checkpoint_is_scored_on_every_language(finished):
    scored = {(r["objective"], r["selection"], r["language"], r["metric"]) for r in tiny.rows_of(finished)}
    for objective in OBJECTIVES:
        for selection in ("source_dev", "last"):
            for language in ("en", "de"):
                for metric in ("accuracy", "macro_f1"):
                    assert (objective, selection, language, metric) in scored
    assert {language for objective, _, language, _ in scored if objective == "teacher"} == {"en"}
    assert {row["count"] for row in tiny.rows_of(finished)} == {17}
    assert len({json.dumps(row, sort_keys=True) for row in tiny.rows_of(finished)}) == len(tiny.rows_of(finished))


def test_accuracy_matches_the_saved_predictions(finished):
    for row in tiny.rows_of(finished):
        if row["metric"] != "accuracy":
            continue
        run = "teacher" if row["objective"] == "teacher" else f"students/{row['objective']}/seed-{row['seed']}"
        path = finished / "predictions" / run / str(row["step"]) / f"test-{row['language']}.jsonl"
        predictions = [json.loads(line) for line in path.read_text().splitlines()]
        assert [entry["id"] for entry in predictions] == [f"files/test/{row['language']}/{i}" for i in range(17)]
        assert row["value"] == sum(entry["prediction"] == entry["label"] for entry in predictions) / 17


def test_the_teacher_learns_the_task(finished):
    best = max(
        row["value"] for row in tiny.rows_of(finished) if row["objective"] == "teacher" and row["metric"] == "accuracy"
    )
    assert best > 0.9


def test_distillation_brings_the_student_closer_to_the_teacher(finished):
    path = finished / "students/monox_kd/seed-0/metrics.jsonl"
    metrics = [json.loads(line) for line in path.read_text().splitlines()]
    assert metrics[-1]["soft_kl"] < 0.7 * metrics[0]["soft_kl"]


def test_logits_are_stored_once_per_teacher(finished):
    manifests = sorted((finished / "logits").glob("*/manifest.json"))
    assert len(manifests) == 2  # the teacher's, and the vanilla student's for self-training
    for path in manifests:
        manifest = json.loads(path.read_text())
        assert (manifest["classes"], manifest["count"]) == (["bad", "good"], 64)
        logits = np.load(path.parent / "shard-00000.npy", allow_pickle=False)
        assert logits.shape == (64, 2) and logits.dtype == np.float32


def test_every_stage_records_its_cost(finished):
    workdir = Workdir(finished)
    config, costs = read_config(workdir), read_costs(workdir)
    examples = {(cost.stage, cost.run): cost.examples for cost in costs}
    assert len(examples) == len(costs)
    steps, batch = config.student.steps, config.student.batch_size
    assert examples["teacher", "teacher"] == config.teacher.steps * config.teacher.batch_size
    for objective in OBJECTIVES:
        run = f"students/{objective}/seed-0"
        assert examples["students", run] == steps * batch
        assert examples["evaluation", run] % 34 == 0 and examples["evaluation", run] > 0  # 17 in each of 2 languages
    assert examples["labelling", "teacher"] == examples["labelling", "students/vanilla/seed-0"] == 64
    assert all(0 < cost.real_tokens <= cost.tokens and cost.seconds > 0 and cost.peak_bytes > 0 for cost in costs)


def test_the_start_and_the_tokens_are_recorded(finished):
    workdir = Workdir(finished)
    (start,) = read_starts(workdir)
    assert start.packages["jax"] == importlib.metadata.version("jax") and start.processes == 1
    counts = read_token_counts(workdir)
    assert [(row.split, row.language, row.examples, row.unit) for row in counts] == [
        ("test", "en", 17, "word"),
        ("test", "de", 17, "word"),
    ]
    # Every word of the tiny task is one piece of its tokenizer.
    assert all(row.tokens == row.units > 0 and row.unknown == 0 for row in counts)


def test_running_again_redoes_nothing(config_file, finished):
    def modification_times():
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}

    before = modification_times()
    main.main(["--config", str(config_file), "--workdir", str(finished)])
    after = modification_times()
    changed = {path.relative_to(finished).parts[0] for path in after if after[path] != before.get(path)}
    assert changed <= {".run.lock", ".evaluation.lock", "finished.json", "report"}


def test_the_end_marker_names_the_runs_and_is_removed_at_the_next_start(config_file, finished, monkeypatch):
    runs = ["teacher", *(f"students/{objective}/seed-0" for objective in OBJECTIVES)]
    assert json.loads((finished / "finished.json").read_text()) == {"runs": runs}

    def stop(*args):
        assert not (finished / "finished.json").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.plan, "lines", stop)
    with pytest.raises(KeyboardInterrupt):
        main.main(["--config", str(config_file), "--workdir", str(finished)])
    assert not (finished / "finished.json").exists()
    monkeypatch.undo()
    main.main(["--config", str(config_file), "--workdir", str(finished)])
    assert (finished / "finished.json").exists()


def test_the_evaluate_command_writes_the_same_rows(finished):
    before = sorted(map(json.dumps, tiny.rows_of(finished)))
    (finished / "results.jsonl").unlink()
    evaluate.main(["--workdir", str(finished)])
    assert sorted(map(json.dumps, tiny.rows_of(finished))) == before


def test_a_new_seed_is_added_but_a_changed_setting_is_refused(config_file, finished):
    before = len(tiny.rows_of(finished))
    arguments = ["--config", str(config_file), "--workdir", str(finished)]
    main.main([*arguments, "--config.seeds=(0,1)", "--config.objectives=('vanilla',)"])
    added = tiny.rows_of(finished)[before:]
    assert {(row["objective"], row["seed"]) for row in added} == {("vanilla", 1)}
    with pytest.raises(UserError, match=r"student\.learning_rate: 0\.01 → 0\.001.*choose another directory"):
        main.main([*arguments, "--config.student.learning_rate=1e-3"])


def start(config_file, workdir, *flags):
    command = ["-m", "xtransfer.main", "--config", str(config_file), "--workdir", str(workdir), *flags]
    return Process(command, workdir.with_name(f"{workdir.name}.log"))


def wait_for(condition, process, seconds=240):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"the condition was never met; exit status {process.poll()}")


LONGER = (
    "--config.objectives=('monox_kd',)",
    "--config.student.steps=200",
    "--config.student.evaluations=10",
    "--config.student.average_last=10",  # so that the kill comes after the first of them
)


@pytest.fixture(scope="module")
def uninterrupted(config_file, tmp_path_factory):
    """Return the workdir of an uninterrupted run in a separate process."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert start(config_file, workdir, *LONGER).wait(300) == 0, workdir.with_name("run.log").read_text()
    return workdir


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_resumes_to_identical_weights(config_file, uninterrupted, tmp_path, signal_number):
    """Kill a run while a student trains, then check that the same command ends like an uninterrupted run."""
    killed = tmp_path / "killed"
    metrics = killed / "students" / "monox_kd" / "seed-0" / "metrics.jsonl"
    process = start(config_file, killed, *LONGER)
    # Each row is written before its checkpoint, and each save waits for the previous one. So once there are three rows,
    # the first checkpoint is complete.
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, process)
    process.send_signal(signal_number)
    status = process.wait(60)
    assert status == (-9 if signal_number == signal.SIGKILL else 143)
    assert not (killed / "results.jsonl").exists() and not (killed / "finished.json").exists()
    assert start(config_file, killed, *LONGER).wait(300) == 0, (tmp_path / "killed.log").read_text()
    assert "resuming from step" in (tmp_path / "killed.log").read_text()

    for item in (PARAMS, AVERAGE):
        expected, resumed = (final_weights(run, "monox_kd", item=item) for run in (uninterrupted, killed))
        assert expected.keys() == resumed.keys() and len(expected) > 10
        for name in expected:
            np.testing.assert_array_equal(expected[name], resumed[name], err_msg=f"{item} {name}")
    assert tiny.rows_of(uninterrupted) == tiny.rows_of(killed)


def test_a_killed_run_stops_early_at_the_same_step(config_file, tmp_path):
    """Train with patience until the score, the F1 of a class, has been 1 for long; kill the run before that."""
    flags = ["--config.objectives=('vanilla',)", "--config.selection_metric=class_f1/bad", "--config.student.steps=400"]
    flags += ["--config.student.evaluations=40", "--config.student.patience=20"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(config_file, whole, *flags).wait(300) == 0, (tmp_path / "whole.log").read_text()
    run = Path("students", "vanilla", "seed-0", "metrics.jsonl")
    process = start(config_file, killed, *flags)
    wait_for(lambda: (killed / run).exists() and len((killed / run).read_text().splitlines()) >= 3, process)
    process.kill()
    assert process.wait(60) == -9
    assert start(config_file, killed, *flags).wait(300) == 0, (tmp_path / "killed.log").read_text()
    assert "resuming from step" in (tmp_path / "killed.log").read_text()

    stopped, resumed = (
        [json.loads(line) for line in (root / run).read_text().splitlines()] for root in (whole, killed)
    )
    scores = [row["dev_class_f1/bad"] for row in stopped]
    assert stopped[-1]["stopped_early"] and stopped[-1]["step"] == 10 * len(stopped) < 400
    assert scores.index(max(scores)) == len(scores) - 1 - 20
    assert resumed == stopped
    expected, weights = final_weights(whole, "vanilla"), final_weights(killed, "vanilla")
    for name in expected:
        np.testing.assert_array_equal(expected[name], weights[name], err_msg=name)
    selected = {
        row["step"] for row in tiny.rows_of(whole) if (row["objective"], row["selection"]) == ("vanilla", "source_dev")
    }
    assert selected == {stopped[scores.index(max(scores))]["step"]} and tiny.rows_of(whole) == tiny.rows_of(killed)


def load_config(config_file, *flags):
    return config.load(str(config_file), flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.task.data_dir=/nowhere"], r"task\.data_dir /nowhere: no such directory"),
        (["--config.task.source_language=xx"], r"no data in 'xx'"),
        (["--config.task.target_languages=('de','tlh')"], r"no data in 'tlh'"),
        (["--config.task.label_column=lable"], r"lable"),
        (
            ["--config.metrics=('accuracy','log_los')"],
            r"config key metrics: no metric 'log_los'; did you mean 'log_loss'",
        ),
        (["--config.metrics=('macro_f1',)"], r"config key metrics is \('macro_f1',\): add 'accuracy'"),
        (["--config.selection_metric=class_f1"], r"selection_metric: class_f1 .* name one, such as class_f1/bad"),
        (["--config.task.labels=('bad','superb')"], r"'good' is not one of bad, superb"),
        (["--config.task.name=nothing"], r"task\.name 'nothing' is not one of"),
        (["--config.teacher.checkpoint="], r"teacher\.checkpoint is empty"),
        (["--config.student.checkpoint=/nowhere"], r"/nowhere"),
        (["--config.objectives=('vanila',)"], r"no objective 'vanila'"),
        (["--config.objectives=('self_training',)"], r"self_training learns from the student of 'vanilla'"),
        (["--config.student.max_length=1000"], r"student\.max_length is 1000, but .* has 32 positions"),
        (["--config.student.frozen=('embedings',)"], r"config group student: .*'embedings' matches no parameter"),
        (["--config.task.labelled=1000"], r"task\.labelled 1000"),
        (
            ["--config.task.labelled=1"],
            r"task\.labelled 1 leaves no example of '.*: raise it to 2",
        ),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(config_file, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        experiment.run(load_config(config_file, *flags), tmp_path / "run")
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
def test_the_transfer_set_keeps_the_whole_splits_it_draws_from(config_file, tmp_path, flags, splits):
    data = shutil.copytree(Path(load_config(config_file).task.data_dir), tmp_path / "data")
    (data / "en" / "unlabelled.tsv").write_text("text\nthe film\nthe great film\n")
    settings = load_config(config_file, f"--config.task.data_dir={data}", *flags)
    task = load_task(settings.task)
    transfer_set = gather(settings, task)
    assert list(transfer_set.drawn_from) == [task.load(split, "en") for split in splits]
    ids = {example.id for split in transfer_set.drawn_from for example in split}
    assert {example.id for example in transfer_set.everything} <= ids


def test_evaluation_refuses_data_that_changed_since_the_run(config_file, tmp_path):
    data = shutil.copytree(Path(load_config(config_file).task.data_dir), tmp_path / "data")
    flags = [f"--config.task.data_dir={data}", "--config.objectives=('vanilla',)", "--config.student.steps=1"]
    experiment.run(load_config(config_file, *flags, "--config.teacher.steps=1"), tmp_path / "run")
    path = data / "de" / "test.tsv"
    path.write_text(path.read_text().replace("gut", "schlecht"))
    with pytest.raises(UserError, match=r"made with other settings or data \(data: "):
        evaluate.main(["--workdir", str(tmp_path / "run")])


def test_a_teacher_head_with_other_classes_is_refused(config_file, tmp_path):
    """Refuse a teacher whose head was trained on other classes, since it cannot teach this task."""
    from flax import nnx

    from xtransfer.data.tokens.tokenizer import load_tokenizer
    from xtransfer.models.heads import Classifier
    from xtransfer.models.hf import checkpoint as hf_checkpoint
    from xtransfer.models.hf import config as hf_config

    source = Path(load_config(config_file).teacher.checkpoint)
    architecture = hf_config.read_config(source)
    params = nnx.state(Classifier(architecture, 3, rngs=nnx.Rngs(0)), nnx.Param)
    labels = ("bad", "good", "soso")
    hf_checkpoint.save(tmp_path / "three", architecture, params, tokenizer=load_tokenizer(source), labels=labels)
    with pytest.raises(UserError, match=r"head's classes are bad, good, soso, the task's are bad, good"):
        experiment.run(load_config(config_file, f"--config.teacher.checkpoint={tmp_path / 'three'}"), tmp_path / "run")


def test_a_command_line_mistake_prints_one_line_and_exits_with_2(config_file, tmp_path):
    command = [sys.executable, "-m", "xtransfer.main", "--config", str(config_file), "--workdir", str(tmp_path / "run")]
    result = subprocess.run([*command, "--config.student.learning_rte=1"], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: unknown config key student.learning_rte; did you mean 'learning_rate'?\n"
    assert not (tmp_path / "run").exists()


def test_an_unwritable_workdir_fails_before_anything_is_read(config_file, tmp_path):
    (tmp_path / "file").write_text("")
    missing = [f"--config.{key}={tmp_path}/missing" for key in ("task.data_dir", "teacher.checkpoint")]
    with pytest.raises(UserError, match=r"cannot be written to"):
        experiment.run(load_config(config_file, *missing), tmp_path / "file" / "run")


def test_a_workdir_on_a_read_only_disk_fails_before_anything_is_read(config_file, tmp_path):
    mounted = ["unshare", "-rm", "sh", "-c", f'mount -t tmpfs -o ro none {tmp_path} && exec "$@"', "-"]
    if subprocess.run([*mounted, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount")
    command = [sys.executable, "-m", "xtransfer.main", "--config", str(config_file), "--workdir", f"{tmp_path}/run"]
    command.append(f"--config.task.data_dir={tmp_path}/missing")
    result = subprocess.run([*mounted, *command], capture_output=True, text=True)
    assert result.returncode == 5
    assert result.stderr == (
        f"error: {tmp_path}/run cannot be written to: Read-only file system; choose another directory\n"
    )


def test_a_workdir_below_a_pattern_is_refused_before_anything_is_read(config_file, tmp_path, monkeypatch):
    workdir = tmp_path / "[a]" / "w"
    with pytest.raises(UserError, match=r"\[a\]/w: files below a path with \[ in it .* choose another --workdir"):
        experiment.run(load_config(config_file), workdir)
    (tmp_path / "[a]").mkdir()
    monkeypatch.chdir(tmp_path / "[a]")
    with pytest.raises(UserError, match="choose another --workdir"):
        experiment.run(load_config(config_file), Path("w"))
    with pytest.raises(UserError, match="choose another task.cache_dir"):
        experiment.run(load_config(config_file, f"--config.task.cache_dir={tmp_path}/[a]"), tmp_path / "run")
    with pytest.raises(UserError, match="would not be found again"):
        Checkpoints(workdir)
    assert list((tmp_path / "[a]").iterdir()) == [] and not (tmp_path / "run").exists()


def test_an_empty_workdir_is_refused(config_file, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["--config", str(config_file), "--workdir", ""])
    assert caught.value.code == 2
    assert "argument --workdir: the path is empty; '.' is the current directory" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_an_earlier_step_gives_the_same_weights(
    config_file, finished, tmp_path, capsys
):
    """Here the last checkpoint of the teacher and of a student, after everything is finished."""
    workdir = Path(shutil.copytree(finished, tmp_path / "run"))
    before = final_weights(workdir, "monox_kd")
    results = [row for row in tiny.rows_of(workdir) if row["seed"] == 0]  # another test may have added a seed
    damaged = []
    for run in ("teacher", "students/monox_kd/seed-0"):
        step = max(workdir.glob(f"{run}/checkpoints/[0-9]*"), key=lambda path: int(path.name))
        path = max((step / "params").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 16
        path.write_bytes(content)
        damaged.append(step)
    (workdir / "results.jsonl").unlink()
    with pytest.raises(UserError, match="this checkpoint is damaged: params/.*train with --from-earlier-step"):
        evaluate.main(["--workdir", str(workdir)])
    main.main(["--config", str(config_file), "--workdir", str(workdir), "--from-earlier-step"])
    output = " ".join(capsys.readouterr().out.split())
    assert all(f"{step}: damaged (params/" in output for step in damaged)
    for name, array in final_weights(workdir, "monox_kd").items():
        np.testing.assert_array_equal(array, before[name])
    assert sorted(map(json.dumps, tiny.rows_of(workdir))) == sorted(map(json.dumps, results))
