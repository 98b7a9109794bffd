"""Objectives compared with constants worked out by hand.

The teacher's logits are (ln 3, 0), so
  T = 1:   q = (3, 1) / 4                         = (0.75, 0.25)
  T = 2:   q = (√3, 1) / (√3 + 1)                 = (0.6339746, 0.3660254)
  T = 0.1: q = (3^10, 1) / (3^10 + 1)             = (0.999983065, 0.0000169348)
The student's logits are (0, ln 2), so p = (1, 2) / 3 with T on the teacher only. With T on both,
  T = 2:   p = (1, √2) / (1 + √2)                 = (0.4142136, 0.5857864)
  T = 0.1: p = (1, 2^10) / (1 + 2^10)             = (0.000975610, 0.999024390)
"""

import dataclasses
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xtransfer.distillation import objectives
from xtransfer.distillation.objectives import OBJECTIVES, Objective, loss_terms, mean
from xtransfer.errors import UserError

TEACHER = [math.log(3), 0.0]
STUDENT = [0.0, math.log(2)]
KD = OBJECTIVES["monox_kd"]
LN3 = 1.0986122886681098  # −log p(0), p = 1/3
LN1_5 = 0.4054651081081644  # −log p(1), p = 2/3


JITTED = jax.jit(loss_terms, static_argnums=0)
GRADIENTS = jax.jit(  # of the summed loss, with respect to the student's and the teacher's logits
    lambda objective, *batch: jax.grad(lambda *b: loss_terms(objective, *b)["loss"][0], argnums=(0, 1))(*batch),
    static_argnums=0,
)
MEAN_GRADIENT = jax.jit(
    lambda objective, *batch: jax.grad(lambda *b: mean(loss_terms(objective, *b)["loss"]))(*batch), static_argnums=0
)


def terms(objective, student=STUDENT, teacher=TEACHER, label=-1, weight=1.0):
    """Return the loss terms of examples given as nested lists, as pairs (sum, count) of floats."""
    pairs = JITTED(
        objective,
        jnp.asarray(student, jnp.float32),
        jnp.asarray(teacher, jnp.float32),
        jnp.asarray(label, jnp.int32),
        jnp.asarray(weight, jnp.float32),
    )
    return {name: (float(total), float(count)) for name, (total, count) in pairs.items()}


@pytest.mark.parametrize(
    ("temperature", "temperature_on", "scale_by_t2", "kl", "loss"),
    [
        # 0.75·ln(0.75·3) + 0.25·ln(0.25·3/2) = 0.75·0.81093022 − 0.25·0.98082925
        (1.0, "teacher", False, 0.36299035, 0.36299035),
        (1.0, "both", False, 0.36299035, 0.36299035),
        (1.0, "both", True, 0.36299035, 0.36299035),
        # 0.6339746·ln(1.9019238) + 0.3660254·ln(0.5490381) = 0.40756811 − 0.21947170; × 4 with T²
        (2.0, "teacher", False, 0.18809641, 0.18809641),
        (2.0, "teacher", True, 0.18809641, 0.75238566),
        # 0.6339746·ln(1.5305501) + 0.3660254·ln(0.6248444); × 4 with T²
        (2.0, "both", False, 0.09771245, 0.09771245),
        (2.0, "both", True, 0.09771245, 0.39084980),
        # ln 3 = 1.0986123 less the teacher's entropy 0.0002030 and q_1·ln 2 = 0.0000117; × 0.01 with T²
        (0.1, "teacher", False, 1.0983976, 1.0983976),
        (0.1, "teacher", True, 1.0983976, 0.010983976),
        # q_0·ln(1025) + q_1·ln(1025/1024) − 0.0002030 = 6.9323306 − 0.0002030
        (0.1, "both", False, 6.9321275, 6.9321275),
        (0.1, "both", True, 6.9321275, 0.069321275),
    ],
)
def test_soft_term_matches_hand_computation(temperature, temperature_on, scale_by_t2, kl, loss):
    objective = dataclasses.replace(KD, temperature=temperature, temperature_on=temperature_on, scale_by_t2=scale_by_t2)
    result = terms(objective)
    np.testing.assert_allclose(result["loss"], (loss, 1), rtol=2e-6)
    np.testing.assert_allclose(result["soft_kl"], (kl, 1), rtol=2e-6)
    assert result["hard"] == (0, 0)
    assert result["accuracy"] == (0, 0)


