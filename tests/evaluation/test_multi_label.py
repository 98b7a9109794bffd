"""Multi-label metrics, thresholds, and comparisons, with values worked out by hand and from scikit-learn."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn import metrics as reference

from xtransfer.config import CalibrationConfig
from xtransfer.errors import UserError
from xtransfer.evaluation import metrics, multi_label, recalibration
from xtransfer.evaluation.calibration import equal_width_bins
from xtransfer.evaluation.paired import influences
from xtransfer.evaluation.recalibration import Recalibration
from xtransfer.runtime import checksums

CLASSES = ("a", "b", "c")
LN3 = math.log(3.0)
# Predicted: {a}, {a, b}, {}, {b}. Class c never occurs, and the third example has no label.
LOGITS = np.array([[2.0, -1.0, -3.0], [1.0, 0.5, -3.0], [-1.0, -2.0, -3.0], [-2.0, 1.0, -3.0]])
LABELS = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0]])


def value(name, logits=LOGITS, labels=LABELS):
    return metrics.score(logits, labels, CLASSES, name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("subset_accuracy", 2 / 4),  # the first and the third
        ("hamming_loss", 2 / 12),  # b too many, and a too few
        ("micro_f1", 6 / 8),  # 3 right of 4 predicted and 4 gold
        ("macro_f1", (4 / 5 + 2 / 3) / 2),  # c does not count
        ("weighted_f1", (3 * 4 / 5 + 2 / 3) / 4),
        ("class_precision/a", 1.0),
        ("class_precision/b", 1 / 2),
        ("class_precision/c", 0.0),
        ("class_recall/a", 2 / 3),
        ("class_f1/a", 4 / 5),
        ("class_f1/c", 0.0),
        ("class_auroc/a", 2 / 3),  # the negative, −1, is below 2 and 1, and above −2
        ("class_auroc/b", 1.0),
        ("macro_auroc", (2 / 3 + 1) / 2),
        ("class_average_precision/a", (1 + 1 + 3 / 4) / 3),
        ("class_average_precision/b", 1.0),
        ("macro_average_precision", ((1 + 1 + 3 / 4) / 3 + 1) / 2),
    ],
)
def test_scores_by_hand(name, expected):
    assert value(name) == pytest.approx(expected, rel=1e-12)


def test_scores_of_probabilities_by_hand():
    # Probabilities 0.75 of a class that is there, and 0.25 of one that is.
    logits, labels = np.array([[LN3, -LN3]]), np.array([[1, 1]])
    scored = {s.metric: s.value for s in metrics.scores(logits, labels, ("a", "b"), ("log_loss", "brier_score", "ece"))}
    assert scored["log_loss"] == pytest.approx(-(math.log(0.75) + math.log(0.25)) / 2)
    assert scored["brier_score"] == pytest.approx((0.25**2 + 0.75**2) / 2)
    # Both decisions are 0.75 sure, and one of the two is right.
    assert scored["ece"] == pytest.approx(0.25)
    assert [part.count for part in equal_width_bins(logits, labels)] == [2]


def test_every_metric_of_multi_label_tasks_is_tested_and_stays_in_its_range():
    tested = {"subset_accuracy", "hamming_loss", "micro_f1", "macro_f1", "weighted_f1", "class_precision"}
    tested |= {"class_recall", "class_f1", "class_auroc", "macro_auroc", "class_average_precision"}
    tested |= {"macro_average_precision", "log_loss", "brier_score", "ece", "adaptive_ece"}
    assert tested == set(metrics.names_of(multi_label=True))
    rng = np.random.default_rng(0)
    for _ in range(10):
        labels = np.vstack([np.eye(3, dtype=int), rng.integers(2, size=(6, 3))])
        for score in metrics.scores(rng.normal(size=(9, 3)) * 5, labels, CLASSES, sorted(tested)):
            low, high = metrics.value_range(score.metric)
            assert low <= score.value <= high, score


@pytest.mark.parametrize("name", metrics.names_of(multi_label=True))
def test_the_direction_of_a_metric_prefers_the_right_answer(name):
    labels = np.tile(np.eye(3, dtype=int), (5, 1))
    right = np.where(labels == 1, 4.0, -4.0)
    mixed = np.vstack([-right[:3], right[3:]])
    single = name + "/a" if metrics.METRICS[name].per_class else name
    better, worse = value(single, right, labels), value(single, mixed, labels)
    assert (better > worse) if metrics.METRICS[name].higher_is_better else (better < worse)


@settings(max_examples=60, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 8), st.just(3))), st.data())
def test_f1_agrees_with_scikit_learn(predicted, data):
    labels = data.draw(arrays.arrays(bool, predicted.shape)).astype(int)
    logits = np.where(predicted, 1.0, -1.0)
    assert multi_label.micro_f1(logits, labels) == pytest.approx(
        reference.f1_score(labels, predicted, average="micro", zero_division=0)
    )
    np.testing.assert_allclose(
        multi_label.class_f1(logits, labels), reference.f1_score(labels, predicted, average=None, zero_division=0)
    )
    assert multi_label.subset_accuracy(logits, labels) == pytest.approx(reference.accuracy_score(labels, predicted))
    np.testing.assert_array_equal(
        multi_label.confusions(predicted, labels), reference.multilabel_confusion_matrix(labels, predicted)
    )


def test_an_empty_world_scores_zero_and_not_nan():
    assert value("micro_f1", -np.ones((2, 3)), np.zeros((2, 3), int)) == 0
    assert value("macro_f1", -np.ones((2, 3)), np.zeros((2, 3), int)) == 0
    assert value("subset_accuracy", -np.ones((2, 3)), np.zeros((2, 3), int)) == 1


def test_the_row_beside_the_metrics_is_the_share_of_the_most_frequent_set():
    assert metrics.scores(LOGITS, LABELS, CLASSES, ("micro_f1",))[-1] == ("majority_share", 0.5, 4)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("accuracy", True, "a multi-label task has no accuracy; the metrics are macro_f1"),
        ("matthews_correlation", True, "a multi-label task has no matthews_correlation"),
        ("auroc", True, "a multi-label task has no auroc"),
        ("micro_f1", False, "a task with one label per text has no micro_f1; the metrics are accuracy"),
        ("class_auroc/a", False, "a task with one label per text has no class_auroc"),
        ("class_auroc/d", True, "'class_auroc/d' names no class; the classes are a, b, c"),
        ("micro_f2", True, "no metric 'micro_f2'; did you mean 'micro_f1'"),
    ],
)
def test_a_metric_of_the_other_kind_of_task_is_refused(name, kind, message):
    with pytest.raises(UserError, match=message):
        metrics.check_names("metrics", (name,), CLASSES, multi_label=kind)


@pytest.mark.parametrize(
    ("name", "labels", "message"),
    [
        (
            "class_auroc",
            LABELS,
            "en test: class_auroc/c is not defined, because no example, or every one, has this lab",
        ),
        ("class_auroc/c", LABELS, "choose macro_auroc"),
        ("class_average_precision/c", LABELS, "choose macro_average_precision"),
        ("macro_auroc", np.ones((2, 3), int), "no class has examples with and without it, so macro_auroc is not"),
    ],
)
def test_a_metric_that_the_labels_do_not_define_is_refused(name, labels, message):
    with pytest.raises(UserError, match=message):
        metrics.check_defined((name,), labels, "en test", CLASSES)


def test_average_precision_needs_no_negative_example():
    metrics.check_defined(("class_average_precision",), np.ones((2, 3), int), "en test", CLASSES)
    assert value("class_average_precision/a", np.zeros((2, 3)), np.ones((2, 3), int)) == 1


@pytest.mark.parametrize(
    ("labels", "message"),
    [(np.full((4, 3), -1), "expected 0 or 1"), (LABELS[:3], r"shape \(4, 3\) for label sets of shape \(3, 3\)")],
)
def test_labels_that_cannot_be_scored_are_refused(labels, message):
    with pytest.raises(UserError, match=message):
        metrics.scores(LOGITS, labels, CLASSES, ("micro_f1",))


def test_a_constant_set_of_labels_is_named():
    labels = np.array([[1, 0], [0, 1]])
    assert metrics.described_constant(np.array([[1.0, 1.0], [2.0, 2.0]]), labels, ("a", "b")) == "a, b"
    assert metrics.described_constant(-np.ones((2, 2)), labels, ("a", "b")) == "no label"
    assert metrics.described_constant(np.array([[1.0, -1.0], [1.0, 1.0]]), labels, ("a", "b")) is None


def test_thresholds_have_the_highest_f1_of_each_class_by_hand():
    # Class 0: above −1.5 there are 3 positives and 1 other, F1 6/7; above 0.5 two positives, F1 4/5.
    # Class 1: any cut between 1 and 2 separates; only 1.5 is a candidate. Class 2 has no example and keeps 0.
    logits = np.array([[2.0, 2.0, 1.0], [1.0, 1.0, -1.0], [0.0, -1.0, 3.0], [-1.0, -2.0, 2.0], [-2.0, -3.0, 0.5]])
    labels = np.array([[1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 0, 0], [0, 0, 0]])
    assert recalibration.fit_class_log_odds(logits, labels) == (-1.5, 1.5, 0.0)


def test_among_equal_thresholds_the_nearest_to_one_half_counts_and_then_the_lower_one():
    # Any cut below 4 and above −4 separates: 0 is a candidate. Without separation, −1 and 1 are equally good.
    assert recalibration.fit_class_log_odds(np.array([[4.0], [-4.0]]), np.array([[1], [0]])) == (0.0,)
    # Both cuts leave out one of the others: with the cuts −1 and 1, F1 is 2·1/(2+1) and 2·1/(2+1).
    logits, labels = np.array([[3.0], [0.5], [-0.5], [-3.0]]), np.array([[1], [0], [0], [1]])
    # Above 1.75: 1 of 2 found, F1 2/3. Above 0: 1 of 2 found with 1 wrong, F1 1/2. The lowest cut, −1.75: F1 2/5.
    assert recalibration.fit_class_log_odds(logits, labels) == (1.75,)


def test_thresholds_shift_decisions_and_the_head_and_are_stored(tmp_path):
    fitted = Recalibration(class_log_odds=(-1.0, 1.0))
    logits = np.array([[-0.5, 0.5]])
    assert multi_label.predictions(fitted.shifted(logits)).tolist() == [[True, False]]
    kernel, bias = np.ones((2, 2), np.float32), np.zeros(2, np.float32)
    np.testing.assert_array_equal(fitted.folded(kernel, bias)[1], [1.0, -1.0])
    path = tmp_path / "calibration.json"
    recalibration.record(path, "40", fitted, 7)
    assert recalibration.recorded(path, "40") == fitted
    assert '"class_thresholds"' in path.read_text()
    recalibration.record(path, "50", Recalibration(2.0), 7)
    assert "class_log_odds" not in path.read_text().partition('"50"')[2]
    entry = checksums.unsigned(json.loads(path.read_text())["40"])
    path.write_text(json.dumps({"40": checksums.signed(entry | {"class_log_odds": ["x", 1.0]})}))
    with pytest.raises(UserError, match=r"40: class_log_odds = \['x', 1.0\], expected a list of numbers"):
        recalibration.recorded(path, "40")


def test_the_temperature_minimises_the_log_loss():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(40, 3))
    labels = (rng.random((40, 3)) < 1 / (1 + np.exp(-logits / 2.5))).astype(int)
    temperature = recalibration.fit_temperature(logits, labels)
    grid = np.exp(np.linspace(-2, 2, 2001))
    best = grid[np.argmin([multi_label.log_loss(logits / t, labels) for t in grid])]
    assert temperature == pytest.approx(best, rel=2e-3)


def test_the_effects_of_recalibration_are_those_of_the_kind_of_task():
    both = CalibrationConfig(temperature=True, threshold=True)
    assert recalibration.effects_of(both) == (
        "log_loss_calibrated",
        "ece_calibrated",
        "accuracy_thresholded",
        "macro_f1_thresholded",
    )
    assert recalibration.effects_of(both, multi_label=True) == (
        "log_loss_calibrated",
        "ece_calibrated",
        "macro_f1_thresholded",
        "micro_f1_thresholded",
    )


def test_influences_have_micro_f1_as_their_mean_and_nearly_so_in_resamples():
    rng = np.random.default_rng(1)
    labels = rng.integers(2, size=(400, 3))
    logits = np.where(rng.random((400, 3)) < 0.8, 1.0, -1.0) * np.where(labels == 1, 1, -1)
    numerator, denominator = (part.sum(axis=1) for part in multi_label.f1_parts(logits > 0, labels))
    scores = influences(numerator, denominator)
    assert scores.mean() == pytest.approx(multi_label.micro_f1(logits, labels), rel=1e-12)
    resamples = rng.integers(400, size=(300, 400))
    exact = np.array([multi_label.micro_f1(logits[i], labels[i]) for i in resamples])
    linear = scores[resamples].mean(axis=1)
    # The delta method: the error is an order smaller than the spread.
    assert np.sqrt(np.mean((exact - linear) ** 2)) < 0.1 * exact.std()
    assert linear.std() == pytest.approx(exact.std(), rel=0.02)


def test_influences_without_any_label_are_zero():
    assert influences(np.zeros(3), np.zeros(3)).tolist() == [0, 0, 0]
