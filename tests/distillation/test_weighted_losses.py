"""Class weights, label smoothing, focal loss, and confidence, compared with constants worked out by hand.

The logits are those of `test_objectives.py`: the student has p = (1, 2) / 3, and the teacher (3, 1) / 4. So the teacher
predicts class 0 with a confidence of 0.75, and the cross-entropy is ln 3 in class 0 and ln 1.5 in class 1.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.distillation.test_objectives import (
    GRADIENTS,
    JITTED,
    LN1_5,
    LN3,
    MEAN_GRADIENT,
    STUDENT,
    TEACHER,
    terms,
    validated,
)
from xtransfer.distillation import objectives
from xtransfer.distillation.objectives import BALANCED, OBJECTIVES, Objective, Pair, loss_terms, with_class_factors
from xtransfer.errors import ConfigError

VANILLA, KD, PL = (OBJECTIVES[name] for name in ("vanilla", "monox_kd", "monox_pl"))
KL = 0.36299035  # at T = 1, see test_objectives.py
TWO_TO_ONE = {"class_weights": ("a=2", "b=0.5"), "class_factors": (2.0, 0.5)}


def gradient(objective, student, label, teacher=TEACHER):
    """Return the gradient of one example's loss. The teacher gets none."""
    batch = jnp.asarray([student], jnp.float32), jnp.asarray([teacher], jnp.float32), jnp.asarray([label], jnp.int32)
    of_student, of_teacher = GRADIENTS(objective, *batch, jnp.ones(1))
    np.testing.assert_array_equal(of_teacher, 0)
    return np.asarray(of_student[0])


def old_loss_terms(objective: Objective, student: Any, teacher: Any, label: Any, weight: Any) -> dict[str, Pair]:
    """Compute the loss terms as before there were factors, for finite inputs in float32."""
    student, teacher = (jnp.where((weight > 0)[..., None], x, 0.0) for x in (student, teacher))
    target = objectives.hard_targets(objective, teacher, label)
    hard_weight = weight * (target >= 0)
    soft_weight = weight if objective.teacher != "none" else jnp.zeros_like(weight)
    gold_weight = weight * (label >= 0)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(student, jnp.maximum(target, 0))
    kl = objectives.soft_kl(objective, student, teacher)
    t2 = objective.temperature**2 if objective.scale_by_t2 else 1.0
    loss = objective.hard_weight * cross_entropy * hard_weight + objective.soft_weight * t2 * kl * soft_weight
    counted = soft_weight if objective.soft_weight > 0 else hard_weight
    correct = (jnp.argmax(student, axis=-1) == label).astype(jnp.float32)
    return {
        "loss": (jnp.sum(loss), jnp.sum(counted)),
        "hard": (jnp.sum(cross_entropy * hard_weight), jnp.sum(hard_weight)),
        "soft_kl": (jnp.sum(kl * soft_weight), jnp.sum(soft_weight)),
        "accuracy": (jnp.sum(correct * gold_weight), jnp.sum(gold_weight)),
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_defaults_are_bit_for_bit_the_old_losses_and_gradients(name):
    objective, rng = OBJECTIVES[name], np.random.default_rng(3)
    student, teacher = jnp.asarray(rng.normal(scale=3, size=(2, 8, 9, 4)), jnp.float32)
    label = jnp.asarray(rng.integers(-1, 4, (8, 9)), jnp.int32)
    weight = jnp.asarray(rng.integers(0, 2, (8, 9)), jnp.float32)

    def value_and_gradient(function, student):
        value, pull_back, rest = jax.vjp(
            lambda s: _split(function(objective, s, teacher, label, weight)), student, has_aux=True
        )
        return value, pull_back(jnp.float32(1))[0], rest

    def _split(pairs):
        return objectives.mean(pairs["loss"]), pairs

    new, old = (jax.jit(functools.partial(value_and_gradient, f))(student) for f in (loss_terms, old_loss_terms))
    for ours, theirs in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert float(new[0]) > 0 and np.any(np.asarray(new[1]))


@pytest.mark.parametrize(
    ("label", "loss", "slope"),
    [
        # The target (0.95, 0.05): 0.95·ln 3 + 0.05·ln 1.5, and p − target.
        (0, 1.06395493, 1 / 3 - 0.95),
        (1, 0.44012247, 1 / 3 - 0.05),
    ],
)
def test_label_smoothing(label, loss, slope):
    smoothed = validated(dataclasses.replace(VANILLA, label_smoothing=0.1))
    result = terms(smoothed, label=label)
    np.testing.assert_allclose(result["loss"], (loss, 1), rtol=1e-6)
    np.testing.assert_allclose(result["hard"], (LN3 if label == 0 else LN1_5, 1), rtol=1e-6)  # plain cross-entropy
    np.testing.assert_allclose(gradient(smoothed, STUDENT, label), (slope, -slope), atol=1e-6)


@pytest.mark.parametrize(
    ("gamma", "label", "loss", "slope"),
    [
        # (1 − p)^γ · CE, with 1 − p = 2/3 in class 0: (4/9)·ln 3, and √(2/3)·ln 3.
        # Its slope is p·(1 − p)·(γ·(1 − p)^(γ − 1)·ln p − (1 − p)^γ / p): (2/9)·(−(4/3)·ln 3 − 4/3), and
        # (2/9)·(−0.5·√1.5·ln 3 − 3·√(2/3)).
        (2.0, 0, 0.48827213, -0.62181103),
        (0.5, 0, 0.89701318, -0.69383295),
        # With p = 2/3 in class 1: (1/9)·ln 1.5. By the logit of class 0: (2/9)·((2/3)·ln 1.5 + 1/6).
        (2.0, 1, 0.04505168, 0.09710594),
    ],
)
def test_focal_loss(gamma, label, loss, slope):
    focal = validated(dataclasses.replace(VANILLA, focal_gamma=gamma))
    np.testing.assert_allclose(terms(focal, label=label)["loss"], (loss, 1), rtol=2e-6)
    np.testing.assert_allclose(gradient(focal, STUDENT, label), (slope, -slope), rtol=2e-6)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 5.0])
