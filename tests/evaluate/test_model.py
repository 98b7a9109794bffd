"""Scoring a run or a Hugging Face classifier on any task: the same numbers as in the experiment, classes by name."""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers import tiny, tiny_run
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.evaluation.evaluator import Run
from xtransfer.export import __main__ as export
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf.config import read_config
from xtransfer.runs.workdir import RunId


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a directory with a config, an evaluated run, and its student's export."""
    root = tmp_path_factory.mktemp("root")
    workdir = tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")
    evaluate.main(["--workdir", str(workdir.root)])
    flags = ["--workdir", str(workdir.root), "--objective", "vanilla", "--seed", "0", "--output", str(root / "export")]
    export.main(flags)
    return root


def run(root, model, output, *flags):
    evaluate.main(["--model", str(model), "--config", str(root / "tiny.py"), "--output", str(output), *flags])
    return read(output / "results.jsonl")


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def warnings(out):
    """Return the warnings but those about random weights that predict one class."""
    return [line for line in out.splitlines() if "warning" in line and "predict one class" not in line]


def values(rows):
    keys = ("task", "split", "language", "metric", "value", "count")
    return [tuple(row[key] for key in keys) for row in rows]


def expected(root):
    """Return the experiment's own rows of the student's best checkpoint, without those that also take its teacher."""
    rows = read(root / "run" / "results.jsonl")
    rows = [row for row in rows if row["metric"] != "teacher_agreement"]
    return [row for row in rows if (row["objective"], row["selection"]) == ("vanilla", "source_dev")]


def test_an_exported_classifier_has_the_rows_and_predictions_of_its_run(root, tmp_path, capsys):
    rows = run(root, root / "export", tmp_path / "output")
    assert values(rows) == values(expected(root)) and len(rows) == 2 * 3
    own = {"objective": str(root / "export"), "draw": "default", "seed": 0, "step": 0, "selection": "none"}
    assert all(own.items() <= row.items() for row in rows)
    for language in ("en", "de"):
        predictions = tmp_path / "output" / "predictions" / f"test-{language}.jsonl"
        source = root / "run/predictions/students/vanilla/seed-0" / str(tiny_run.BEST) / f"test-{language}.jsonl"
        assert predictions.read_text() == source.read_text()
    accuracy = next(row["value"] for row in rows if row["language"] == "de")
    assert f"| de | 9 | {100 * accuracy:.1f} | " in capsys.readouterr().out


def test_a_run_needs_no_config_and_keeps_its_name(root, tmp_path):
    model = root / "run/students/vanilla/seed-0"
    evaluate.main(["--model", str(model), "--output", str(tmp_path / "output")])
    assert read(tmp_path / "output" / "results.jsonl") == expected(root)
    evaluate.main(["--model", str(root / "run/teacher"), "--output", str(tmp_path / "teacher")])
    assert {row["language"] for row in read(tmp_path / "teacher" / "results.jsonl")} == {"en"}


def test_classes_in_another_order_are_matched_by_name(root, tmp_path):
    """Write the same classifier with its classes swapped, in the head and in id2label."""
    config = read_config(root / "export")
    _, params = hf_checkpoint.load_classifier(root / "export", 2, seed=0, labels=("good", "bad"))
    labels, tokenizer = ("good", "bad"), load_tokenizer(root / "export")
    hf_checkpoint.save(tmp_path / "swapped", config, params, tokenizer=tokenizer, labels=labels)
    assert json.loads((tmp_path / "swapped/config.json").read_text())["id2label"] == {"0": "good", "1": "bad"}
    assert values(run(root, tmp_path / "swapped", tmp_path / "output")) == values(expected(root))
    swapped, original = (tmp_path / "output/predictions/test-de.jsonl"), (root / "run/predictions/students/vanilla")
    assert read(swapped) == read(original / "seed-0" / str(tiny_run.BEST) / "test-de.jsonl")


