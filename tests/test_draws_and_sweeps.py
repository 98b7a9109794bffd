"""Draws and sweeps from end to end on tiny files: what is trained, what is shared, and what the report says."""

import json
import os
import shutil

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import experiment, main
from xtransfer.config import load
from xtransfer.errors import DataError, UserError
from xtransfer.export import __main__ as export
from xtransfer.predict import __main__ as predict
from xtransfer.report import __main__ as report
from xtransfer.runs.costs import read_costs
from xtransfer.runs.workdir import Workdir
from xtransfer.train.checkpoints import Checkpoints

FAST = ("--config.teacher.steps=4", "--config.student.steps=4", "--config.student.evaluations=1")
FAST += ("--config.objectives=('vanilla','monox_kd')", "--config.task.labelled=24")
OTHER = "draws/sample-1-teacher-7"


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    return tiny.config_file(root / "tiny.py", data, teacher, student)


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


@pytest.fixture(scope="module")
def drawn(config_file, tmp_path_factory):
    """Return the workdir of an experiment that got a second draw when its first was finished."""
    workdir = tmp_path_factory.mktemp("draws") / "run"
    start(config_file, workdir)
    start(config_file, workdir, "--config.task.labelled_seeds=(0,1)", "--config.teacher_seeds=(0,7)")
    return workdir


def weights(run):
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.restore_arrays(checkpoints.steps()[-1])


def trained(workdir):
    """Return the number of times that each run was trained or labelled with, by stage and run."""
    costs = [(cost.stage, cost.run) for cost in read_costs(Workdir(workdir)) if cost.stage != "evaluation"]
    assert len(costs) == len(set(costs))
    return set(costs)


def test_a_second_draw_trains_what_it_needs_and_nothing_else(drawn):
    students = {("students", f"students/{name}/seed-0") for name in ("vanilla", "monox_kd")}
    first = {("teacher", "teacher"), ("labelling", "teacher"), *students}
    assert trained(drawn) == first | {(stage, f"{OTHER}/{run}") for stage, run in first}
    assert len(list((drawn / "logits").iterdir())) == 2


def test_a_draw_is_the_experiment_with_its_seeds(drawn, config_file, tmp_path):
    alone = tmp_path / "alone"
    start(
        config_file,
        alone,
        "--config.task.labelled_seed=1",
        "--config.teacher_seed=7",
        "--config.objectives=('vanilla',)",
    )
    for run in ("teacher", "students/vanilla/seed-0"):
        expected, actual = weights(alone / run), weights(drawn / OTHER / run)
        assert expected.keys() == actual.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(actual[key], array)


