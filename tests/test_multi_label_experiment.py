"""A multi-label experiment from end to end: everything that reads or writes its labels."""

import json

import pytest

from tests.helpers import label_sets, tiny
from tests.helpers.label_sets import predicted
from xtransfer import config as settings
from xtransfer import experiment, main
from xtransfer.describe import __main__ as describe
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.export import __main__ as export
from xtransfer.report import __main__ as report
from xtransfer.runs.sharing import settings_of
from xtransfer.runs.workdir import Workdir, read_task

METRICS = ("micro_f1", "macro_f1", "subset_accuracy", "class_f1", "macro_auroc")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return label_sets.config_file(
        tmp_path_factory.mktemp("setting"),
        "config.objectives = ('vanilla', 'monox_kd', 'monox_pl')",
        f"config.metrics, config.oracle = {METRICS!r}, True",
        "config.student.average_last, config.transfer.fitted_thresholds = 2, True",
        "config.calibration.temperature = config.calibration.threshold = True",
    )


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """Return the workdir of a finished experiment, with its average, oracle, temperature, and thresholds."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    main.main(["--config", str(config_file), "--workdir", str(workdir)])
    return workdir


@pytest.fixture(scope="module")
def exported(finished, tmp_path_factory):
    """Return the export of the student `monox_kd`, without and with what was fitted."""
    root = tmp_path_factory.mktemp("exported")
    command = ["--workdir", str(finished), "--objective", "monox_kd", "--seed", "0"]
    export.main([*command, "--output", str(root / "plain")])
    export.main([*command, "--output", str(root / "fitted"), "--calibrated", "--threshold"])
    return root


@pytest.fixture
def texts(tmp_path):
    return label_sets.write_texts(tmp_path)


def predictions(workdir, run, step, name):
    path = workdir / "predictions" / run / step / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_checkpoint_is_scored_and_predictions_are_lists(finished):
    assert read_task(Workdir(finished)).multi_label
    scored = {(row["objective"], row["selection"], row["metric"]) for row in tiny.rows_of(finished)}
    names = {"micro_f1", "macro_f1", "subset_accuracy", "macro_auroc", "majority_share"}
    names |= {f"class_f1/{label}" for label in label_sets.LABELS}
    names |= {
        "macro_f1_thresholded",
        "micro_f1_thresholded",
        "log_loss",
        "log_loss_calibrated",
        "ece",
        "ece_calibrated",
    }
    for objective in ("vanilla", "monox_kd", "monox_pl"):
        for selection in ("source_dev", "last", "average", "target_dev"):
            found = {metric for one, two, metric in scored if (one, two) == (objective, selection)}
            assert found == names | {"teacher_agreement"}
    path = next((finished / "predictions" / "students" / "vanilla" / "seed-0").glob("*/test-de.jsonl"))
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == label_sets.SIZES["test"]
    for line in lines:
        above = [name for name, logit in zip(label_sets.LABELS, line["logits"], strict=True) if logit > 0]
        assert line["prediction"] == above and set(line["label"]) <= set(label_sets.LABELS)
    assert any(not line["label"] for line in lines)


def test_the_rows_are_the_scores_of_the_predictions(finished):
    row = next(
        row
        for row in tiny.rows_of(finished)
        if (row["objective"], row["selection"], row["language"], row["metric"])
        == ("monox_kd", "last", "de", "micro_f1")
    )
    lines = predictions(finished, "students/monox_kd/seed-0", str(row["step"]), "test-de.jsonl")
    right = sum(len({*line["label"]} & {*line["prediction"]}) for line in lines)
    total = sum(len(line["label"]) + len(line["prediction"]) for line in lines)
    assert row["value"] == pytest.approx(2 * right / total) and row["count"] == len(lines)


def test_the_teacher_learns(finished):
    row = next(r for r in tiny.rows_of(finished) if (r["objective"], r["metric"]) == ("teacher", "macro_auroc"))
    assert row["value"] > 0.6
    last = json.loads((finished / "teacher" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["dev_score"] == last["dev_micro_f1"] and "dev_accuracy" not in last


def test_thresholds_of_the_teacher_and_the_students_are_kept_with_their_runs(finished):
    for run in ("teacher", "students/monox_pl/seed-0"):
        for entry in json.loads((finished / run / "calibration.json").read_text()).values():
            assert len(entry["class_log_odds"]) == len(entry["class_thresholds"]) == 3
            assert entry["log_odds"] is None and entry["temperature"] > 0


def test_running_it_again_repeats_nothing(finished, config_file, capsys):
    before = (finished / "results.jsonl").read_bytes()
    stamp = [path.stat().st_mtime_ns for path in sorted(finished.glob("predictions/**/*.jsonl"))]
    main.main(["--config", str(config_file), "--workdir", str(finished)])
    assert (finished / "results.jsonl").read_bytes() == before
    assert [path.stat().st_mtime_ns for path in sorted(finished.glob("predictions/**/*.jsonl"))] == stamp


def test_every_part_of_the_page_is_there(finished):
    page = (finished / "report" / "report.html").read_text(encoding="utf-8")
    assert "Left out" not in page
    assert "Each class against the rest" in page and "micro_f1 on test" in page
    text = (finished / "report" / "results.md").read_text(encoding="utf-8")
    assert "micro_f1 in %" in text and "majority" not in text


def test_a_comparison_is_by_micro_f1(finished, capsys):
    report.main(["--workdir", str(finished), "--compare", "monox_kd", "vanilla"])
    lines = (finished / "report" / "compare-monox_kd-vanilla.jsonl").read_text().splitlines()
    compared = {row["language"]: row for row in map(json.loads, lines)}
    values = {
        (row["objective"], row["language"]): row["value"]
        for row in tiny.rows_of(finished)
        if (row["selection"], row["metric"], row["split"]) == ("source_dev", "micro_f1", "test")
    }
    for language in ("en", "de"):
        assert compared[language]["micro_f1_a"] == pytest.approx(values["monox_kd", language])
        assert compared[language]["micro_f1_b"] == pytest.approx(values["vanilla", language])
        assert compared[language]["micro_f1_a_interval"] is compared[language]["p_mcnemar"] is None
    with pytest.raises(UserError, match="--metric subset_accuracy: --compare compares micro_f1 only"):
        report.main(["--workdir", str(finished), "--metric", "subset_accuracy", "--compare", "monox_kd", "vanilla"])


def test_other_metrics_and_protocols_are_reported(finished):
    report.main(["--workdir", str(finished), "--metric", "subset_accuracy", "--selection", "average"])
    assert "subset_accuracy" in (finished / "report" / "results-subset_accuracy-average.md").read_text()
    report.main(["--workdir", str(finished), "--protocols"])
    assert "micro_f1" in (finished / "report" / "protocols.md").read_text()


def test_predict_gives_lists_and_thresholds_apply(finished, texts):
    run = finished / "students" / "monox_kd" / "seed-0"
    plain, fitted = predicted(run, texts), predicted(run, texts, "--threshold")
    step = next(
        row["step"]
        for row in tiny.rows_of(finished)
        if (row["objective"], row["selection"]) == ("monox_kd", "source_dev")
    )
    thresholds = json.loads((run / "calibration.json").read_text())[str(step)]["class_thresholds"]
    for one, two in zip(plain, fitted, strict=True):
        assert one["labels"] == [name for name, p in one["probabilities"].items() if p > 0.5]
        cuts = zip(one["probabilities"].items(), thresholds, strict=True)
        assert two["labels"] == [name for (name, p), threshold in cuts if p > threshold]
        assert "label" not in one
    assert predicted(run, texts, "--long", "mean")[2]["probabilities"] != plain[2]["probabilities"]
    assert predicted(run, texts, "--calibrated")[0]["probabilities"] != plain[0]["probabilities"]


def test_an_export_predicts_the_same(finished, exported, texts):
    run = finished / "students" / "monox_kd" / "seed-0"
    values = json.loads((exported / "plain" / "config.json").read_text())
    assert values["problem_type"] == "multi_label_classification"
    assert predicted(exported / "plain", texts) == predicted(run, texts)
    both = predicted(run, texts, "--threshold")
    assert [row["labels"] for row in predicted(exported / "fitted", texts)] == [row["labels"] for row in both]
    card = (exported / "fitted" / "README.md").read_text()
    assert "top_k=None" in card and "**Thresholds**: a class is predicted" in card and "majority class" not in card


def test_an_export_is_scored_as_the_run_was(finished, exported, config_file, tmp_path):
    command = ["--model", str(exported / "plain"), "--config", str(config_file), "--output", str(tmp_path / "out")]
    evaluate.main([*command, "--metrics=micro_f1,subset_accuracy"])
    again = {(r["language"], r["metric"]): r["value"] for r in tiny.rows_of(tmp_path / "out")}
    for row in tiny.rows_of(finished):
        key = (row["language"], row["metric"])
        if (row["objective"], row["selection"]) == ("monox_kd", "source_dev") and key in again:
            assert row["value"] == pytest.approx(again[key])
    assert (
        json.loads((tmp_path / "out" / "predictions" / "test-de.jsonl").read_text().splitlines()[0])["label"]
        is not None
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.selection_metric=auroc"], "selection_metric: a multi-label task has no auroc"),
        (["--config.selection_metric=class_f1"], "selection_metric: class_f1 has a value for each class"),
        (["--config.metrics=('micro_f1','accuracy')"], "metrics: a multi-label task has no accuracy"),
        (["--config.task.multi_label=False"], "data/en/train.jsonl:1: column 'label' is a list"),
        (["--config.task.labelled=100"], "task.labelled 100 is more than available: 80"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(config_file, tmp_path, flags, message):
    plain = ["--config.metrics=('micro_f1',)"] if "multi_label" not in flags[0] else ["--config.metrics=('accuracy',)"]
    if "multi_label" in flags[0]:
        plain += ["--config.selection_metric=accuracy", "--config.transfer.fitted_thresholds=False"]
    with pytest.raises(UserError, match=message):
        main.main(["--config", str(config_file), "--workdir", str(tmp_path / "run"), *plain, *flags])
    assert not (tmp_path / "run" / "config.json").exists()


def test_describe_shows_label_sets(config_file, tmp_path, capsys):
    describe.main(["--config", str(config_file), "--batches", "1", "--json", str(tmp_path / "out.json")])
    shown = json.loads((tmp_path / "out.json").read_text())
    lines = (config_file.parent / "data" / "en" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    sets = [json.loads(line)["label"] for line in lines]
    test = next(entry for entry in shown["label_sets"] if (entry["language"], entry["name"]) == ("en", "test"))
    assert test["cardinality"] == pytest.approx(sum(map(len, sets)) / len(sets)) and test["most"] == 2
    assert test["empty"] == sum(not labels for labels in sets)
    counts = next(entry for entry in shown["counts"] if (entry["language"], entry["name"]) == ("en", "test"))
    assert counts["labels"] == [sum(name in labels for labels in sets) for name in label_sets.LABELS]
    assert "Label sets" in capsys.readouterr().out


def test_a_sweep_over_fitted_thresholds_trains_only_pseudo_labels_again(config_file):
    fitted, half = (
        settings.load(str(config_file), [f"--config.transfer.fitted_thresholds={value}"]) for value in (True, False)
    )
    same = {name for name in fitted.objectives if settings_of(fitted, name) == settings_of(half, name)}
    assert same == {"vanilla", "monox_kd"}


def test_fitted_thresholds_are_refused_where_the_same_logits_are_distilled(config_file):
    with pytest.raises(UserError, match="fitted_thresholds is True, but monox_pl also learns from the teacher's prob"):
        experiment.check(settings.load(str(config_file), ["--config.objective.monox_pl.soft_weight=1.0"]))