def test_focal_loss_of_extreme_logits_is_finite_and_still_pulls(gamma):
    focal = dataclasses.replace(VANILLA, focal_gamma=gamma)
    # 1 − p rounds to 0 in class 0: nothing to learn. In class 1 the factor is 1 and the loss 200, with the slope p = 1.
    assert terms(focal, [200.0, 0.0], label=0)["loss"] == (0, 1)
    np.testing.assert_array_equal(gradient(focal, [200.0, 0.0], 0), 0)
    np.testing.assert_allclose(terms(focal, [200.0, 0.0], label=1)["loss"], (200, 1), rtol=1e-6)
    np.testing.assert_allclose(gradient(focal, [200.0, 0.0], 1), (1, -1), rtol=1e-6)


def test_class_weights_scale_examples_and_not_their_number():
    weighted = validated(dataclasses.replace(VANILLA, **TWO_TO_ONE))
    result = terms(weighted, [STUDENT] * 3, [TEACHER] * 3, [0, -1, 1], [1, 1, 1])
    np.testing.assert_allclose(result["loss"], (2 * LN3 + 0.5 * LN1_5, 2), rtol=1e-6)
    np.testing.assert_allclose(result["hard"], (LN3 + LN1_5, 2), rtol=1e-6)
    np.testing.assert_allclose(gradient(weighted, STUDENT, 0), (-4 / 3, 4 / 3), rtol=1e-6)
    np.testing.assert_allclose(gradient(weighted, STUDENT, 1), (1 / 6, -1 / 6), rtol=1e-6)
    # In a batch of one class, the weight has its full effect: a sum of factors as the denominator would cancel it.
    batch = [jnp.array([STUDENT] * 2), jnp.array([TEACHER] * 2), jnp.array([0, 0]), jnp.ones(2)]
    np.testing.assert_allclose(MEAN_GRADIENT(weighted, *batch), [[-2 / 3, 2 / 3]] * 2, rtol=1e-6)


