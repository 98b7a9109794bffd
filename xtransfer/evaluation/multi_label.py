"""Metrics of multi-label tasks: functions of logits and multi-hot labels. Each class is a decision of its own.

A class is predicted if its logit is above 0, that is, if its probability is above 0.5. Where a mean over classes is
taken, a class without gold labels and predictions does not count.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from xtransfer.errors import DataError


def predictions(logits: np.ndarray) -> np.ndarray:
    """Return the predicted classes, bool [n, K], of logits [n, K]."""
    return np.asarray(logits) > 0


def set_of(names: Sequence[str], position: Mapping[str, int]) -> np.ndarray:
    """Return a set of labels as int64 [K], 1 for each name, from the classes' positions; KeyError for another name."""
    return np.bincount([position[name] for name in names], minlength=len(position))


def check(logits: np.ndarray, labels: np.ndarray) -> None:
    """Refuse what cannot be scored.

    Args:
      logits: [n, K].
      labels: integers [n, K], 0 or 1.

    Raises:
      UserError: no examples, different shapes, or an example without labels, which has −1.
    """
    if logits.shape != labels.shape or labels.ndim != 2:
        raise DataError(f"logits of shape {logits.shape} for label sets of shape {labels.shape}")
    if len(labels) == 0:
        raise DataError("no examples to score")
    bad = np.flatnonzero(((labels != 0) & (labels != 1)).any(axis=1))
    if len(bad):
        raise DataError(f"labels {labels[bad[0]].tolist()} at position {bad[0]}: expected 0 or 1 for each class")


def confusions(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Count each class against the rest: int64 [K, 2, 2], rows are gold (absent, present), columns predictions."""
    predicted, labels = np.asarray(predicted, bool), np.asarray(labels, bool)
    cells = [[~labels & ~predicted, ~labels & predicted], [labels & ~predicted, labels & predicted]]
    return np.array([[cell.sum(axis=0) for cell in row] for row in cells], np.int64).transpose(2, 0, 1)


def f1_parts(predicted: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the numerator 2 · TP and the denominator of F1 in each decision, integers [n, K]."""
    predicted, labels = np.asarray(predicted, bool), np.asarray(labels, bool)
    return 2 * (predicted & labels).astype(np.int64), predicted.astype(np.int64) + labels


def subset_accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of examples whose labels are all right, and no others predicted."""
    return float((predictions(logits) == (labels > 0)).all(axis=1).mean())


def hamming_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of decisions that are wrong."""
    return float((predictions(logits) != (labels > 0)).mean())


def micro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return F1 over all decisions together; 0 without gold labels and predictions."""
    numerator, denominator = (part.sum() for part in f1_parts(predictions(logits), labels))
    return float(numerator / denominator) if denominator else 0.0


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur as gold or prediction; 0 without any."""
    numerator, denominator = (part.sum(axis=0) for part in f1_parts(predictions(logits), labels))
    occurs = denominator > 0
    return float(np.mean(numerator[occurs] / denominator[occurs])) if occurs.any() else 0.0


def weighted_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 of the classes, weighted by their numbers of gold examples; 0 without any."""
    support = (labels > 0).sum(axis=0)
    return float(class_f1(logits, labels) @ support / support.sum()) if support.any() else 0.0


def class_precision(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of each class's predictions that are right [K]; 0 for a class that is never predicted."""
    counts = confusions(predictions(logits), labels)
    return counts[:, 1, 1] / np.maximum(counts[:, :, 1].sum(axis=1), 1)


def class_recall(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of each class's gold examples that are found [K]; 0 for a class without any."""
    counts = confusions(predictions(logits), labels)
    return counts[:, 1, 1] / np.maximum(counts[:, 1].sum(axis=1), 1)


def class_f1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each class's F1 [K]; 0 for a class without a correct prediction."""
    numerator, denominator = (part.sum(axis=0) for part in f1_parts(predictions(logits), labels))
    return numerator / np.maximum(denominator, 1)


def class_auroc(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the probability that an example of a class ranks above another one [K]; NaN if either does not exist."""
    from sklearn.metrics import roc_auc_score

    return _by_class(roc_auc_score, logits, labels, needs_negative=True)


def macro_auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of `class_auroc` over the classes that have it."""
    return float(np.nanmean(class_auroc(logits, labels)))


def class_average_precision(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each class's average precision, the area under its precision-recall steps [K]; NaN without an example."""
    from sklearn.metrics import average_precision_score

    return _by_class(average_precision_score, logits, labels, needs_negative=False)


def macro_average_precision(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of `class_average_precision` over the classes that have it."""
    return float(np.nanmean(class_average_precision(logits, labels)))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of −log p(decision) over examples and classes, in nats."""
    return float(np.logaddexp(0, np.where(labels > 0, -1.0, 1.0) * logits).mean())


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared distance of a class's probability from 0 or 1, over examples and classes."""
    from scipy.special import expit

    return float(np.mean((expit(logits) - (labels > 0)) ** 2))


def defined_classes(labels: np.ndarray, *, needs_negative: bool) -> np.ndarray:
    """Return whether each class has an example, and, if it needs one, also an example of another class, bool [K]."""
    count = (labels > 0).sum(axis=0)
    return (count > 0) & ((count < len(labels)) | (not needs_negative))


def _by_class(
    function: Callable[[np.ndarray, np.ndarray], float], logits: np.ndarray, labels: np.ndarray, *, needs_negative: bool
) -> np.ndarray:
    is_defined = defined_classes(labels, needs_negative=needs_negative)
    values = np.full(labels.shape[1], np.nan)
    for index in np.flatnonzero(is_defined):
        values[index] = function(labels[:, index] > 0, logits[:, index])
    return values


def majority_share(labels: np.ndarray) -> float:
    """Return the subset accuracy of always predicting the most frequent set of labels."""
    return float(np.unique(labels, axis=0, return_counts=True)[1].max() / len(labels))


def constant_prediction(predicted: np.ndarray, labels: np.ndarray) -> tuple[int, ...] | None:
    """Return the set of classes that every example was given; None if predictions differ or all labels are that set.

    Args:
      predicted: bool [n, K].
      labels: integers [n, K], 0 or 1.
    """
    if len(predicted) == 0 or np.any(predicted != predicted[0]) or np.all((labels > 0) == predicted[0]):
        return None
    return tuple(int(index) for index in np.flatnonzero(predicted[0]))
