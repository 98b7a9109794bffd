"""Training objectives: four settings of one general loss.

    loss(x) = hard_weight · CE(label, p) + soft_weight · KL(q ‖ p)

Here q = softmax(z_t / T) are the teacher's probabilities, and p = softmax(z_s) the student's, or softmax(z_s / T) if
the temperature applies to both. KL and soft cross-entropy differ by the teacher's entropy, which is constant in the
student, so both have the gradient p − q. KL is reported because 0 is its best value.

Sources: "Can Monolingual Pretrained Models Help Cross-Lingual Classification?" (Chi et al., AACL 2020, arXiv
1911.03913) for the objectives; "Distilling the Knowledge in a Neural Network" (Hinton et al., 2015, arXiv 1503.02531)
for the temperature on both sides and the factor T².
"""

import dataclasses
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, cast

import jax
import jax.numpy as jnp
import optax

from xtransfer.config import ExperimentConfig
from xtransfer.errors import ConfigError, nearest

Pair = tuple[jax.Array, jax.Array]
"""A (sum, count) pair of float32 scalars. It stays exact over ragged batches and devices until it is divided."""


@dataclasses.dataclass(frozen=True)
class Objective:
    """A way to train a student; hashable, so that it can be a static argument of `jax.jit`.

    Attributes:
      name: its name in tables and in the workdir.
      hard_weight: the factor of the cross-entropy with a label, which examples without a label do not have.
      soft_weight: the factor of KL(q ‖ p).
      temperature: T > 0 in q = softmax(z_t / T).
      temperature_on: "teacher" only, or "both" teacher and student.
      scale_by_t2: whether to multiply the soft term by T², as Hinton et al. do.
      pseudo_labels: whether the teacher's argmax stands in for a missing label.
      threshold: the smallest max softmax(z_t) for which a pseudo-label counts; 0 keeps all.
      data: "labelled" trains on the labelled source text, "all" on the unlabelled text as well.
      teacher: "monolingual", "vanilla" (the student trained on labels alone), or "none".
    """

    name: str
    hard_weight: float = 1.0
    soft_weight: float = 0.0
    temperature: float = 1.0
    temperature_on: Literal["teacher", "both"] = "teacher"
    scale_by_t2: bool = False
    pseudo_labels: bool = False
    threshold: float = 0.0
    data: Literal["labelled", "all"] = "labelled"
    teacher: Literal["none", "monolingual", "vanilla"] = "none"

    def loss_settings(self) -> "Objective":
        """Return the objective reduced to the fields of its loss: without name, data, and the origin of the logits."""
        teacher: Literal["none", "monolingual"] = "none" if self.teacher == "none" else "monolingual"
        return dataclasses.replace(self, name="", data="labelled", teacher=teacher)


OBJECTIVES: Mapping[str, Objective] = MappingProxyType(
    {
        objective.name: objective
        for objective in (
            Objective("vanilla"),
            Objective("monox_kd", hard_weight=0.0, soft_weight=1.0, data="all", teacher="monolingual"),
            Objective("monox_pl", pseudo_labels=True, data="all", teacher="monolingual"),
            Objective("self_training", hard_weight=0.0, soft_weight=1.0, data="all", teacher="vanilla"),
        )
    }
)


def validate(objective: Objective) -> None:
    """Check an objective; a UserError names the first field with an impossible value."""

    def refuse(field: str, expected: str) -> None:
        raise ConfigError(f"objective {objective.name!r}: {field} = {getattr(objective, field)!r}, expected {expected}")

    for field, choices in _CHOICES.items():
        if getattr(objective, field) not in choices:
            refuse(field, "one of " + ", ".join(map(repr, choices)))
    if not (math.isfinite(objective.temperature) and objective.temperature > 0):
        refuse("temperature", "a finite number above 0")
    if not 0 <= objective.threshold <= 1:
        refuse("threshold", "a number from 0 to 1")
    for field in ("hard_weight", "soft_weight"):
        value = getattr(objective, field)
        if not (math.isfinite(value) and value >= 0):
            refuse(field, "a finite number, 0 or more")
    if objective.hard_weight == 0 and objective.soft_weight == 0:
        refuse("soft_weight", "above 0 if hard_weight is 0 too: nothing would be learnt")
    if objective.teacher == "none" and (objective.soft_weight > 0 or objective.pseudo_labels):
        refuse("teacher", "'monolingual' or 'vanilla' for soft_weight > 0 or pseudo_labels")
    if objective.pseudo_labels and objective.hard_weight == 0:
        refuse("hard_weight", "above 0 if pseudo_labels is true")


_CHOICES = {
    "temperature_on": ("teacher", "both"),
    "data": ("labelled", "all"),
    "teacher": ("none", "monolingual", "vanilla"),
}


def mean(pair: Pair) -> jax.Array:
    """Return sum / count as a scalar, or 0, with a zero gradient, if nothing was counted."""
    total, count = pair
    return jnp.where(count > 0, total / jnp.where(count > 0, count, 1.0), 0.0)


