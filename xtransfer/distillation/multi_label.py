"""The loss of objectives in a multi-label task, where each class is a decision of its own.

    loss(x) = mean over classes of  hard_weight · BCE(label_k, p_k) + soft_weight · KL(Bernoulli(q_k) ‖ Bernoulli(p_k))

Here q_k = σ(z_t / T) is the teacher's probability of class k, and p_k = σ(z_s) the student's, or σ(z_s / T) if the
temperature applies to both. The gradient of either term is p_k − q_k over K, as for a single label without the mean.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from xtransfer.distillation import objectives
from xtransfer.distillation.objectives import Objective, Pair


def terms_of_batch(objective: Objective, student_logits: jax.Array, batch: Mapping[str, jax.Array]) -> dict[str, Pair]:
    """Return the loss terms of a batch [R, M, K], by the kind of its labels: [R, M], or [R, M, K] for sets of them."""
    label = batch["label"]
    terms = loss_terms if label.ndim == student_logits.ndim else objectives.loss_terms
    return terms(objective, student_logits, batch["teacher_logits"], label, batch["weight"])


def soft_kl(objective: Objective, student_logits: jax.Array, teacher_logits: jax.Array) -> jax.Array:
    """Return KL(q_k ‖ p_k) in nats for each class, at the objective's temperatures and without the factor T².

    Args:
      objective: gives T, and says whether T divides the student's logits too.
      student_logits: [..., K] float32.
      teacher_logits: [..., K] float32; no gradient flows into them.

    Returns:
      [..., K] float32, 0 or more up to rounding.
    """
    student = student_logits / (objective.temperature if objective.temperature_on == "both" else 1.0)
    teacher = jax.lax.stop_gradient(teacher_logits) / objective.temperature
    present = jax.nn.sigmoid(teacher) * (jax.nn.log_sigmoid(teacher) - jax.nn.log_sigmoid(student))
    absent = jax.nn.sigmoid(-teacher) * (jax.nn.log_sigmoid(-teacher) - jax.nn.log_sigmoid(-student))
    return present + absent


def hard_targets(objective: Objective, teacher_logits: jax.Array, label: jax.Array) -> jax.Array:
    """Return what the hard term aims at for each class: the label, or a pseudo-label that passes the threshold.

    A class is a pseudo-label if the teacher's probability is above 0.5, that is, if its logit is positive. The
    teacher's confidence in a class is the probability of its decision.

    Args:
      objective: says whether to use pseudo-labels, and how confident they must be.
      teacher_logits: [..., K] float32.
      label: [..., K] int32, 1 or 0, and −1 throughout an example without labels.

    Returns:
      [..., K] int32, −1 if the class has no target.
    """
    if not objective.pseudo_labels:
        return label
    confidence = jax.nn.sigmoid(jnp.abs(teacher_logits))
    guess = (teacher_logits > 0).astype(label.dtype)
    return jnp.where(label >= 0, label, jnp.where(confidence >= objective.threshold, guess, -1))


def loss_terms(
    objective: Objective,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    label: jax.Array,
    weight: jax.Array,
) -> dict[str, Pair]:
    """Return the loss of a batch, and further terms to log, as (sum, count) pairs; see `objectives.loss_terms`.

    A hard term counts the share of an example's classes that have a target, and sums over them, so it is the mean over
    decisions.

    Args:
      objective: static under jit.
      student_logits: [..., K]; computed in float32.
      teacher_logits: [..., K] raw logits, zeros without a teacher.
      label: [..., K] int32, 1 or 0, and −1 throughout an example without labels.
      weight: [...] float32, 0 in empty slots.

    Returns:
      "loss": the objective's value. "hard": binary cross-entropy with the hard targets. "soft_kl": KL(q ‖ p) in nats,
      the mean over classes. "accuracy": the share of labelled examples whose labels are all right at 0.5.
    """
    used = weight > 0
    # An empty slot may hold anything; zeros there keep 0 · NaN out of sums and gradients.
    student = jnp.where(used[..., None], student_logits.astype(jnp.float32), 0.0)
    teacher = jnp.where(used[..., None], teacher_logits.astype(jnp.float32), 0.0)
    weight = weight.astype(jnp.float32)
    target = hard_targets(objective, teacher, label)  # [..., K]
    has_target = (target >= 0).astype(jnp.float32)
    soft_weight = weight if objective.teacher != "none" else jnp.zeros_like(weight)
    gold_weight = weight * jnp.all(label >= 0, axis=-1)

    entropy = optax.losses.sigmoid_binary_cross_entropy(student, jnp.maximum(target, 0).astype(jnp.float32))
    cross_entropy = jnp.mean(entropy * has_target, axis=-1) * weight  # [...]
    hard_weight = jnp.mean(has_target, axis=-1) * weight
    kl = jnp.mean(soft_kl(objective, student, teacher), axis=-1) * soft_weight
    t2 = objective.temperature**2 if objective.scale_by_t2 else 1.0
    loss = objective.hard_weight * cross_entropy + objective.soft_weight * t2 * kl
    counted = soft_weight if objective.soft_weight > 0 else hard_weight
    correct = jnp.all((student > 0) == (label > 0), axis=-1).astype(jnp.float32)
    return {
        "loss": (jnp.sum(loss), jnp.sum(counted)),
        "hard": (jnp.sum(cross_entropy), jnp.sum(hard_weight)),
        "soft_kl": (jnp.sum(kl), jnp.sum(soft_weight)),
        "accuracy": (jnp.sum(correct * gold_weight), jnp.sum(gold_weight)),
    }
