"""The mean of several teachers, by hand, and their seeds."""

import hashlib
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.distillation.teachers import mean, seed_of


def logs(*probabilities):
    return np.log(np.array(probabilities, np.float64)).astype(np.float32)


def test_the_mean_of_probabilities_by_hand():
    """The second teacher counts three times on the first example, and does not read the second one."""
    logits = np.stack([logs([0.5, 0.5], [0.9, 0.1]) + 3, logs([0.1, 0.9], [0.5, 0.5])])
    averaged, disagreement = mean(logits, np.array([[1.0, 1.0], [3.0, 0.0]]), of_logits=False)
    np.testing.assert_allclose(np.exp(averaged), [[0.2, 0.8], [0.9, 0.1]], rtol=1e-6)
    first = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    second = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.8)
    np.testing.assert_allclose(disagreement, [0.25 * first + 0.75 * second, 0], atol=1e-6)
    assert averaged.dtype == disagreement.dtype == np.float32


def test_the_mean_of_logits_by_hand():
    logits = np.array([[[2.0, -2.0, 0.0]], [[0.0, 4.0, 0.0]]], np.float32)
    averaged, _ = mean(logits, np.array([[3.0], [1.0]]), of_logits=True)
    np.testing.assert_allclose(averaged, [[1.5, -0.5, 0.0]])


def test_certain_teachers_that_contradict_each_other_disagree_by_the_logarithm_of_two():
    logits = np.array([[[500.0, -500.0]], [[-500.0, 500.0]]], np.float32)
    averaged, disagreement = mean(logits, np.ones((2, 1)), of_logits=False)
    np.testing.assert_allclose(np.exp(averaged), [[0.5, 0.5]])
    np.testing.assert_allclose(disagreement, [math.log(2)], rtol=1e-6)


@given(
    st.lists(st.lists(st.floats(-50, 50, width=32), min_size=3, max_size=3), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
)
def test_the_disagreement_is_bounded_and_the_mean_is_a_distribution(rows, weights):
    logits = np.array(rows, np.float32)[:, None]  # [M, 1, 3]
    averaged, disagreement = mean(logits, np.array(weights[: len(rows)])[:, None], of_logits=False)
    assert 0 <= disagreement[0] <= math.log(len(rows)) + 1e-6
    assert np.exp(averaged.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    if len(rows) == 1:
        assert disagreement[0] == pytest.approx(0, abs=1e-6)


def test_a_teacher_of_seed_0_has_the_seed_of_the_draw():
    assert seed_of(7, 0) == 7
    assert seed_of(7, 1) == int(hashlib.sha256(b"7 1").hexdigest()[:8], 16)
    assert len({seed_of(draw, seed) for draw in range(4) for seed in range(4)}) == 16


def test_the_mean_of_a_multi_label_task_is_taken_class_by_class():
    """The second teacher counts three times. Nobody disagrees about the second class."""
    p, q = np.array([0.5, 0.25]), np.array([0.1, 0.25])
    logits = np.stack([np.log(p / (1 - p)), np.log(q / (1 - q))])[:, None].astype(np.float32)  # [2, 1, 2]
    averaged, disagreement = mean(logits, np.array([[1.0], [3.0]]), of_logits=False, multi_label=True)
    np.testing.assert_allclose(1 / (1 + np.exp(-averaged)), [[0.2, 0.25]], rtol=1e-6)
    first = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    second = 0.1 * math.log(0.1 / 0.2) + 0.9 * math.log(0.9 / 0.8)
    np.testing.assert_allclose(disagreement, [0.25 * first + 0.75 * second], rtol=1e-5)
    averaged, _ = mean(logits, np.array([[1.0], [3.0]]), of_logits=True, multi_label=True)
    np.testing.assert_allclose(averaged, (logits[0] + 3 * logits[1]) / 4, rtol=1e-6)


def test_multi_label_logits_of_any_size_have_a_mean_and_a_disagreement():
    logits = np.array([[[900.0, -900.0]], [[-900.0, -900.0]]], np.float32)
    averaged, disagreement = mean(logits, np.ones((2, 1)), of_logits=False, multi_label=True)
    np.testing.assert_allclose(averaged, [[0.0, -900.0]], atol=1e-6)
    np.testing.assert_allclose(disagreement, [math.log(2)], rtol=1e-6)