def soft_kl(objective: Objective, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return KL(q ‖ p) in nats for each example, at the objective's temperatures and without the factor T².

    Args:
      objective: gives T, and says whether T divides the student's logits too.
      student_logits: [..., K] float32.
      teacher_logits: [..., K] float32; no gradient flows into them.

    Returns:
      [...] float32, 0 or more up to rounding.
    """
    student_temperature = objective.temperature if objective.temperature_on == "both" else 1.0
    log_q = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / objective.temperature)
    log_p = jax.nn.log_softmax(student_logits / student_temperature)
    return optax.losses.kl_divergence_with_log_targets(log_p, log_q)


def hard_targets(objective: Objective, teacher_logits: jax.Array, label: jax.Array) -> jax.Array:
    """Return the class that the hard term aims at: the label, or a pseudo-label that passes the threshold.

    Args:
      objective: says whether to use pseudo-labels, and how confident they must be.
      teacher_logits: [..., K] float32.
      label: [...] int32, −1 without a label.

    Returns:
      [...] int32, −1 if the example has no target.
    """
    if not objective.pseudo_labels:
        return label
    confidence = jnp.max(jax.nn.softmax(teacher_logits), axis=-1)
    guess = jnp.argmax(teacher_logits, axis=-1).astype(label.dtype)
    return jnp.where(label >= 0, label, jnp.where(confidence >= objective.threshold, guess, -1))


def loss_terms(
    objective: Objective,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    label: jax.Array,
    weight: jax.Array,
) -> dict[str, Pair]:
    """Return the loss of a batch, and further terms to log, as (sum, count) pairs.

    Differentiate `mean` of "loss" after sum and count have been added up over the global batch. An example without any
    term (no label and no soft term, or a pseudo-label below the threshold) is in neither sum nor count. Neither is a
    slot of weight 0, whatever it holds.

    Args:
      objective: static under jit.
      student_logits: [..., K]; computed in float32.
      teacher_logits: [..., K] raw logits, zeros without a teacher.
      label: [...] int32, −1 without a label.
      weight: [...] float32, 0 in empty slots.

    Returns:
      "loss": the objective's value. "hard": cross-entropy with the hard targets. "soft_kl": KL(q ‖ p) in nats, without
      weight or T²; it counts nothing for objectives without a teacher. "accuracy": the student's argmax against the
      given labels.
    """
    used = weight > 0
    # An empty slot may hold anything; zeros there keep 0 · NaN out of sums and gradients.
    student = jnp.where(used[..., None], student_logits.astype(jnp.float32), 0.0)
    teacher = jnp.where(used[..., None], teacher_logits.astype(jnp.float32), 0.0)
    weight = weight.astype(jnp.float32)
    target = hard_targets(objective, teacher, label)
    hard_weight = weight * (target >= 0)
    soft_weight = weight if objective.teacher != "none" else jnp.zeros_like(weight)
    gold_weight = weight * (label >= 0)

    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(student, jnp.maximum(target, 0))
    kl = soft_kl(objective, student, teacher)
    t2 = objective.temperature**2 if objective.scale_by_t2 else 1.0
    loss = objective.hard_weight * cross_entropy * hard_weight + objective.soft_weight * t2 * kl * soft_weight  # [...]
    counted = soft_weight if objective.soft_weight > 0 else hard_weight
    correct = (jnp.argmax(student, axis=-1) == label).astype(jnp.float32)
    return {
        "loss": (jnp.sum(loss), jnp.sum(counted)),
        "hard": (jnp.sum(cross_entropy * hard_weight), jnp.sum(hard_weight)),
        "soft_kl": (jnp.sum(kl * soft_weight), jnp.sum(soft_weight)),
        "accuracy": (jnp.sum(correct * gold_weight), jnp.sum(gold_weight)),
    }


def configured_objective(config: ExperimentConfig, name: str) -> Objective:
    """Return an objective by name with the config's settings.

    A setting that the objective does not use keeps its default: the temperature without a soft term, and the threshold
    without pseudo-labels. Runs that differ in such a setting alone are therefore the same.

    Raises:
      UserError: there is no such objective, its settings are impossible, or it is listed before the one that it needs.
    """
    if name not in OBJECTIVES:
        choices = f"choose from {', '.join(OBJECTIVES)}{nearest(name, OBJECTIVES)}"
        raise ConfigError(f"config key objectives: no objective {name!r}; {choices}")
    options = config.transfer
    objective = OBJECTIVES[name]
    if objective.soft_weight:
        objective = dataclasses.replace(
            objective,
            temperature=options.temperature,
            temperature_on=cast(Literal["teacher", "both"], options.temperature_on),
            scale_by_t2=options.scale_by_t2,
        )
    if objective.pseudo_labels:
        objective = dataclasses.replace(objective, threshold=options.threshold)
    validate(objective)
    if objective.teacher == "vanilla" and "vanilla" not in config.objectives[: config.objectives.index(name)]:
        raise ConfigError(
            f"config key objectives: {name} learns from the student of 'vanilla'; list that one before it"
        )
    return objective
