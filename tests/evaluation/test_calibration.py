"""Bins of confidence, compared with bins counted by hand."""

import numpy as np
import pytest

from xtransfer.evaluation.calibration import Bin, equal_mass_bins, equal_width_bins, expected_error, probabilities

# Confidences 0.9, 0.6, 0.7, and 0.6, the second and the last for class 0; the labels make 0.9 and the last 0.6 right.
P = np.array([0.9, 0.4, 0.7, 0.4])
LOGITS = np.log(np.stack([1 - P, P], axis=1))
LABELS = np.array([1, 1, 0, 0])


def as_rows(bins):
    return [(part.count, pytest.approx(part.confidence), pytest.approx(part.accuracy)) for part in bins]


def test_probabilities_are_the_softmax():
    np.testing.assert_allclose(probabilities(LOGITS)[:, 1], P, rtol=1e-12)
    np.testing.assert_allclose(probabilities(np.array([[1000, 0]])), [[1, 0]])  # without overflow


def test_bins_of_equal_width_hold_their_confidences():
    assert as_rows(equal_width_bins(LOGITS, LABELS, bins=15)) == [(2, 0.6, 0.5), (1, 0.7, 0), (1, 0.9, 1)]
    assert as_rows(equal_width_bins(LOGITS, LABELS, bins=2)) == [(4, 0.7, 0.5)]  # none at or below 1/2


def test_a_bin_contains_its_upper_edge_and_not_its_lower_one():
    logits = np.zeros((1, 2))  # confidence exactly 1/2
    assert equal_width_bins(logits, np.array([0]), bins=2) == [Bin(1, 0.5, 1.0)]
    sure = np.array([[2000.0, 0.0], [0.0, 0.0]])
    assert as_rows(equal_width_bins(sure, np.array([0, 0]), bins=2)) == [(1, 0.5, 1), (1, 1, 1)]


def test_bins_of_equal_mass_differ_by_one_at_most():
    assert as_rows(equal_mass_bins(LOGITS, LABELS, bins=2)) == [(2, 0.6, 0.5), (2, 0.8, 0.5)]
    assert as_rows(equal_mass_bins(LOGITS, LABELS, bins=3)) == [(2, 0.6, 0.5), (1, 0.7, 0), (1, 0.9, 1)]
    assert len(equal_mass_bins(LOGITS, LABELS)) == 4


def test_the_error_weights_bins_by_their_counts():
    # (2 · 0.1 + 1 · 0.7 + 1 · 0.1) / 4
    assert expected_error(equal_width_bins(LOGITS, LABELS)) == pytest.approx(0.25)
    assert expected_error([Bin(3, 0.8, 0.8), Bin(1, 1.0, 0.0)]) == 0.25
