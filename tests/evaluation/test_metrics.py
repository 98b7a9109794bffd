"""Metrics compared with values computed by hand and with scikit-learn."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as reference

from xtransfer.errors import UserError
from xtransfer.evaluation import metrics
from xtransfer.evaluation.metrics import METRICS, at_chance, check_names, check_single, constant_prediction, scores

# Six predictions are right: 0 0 0, 1, 2 2. Three are wrong: a 0 predicted as 1, a 1 as 2, and a 1 as 0.
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
PREDICTED = np.array([0, 0, 0, 1, 1, 2, 0, 2, 2])
CLASSES = ("a", "b", "c")
DEFAULT = ("accuracy", "macro_f1")

# Five reviews; the probabilities of "good" are 0.75, 0.5, 0.75, 0.25, and 0.1. A tie goes to the first class.
GOOD = np.array([0.75, 0.5, 0.75, 0.25, 0.1])
REVIEWS = np.log(np.stack([1 - GOOD, GOOD], axis=1))
REVIEW_LABELS = np.array([1, 1, 0, 0, 0])

SINGLE = tuple(metrics.names_of(multi_label=False))  # test_multi_label.py has the others


def logits_of(predictions, num_classes):
    """Return logits [n, K] with these predictions."""
    return np.eye(num_classes)[np.asarray(predictions, int)]


def value(name, logits, labels, classes=("bad", "good")):
    return metrics.score(logits, labels, classes, name)


def test_the_confusion_matrix_has_gold_classes_in_rows():
    confusion = metrics.confusion_matrix(PREDICTED, LABELS, 3)
    np.testing.assert_array_equal(confusion, [[3, 1, 0], [1, 1, 1], [0, 0, 2]])
    np.testing.assert_array_equal(metrics.confusion_matrix([0], [2], 4), np.eye(4)[2][:, None] * np.eye(4)[0])


def test_scores_by_hand():
    # Accuracy 6/9. F1: class 0 2·3/(4 + 4) = 3/4, class 1 2·1/(3 + 2) = 2/5, class 2 2·2/(2 + 3) = 4/5; mean 0.65.
    # Weighted by 4, 3, and 2 gold examples: (3 + 1.2 + 1.6)/9. Matthews: with c = 6 right of s = 9, gold counts 4 3 2,
    # and predicted counts 4 2 3: (6·9 − (16 + 6 + 6))/√((81 − 29)(81 − 29)) = 26/52.
    expected = {
        "accuracy": 2 / 3,
        "macro_f1": 0.65,
        "weighted_f1": 5.8 / 9,
        "class_precision/a": 3 / 4,
        "class_precision/b": 1 / 2,
        "class_precision/c": 2 / 3,
        "class_recall/a": 3 / 4,
        "class_recall/b": 1 / 3,
        "class_recall/c": 1,
        "class_f1/b": 2 / 5,
        "matthews_correlation": 0.5,
        # The most frequent gold class is 0, with 4 of 9.
        "majority_share": 4 / 9,
    }
    names = (*DEFAULT, "weighted_f1", "class_precision", "class_recall", "class_f1/b", "matthews_correlation")
    result = scores(logits_of(PREDICTED, 3), LABELS, CLASSES, names)
    assert [(score.metric, score.count) for score in result] == [(name, 9) for name in expected]
    assert [score.value for score in result] == pytest.approx(list(expected.values()), rel=1e-12)
    assert metrics.score_names(names, CLASSES) == list(expected)
    assert result[0]._asdict() == {"metric": "accuracy", "value": 6 / 9, "count": 9}  # as in a row of results


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # −log of 0.75, 0.5, 0.25, 0.75, and 0.9.
        ("log_loss", -(2 * math.log(0.75) + math.log(0.5) + math.log(0.25) + math.log(0.9)) / 5),
        # Both classes of an example have the same error, so twice the mean of 0.25², 0.5², 0.75², 0.25², and 0.1².
        ("brier_score", 2 * (0.0625 + 0.25 + 0.5625 + 0.0625 + 0.01) / 5),
        # Confidences 0.5 (bin 8 of 15; wrong), three of 0.75 (bin 12; two right), and 0.9 (bin 14; right).
        ("ece", (0.5 + 3 * (0.75 - 2 / 3) + 0.1) / 5),
        # Five predictions in 15 bins of equal mass have a bin each: 0.5 wrong, 0.75 right twice and wrong once, 0.9.
        ("adaptive_ece", (0.5 + 0.25 + 0.75 + 0.25 + 0.1) / 5),
        # Of the six pairs, 0.75 ties with 0.75 and beats two; 0.5 loses to 0.75 and beats two.
        ("auroc", (0.5 + 2 + 2) / 6),
        # Every threshold that a positive example passes admits a negative one, which is a third of them.
        ("recall_at_fpr_0.01", 0),
        ("recall_at_fpr_0.05", 0),
    ],
)
def test_metrics_of_probabilities_by_hand(name, expected):
    assert value(name, REVIEWS, REVIEW_LABELS) == pytest.approx(expected, rel=1e-12)


def test_recall_counts_positives_above_the_threshold_that_the_rate_allows():
    # One of 20 negatives (5 %) scores 4, above two of the four positives; the best positive scores 5, above all.
    margins = np.array([5, 3, 3, 1, 4, *[0] * 19], float)
    labels = np.array([1] * 4 + [0] * 20)
    logits = np.stack([np.zeros(24), margins], axis=1)
    assert value("recall_at_fpr_0.01", logits, labels) == 1 / 4
    assert value("recall_at_fpr_0.05", logits, labels) == 1


def test_every_metric_is_tested_by_hand_and_stays_in_its_range():
    tested = {"accuracy", "macro_f1", "weighted_f1", "class_precision", "class_recall", "class_f1", "log_loss", "ece"}
    tested |= {"matthews_correlation", "brier_score", "adaptive_ece", "auroc"}
    tested |= {"recall_at_fpr_0.01", "recall_at_fpr_0.05"}
    assert tested == set(SINGLE)
    rng = np.random.default_rng(0)
    for _ in range(20):
        logits, labels = rng.normal(size=(9, 2)) * 5, np.array([0, 1, *rng.integers(2, size=7)])
        for score in scores(logits, labels, ("a", "b"), SINGLE):
            low, high = metrics.value_range(score.metric)
            assert low <= score.value <= high, score


@pytest.mark.parametrize("name", SINGLE)
def test_the_direction_of_a_metric_prefers_the_right_answer(name):
    labels = np.array([0, 1] * 10)
    right = np.stack([labels == 0, labels == 1], axis=1) * 8.0
    mixed = right.copy()
    mixed[:4] = mixed[:4, ::-1]  # four of twenty are wrong, and as sure of it
    single = name + "/a" if METRICS[name].per_class else name
    better, worse = (value(single, logits, labels, ("a", "b")) for logits in (right, mixed))
    assert (better > worse) if METRICS[name].higher_is_better else (better < worse)


def test_macro_f1_skips_an_absent_class_and_counts_zero_for_one_only_predicted():
    # Class 2 of 3 is absent, so F1 is averaged over 0 and 1: (1 + 1)/2. With a wrong prediction of 2: (1 + 2/3 + 0)/3.
    assert scores(logits_of([0, 1], 3), [0, 1], CLASSES, DEFAULT)[1] == ("macro_f1", 1, 2)
    assert value("macro_f1", logits_of([0, 1, 2], 3), [0, 1, 1], CLASSES) == pytest.approx(5 / 9, rel=1e-12)


def test_log_loss_is_exact_where_probabilities_underflow():
    assert value("log_loss", [[1000.0, 0.0]], [1]) == 1000


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 40))
def test_scores_match_scikit_learn(seed, count):
    rng = np.random.default_rng(seed)
    logits, labels = rng.normal(size=(count, 4)), rng.integers(4, size=count)
    names = (*DEFAULT, "weighted_f1", "matthews_correlation", "log_loss", "brier_score")
    guesses, shares = logits.argmax(1), np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = [
        reference.accuracy_score(labels, guesses),
        reference.f1_score(labels, guesses, average="macro", zero_division=0),
        reference.f1_score(labels, guesses, average="weighted", zero_division=0),
        reference.matthews_corrcoef(labels, guesses),
        reference.log_loss(labels, shares, labels=range(4)),
        np.mean(np.sum((shares - np.eye(4)[labels]) ** 2, axis=1)),
    ]
    values = [score.value for score in scores(logits, labels, "abcd", names)[:-1]]
    np.testing.assert_allclose(values, expected, rtol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 30))
def test_binary_metrics_match_a_count_of_pairs_and_thresholds(seed, count):
    rng = np.random.default_rng(seed)
    margins, labels = rng.integers(6, size=count + 2).astype(float), np.array([0, 1, *rng.integers(2, size=count)])
    positive, negative = margins[labels == 1], margins[labels == 0]
    logits = np.stack([-margins, np.zeros(count + 2)], axis=1)
    wins = (positive[:, None] > negative).mean() + (positive[:, None] == negative).mean() / 2
    assert value("auroc", logits, labels) == pytest.approx(wins, rel=1e-12)
    allowed = [t for t in (*np.unique(margins), np.inf) if (negative >= t).mean() <= 0.05]
    assert value("recall_at_fpr_0.05", logits, labels) == max((positive >= t).mean() for t in allowed)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        ([], [], "no examples"),
        ([0, 1], [0], "shape"),
        ([0], [-1], "label -1 at position 0"),
        ([0, 1], [0, 2], "label 2 at position 1"),
    ],
)
def test_invalid_predictions_and_labels_are_refused(predictions, labels, message):
    with pytest.raises(UserError, match=message):
        scores(logits_of(predictions, 2), np.array(labels, int), ("a", "b"), DEFAULT)


def test_a_prediction_out_of_range_is_refused():
    with pytest.raises(UserError, match="prediction 2 at position 1"):
        metrics.confusion_matrix([0, 2], [0, 1], 2)


@pytest.mark.parametrize(
    ("name", "classes", "message"),
    [
        ("acuracy", "ab", "config key metrics: no metric 'acuracy'; did you mean 'accuracy'?"),
        ("zzz", "ab", "config key metrics: no metric 'zzz'; the metrics are accuracy, macro_f1, "),
        ("auroc", "abc", "config key metrics: auroc needs a task with 2 classes, and this one has 3"),
        ("ece/a", "ab", "config key metrics: ece has one value for all classes: write 'ece', not 'ece/a'"),
        (
            "teacher_agreement",
            "ab",
            "config key metrics: teacher_agreement is not a metric to choose: it depends on a ",
        ),
        ("class_f1/c", "ab", "config key metrics: 'class_f1/c' names no class; the classes are a, b"),
    ],
)
def test_a_metric_that_a_task_does_not_have_is_refused(name, classes, message):
    with pytest.raises(UserError) as caught:
        check_names("config key metrics", ("accuracy", name), tuple(classes))
    assert str(caught.value).startswith(message)


def test_agreement_with_the_teacher_has_a_range_and_a_direction():
    metric = metrics.metric_of("teacher_agreement")
    assert (metric.low, metric.high, metric.higher_is_better, metric.is_share) == (0, 1, True, True)
    assert metrics.value_range("teacher_agreement") == (0, 1)


def test_a_metric_to_select_by_has_one_value():
    check_single("config key selection_metric", "class_f1/a", ("a", "b"))
    with pytest.raises(UserError, match="selection_metric: teacher_agreement is not .*: it depends on a second model"):
        check_single("config key selection_metric", "teacher_agreement", ("a", "b"))
    with pytest.raises(UserError, match="selection_metric: class_f1 has a value for each class: name one, such as"):
        check_single("config key selection_metric", "class_f1", ("a", "b"))


def test_a_binary_metric_needs_both_classes():
    with pytest.raises(UserError, match="de test: all have the same label, so auroc is not defined"):
        metrics.check_defined(("accuracy", "auroc"), [1, 1, 1], "de test")
    metrics.check_defined(("accuracy",), [1, 1, 1], "de test")


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
