"""The multi-label loss compared with values worked out by hand, and with autodiff."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xtransfer.distillation.multi_label import hard_targets, loss_terms, soft_kl, terms_of_batch
from xtransfer.distillation.objectives import OBJECTIVES, mean

LN3 = math.log(3.0)  # the logit of probability 0.75
KD, PL = OBJECTIVES["monox_kd"], OBJECTIVES["monox_pl"]


def terms(objective, student, teacher, label, weight):
    arrays = (jnp.array(student, jnp.float32), jnp.array(teacher, jnp.float32), jnp.array(label), jnp.array(weight))
    return {name: tuple(map(float, pair)) for name, pair in loss_terms(objective, *arrays).items()}


def test_cross_entropy_is_the_mean_over_classes_by_hand():
    # Probabilities 0.75 and 0.5 of the classes 1 and 0: −(log 0.75 + log 0.5) / 2. A slot of weight 0 counts nothing.
    result = terms(OBJECTIVES["vanilla"], [[LN3, 0.0], [9, 9]], np.zeros((2, 2)), [[1, 0], [0, 0]], [1.0, 0.0])
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert result["loss"] == pytest.approx((expected, 1.0), rel=1e-6)
    assert result["hard"] == result["loss"]
    assert result["soft_kl"] == (0.0, 0.0)
    assert result["accuracy"] == (1.0, 1.0)  # 0.75 is predicted, and 0.5 is not


def test_one_class_is_binary_cross_entropy_of_a_two_class_softmax():
    logits = np.array([[2.0], [-1.0]])
    ours = terms(OBJECTIVES["vanilla"], logits, np.zeros((2, 1)), [[1], [1]], [1.0, 1.0])["loss"][0]
    assert ours == pytest.approx(math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1)), rel=1e-6)


def test_an_empty_set_is_a_label_and_a_missing_one_is_not():
    empty = terms(OBJECTIVES["vanilla"], [[0.0, 0.0]], np.zeros((1, 2)), [[0, 0]], [1.0])
    missing = terms(OBJECTIVES["vanilla"], [[0.0, 0.0]], np.zeros((1, 2)), [[-1, -1]], [1.0])
    assert empty["loss"] == pytest.approx((math.log(2), 1.0))
    assert missing["loss"] == (0.0, 0.0) and missing["accuracy"] == (0.0, 0.0)


def test_the_divergence_of_each_class_by_hand():
    # q = 0.75 and p = 0.5: 0.75 log 1.5 + 0.25 log 0.5. The same distribution diverges by nothing.
    kl = soft_kl(KD, jnp.array([[0.0, LN3]]), jnp.array([[LN3, LN3]]))
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    np.testing.assert_allclose(kl, [[expected, 0.0]], atol=1e-7)


@pytest.mark.parametrize(("on", "divisor"), [("teacher", 1.0), ("both", 2.0)])
def test_the_temperature_divides_the_teachers_logits_or_both(on, divisor):
    objective = dataclasses.replace(KD, temperature=2.0, temperature_on=on, scale_by_t2=True)
    student, teacher = np.array([[1.0, -2.0]]), np.array([[3.0, 0.5]])
    q, p = 1 / (1 + np.exp(-teacher / 2)), 1 / (1 + np.exp(-student / divisor))
    expected = 4 * np.mean(q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p)))
    assert terms(objective, student, teacher, [[-1, -1]], [1.0])["loss"] == pytest.approx((expected, 1.0), rel=1e-5)


def test_the_divergence_is_finite_for_extreme_logits():
    kl = soft_kl(KD, jnp.array([[-200.0, 200.0]]), jnp.array([[200.0, 200.0]]))
    np.testing.assert_allclose(kl, [[200.0, 0.0]], atol=1e-4)


def test_the_gradient_is_p_minus_q_over_the_number_of_classes():
    student, teacher = jnp.array([[0.3, -1.0, 2.0]]), jnp.array([[1.0, 0.0, -0.5]])

    def loss(logits):
        return mean(loss_terms(KD, logits, teacher, jnp.full((1, 3), -1), jnp.ones(1))["loss"])

    expected = (jax.nn.sigmoid(student) - jax.nn.sigmoid(teacher)) / 3
    np.testing.assert_allclose(jax.grad(loss)(student), expected, atol=1e-6)


def test_pseudo_labels_are_the_classes_above_one_half_and_leave_gold_labels_alone():
    teacher = jnp.array([[1.0, -1.0], [0.0, 5.0]])
    label = jnp.array([[-1, -1], [1, 0]])
    assert hard_targets(PL, teacher, label).tolist() == [[1, 0], [1, 0]]
    assert hard_targets(OBJECTIVES["vanilla"], teacher, label).tolist() == label.tolist()


def test_a_class_below_the_confidence_threshold_counts_in_neither_sum_nor_count():
    # The teacher is 0.75 sure that class 0 is there, and 0.6 sure that class 1 is not.
    objective = dataclasses.replace(PL, threshold=0.7)
    teacher = [[LN3, -math.log(1.5)]]
    result = terms(objective, [[0.0, 9.0]], teacher, [[-1, -1]], [1.0])
    assert result["loss"] == pytest.approx((math.log(2) / 2, 0.5))


def test_the_kind_of_labels_in_a_batch_decides_the_loss():
    batch = {"teacher_logits": jnp.zeros((1, 1, 2)), "weight": jnp.ones((1, 1))}
    logits = jnp.array([[[LN3, 0.0]]])
    single = terms_of_batch(OBJECTIVES["vanilla"], logits, batch | {"label": jnp.array([[0]])})["loss"][0]
    several = terms_of_batch(OBJECTIVES["vanilla"], logits, batch | {"label": jnp.array([[[1, 1]]])})["loss"][0]
    assert float(single) == pytest.approx(-math.log(0.75))
    assert float(several) == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