def test_other_classes_are_refused_with_both_names(root, tmp_path):
    model = shutil.copytree(root / "export", tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    settings |= {"id2label": {"0": "bad", "1": "superb"}, "label2id": {"bad": 0, "superb": 1}}
    (model / "config.json").write_text(json.dumps(settings))
    message = "its classes are bad, superb, and the classes of files are bad, good: if they are the same, write"
    with pytest.raises(UserError, match=message):
        run(root, model, tmp_path / "output")
    assert not (tmp_path / "output").exists()


def test_split_languages_and_metrics_are_flags(root, tmp_path):
    rows = run(
        root,
        root / "export",
        tmp_path / "output",
        *("--split", "dev", "--languages", "de", "--metrics", "log_loss,class_f1/good"),
    )
    assert [(row["split"], row["language"], row["metric"], row["count"]) for row in rows] == [
        ("dev", "de", name, 8) for name in ("log_loss", "class_f1/good", "majority_share")
    ]


def test_overrides_name_another_task(root, tmp_path):
    data = tiny.write_task(tmp_path / "data", train=4, other=3, languages=("en", "fr"))
    rows = run(root, root / "export", tmp_path / "output", f"--config.task.data_dir={data}")
    assert {(row["language"], row["count"]) for row in rows} == {("en", 4), ("fr", 4)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "name the task to score it on: --config FILE"),
        (["--languages", "en,xx", "--config", "FILE"], "no data in 'xx'"),
        (["--languages", "en,,de", "--config", "FILE"], "--languages en,,de: expected names with commas"),
        (["--metrics", "acuracy", "--config", "FILE"], "no metric 'acuracy'; did you mean 'accuracy'"),
        (["--config.task.nme=x", "--config", "FILE"], "unknown config key task.nme"),
        (["--export-xtreme", "DIR", "--config", "FILE"], "--export-xtreme: task 'files' is not one of xnli, paws_x"),
        (["--output", "FULL", "--config", "FILE"], "already exists; choose another --output"),
        (["--output", "UNDER", "--languages", "en,xx", "--config", "FILE"], "file/x cannot be written: "),  # first
        (["--watch"], "--watch needs --workdir"),
        (["--timeout", "3"], "--timeout needs --watch"),
    ],
)
def test_flags_that_cannot_work_are_refused_in_one_line(root, tmp_path, flags, message):
    (tmp_path / "file").write_text("")
    paths = {"FILE": str(root / "tiny.py"), "DIR": str(tmp_path / "new"), "FULL": str(tmp_path)}
    paths |= {"UNDER": str(tmp_path / "file" / "x")}
    with pytest.raises(UserError) as caught:
        evaluate.main(["--model", str(root / "export"), *(paths.get(flag, flag) for flag in flags)])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_flags_of_a_model_do_not_fit_a_workdir(root):
    for flags, message in (
        (["--selection", "last"], "--selection needs --model"),
        (
            ["--config", "FILE"],
            "--config needs --model: to score .* its directory: --model .*/students/OBJECTIVE/seed-N",
        ),
        (["--config.seeds=(1,)"], r"unknown flag --config.seeds=\(1,\): with --workdir"),
        (["--metrics", "macro_f1"], "--metrics macro_f1: .* accuracy too, .*: --metrics accuracy,macro_f1$"),
        (["--metrics", "accuracy,ecee"], "--metrics: no metric 'ecee'; did you mean 'ece'"),
        (["--languages", "en,xx"], r"--languages en,xx: .*no data in 'xx'"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate.main(["--workdir", str(root / "run"), *flags])


def test_more_metrics_are_added_to_a_finished_workdir(root, tmp_path):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    before = read(workdir / "results.jsonl")
    evaluate.main(["--workdir", str(workdir), "--metrics", "accuracy,log_loss"])
    after = read(workdir / "results.jsonl")
    assert after[: len(before)] == before
    assert {row["metric"] for row in after[len(before) :]} == {"log_loss"}
    assert not (workdir / "watch.jsonl").exists()


def test_a_split_of_a_workdir_has_a_report_of_its_own(root, tmp_path, capsys):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    before = read(workdir / "results.jsonl")
    headline = {path: path.read_bytes() for path in (workdir / "report").iterdir()}
    evaluate.main(["--workdir", str(workdir), "--split", "dev"])
    added = read(workdir / "results.jsonl")[len(before) :]
    assert {(row["objective"], row["split"], row["language"]) for row in added} == {
        ("teacher", "dev", "en"), ("vanilla", "dev", "en"), ("vanilla", "dev", "de"),
    }  # fmt: skip
    assert "accuracy in % on the dev split" in (workdir / "report" / "results-dev.md").read_text()
    assert {path: path.read_bytes() for path in headline} == headline
    assert not warnings(capsys.readouterr().out)


def test_languages_of_a_workdir_may_be_new_to_the_experiment(root, tmp_path, capsys):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    shutil.copytree(root / "data", tmp_path / "data")
    tiny.write_task(tmp_path / "data", train=4, other=3, languages=("fr",))
    config = json.loads((workdir / "config.json").read_text())
    # The experiment has German alone, so its data are the same as before.
    config["task"] |= {"data_dir": str(tmp_path / "data"), "target_languages": ["de"]}
    (workdir / "config.json").write_text(json.dumps(config))
    headline = {path: path.read_bytes() for path in (workdir / "report").iterdir()}
    evaluate.main(["--workdir", str(workdir), "--languages", "fr"])
    rows = [row for row in read(workdir / "results.jsonl") if row["language"] == "fr"]
    assert {(row["objective"], row["selection"], row["count"]) for row in rows} == {
        ("vanilla", "source_dev", 4), ("vanilla", "last", 4),
    }  # fmt: skip
    accuracy = next(row["value"] for row in rows if row["metric"] == "accuracy" and row["selection"] == "source_dev")
    out = capsys.readouterr().out
    assert "| objective | seed | step | test fr |" in out
    assert f"| vanilla | 0 | {tiny_run.BEST} | {100 * accuracy:.1f} |" in out
    assert {path: path.read_bytes() for path in headline} == headline


def stop_early(workdir):
    """Take a workdir back to the time when its student had saved its first checkpoint."""
    (workdir / "results.jsonl").unlink()
    student = workdir / "students/vanilla/seed-0"
    lines = (student / "metrics.jsonl").read_text().splitlines(keepends=True)
    (student / "metrics.jsonl").write_text(lines[0])
    shutil.rmtree(student / "checkpoints" / str(tiny_run.STEPS))


def test_several_processes_say_what_they_do_not_score(root, tmp_path, capsys, monkeypatch):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    stop_early(workdir)
    monkeypatch.setattr(evaluate.processes, "count", lambda: 2)
    evaluate.main(["--workdir", str(workdir)])
    out = " ".join(capsys.readouterr().out.split())
    assert "vanilla seed 0 is not finished, and not scored: only a single process scores checkpoints by step" in out
    assert not (workdir / "watch.jsonl").exists()


def test_a_line_about_unfinished_runs_names_a_few():
    runs = [Run("vanilla", RunId("default", seed), Path()) for seed in range(5)]
    assert evaluate._not_finished(runs) == (
        "5 runs are not finished (vanilla seed 0, vanilla seed 1, vanilla seed 2 and 2 more)"
    )


def test_a_run_in_training_has_its_checkpoints_scored_by_step(root, tmp_path, capsys):
    workdir = shutil.copytree(root / "run", tmp_path / "run")
    stop_early(workdir)
    headline = {path: path.read_bytes() for path in (workdir / "report").iterdir()}
    evaluate.main(["--workdir", str(workdir)])
    assert {row["objective"] for row in read(workdir / "results.jsonl")} == {"teacher"}
    rows = read(workdir / "watch.jsonl")
    assert {(row["objective"], row["step"], row["selection"]) for row in rows} == {("vanilla", tiny_run.BEST, "step")}
    accuracy = [f"{100 * row['value']:.1f}" for row in rows if row["metric"] == "accuracy"]
    out = capsys.readouterr().out
    assert "| objective | seed | step | dev en | test en | test de |" in out
    assert f"| vanilla | 0 | {tiny_run.BEST} | {' | '.join(accuracy)} |" in out
    assert not warnings(out) and "skipped" not in out
    assert f"{workdir}: no student is finished yet, so there is no report" in out
    assert "vanilla seed 0 is not finished: checkpoints are scored by step" in out
    assert {path: path.read_bytes() for path in headline} == headline
