"""Selection protocols and recalibration from one experiment: its rows, the report, predictions, and exports."""

import json
import math
import shutil

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import config, experiment
from xtransfer.errors import UserError
from xtransfer.export import __main__ as export
from xtransfer.predict import __main__ as predict
from xtransfer.report import __main__ as report
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import checksums
from xtransfer.train.checkpoints import AVERAGE, Checkpoints

RUN = "students/vanilla/seed-0"
FLAGS = (
    "--config.objectives=('vanilla',)",
    "--config.teacher.steps=4",
    "--config.student.average_last=2",
    "--config.oracle=True",
    "--config.calibration.temperature=True",
    "--config.calibration.threshold=True",
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Return a finished workdir with an average, an oracle, a temperature, and a threshold."""
    root = tmp_path_factory.mktemp("protocols")
    data = tiny.write_task(root / "data", languages=("en", "de", "fr"))
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    settings = {"pooling": "cls", "steps": 12, "evaluations": 4, "learning_rate": 3e-3}
    file = tiny.config_file(root / "tiny.py", data, teacher, student, **settings)
    experiment.run(config.load(str(file), FLAGS), root / "run")
    return Workdir(root / "run")


@pytest.fixture(scope="module")
def texts(workdir):
    """Return the German test split as an input file."""
    path = workdir.root.parent / "texts.tsv"
    shutil.copy(workdir.root.parent / "data" / "de" / "test.tsv", path)
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def students(workdir, **values):
    rows = [row for row in read(workdir.results) if row["objective"] == "vanilla"]
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def test_the_oracle_has_the_best_step_of_each_language_and_no_other_protocol_does(workdir):
    metrics = read(workdir.root / RUN / "metrics.jsonl")
    for language in ("de", "fr"):
        scores = {row["step"]: row["target_dev_scores"][language] for row in metrics}
        best = min(scores, key=lambda step: (-scores[step], step))
        assert {row["step"] for row in students(workdir, selection="target_dev", language=language)} == {best}
    source = {row["step"] for row in students(workdir, selection="source_dev")}
    assert {row["step"] for row in students(workdir, selection="target_dev", language="en")} == source
    assert {row["step"] for row in students(workdir, selection="average")} == {12}
    teacher = {row["selection"] for row in read(workdir.results) if row["objective"] == "teacher"}
    assert teacher == {"source_dev", "last"}


def test_the_average_is_scored_by_its_own_weights(workdir):
    predictions = workdir.root / "predictions" / RUN
    last, average = (read(predictions / name / "test-de.jsonl") for name in ("12", "12-average"))
    assert [row["id"] for row in last] == [row["id"] for row in average]
    assert [row["logits"] for row in last] != [row["logits"] for row in average]
    accuracy = np.mean([row["label"] == row["prediction"] for row in average])
    assert [row["value"] for row in students(workdir, selection="average", language="de", metric="accuracy")] == [
        accuracy
    ]


def test_every_language_has_the_scores_before_and_after_recalibration(workdir):
    fitted = json.loads((workdir.root / RUN / "calibration.json").read_text())
    assert {f"{step}" for step in (12,)} | {"12-average"} <= fitted.keys()
    for language in ("en", "de", "fr"):
        (row,) = students(workdir, selection="last", language=language, metric="log_loss_calibrated")
        predictions = read(workdir.root / "predictions" / RUN / "12" / f"test-{language}.jsonl")
        labels = np.array([["bad", "good"].index(entry["label"]) for entry in predictions])
        logits = np.array([entry["logits"] for entry in predictions])
        scaled = logits / fitted["12"]["temperature"]
        sign = np.where(labels == 1, 1, -1)
        assert row["value"] == pytest.approx(np.log1p(np.exp(-sign * (scaled[:, 1] - scaled[:, 0]))).mean(), abs=1e-4)
        (row,) = students(workdir, selection="last", language=language, metric="accuracy_thresholded")
        assert row["value"] == np.mean((logits[:, 1] - logits[:, 0] > fitted["12"]["log_odds"]) == labels)
    for name in ("log_loss", "ece", "ece_calibrated", "macro_f1_thresholded"):
        assert len(students(workdir, selection="source_dev", metric=name)) == 3


def test_the_report_puts_the_protocols_side_by_side_and_the_headline_is_zero_shot(workdir, capsys):
    report.main(["--workdir", str(workdir.root)])
    headline = {path: path.read_bytes() for path in (workdir.root / "report").iterdir()}
    page = (workdir.root / "report" / "results.md").read_text()
    assert "(source_dev)" in page and "oracle" not in page
    report.main(["--workdir", str(workdir.root), "--selection", "target_dev"])
    assert "oracle, not zero-shot (target_dev)" in (workdir.root / "report" / "results-target_dev.md").read_text()
    report.main(["--workdir", str(workdir.root), "--selection", "average", "--metric", "ece_calibrated"])
    assert {path: path.read_bytes() for path in headline} == headline, "the headline is not replaced"
    report.main(["--workdir", str(workdir.root), "--protocols"])
    assert "target_dev (not zero-shot)" in capsys.readouterr().out
    lines = (workdir.root / "report" / "protocols.md").read_text().splitlines()
    cells = [line.split(" | ") for line in lines if line.startswith("| vanilla")]
    protocols = ["source_dev", "last", "average", "target_dev (not zero-shot)"]
    assert [row[1] for row in cells] == protocols
    means = [
        np.mean(
            [
                row["value"]
                for language in ("de", "fr")
                for row in students(workdir, selection=name.split()[0], language=language, metric="accuracy")
            ]
        )
        for name in protocols
    ]
    assert [row[3] for row in cells] == [f"{100 * mean:.1f}" for mean in means]
    assert [row[4] for row in cells] == ["– |", *(f"{100 * (mean - means[0]):+.1f} |" for mean in means[1:])]


def test_evaluating_again_changes_nothing_and_fits_what_was_removed(workdir):
    before = {path: path.read_bytes() for path in (workdir.results, workdir.root / RUN / "calibration.json")}
    (workdir.root / RUN / "calibration.json").unlink()
    settings = config.load(str(workdir.root.parent / "tiny.py"), FLAGS)
    experiment.run(settings, workdir.root)
    assert {path: path.read_bytes() for path in before} == before


def label(model, texts, *flags):
    output = texts.with_suffix(".out")
    arguments = ["--model", str(model), "--input", str(texts), "--output", str(output), "--overwrite"]
    predict.main([*arguments, *flags])
    return read(output)


def set_fitted(workdir, root, **values):
    """Return a copy of the workdir whose last checkpoint has other values, which change many predictions."""
    copy = Workdir(shutil.copytree(workdir.root, root / "run"))
    path = copy.root / RUN / "calibration.json"
    fitted = json.loads(path.read_text())
    fitted["12"] = checksums.signed({**checksums.unsigned(fitted["12"]), **values})
    path.write_text(json.dumps(fitted))
    return copy


def exported(workdir, output, *flags):
    arguments = ["--workdir", str(workdir.root), "--objective", "vanilla", "--seed", "0", "--output", str(output)]
    export.main([*arguments, "--selection", "last", *flags])
    return output


def test_predict_and_export_apply_the_temperature_and_the_threshold(workdir, texts, tmp_path):
    margins = [logit_margin(row) for row in label(workdir.root / RUN, texts, "--selection", "last")]
    middle = float(np.mean(sorted(margins)[6:8]))  # about a third of the texts are below it
    copy = set_fitted(workdir, tmp_path, temperature=2.5, log_odds=middle)
    run, last = copy.root / RUN, ("--selection", "last")
    plain, calibrated, decided, both = (
        label(run, texts, *last, *flags)
        for flags in ([], ["--calibrated"], ["--threshold"], ["--calibrated", "--threshold"])
    )
    for before, after in zip(plain, calibrated, strict=True):
        assert after["label"] == before["label"]
        assert logit_margin(after) == pytest.approx(logit_margin(before) / 2.5, abs=1e-4)
    assert [row["label"] for row in decided] == ["good" if margin > middle else "bad" for margin in margins]
    assert [row["label"] for row in decided].count("bad") == 7
    assert [row["probabilities"] for row in decided] == [row["probabilities"] for row in plain]
    assert [row["label"] for row in both] == [row["label"] for row in decided]
    assert [row["probabilities"] for row in both] == [row["probabilities"] for row in calibrated]

    scaled = exported(copy, tmp_path / "scaled", "--calibrated")
    for ours, theirs in zip(calibrated, label(scaled, texts), strict=True):
        assert theirs["label"] == ours["label"]
        assert theirs["probabilities"] == pytest.approx(ours["probabilities"], abs=2e-6)
    folded = exported(copy, tmp_path / "folded", "--calibrated", "--threshold")
    for ours, theirs in zip(calibrated, label(folded, texts), strict=True):
        assert logit_margin(theirs) == pytest.approx(logit_margin(ours) - middle / 2.5, abs=1e-4)
    assert [row["label"] for row in label(folded, texts)] == [row["label"] for row in decided]
    card = (folded / "README.md").read_text()
    assert (
        "**Temperature**: 2.5, which has the lowest log loss" in card and "**Threshold**: `good` is predicted" in card
    )
    (row,) = students(copy, selection="last", language="de", metric="accuracy_thresholded")
    assert f"| de | test | {100 * row['value']:.1f} |" in card
    assert "**Temperature**" not in (exported(copy, tmp_path / "plain") / "README.md").read_text()


def test_transformers_computes_the_calibrated_probabilities(workdir, texts, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    copy = set_fitted(workdir, tmp_path, temperature=2.5)
    ours = label(copy.root / RUN, texts, "--selection", "last", "--calibrated")
    directory = exported(copy, tmp_path / "scaled", "--calibrated")
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    lines = [line.split("\t")[0] for line in texts.read_text().splitlines()[1:]]
    encoded = AutoTokenizer.from_pretrained(directory)(lines, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        theirs = model(**encoded).logits.softmax(-1).numpy()
    np.testing.assert_allclose([row["probabilities"]["good"] for row in ours], theirs[:, 1], atol=1e-5)


def logit_margin(row):
    return math.log(row["probabilities"]["good"] / row["probabilities"]["bad"])


def test_the_average_predicts_with_its_own_weights(workdir, texts):
    run = workdir.root / RUN
    predictions = {row["id"]: row for row in read(workdir.root / "predictions" / RUN / "12-average" / "test-de.jsonl")}
    for row, expected in zip(label(run, texts, "--selection", "average"), predictions.values(), strict=True):
        bad, good = expected["logits"]
        assert logit_margin(row) == pytest.approx(good - bad, abs=1e-3)
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        assert not np.array_equal(
            checkpoints.restore_arrays(12, AVERAGE)["head.kernel"], checkpoints.restore_arrays(12)["head.kernel"]
        )


def test_what_was_not_fitted_or_averaged_is_refused_with_the_setting(workdir, texts, tmp_path):
    copy = Workdir(shutil.copytree(workdir.root, tmp_path / "run"))
    (copy.root / RUN / "calibration.json").unlink()
    for flag, key in (("--calibrated", "temperature"), ("--threshold", "threshold")):
        message = rf"seed-0: no {key} was fitted to step 12 \(last\): .* --config\.calibration\.{key}=True"
        with pytest.raises(UserError, match=message):
            label(copy.root / RUN, texts, "--selection", "last", flag)
        with pytest.raises(UserError, match=message):
            exported(copy, tmp_path / "out", flag)
    with pytest.raises(UserError, match="a Hugging Face classifier, and only a run has a temperature"):
        label(exported(copy, tmp_path / "plain"), texts, "--calibrated")
    with pytest.raises(UserError, match=r"teacher: this run has no average .* --config\.teacher\.average_last=3"):
        label(copy.teacher, texts, "--selection", "average")


def test_scores_after_recalibration_cannot_be_chosen_as_metrics(workdir, tmp_path):
    file = str(workdir.root.parent / "tiny.py")
    with pytest.raises(UserError, match=r"metrics: ece_calibrated is not a metric to choose: calibration\.temperature"):
        experiment.run(config.load(file, ["--config.metrics=('accuracy','ece_calibrated')"]), tmp_path / "run")