def test_vanilla_is_cross_entropy_with_the_label_and_ignores_the_teacher():
    for label, expected, correct in ((0, LN3, 0), (1, LN1_5, 1)):
        result = terms(OBJECTIVES["vanilla"], label=label)
        np.testing.assert_allclose(result["loss"], (expected, 1), rtol=1e-6)
        np.testing.assert_allclose(result["hard"], (expected, 1), rtol=1e-6)
        assert result["soft_kl"] == (0, 0)
        assert result["accuracy"] == (correct, 1)


def test_masked_label_adds_to_neither_sum_nor_count():
    result = terms(OBJECTIVES["vanilla"], [STUDENT] * 3, [TEACHER] * 3, [0, -1, 1], [1, 1, 1])
    np.testing.assert_allclose(result["loss"], (LN3 + LN1_5, 2), rtol=1e-6)
    assert result["accuracy"] == (1, 2)


def test_mix_of_hard_and_soft_terms_matches_hand_computation():
    # Labelled: 0.3·ln 3 + 0.7·4·0.09771245 = 0.32958369 + 0.27359486 = 0.60317855.
    # Unlabelled: the soft part alone, 0.27359486. Both count: sum 0.87677341 over 2.
    mix = Objective(
        "mix", 0.3, 0.7, temperature=2.0, temperature_on="both", scale_by_t2=True, data="all", teacher="monolingual"
    )
    validated(mix)
    np.testing.assert_allclose(terms(mix, label=0)["loss"], (0.60317855, 1), rtol=2e-6)
    both = terms(mix, [STUDENT] * 2, [TEACHER] * 2, [0, -1], [1, 1])
    np.testing.assert_allclose(both["loss"], (0.87677341, 2), rtol=2e-6)
    np.testing.assert_allclose(both["hard"], (LN3, 1), rtol=1e-6)
    np.testing.assert_allclose(both["soft_kl"], (2 * 0.09771245, 2), rtol=2e-6)


def validated(objective):
    objectives.validate(objective)
    return objective


@pytest.mark.parametrize(
    ("threshold", "loss", "count"),
    [
        # The teacher's confidence in class 0 is 0.75. The labelled example has class 1 whatever the teacher predicts.
        (0.0, LN1_5 + LN3, 2),
        (0.74, LN1_5 + LN3, 2),
        (0.76, LN1_5, 1),
        (1.0, LN1_5, 1),
    ],
)
def test_pseudo_labels_and_threshold(threshold, loss, count):
    objective = validated(dataclasses.replace(OBJECTIVES["monox_pl"], threshold=threshold))
    result = terms(objective, [STUDENT] * 2, [TEACHER] * 2, [1, -1], [1, 1])
    np.testing.assert_allclose(result["loss"], (loss, count), rtol=1e-6)
    assert result["accuracy"] == (1, 1)  # against gold labels only


def test_threshold_is_inclusive_and_ignores_the_temperature():
    # An undecided teacher's confidence is exactly 1/2: a threshold of 0.5 keeps it, and argmax takes the first class.
    undecided = dataclasses.replace(OBJECTIVES["monox_pl"], threshold=0.5, temperature=0.1)
    np.testing.assert_allclose(terms(undecided, teacher=[0.0, 0.0])["loss"], (LN3, 1), rtol=1e-6)
    # At T = 0.1 the confidence of the teacher (ln 3, 0) would be 0.99998; the threshold uses T = 1.
    sharp = dataclasses.replace(OBJECTIVES["monox_pl"], threshold=0.9, temperature=0.1)
    assert terms(sharp)["loss"] == (0, 0)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_empty_slots_do_not_count_even_with_nan_in_them(name):
    student = jnp.array([STUDENT, [jnp.nan, jnp.inf]], jnp.float32)
    teacher = jnp.array([TEACHER, [jnp.nan, 0.0]], jnp.float32)
    label, weight = jnp.array([1, 0], jnp.int32), jnp.array([1.0, 0.0])
    without_empty_slot = JITTED(OBJECTIVES[name], student[:1], teacher[:1], label[:1], weight[:1])
    with_empty_slot = JITTED(OBJECTIVES[name], student, teacher, label, weight)
    chex.assert_trees_all_equal(without_empty_slot, with_empty_slot)
    gradient = MEAN_GRADIENT(OBJECTIVES[name], student, teacher, label, weight)
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.all(np.isfinite(gradient)) and np.any(gradient[0] != 0)


