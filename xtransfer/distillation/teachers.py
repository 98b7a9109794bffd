"""The kinds of teachers, what each needs, and the mean of several.

One that is trained here learns from labels, and others need none. Several teach as one: for each example, the logits of
those that read its language are averaged, and the student sees nothing but the mean.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from xtransfer.config import ExperimentConfig
from xtransfer.distillation.objectives import BALANCED, Objective, configured_objectives, teacher_objective
from xtransfer.errors import ConfigError


def need_labels(objectives: Sequence[Objective]) -> list[str]:
    """Return the names of the objectives that cannot do without labelled text, in the given order."""
    names: list[str] = []
    for objective in objectives:  # a student that teaches comes before those that it teaches
        if _needs_labels(objective) or objective.student_teacher in names:
            names.append(objective.name)
    return names


def _needs_labels(objective: Objective) -> bool:
    has_targets = objective.pseudo_labels or objective.soft_weight > 0
    return objective.data == "labelled" or not has_targets


def trained_objectives(config: ExperimentConfig) -> tuple[Objective, ...]:
    """Return the objectives that something is trained by: the students', and the teachers' if one is trained here."""
    return (*configured_objectives(config), *([teacher_objective(config)] if config.trains_teachers else []))


def refuse_balanced_without_labels(config: ExperimentConfig, language: str) -> None:
    """Refuse class weights that are computed from labelled text, if there is none; a UserError names the objective."""
    for objective in trained_objectives(config):
        if objective.class_weights == BALANCED:
            raise ConfigError(
                f"objective {objective.name!r}: class_weights {BALANCED!r} need labelled {language} text, and there is "
                "none (no train split): give factors as NAME=FACTOR, or leave them out"
            )


def refuse_without_dev(config: ExperimentConfig, language: str) -> None:
    """Refuse settings that select or fit something on the source language's dev split, if there is none.

    Raises:
      UserError: names the key.
    """
    needs = {
        **{f"{role}.patience": encoder.patience > 0 for role, encoder in config.encoders.items()},
        "calibration.temperature": config.calibration.temperature,
        "calibration.threshold": config.calibration.threshold,
        "transfer.fitted_thresholds": config.transfer.fitted_thresholds,
        "oracle": config.oracle,
        "selection_metric": config.selection_metric != config.headline_metric,
    }
    for key, is_set in needs.items():
        if is_set:
            raise ConfigError(
                f"config key {key} needs a dev split in {language}, and there is none: add one, or leave {key} at its "
                "default"
            )


def seed_of(teacher_seed: int, seed: int) -> int:
    """Return the seed of a further teacher: the draw's own for 0, and another one for each other number."""
    if not seed:
        return teacher_seed
    return int.from_bytes(hashlib.sha256(f"{teacher_seed} {seed}".encode()).digest()[:4], "big")


def log_probabilities(logits: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Return the logarithms of probabilities at temperature 1, float64.

    Args:
      logits: [..., K].
      multi_label: whether each class is a decision of its own, and not one of K.

    Returns:
      [..., K]; or [..., K, 2] of multi-label logits, for a text that has the class and for one that does not.
    """
    z = logits.astype(np.float64)
    if multi_label:
        return np.stack([-np.logaddexp(0, -z), -np.logaddexp(0, z)], axis=-1)
    return z - np.logaddexp.reduce(z, axis=-1, keepdims=True)


def mean(
    logits: np.ndarray, weights: np.ndarray, *, of_logits: bool, multi_label: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean of several teachers, and how much they disagree.

    The disagreement is the weighted Jensen-Shannon divergence (Lin, "Divergence Measures Based on the Shannon Entropy",
    1991): the mean of KL(q_m ‖ q̄), where q̄ is the mean of the probabilities. It is 0 if all have the same
    probabilities, or if there is only one teacher, and at most the logarithm of their number. In a multi-label task, it
    is the sum over the classes, each of which is a decision of its own.

    Args:
      logits: [M, n, K] of M teachers; anything finite where a teacher does not read an example.
      weights: [M, n], 0 or more; 0 where a teacher does not read an example. Each example has a teacher.
      of_logits: return the mean of the logits, and not logits whose probabilities are the mean of the teachers'.
      multi_label: whether the probabilities are those of a multi-label task, by a sigmoid for each class.

    Returns:
      The mean, float32 [n, K]; and the disagreement in nats, float32 [n].
    """
    shares = np.asarray(weights, np.float64)  # [M, n]
    shares = (shares / shares.sum(axis=0))[..., None]  # [M, n, 1]
    log_q = log_probabilities(logits, multi_label=multi_label)
    each = shares[..., None] if multi_label else shares  # for every entry of log_q
    with np.errstate(divide="ignore"):  # the logarithm of a share of 0
        log_mean = np.logaddexp.reduce(log_q + np.log(each), axis=0)  # [n, K], or [n, K, 2]
    divergence = each * np.exp(log_q) * (log_q - log_mean)
    disagreement = divergence.sum(axis=(0, *range(2, divergence.ndim)))
    if of_logits:
        averaged = (shares * logits.astype(np.float64)).sum(axis=0)
    else:
        averaged = log_mean[..., 0] - log_mean[..., 1] if multi_label else log_mean
    return averaged.astype(np.float32), np.maximum(disagreement, 0.0).astype(np.float32)
