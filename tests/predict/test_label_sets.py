"""Multi-label classifiers from Hugging Face directories: predictions, another kind of task, and trimming."""

import json
import shutil

import pytest

from tests.helpers import label_sets
from tests.helpers.label_sets import TEXTS, predicted
from xtransfer import main
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.trim import __main__ as trim


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    return label_sets.config_file(tmp_path_factory.mktemp("setting"))


@pytest.fixture(scope="module")
def classifier(config_file, tmp_path_factory):
    return label_sets.classifier(config_file.parent / "student", tmp_path_factory.mktemp("made") / "classifier")


@pytest.fixture
def texts(tmp_path):
    return label_sets.write_texts(tmp_path)


def test_long_texts_get_the_mean_of_their_chunks(classifier, texts):
    plain, mean = predicted(classifier, texts), predicted(classifier, texts, "--long", "mean")
    for number, (one, other) in enumerate(zip(plain, mean, strict=True)):
        is_same = one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
        assert is_same == (number != 2)
    for row in (*plain, *mean):
        assert row["labels"] == [name for name, p in row["probabilities"].items() if p > 0.5]
    assert len({row["probabilities"]["positive"] for row in plain}) == len(plain)


def test_only_a_run_has_thresholds(classifier, texts):
    with pytest.raises(UserError, match="only a run has a temperature and a threshold"):
        predicted(classifier, texts, "--threshold")


def test_a_pipeline_of_transformers_gives_the_same_probabilities(classifier, texts):
    pytest.importorskip("torch")
    from transformers import pipeline

    theirs = pipeline("text-classification", model=str(classifier), top_k=None, truncation=True)(TEXTS)
    for ours, scores in zip(predicted(classifier, texts), theirs, strict=True):
        assert {score["label"] for score in scores} == ours["probabilities"].keys()
        for score in scores:
            assert score["score"] == pytest.approx(ours["probabilities"][score["label"]], abs=1e-4)
        assert sum(ours["probabilities"].values()) != pytest.approx(1, abs=1e-3)


def test_a_classifier_of_the_other_kind_is_refused(classifier, config_file, tmp_path):
    directory = shutil.copytree(classifier, tmp_path / "single")
    values = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(values | {"problem_type": "single_label_classification"}))
    with pytest.raises(UserError, match="gives a text one label, and the task files has any number of labels"):
        evaluate.main(["--model", str(directory), "--config", str(config_file)])
    # Nor is its head a start for the other kind of task.
    with pytest.raises(UserError, match="the head was trained for one label per text, and the task has any number"):
        main.main(
            [
                *("--config", str(config_file), "--workdir", str(tmp_path / "run")),
                f"--config.student.checkpoint={directory}",
            ]
        )


def test_a_trimmed_classifier_is_still_a_multi_label_one(classifier, texts, tmp_path):
    trim.main(["--model", str(classifier), "--text", str(texts), "--output", str(tmp_path / "small")])
    assert json.loads((tmp_path / "small" / "config.json").read_text())["problem_type"] == "multi_label_classification"
    before, after = predicted(classifier, texts), predicted(tmp_path / "small", texts)
    assert [row["labels"] for row in before] == [row["labels"] for row in after]