@pytest.mark.parametrize(
    ("temperature", "temperature_on", "scale_by_t2"),
    [
        (1.0, "teacher", False),
        (0.1, "teacher", False),
        (2.0, "teacher", True),
        (2.0, "both", False),
        (2.0, "both", True),
        (0.1, "both", True),
    ],
)
def test_gradient_is_p_minus_q(temperature, temperature_on, scale_by_t2):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 3))
    p = _softmax(student / (temperature if temperature_on == "both" else 1))
    expected = p - _softmax(teacher / temperature)
    if temperature_on == "both":
        expected /= temperature
    if scale_by_t2:
        expected *= temperature**2
    objective = dataclasses.replace(KD, temperature=temperature, temperature_on=temperature_on, scale_by_t2=scale_by_t2)
    gradient = _gradient(objective, student, teacher, np.full(5, -1))
    np.testing.assert_allclose(gradient, expected, atol=1e-6 * max(1, 1 / temperature))


def _softmax(z):
    z = np.exp(z - z.max(-1, keepdims=True))
    return z / z.sum(-1, keepdims=True)


def _gradient(objective, student, teacher, label):
    """Return the gradient of the summed loss with respect to the student's logits."""
    batch = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32), jnp.asarray(label, jnp.int32)
    student_gradient, teacher_gradient = GRADIENTS(objective, *batch, jnp.ones(len(label)))
    np.testing.assert_array_equal(teacher_gradient, 0)  # the teacher gets no gradient
    return student_gradient


def test_gradient_of_the_hard_term_and_of_masked_rows():
    student = np.array([STUDENT] * 3)
    teacher = np.array([TEACHER] * 3)
    # p − onehot: (1/3, 2/3) − (1, 0), (1/3, 2/3) − (0, 1); the unlabelled row must not move.
    expected = [[-2 / 3, 2 / 3], [0, 0], [1 / 3, -1 / 3]]
    gradient = _gradient(OBJECTIVES["vanilla"], student, teacher, np.array([0, -1, 1]))
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    np.testing.assert_array_equal(gradient[1], 0)
    unsure = dataclasses.replace(OBJECTIVES["monox_pl"], threshold=0.8)
    np.testing.assert_array_equal(_gradient(unsure, student, teacher, np.array([0, -1, 1]))[1], 0)


@pytest.mark.parametrize("temperature_on", ["teacher", "both"])
def test_loss_and_gradient_are_finite_with_sharp_temperature_and_large_logits(temperature_on):
    objective = dataclasses.replace(KD, hard_weight=1.0, temperature=0.1, temperature_on=temperature_on)
    student = np.array([[50.0, -50.0, 0.0], [-50.0, 50.0, 50.0]])
    teacher = np.array([[-50.0, 50.0, 50.0], [50.0, -50.0, 0.0]])
    result = terms(objective, student, teacher, [1, -1], [1, 1])
    # Teacher only, row 0: q = (0, ½, ½), p = (1, e^−100, e^−50): KL = ½·100 + ½·50 − ln 2; row 1 is
    # q = (1, 0, 0), −log p_0 = 100 + ln 2. With T on both, the distances are ten times as large. The label costs 100.
    factor = 10 if temperature_on == "both" else 1
    np.testing.assert_allclose(result["loss"][0], factor * 175 + 100, rtol=1e-6)
    assert np.all(np.isfinite(_gradient(objective, student, teacher, np.array([1, -1]))))