def test_a_pseudo_label_has_the_weight_of_its_class():
    # The teacher predicts class 0, so the unlabelled example costs 2·ln 3, and the labelled one 0.5·ln 1.5.
    weighted = validated(dataclasses.replace(PL, **TWO_TO_ONE))
    result = terms(weighted, [STUDENT] * 2, [TEACHER] * 2, [1, -1], [1, 1])
    np.testing.assert_allclose(result["loss"], (0.5 * LN1_5 + 2 * LN3, 2), rtol=1e-6)


def test_confidence_weighs_pseudo_labels_alone():
    confident = validated(dataclasses.replace(PL, confidence_weighted=True))
    result = terms(confident, [STUDENT] * 2, [TEACHER] * 2, [1, -1], [1, 1])
    np.testing.assert_allclose(result["loss"], (LN1_5 + 0.75 * LN3, 2), rtol=1e-6)
    np.testing.assert_allclose(gradient(confident, STUDENT, -1), (-0.5, 0.5), rtol=1e-6)  # 0.75 · (−2/3, 2/3)
    np.testing.assert_allclose(gradient(confident, STUDENT, 1), (1 / 3, -1 / 3), rtol=1e-6)
    # The confidence is the one of the threshold, at T = 1, and an example below the threshold does not count at all.
    sure = dataclasses.replace(confident, threshold=0.8, temperature=0.1)
    assert terms(sure)["loss"] == (0, 0)
    np.testing.assert_allclose(terms(dataclasses.replace(sure, threshold=0.7))["loss"], (0.75 * LN3, 1), rtol=1e-6)


def test_factors_multiply_and_leave_the_soft_term_alone():
    mix = validated(
        dataclasses.replace(
            KD, hard_weight=0.3, soft_weight=0.7, pseudo_labels=True, confidence_weighted=True, **TWO_TO_ONE
        )
    )
    # Class 0, labelled: 0.3·2·ln 3 + 0.7·KL. Unlabelled: 0.3·2·0.75·ln 3 + 0.7·KL.
    expected = 0.3 * 2 * LN3 + 0.7 * KL + 0.3 * 2 * 0.75 * LN3 + 0.7 * KL
    result = terms(mix, [STUDENT] * 2, [TEACHER] * 2, [0, -1], [1, 1])
    np.testing.assert_allclose(result["loss"], (expected, 2), rtol=2e-6)
    np.testing.assert_allclose(result["soft_kl"], (2 * KL, 2), rtol=2e-6)
    # p − onehot and p − q: 0.3·2·(−2/3) + 0.7·(1/3 − 3/4).
    np.testing.assert_allclose(gradient(mix, STUDENT, 0), (-0.4 - 0.7 * 5 / 12, 0.4 + 0.7 * 5 / 12), rtol=2e-6)


@pytest.mark.parametrize(
    "objective",
    [
        dataclasses.replace(PL, confidence_weighted=True, focal_gamma=0.5, **TWO_TO_ONE),
        dataclasses.replace(KD, hard_weight=0.5, label_smoothing=0.2, **TWO_TO_ONE),
        dataclasses.replace(VANILLA, focal_gamma=0.5, **TWO_TO_ONE),
    ],
    ids=["pl", "mix", "vanilla"],
)
def test_empty_slots_and_parts_of_a_batch(objective):
    """NaN in an empty slot changes nothing, and the pairs of a batch's parts add up to those of the batch."""
    validated(objective)
    student = jnp.array([STUDENT, [jnp.nan, jnp.inf], [3.0, -1.0], [-2.0, 0.5]], jnp.float32)
    teacher = jnp.array([TEACHER, [jnp.nan, 0.0], [0.2, 0.1], [5.0, 0.0]], jnp.float32)
    label, weight = jnp.array([1, 0, -1, 0], jnp.int32), jnp.array([1.0, 0.0, 1.0, 1.0])
    whole = JITTED(objective, student, teacher, label, weight)
    parts = [JITTED(objective, *(x[i : i + 1] for x in (student, teacher, label, weight))) for i in range(4)]
    for name, (total, count) in whole.items():
        assert np.isfinite(total)
        np.testing.assert_allclose(sum(part[name][0] for part in parts), total, rtol=1e-6)
        assert sum(part[name][1] for part in parts) == count
    slope = MEAN_GRADIENT(objective, student, teacher, label, weight)
    np.testing.assert_array_equal(slope[1], 0)
    assert np.all(np.isfinite(slope)) and np.any(slope[0] != 0)


