"""Metrics of a complete set of predictions. A new metric is a new entry in `METRICS`."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from xtransfer.errors import UserError

SIGNIFICANCE = 0.05
"""The level at which a result is better than chance, by a one-sided exact binomial test."""


class Score(NamedTuple):
    """One metric on one set: its name, its value, and the number of examples."""

    metric: str
    value: float
    count: int  # type: ignore[assignment]  # hides tuple.count: these are the keys of a row of results


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often gold class i was predicted as class j.

    Args:
      predictions: integers [n] in 0 .. K − 1.
      labels: integers [n] in 0 .. K − 1.
      num_classes: K.

    Returns:
      np.int64 [K, K]; rows are gold classes, columns predictions.

    Raises:
      UserError: no examples, different lengths, or a class out of range, such as an unlabelled example's.
    """
    from sklearn.metrics import confusion_matrix as count

    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise UserError(f"predictions of shape {predictions.shape} for labels of shape {labels.shape}")
    if len(labels) == 0:
        raise UserError("no examples to score")
    for name, values in (("label", labels), ("prediction", predictions)):
        bad = np.flatnonzero((values < 0) | (values >= num_classes))
        if len(bad):
            raise UserError(f"{name} {values[bad[0]]} at position {bad[0]}: expected 0 to {num_classes - 1}")
    return count(labels, predictions, labels=np.arange(num_classes)).astype(np.int64)


def accuracy(confusion: np.ndarray) -> float:
    """Return the share of examples on the diagonal of a confusion matrix [K, K]."""
    return float(np.trace(confusion) / confusion.sum())


def macro_f1(confusion: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur as gold or prediction, from a confusion matrix [K, K].

    This is scikit-learn's `f1_score(average="macro")`: a class that occurs on one side only has F1 = 0.
    """
    correct = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * correct[total > 0] / total[total > 0]))


def majority_share(confusion: np.ndarray) -> float:
    """Return the accuracy of always predicting the most frequent gold class, from a confusion matrix [K, K]."""
    return float(confusion.sum(axis=1).max() / confusion.sum())


METRICS: Mapping[str, Callable[[np.ndarray], float]] = MappingProxyType({"accuracy": accuracy, "macro_f1": macro_f1})
"""The metrics by name: functions of the confusion matrix with values from 0 to 1. Higher is better."""

CHANCE = "majority_share"
"""The name of the row beside the metrics that holds `majority_share`, the accuracy that needs no model."""


def scores(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> list[Score]:
    """Return every metric of integer arrays [n], and `CHANCE`; see `confusion_matrix` for errors."""
    confusion = confusion_matrix(predictions, labels, num_classes)
    functions = {**METRICS, CHANCE: majority_share}
    return [Score(name, function(confusion), len(labels)) for name, function in functions.items()]


def at_chance(accuracy: float, count: int, majority: float) -> bool:
    """Return whether an accuracy over `count` examples is no better than always predicting the majority class.

    This is an exact binomial test at `SIGNIFICANCE` against that class's share, which is 1/K for balanced classes. A
    set with a single class (share 1) says nothing either way, so the result is False.
    """
    from scipy.stats import binomtest

    if majority == 1:
        return False
    test = binomtest(round(accuracy * count), count, majority, alternative="greater")
    return bool(test.pvalue >= SIGNIFICANCE)


def constant_prediction(predictions: np.ndarray, labels: np.ndarray) -> int | None:
    """Return the class that every example was given, or None if predictions differ or all labels are that class.

    Args:
      predictions: integers [n].
      labels: integers [n].
    """
    if len(predictions) == 0 or np.any(predictions != predictions[0]) or np.all(labels == predictions[0]):
        return None
    return int(predictions[0])
