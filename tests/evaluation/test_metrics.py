"""Metrics compared with values computed by hand and with scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from xtransfer.errors import UserError
from xtransfer.evaluation import metrics
from xtransfer.evaluation.metrics import at_chance, constant_prediction, scores

# Six predictions are right: 0 0 0, 1, 2 2. Three are wrong: a 0 predicted as 1, a 1 as 2, and a 1 as 0.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
PREDICTED = np.array([0, 0, 0, 1, 1, 2, 0, 2, 2])


def test_the_confusion_matrix_has_gold_classes_in_rows():
    confusion = metrics.confusion_matrix(PREDICTED, LABELS, 3)
    np.testing.assert_array_equal(confusion, [[3, 1, 0], [1, 1, 1], [0, 0, 2]])
    np.testing.assert_array_equal(metrics.confusion_matrix([0], [2], 4), np.eye(4)[2][:, None] * np.eye(4)[0])


def test_scores_by_hand():
    # Accuracy 6/9. F1: class 0 2·3/(4 + 4) = 3/4, class 1 2·1/(3 + 2) = 2/5, class 2 2·2/(2 + 3) = 4/5; mean 0.65.
    result = scores(PREDICTED, LABELS, 3)
    # The most frequent gold class is 0, with 4 of 9.
    names = ["accuracy", "macro_f1", "majority_share"]
    assert [(score.metric, score.count) for score in result] == [(name, 9) for name in names]
    assert [score.value for score in result] == pytest.approx([2 / 3, 0.65, 4 / 9], rel=1e-12)
    assert result[0]._asdict() == {"metric": "accuracy", "value": 6 / 9, "count": 9}  # as in a row of results


def test_macro_f1_skips_an_absent_class_and_counts_zero_for_one_only_predicted():
    # Class 2 of 3 is absent, so F1 is averaged over 0 and 1: (1 + 1)/2. With a wrong prediction of 2: (1 + 2/3 + 0)/3.
    assert scores([0, 1], [0, 1], 3)[1] == ("macro_f1", 1, 2)
    assert scores([0, 1, 2], [0, 1, 1], 3)[1].value == pytest.approx(5 / 9, rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_scores_match_scikit_learn(pairs):
    predictions, labels = np.array(pairs).T
    values = [score.value for score in scores(predictions, labels, 4)[:2]]
    expected = [
        reference.accuracy_score(labels, predictions),
        reference.f1_score(labels, predictions, average="macro", zero_division=0),
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "no examples"),
        ([0, 1], [0], "shape"),
        ([0], [-1], "label -1 at position 0"),
        ([0, 2], [0, 1], "prediction 2 at position 1"),
    ],
)
def test_invalid_predictions_and_labels_are_refused(predictions, labels, message):
    with pytest.raises(UserError, match=message):
        scores(np.array(predictions, int), np.array(labels, int), 2)


def test_constant_prediction_is_named():
    labels = np.arange(1000) % 2
    assert constant_prediction(np.ones(1000, int), labels) == 1
    assert constant_prediction(labels, labels) is None
    assert constant_prediction(np.zeros(9, int), np.zeros(9, int)) is None
    assert constant_prediction(np.zeros(0, int), np.zeros(0, int)) is None


@pytest.mark.parametrize(
    ("accuracy", "majority", "expected"),
    # 1,000 coins that show heads in nine of ten cases: P(X >= 915) = 0.0607, P(X >= 916) = 0.0485 (the exact tail).
    # 1,000 fair coins: P(X >= 526) = 0.0534, P(X >= 527) = 0.0468.
    [
        (0.526, 0.5, True),
        (0.4, 0.5, True),
        (0.9, 0.9, True),
        (0.915, 0.9, True),
        (0.916, 0.9, False),
        (0.527, 0.5, False),
        (0.527, 0.9, True),
        (1, 1, False),
    ],
)
def test_at_chance_compares_with_the_majority_class(accuracy, majority, expected):
    assert at_chance(accuracy, 1000, majority) is expected
