"""Calibration: whether a classifier's confidence, the probability of its prediction, is the share that is right.

Guo, Pleiss, Sun, and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017. Bins of equal mass are from
Nguyen and O'Connor, "Posterior calibration and exploratory analysis for natural language processing models",
EMNLP 2015.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BINS = 15
"""The number of bins of both calibration errors."""


@dataclass(frozen=True)
class Bin:
    """The predictions whose confidence falls into one bin, which is never empty.

    Attributes:
      count: their number.
      confidence: their mean confidence.
      accuracy: the share of them that is right.
    """

    count: int
    confidence: float
    accuracy: float


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the softmax [n, K] float64 of logits [n, K]."""
    from scipy.special import softmax

    return softmax(np.asarray(logits, np.float64), axis=1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Return the probability of each class of a multi-label task, float64 [n, K], from logits [n, K]."""
    from scipy.special import expit

    return expit(np.asarray(logits, np.float64))


def equal_width_bins(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Return the occupied bins of equal width, ascending; bin i holds confidences in (i / bins, (i + 1) / bins].

    Args:
      logits: [n, K].
      labels: integers [n] in 0 .. K − 1; in a multi-label task [n, K], 0 or 1, where each of the n · K decisions counts
        as a prediction.
      bins: the number of bins between 0 and 1.
    """
    confidence, correct = _confidence(logits, labels)
    index = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    return [_bin(confidence[index == i], correct[index == i]) for i in np.unique(index)]


def equal_mass_bins(logits: np.ndarray, labels: np.ndarray, bins: int = BINS) -> list[Bin]:
    """Return bins with equal numbers of predictions (give or take one), by ascending confidence.

    Fewer predictions than `bins` have a bin each. See `equal_width_bins` for the arguments.
    """
    confidence, correct = _confidence(logits, labels)
    order = np.argsort(confidence, kind="stable")
    return [_bin(confidence[part], correct[part]) for part in np.array_split(order, bins) if len(part)]


def expected_error(bins: Sequence[Bin]) -> float:
    """Return the mean distance between accuracy and confidence over bins, weighted by their counts; from 0 to 1."""
    total = sum(part.count for part in bins)
    return float(sum(part.count * abs(part.accuracy - part.confidence) for part in bins) / total)


def _confidence(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probability of each prediction, and whether it is right, both [n], or [n · K] for label sets."""
    if np.ndim(labels) == 2:
        right = (np.asarray(logits) > 0) == (np.asarray(labels) > 0)
        return sigmoid(np.abs(logits)).ravel(), right.ravel()
    return probabilities(logits).max(axis=1), np.asarray(logits).argmax(axis=1) == labels


def _bin(confidence: np.ndarray, correct: np.ndarray) -> Bin:
    return Bin(len(confidence), float(confidence.mean()), float(correct.mean()))
