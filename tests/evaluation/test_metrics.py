"""Metrics compared with values computed by hand and with scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from xtransfer.errors import UserError
from xtransfer.evaluation import metrics
from xtransfer.evaluation.metrics import at_chance, degenerate_warning, scores

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


def test_constant_prediction_is_degenerate():
    labels = np.arange(1000) % 2
    assert "constant prediction: class 1 for all 1,000" in degenerate_warning(np.ones(1000, int), labels, 2)
    assert degenerate_warning(np.zeros(9, int), np.zeros(9, int), 2) is None


@pytest.mark.parametrize(
    ("correct", "warned"),
    # 1,000 fair coins: P(X >= 526) = 0.0534, P(X >= 527) = 0.0468 (normal approximation with
    # continuity correction: z = 25.5/15.81 = 1.613 and 26.5/15.81 = 1.676).
    [(400, True), (500, True), (526, True), (527, False), (700, False)],
)
def test_accuracy_within_noise_of_chance_is_degenerate(correct, warned):
    labels = np.arange(1000) % 2
    predictions = np.where(np.arange(1000) < correct, labels, 1 - labels)
    warning = degenerate_warning(predictions, labels, 2)
    assert (warning is not None) == warned
    if warned:
        assert f"{correct / 10:.1f}%" in warning and "50.0%" in warning


def test_chance_is_the_majority_share_if_classes_are_unbalanced():
    labels = np.array([0] * 900 + [1] * 100)
    predictions = np.where(np.arange(1000) % 10 == 0, 1 - labels, labels)  # 90 % right, like always predicting 0
    assert "90.0%" in degenerate_warning(predictions, labels, 2)
    assert degenerate_warning(labels, labels, 2) is None


@pytest.mark.parametrize(
    ("accuracy", "majority", "expected"),
    # 1,000 biased coins, with 90 % heads: P(X >= 915) = 0.0607, P(X >= 916) = 0.0485 (the exact tail).
    [(0.9, 0.9, True), (0.915, 0.9, True), (0.916, 0.9, False), (0.527, 0.5, False), (0.527, 0.9, True), (1, 1, False)],
)
def test_at_chance_compares_with_the_majority_class(accuracy, majority, expected):
    assert at_chance(accuracy, 1000, majority) is expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
def test_the_rows_and_the_warning_agree(pairs):
    """The report sees only the rows, and the log sees the predictions. Both must flag the same runs."""
    predictions, labels = np.array(pairs).T
    by_name = {score.metric: score for score in scores(predictions, labels, 3)}
    from_rows = at_chance(by_name["accuracy"].value, len(pairs), by_name["majority_share"].value)
    assert from_rows == (degenerate_warning(predictions, labels, 3) is not None)
