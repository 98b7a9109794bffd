"""Metrics of a finished set of predictions. A new metric is a new entry in `METRICS`."""

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from xtransfer.errors import UserError

SIGNIFICANCE = 0.05
"""Level at which a result is told from chance: one-sided exact binomial test."""


class Score(NamedTuple):
    """One metric of one set: its name, its value, and over how many examples."""

    metric: str
    value: float
    count: int  # type: ignore[assignment]  # hides tuple.count: these are the keys of a row of results


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """How often gold class i was called j.

    Args:
      predictions: integers [n] in 0 .. K − 1.
      labels: integers [n] in 0 .. K − 1.
      num_classes: K.

    Returns:
      np.int64 [K, K], rows gold, columns predicted.

    Raises:
      UserError: nothing to score, different lengths, or a class out of range (an unlabelled example is one).
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
    """The share of examples on the diagonal of a confusion matrix [K, K]."""
    return float(np.trace(confusion) / confusion.sum())


def macro_f1(confusion: np.ndarray) -> float:
    """The mean F1 of the classes that occur in gold or predictions, from a confusion matrix [K, K].

    scikit-learn's `f1_score(average="macro")`: a class that occurs on one side only has F1 = 0.
    """
    correct = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * correct[total > 0] / total[total > 0]))


METRICS: Mapping[str, Callable[[np.ndarray], float]] = MappingProxyType({"accuracy": accuracy, "macro_f1": macro_f1})
"""Name -> function of the confusion matrix; values from 0 to 1, higher is better."""


def scores(
    predictions: np.ndarray, labels: np.ndarray, num_classes: int, names: Iterable[str] = tuple(METRICS)
) -> list[Score]:
    """The named metrics of integer arrays [n]; `UserError` as `confusion_matrix`, or for an unknown name."""
    confusion = confusion_matrix(predictions, labels, num_classes)
    result = []
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric {name!r}: the metrics are {', '.join(METRICS)}")
        result.append(Score(name, METRICS[name](confusion), len(labels)))
    return result


def above_chance(correct: int, count: int, chance: float) -> bool:
    """Whether `correct` of `count` is more than guessing with success rate `chance` gives (exact binomial test)."""
    from scipy.stats import binomtest

    return bool(binomtest(correct, count, chance, alternative="greater").pvalue < SIGNIFICANCE)


def degenerate_warning(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> str | None:
    """What is suspicious about predictions, in one line, or None.

    Suspicious is one class for every example, and an accuracy that cannot be told from always
    answering the most frequent gold class (for balanced classes: from 1/K). A set with a single
    gold class says nothing either way. Arguments and errors as `confusion_matrix`.
    """
    confusion = confusion_matrix(predictions, labels, num_classes)
    count = int(confusion.sum())
    majority = float(confusion.sum(axis=1).max()) / count
    if majority == 1:
        return None
    used = np.flatnonzero(confusion.sum(axis=0))
    if len(used) == 1:
        return f"constant prediction: class {used[0]} for all {count:,} examples"
    if not above_chance(int(np.trace(confusion)), count, majority):
        return (
            f"accuracy {accuracy(confusion):.1%} over {count:,} examples cannot be told from always answering "
            f"the most frequent class ({majority:.1%})"
        )
    return None