def test_eager_jit_and_vmap_agree_without_retracing():
    rng = np.random.default_rng(1)
    student, teacher = jnp.asarray(rng.normal(size=(2, 4, 6, 3)), jnp.float32)
    label = jnp.asarray(rng.integers(-1, 3, size=(4, 6)), jnp.int32)
    weight = jnp.asarray(rng.integers(0, 2, size=(4, 6)), jnp.float32)
    chex.clear_trace_counter()
    # One trace for each objective, and one more under vmap.
    cases = (KD, dataclasses.replace(OBJECTIVES["monox_pl"], threshold=0.6))
    jitted = jax.jit(chex.assert_max_traces(loss_terms, 2 * len(cases)), static_argnums=0)
    for objective in cases:
        plain = loss_terms(objective, student, teacher, label, weight)  # op by op
        chex.assert_shape(jax.tree.leaves(plain), ())
        chex.assert_type(jax.tree.leaves(plain), jnp.float32)
        chex.assert_trees_all_close(jitted(objective, student, teacher, label, weight), plain, rtol=1e-6)
        jitted(dataclasses.replace(objective), teacher, student, label[::-1], weight)  # equal: no new trace
        rows = jax.vmap(functools.partial(jitted, objective))(student, teacher, label, weight)
        chex.assert_trees_all_close(jax.tree.map(lambda x: x.sum(0), rows), plain, rtol=1e-5)


def test_mean_and_its_gradient_are_zero_if_nothing_counts():
    assert float(mean((jnp.float32(6), jnp.float32(4)))) == 1.5
    assert float(mean((jnp.float32(0), jnp.float32(0)))) == 0
    batch = jnp.array([STUDENT]), jnp.array([TEACHER]), jnp.array([-1]), jnp.ones(1)
    np.testing.assert_array_equal(MEAN_GRADIENT(OBJECTIVES["vanilla"], *batch), 0)


LOGITS = st.lists(st.floats(-20, 20, width=32), min_size=3, max_size=3)
TEMPERATURES = st.sampled_from([0.5, 1.0, 2.0])


@settings(max_examples=60, deadline=None)
@given(LOGITS, LOGITS, TEMPERATURES, st.sampled_from(["teacher", "both"]), st.floats(-5, 5))
def test_kl_properties(student, teacher, temperature, temperature_on, shift):
    objective = dataclasses.replace(KD, temperature=temperature, temperature_on=temperature_on)
    divisor = temperature if temperature_on == "both" else 1.0
    p = _softmax(np.array(student) / divisor)
    q = _softmax(np.array(teacher) / temperature)
    kl = terms(objective, student, teacher)["soft_kl"][0]
    assert kl >= -1e-5
    same = np.array(teacher) / temperature * divisor
    assert abs(terms(objective, same, teacher)["soft_kl"][0]) < 1e-5
    if np.abs(p - q).sum() > 0.01:  # Pinsker: KL >= ½·‖p − q‖₁²
        assert kl >= 0.49 * np.abs(p - q).sum() ** 2 > 0
    shifted = terms(objective, np.array(student) + shift, np.array(teacher) - shift)["soft_kl"][0]
    np.testing.assert_allclose(shifted, kl, rtol=1e-4, atol=1e-4)
    soft_cross_entropy = -np.sum(q * np.log(p))
    entropy = -np.sum(q * np.log(np.maximum(q, 1e-300)))
    np.testing.assert_allclose(soft_cross_entropy - kl, entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("temperature", -1.0),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("threshold", -0.1),
        ("threshold", 1.1),
        ("threshold", math.nan),
        ("hard_weight", -1.0),
        ("soft_weight", -1.0),
        ("soft_weight", math.nan),
        ("soft_weight", 0.0),
        ("temperature_on", "student"),
        ("data", "some"),
        ("teacher", "none"),
        ("teacher", ""),
    ],
)
def test_invalid_values_are_refused_with_the_field_name(field, value):
    with pytest.raises(UserError, match=field):
        objectives.validate(dataclasses.replace(KD, **{field: value}))


def test_table_has_the_papers_objectives_and_is_valid():
    assert list(OBJECTIVES)[:4] == ["vanilla", "monox_kd", "monox_pl", "self_training"]
    for name, objective in OBJECTIVES.items():
        assert objective.name == name
        objectives.validate(objective)
    assert {o.teacher for o in OBJECTIVES.values() if o.data == "all"} == {"monolingual", "vanilla"}
    with pytest.raises(UserError, match="hard_weight"):
        objectives.validate(dataclasses.replace(KD, pseudo_labels=True))