def test_balanced_weights_are_inverse_frequencies():
    # n / (K · n_c) for six examples of three classes: 6 / (3 · 3), 6 / (3 · 1), 6 / (3 · 2). Their mean over them is 1.
    objective = with_class_factors(
        dataclasses.replace(VANILLA, class_weights=BALANCED), ("a", "b", "c"), [0, 0, 0, 1, 2, 2]
    )
    np.testing.assert_allclose(objective.class_factors, (2 / 3, 2, 1))
    assert with_class_factors(VANILLA, ("a", "b"), [0, 0, 1]) is VANILLA


def test_explicit_weights_go_by_name_and_the_other_classes_have_1():
    objective = dataclasses.replace(VANILLA, class_weights=("c=0.25", "x=y=3"))
    assert with_class_factors(objective, ("x=y", "b", "c"), [0, 1, 2]).class_factors == (3.0, 1.0, 0.25)
    with pytest.raises(ConfigError, match=r"'vanilla': class_weights names the class 'x=y'; the task has.*'x=z'\?"):
        with_class_factors(objective, ("x=z", "b", "c"), [0, 1, 2])


def test_weights_without_their_factors_are_a_defect():
    with pytest.raises(ValueError, match="call with_class_factors"):
        terms(dataclasses.replace(VANILLA, class_weights=BALANCED), label=0)


@pytest.mark.parametrize("item", ["a", "a=", "=2", "a=0", "a=-1", "a=nan", "a=inf", "a=two", "balanced", "b=3"])
def test_malformed_weights_are_refused(item):
    with pytest.raises(ConfigError, match=r"objective 'vanilla': class_weights has .*NAME=FACTOR"):
        objectives.validate(dataclasses.replace(VANILLA, class_weights=("b=2", item)))


@settings(max_examples=100)
@given(st.lists(st.tuples(st.text(min_size=1), st.floats(2**-20, 2**20)), unique_by=lambda pair: pair[0]))
def test_any_class_name_can_have_a_weight(pairs):
    labels = [*(name for name, _ in pairs), "\0 no weight"]
    objective = dataclasses.replace(VANILLA, class_weights=tuple(f"{name}={factor!r}" for name, factor in pairs))
    expected = (*(factor for _, factor in pairs), 1.0) if pairs else ()
    assert with_class_factors(objective, labels, []).class_factors == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing = 1.0, expected a number from 0 to below 1"),
        ({"label_smoothing": math.nan}, "label_smoothing"),
        ({"focal_gamma": -1.0}, "focal_gamma = -1.0, expected a finite number, 0 or more"),
        ({"focal_gamma": math.inf}, "focal_gamma"),
        ({"focal_gamma": 2.0, "label_smoothing": 0.1}, "focal_gamma = 2.0, expected 0 with label_smoothing"),
        ({"teacher": "monolingual"}, "teacher = 'monolingual', expected 'none' without soft_weight"),
        ({"data": "all"}, "data = 'all', expected 'labelled' without soft_weight"),
        ({"teacher": "monolingual", "pseudo_labels": True}, "pseudo_labels = True, expected false, or data 'all'"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        objectives.validate(dataclasses.replace(VANILLA, **changes))
    assert message in str(caught.value) and "\n" not in str(caught.value)