def test_rows_and_report_know_the_draws(drawn, capsys):
    rows = [json.loads(line) for line in (drawn / "results.jsonl").read_text().splitlines()]
    assert {(row["objective"], row["draw"], row["seed"]) for row in rows} == {
        (name, draw, 0 if name != "teacher" or draw == "default" else 7)
        for name in ("teacher", "vanilla", "monox_kd")
        for draw in ("default", "sample-1-teacher-7")
    }
    # A row without a draw is of the default draw. It is older than digests too.
    old = [{k: v for k, v in row.items() if k != "digest" and (k != "draw" or v != "default")} for row in rows]
    (drawn / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    report.main(["--workdir", str(drawn)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "over 2 labelled samples, each with its own teacher; " in printed
    assert "share one labelled sample" not in printed
    values = [
        np.mean([r["value"] for r in rows if (r["objective"], r["draw"], r["language"]) == ("monox_kd", draw, "de")
                 and (r["metric"], r["selection"]) == ("accuracy", "source_dev")])
        for draw in ("default", "sample-1-teacher-7")
    ]  # fmt: skip
    cell = f"{np.mean(values) * 100:.1f} ± {np.std(values, ddof=1) * 100:.1f}"
    assert cell in (drawn / "report" / "results.md").read_text()
    page = (drawn / "report" / "report.html").read_text()
    assert "over test items and 2 labelled samples" in page and "Left out, because it failed" not in page
    report.main(["--workdir", str(drawn), "--compare", "monox_kd", "vanilla"])
    lines = (drawn / "report" / "compare-monox_kd-vanilla.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["difference_by_draw"].keys() == {"default", "sample-1-teacher-7"}
    assert "items by 10,000 resamples, labelled samples by Student's t" in " ".join(capsys.readouterr().out.split())


def test_a_draw_predicts_and_exports(drawn, tmp_path):
    (tmp_path / "in.tsv").write_text("text\nder film ist toll\n")
    run = drawn / OTHER / "students/monox_kd/seed-0"
    predict.main(["--model", str(run), "--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "out.jsonl")])
    command = ["--workdir", str(drawn), "--objective", "monox_kd", "--seed", "0", "--output", str(tmp_path / "model")]
    export.main([*command, "--draw", "sample-1-teacher-7"])
    assert "sample-1-teacher-7 seed 0" in (tmp_path / "model" / "README.md").read_text()
    predict.main(
        ["--model", str(tmp_path / "model"), "--input", str(tmp_path / "in.tsv"), "--output", str(tmp_path / "2.jsonl")]
    )
    assert (tmp_path / "2.jsonl").read_text() == (tmp_path / "out.jsonl").read_text()
    with pytest.raises(UserError, match=f"no draw 'sample-9'; runs: .*{OTHER}/teacher"):
        export.main([*command[:-1], str(tmp_path / "other"), "--draw", "sample-9"])


@pytest.fixture(scope="module")
def swept(config_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweeps") / "sweep"
    start(config_file, root, "--sweep", "transfer.temperature=0.5,2")
    return root


def test_a_temperature_sweep_trains_teacher_and_vanilla_once(swept, capsys):
    first, second = (swept / "points" / f"transfer.temperature={value}" for value in ("0.5", "2"))
    assert trained(first) == {
        ("teacher", "teacher"),
        ("labelling", "teacher"),
        ("students", "students/vanilla/seed-0"),
        ("students", "students/monox_kd/seed-0"),
    }
    assert trained(second) == {("students", "students/monox_kd/seed-0")}
    assert {cost.run for cost in read_costs(Workdir(second))} == {"students/monox_kd/seed-0"}, "shared scores are kept"
    different = weights(first / "students/monox_kd/seed-0"), weights(second / "students/monox_kd/seed-0")
    assert any(not np.array_equal(different[0][key], different[1][key]) for key in different[0])
    shard = next((first / "logits").glob("*/shard-00000.npy")).relative_to(first)
    assert (second / shard).read_bytes() == (first / shard).read_bytes()
    scores = [
        {
            (r["objective"], r["language"], r["metric"], r["selection"]): r["value"]
            for r in map(json.loads, (point / "results.jsonl").read_text().splitlines())
        }
        for point in (first, second)
    ]
    assert scores[0].keys() == scores[1].keys() and ("vanilla", "en", "teacher_agreement", "last") in scores[0]
    assert all(scores[0][key] == scores[1][key] for key in scores[0] if key[0] != "monox_kd")


def test_a_point_is_the_experiment_by_itself(swept, config_file, tmp_path):
    start(config_file, tmp_path / "alone", "--config.transfer.temperature=2.0")
    run = "students/monox_kd/seed-0"
    expected, actual = (weights(root / run) for root in (tmp_path / "alone", swept / "points/transfer.temperature=2"))
    for key, array in expected.items():
        np.testing.assert_array_equal(actual[key], array)


def test_a_sweep_reports_and_resumes(swept, config_file, capsys):
    table = (swept / "report" / "sweep.md").read_text()
    assert "| transfer.temperature | teacher, source | vanilla | monox_kd | gain of monox_kd |" in table
    assert "One run each, spread unknown." in table
    lines = [json.loads(line) for line in (swept / "report" / "sweep.jsonl").read_text().splitlines()]
    assert {(x["values"]["transfer.temperature"], x["objective"], x["quantity"]) for x in lines} == {
        (t, *rest)
        for t in (0.5, 2.0)
        for rest in (("vanilla", "average"), ("monox_kd", "average"), ("monox_kd", "gain"))
    }
    assert (swept / "report" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    before = {path: os.stat(path).st_mtime_ns for path in (swept / "points").glob("*/students/*/*/metrics.jsonl")}
    start(config_file, swept, "--sweep", "transfer.temperature=0.5,2")
    assert {path: os.stat(path).st_mtime_ns for path in before} == before
    report.main(["--workdir", str(swept)])
    assert (swept / "report" / "sweep.md").read_text() == table


def test_a_sweep_over_a_checkpoint_shares_the_runs_that_do_not_start_from_it(config_file, tmp_path):
    shared, root = config_file.parent / "teacher", tmp_path / "sweep"
    other = tiny.checkpoint(tmp_path / "other", seed=3)
    start(config_file, root, "--sweep", f"teacher.checkpoint={shared},{other}")
    first, second = (
        root / "points" / point["name"] for point in json.loads((root / "sweep.json").read_text())["points"]
    )
    assert ("students", "students/vanilla/seed-0") in trained(first)
    assert trained(second) == {
        ("teacher", "teacher"),
        ("labelling", "teacher"),
        ("students", "students/monox_kd/seed-0"),
    }
    # The copied student is compared with the teacher here, and not with its old one.
    for point in (first, second):
        rows = [json.loads(line) for line in (point / "results.jsonl").read_text().splitlines()]
        guesses = {}
        for row in rows:
            if (row["language"], row["selection"], row["metric"]) == ("en", "source_dev", "accuracy"):
                run = "teacher" if row["objective"] == "teacher" else f"students/{row['objective']}/seed-0"
                lines = (point / "predictions" / run / str(row["step"]) / "test-en.jsonl").read_text().splitlines()
                guesses[row["objective"]] = np.array([json.loads(line)["prediction"] for line in lines])
        agreement = {
            row["objective"]: row["value"]
            for row in rows
            if (row["metric"], row["selection"]) == ("teacher_agreement", "source_dev")
        }
        assert agreement == {name: (guesses[name] == guesses["teacher"]).mean() for name in ("vanilla", "monox_kd")}


def test_a_failed_point_leaves_the_table_of_the_others(config_file, swept, tmp_path, monkeypatch, capsys):
    root, run = shutil.copytree(swept, tmp_path / "sweep"), experiment.run
    (root / "report" / "sweep.md").unlink()

    def fail(config, directory, **settings):
        if config.transfer.temperature == 8:
            raise DataError("broken")
        run(config, directory, **settings)

    monkeypatch.setattr(experiment, "run", fail)
    with pytest.raises(DataError) as caught:
        start(config_file, root, "--sweep", "transfer.temperature=2,8")
    assert str(caught.value) == "1 of 2 points failed; the first is transfer.temperature=8: broken"
    table = (root / "report" / "sweep.md").read_text()
    assert "| 2 | " in table and "No results yet: transfer.temperature=8." in table
    with pytest.raises(DataError, match="1 of 1 points failed; the first is transfer.temperature=8: broken"):
        start(config_file, root, "--sweep", "transfer.temperature=8")


def test_nothing_runs_before_every_point_is_checked(config_file, tmp_path):
    with pytest.raises(UserError, match="point task.unlabelled=9999: task.unlabelled 9999 is more than available"):
        start(config_file, tmp_path / "sweep", "--sweep", "task.unlabelled=8,9999")
    with pytest.raises(UserError, match="point student.max_length=99: student.max_length is 99, but"):
        start(config_file, tmp_path / "sweep", "--sweep", "student.max_length=9,99")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_and_an_experiment_do_not_share_a_directory(swept, drawn, config_file):
    with pytest.raises(UserError, match="holds an experiment and no sweep"):
        start(config_file, drawn, "--sweep", "transfer.temperature=0.5,2")
    with pytest.raises(UserError, match="holds a sweep: add its --sweep flags"):
        start(config_file, swept)


def test_the_test_config_has_the_default_seeds(config_file):
    loaded = load(str(config_file))
    assert (loaded.task.labelled_seed, loaded.teacher_seed) == (0, 0)
