"""A student's agreement with its teacher, by hand."""

import json

import pytest

from xtransfer.errors import UserError
from xtransfer.evaluation import agreement
from xtransfer.evaluation.metrics import Score

LABELS = ("bad", "good", "mixed")


def write(path, predictions, *, label="good"):
    """Write a file of predictions: a predicted class by id. The labels and the logits play no part."""
    rows = [
        {"id": name, "label": label, "prediction": prediction, "logits": [0.0, 0.0, 0.0]}
        for name, prediction in predictions.items()
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_agreement_is_the_share_of_equal_predictions_whatever_the_labels(tmp_path):
    teacher = write(tmp_path / "teacher", {"a": "bad", "b": "good", "c": "mixed", "d": "bad"}, label="good")
    student = write(tmp_path / "student", {"a": "bad", "b": "bad", "c": "mixed", "d": "bad"}, label="mixed")
    assert agreement.scores(student, teacher, LABELS) == [Score("teacher_agreement", 0.75, 4)]
    assert agreement.scores(teacher, teacher, LABELS) == [Score("teacher_agreement", 1.0, 4)]


def test_other_examples_and_other_classes_are_refused(tmp_path):
    teacher = write(tmp_path / "teacher", {"a": "bad", "b": "good"})
    for name, predictions, message in (
        ("order", {"b": "good", "a": "bad"}, "different examples: remove both files"),
        ("fewer", {"a": "bad"}, "different examples: remove both files"),
        ("class", {"a": "bad", "b": "superb"}, "class:2: not a prediction"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            agreement.scores(write(tmp_path / name, predictions), teacher, LABELS)
        assert "\n" not in str(caught.value)
