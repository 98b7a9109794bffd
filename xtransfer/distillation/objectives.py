"""Training objectives: four settings of one general loss, and more that a config defines.

    loss(x) = hard_weight · w(x) · CE(label, p) + soft_weight · KL(q ‖ p)

The factor w(x) is 1 unless the objective has class weights (the factor of the label's class), focal loss
((1 − p_label)^γ), or confidence-weighted pseudo-labels (max softmax(z_t)). Label smoothing ε changes the target of CE
to (1 − ε) · label + ε / K.

The mean loss of a batch divides by the number of examples that have a term, whatever their factors. So a factor has its
full effect in any batch: dividing by the sum of factors would cancel a class weight in a batch of one class, and a
confidence in a batch of one pseudo-label. The hard and the soft term share this denominator, it does not depend on the
parameters, and it adds up exactly over microbatches and devices.

Here q = softmax(z_t / T) are the teacher's probabilities, and p = softmax(z_s) the student's, or softmax(z_s / T) if
the temperature applies to both. KL and soft cross-entropy differ by the teacher's entropy, which is constant in the
student, so both have the gradient p − q. KL is reported because 0 is its best value.

Sources: "Can Monolingual Pretrained Models Help Cross-Lingual Classification?" (Chi et al., AACL 2020, arXiv
1911.03913) for the objectives; "Distilling the Knowledge in a Neural Network" (Hinton et al., 2015, arXiv 1503.02531)
for the temperature on both sides and the factor T²; "Rethinking the Inception Architecture for Computer Vision"
(Szegedy et al., 2016, arXiv 1512.00567) for label smoothing; "Focal Loss for Dense Object Detection" (Lin et al.,
2017, arXiv 1708.02002).
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from xtransfer.config import ExperimentConfig, ObjectiveConfig, TransferConfig
from xtransfer.data import names
from xtransfer.errors import ConfigError, nearest

Pair = tuple[jax.Array, jax.Array]
"""A (sum, count) pair of float32 scalars. It stays exact over ragged batches and devices until it is divided."""

TEACHER = "teacher"
"""The teacher's name wherever a student has an objective. The teacher knows the source language only."""

BALANCED = ("balanced",)
"""Class weights of n / (K · n_c), for n_c of n labelled examples in class c. Their mean over the examples is 1."""


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
      confidence_weighted: whether max softmax(z_t) multiplies the hard term of a pseudo-label.
      class_weights: `BALANCED`, or "NAME=FACTOR" for some classes, as configured.
      class_factors: the factors [K] of the hard term by its target's class, which `with_class_factors` takes from
        `class_weights`; () = 1 for all.
      label_smoothing: ε, the probability that the target of the hard term spreads evenly over all classes.
      focal_gamma: γ in the factor (1 − p_target)^γ of the hard term; 0 = none.
      data: "labelled" trains on the labelled source text, "all" on the unlabelled text as well, "target" on unlabelled
        text in target languages alone, and "parallel" on translations, with the teacher's logits for the originals.
      teacher: "monolingual", "none", or the objective whose student labels the text, such as "vanilla".
      languages: with data "target" or "parallel", the languages that it reads and is scored in; () = all target
        languages, and scored in the source language too; with "parallel", it then reads the originals as well.
      student: the name of a further encoder that it trains; "" = the usual one.
    """

    name: str
    hard_weight: float = 1.0
    soft_weight: float = 0.0
    temperature: float = 1.0
    temperature_on: Literal["teacher", "both"] = "teacher"
    scale_by_t2: bool = False
    pseudo_labels: bool = False
    threshold: float = 0.0
    confidence_weighted: bool = False
    class_weights: tuple[str, ...] = ()
    class_factors: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    focal_gamma: float = 0.0
    data: Literal["labelled", "all", "target", "parallel"] = "labelled"
    teacher: str = "none"
    languages: tuple[str, ...] = ()
    student: str = ""

    @property
    def student_teacher(self) -> str | None:
        """The objective whose student is the teacher, if it is a student."""
        return None if self.teacher in _NO_STUDENTS else self.teacher

    @property
    def reads_target_text(self) -> bool:
        """Whether it learns from text in target languages, which has no labels."""
        return self.data in _KINDS_OF_TARGET_TEXT

    def loss_settings(self) -> "Objective":
        """Return the objective reduced to the fields of its loss: without name, data, and the origin of the logits."""
        teacher = "none" if self.teacher == "none" else "monolingual"
        return dataclasses.replace(
            self, name="", data="labelled", teacher=teacher, class_weights=(), languages=(), student=""
        )


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
    if not objective.teacher:
        refuse("teacher", "'none', 'monolingual', or the name of another objective")
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
        refuse("teacher", "'monolingual' or another objective for soft_weight > 0 or pseudo_labels")
    if objective.pseudo_labels and objective.hard_weight == 0:
        refuse("hard_weight", "above 0 if pseudo_labels is true")
    if objective.teacher != "none" and not (objective.soft_weight > 0 or objective.pseudo_labels):
        refuse("teacher", "'none' without soft_weight and pseudo_labels: nothing would read its logits")
    if objective.data != "labelled" and not (objective.soft_weight > 0 or objective.pseudo_labels):
        refuse("data", "'labelled' without soft_weight and pseudo_labels: the other text would have no loss")
    if objective.data == "target" and objective.teacher == "monolingual":
        refuse("teacher", "another objective with data 'target': the monolingual teacher cannot read target languages")
    if objective.reads_target_text and objective.hard_weight > 0 and not objective.pseudo_labels:
        refuse("hard_weight", f"0 with data {objective.data!r}, or pseudo_labels: that text has no labels")
    if objective.languages and not objective.reads_target_text:
        refuse("languages", "() unless data is 'target' or 'parallel': the source text is in the source language")
    if len(set(objective.languages)) < len(objective.languages):
        refuse("languages", "each language once")
    if objective.data == "labelled" and objective.pseudo_labels:
        refuse("pseudo_labels", "false, or data 'all': labelled text has its own labels")
    if not 0 <= objective.label_smoothing < 1:
        refuse("label_smoothing", "a number from 0 to below 1")
    if not (math.isfinite(objective.focal_gamma) and objective.focal_gamma >= 0):
        refuse("focal_gamma", "a finite number, 0 or more")
    if objective.label_smoothing and objective.focal_gamma:
        refuse("focal_gamma", "0 with label_smoothing: it ignores the confident examples that smoothing corrects")
    if objective.class_weights != BALANCED:
        _class_weights(objective)


_NO_STUDENTS = ("none", "monolingual")  # teachers that are no students, whose names no objective can have
_CHOICES = {
    "temperature_on": ("teacher", "both"),
    "data": ("labelled", "all", "target", "parallel"),
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
    confidence = _confidence(teacher_logits)
    guess = jnp.argmax(teacher_logits, axis=-1).astype(label.dtype)
    return jnp.where(label >= 0, label, jnp.where(confidence >= objective.threshold, guess, -1))


def hard_loss(
    objective: Objective,
    student_logits: jax.Array,
    teacher_logits: jax.Array,
    label: jax.Array,
    target: jax.Array,
    cross_entropy: jax.Array,
) -> jax.Array:
    """Return the hard term of each example, without `hard_weight`: its cross-entropy, smoothed, and times its factors.

    Args:
      objective: gives the smoothing and the factors.
      student_logits: [..., K] float32.
      teacher_logits: [..., K] float32; no gradient flows into them.
      label: [...] int32, −1 without a label.
      target: [...] int32, the class to aim at, 0 or more.
      cross_entropy: [...] float32, −log p of the target.

    Returns:
      [...] float32.
    """
    loss = cross_entropy
    if objective.label_smoothing:
        uniform = -jnp.mean(jax.nn.log_softmax(student_logits), axis=-1)
        loss = (1 - objective.label_smoothing) * loss + objective.label_smoothing * uniform
    if objective.focal_gamma:
        # 1 − p rounds to 0 for a confident student, where its power has no gradient. The logarithm stays finite.
        log_p = jax.nn.log_softmax(student_logits)  # [..., K]
        is_target = jnp.arange(log_p.shape[-1]) == target[..., None]
        log_rest = jax.nn.logsumexp(jnp.where(is_target, -jnp.inf, log_p), axis=-1)  # log(1 − p)
        loss = loss * jnp.exp(objective.focal_gamma * log_rest)
    if objective.class_factors:
        loss = loss * jnp.asarray(objective.class_factors, jnp.float32)[target]
    if objective.confidence_weighted:
        loss = loss * jnp.where(label >= 0, 1.0, _confidence(teacher_logits))
    return loss


def _confidence(teacher_logits: jax.Array) -> jax.Array:
    """Return the teacher's largest probability at temperature 1; [...] float32 without a gradient."""
    return jnp.max(jax.nn.softmax(jax.lax.stop_gradient(teacher_logits)), axis=-1)


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
    slot of weight 0, whatever it holds. Every other example counts as one, whatever its factors (see the module).

    Args:
      objective: static under jit.
      student_logits: [..., K]; computed in float32.
      teacher_logits: [..., K] raw logits, zeros without a teacher.
      label: [...] int32, −1 without a label.
      weight: [...] float32, 0 in empty slots.

    Returns:
      "loss": the objective's value. "hard": cross-entropy with the hard targets, without weight, factors, or smoothing.
      "soft_kl": KL(q ‖ p) in nats, without weight or T²; it counts nothing for objectives without a teacher.
      "accuracy": the student's argmax against the given labels.

    Raises:
      ValueError: the objective has class weights whose factors are not known yet (see `with_class_factors`).
    """
    if objective.class_weights and not objective.class_factors:
        raise ValueError(f"objective {objective.name!r} has class weights without factors: call with_class_factors")
    used = weight > 0
    # An empty slot may hold anything; zeros there keep 0 · NaN out of sums and gradients.
    student = jnp.where(used[..., None], student_logits.astype(jnp.float32), 0.0)
    teacher = jnp.where(used[..., None], teacher_logits.astype(jnp.float32), 0.0)
    weight = weight.astype(jnp.float32)
    target = hard_targets(objective, teacher, label)
    hard_weight = weight * (target >= 0)
    soft_weight = weight if objective.teacher != "none" else jnp.zeros_like(weight)
    gold_weight = weight * (label >= 0)

    target = jnp.maximum(target, 0)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(student, target)
    hard = hard_loss(objective, student, teacher, label, target, cross_entropy)
    kl = soft_kl(objective, student, teacher)
    t2 = objective.temperature**2 if objective.scale_by_t2 else 1.0
    loss = objective.hard_weight * hard * hard_weight + objective.soft_weight * t2 * kl * soft_weight  # [...]
    counted = soft_weight if objective.soft_weight > 0 else hard_weight
    correct = (jnp.argmax(student, axis=-1) == label).astype(jnp.float32)
    return {
        "loss": (jnp.sum(loss), jnp.sum(counted)),
        "hard": (jnp.sum(cross_entropy * hard_weight), jnp.sum(hard_weight)),
        "soft_kl": (jnp.sum(kl * soft_weight), jnp.sum(soft_weight)),
        "accuracy": (jnp.sum(correct * gold_weight), jnp.sum(gold_weight)),
    }


# The part of a loss that uses each setting of `TransferConfig`.
_SOFT, _HARD, _PSEUDO = "soft term (soft_weight)", "hard term (hard_weight)", "pseudo-labels (pseudo_labels)"
_USED_BY = {
    "temperature": _SOFT,
    "temperature_on": _SOFT,
    "scale_by_t2": _SOFT,
    "threshold": _PSEUDO,
    "confidence_weighted": _PSEUDO,
    "class_weights": _HARD,
    "label_smoothing": _HARD,
    "focal_gamma": _HARD,
}
_OF_ONE_LABEL = ("confidence_weighted", "class_weights", "label_smoothing", "focal_gamma")
_READS = ("data", "teacher", "pseudo_labels", "languages")  # which text, whose logits, and which labels
_WEIGHTS = ("hard_weight", "soft_weight")
_KINDS_OF_TARGET_TEXT = {"target": "unlabelled text", "parallel": "translations"}  # by `Objective.data`


def configured_objectives(config: ExperimentConfig) -> tuple[Objective, ...]:
    """Return the objectives of an experiment, after a check of all objectives that the config has settings for.

    Raises:
      UserError: see `configured_objective`.
    """
    definitions(config)
    teacher_objective(config)
    return tuple(configured_objective(config, name) for name in config.objectives)


def configured_objective(config: ExperimentConfig, name: str) -> Objective:
    """Return one of the experiment's objectives with the config's settings.

    A setting that the objective does not use keeps its default: the temperature without a soft term, and the threshold
    without pseudo-labels. Runs that differ in such a setting alone are therefore the same.

    Raises:
      UserError: there is no such objective, its settings are impossible, or it is listed before the one that it needs.
    """
    if name not in OBJECTIVES and name not in config.objective:
        known = [*OBJECTIVES, *(own for own in config.objective if own not in (*OBJECTIVES, TEACHER))]
        raise ConfigError(
            f"config key objectives: no objective {name!r}; choose from {', '.join(known)}{nearest(name, known)}"
        )
    if name == TEACHER:
        raise ConfigError(f"config key objectives: {name!r} is trained in any case; leave it out")
    objective = _defined(config, name)
    teacher = objective.student_teacher
    if teacher is not None and teacher not in config.objectives[: config.objectives.index(name)]:
        raise ConfigError(
            f"config key objectives: {name} learns from the student of {teacher!r}; list that one before it"
        )
    return objective


def definitions(config: ExperimentConfig) -> dict[str, Objective]:
    """Return all objectives by name with the config's settings: those of the table, then those of the config.

    Raises:
      UserError: an objective's settings are impossible, or its name looks like another one.
    """
    own = [name for name in config.objective if name not in (*OBJECTIVES, TEACHER)]
    taken = next((name for name in own if name in _NO_STUDENTS), None)
    if taken is not None:
        raise ConfigError(
            f"config key objective.{taken}: {taken!r} is a value of objective.NAME.teacher; choose another name"
        )
    result = {name: _defined(config, name) for name in (*OBJECTIVES, *own)}
    alike = names.look_alikes((TEACHER, *result))
    if alike:
        raise ConfigError(f"config key objective.{alike[1]}: it looks like {alike[0]!r}; choose another name")
    for objective in result.values():
        _check_student_teacher(objective, result, config)
    return result


def _check_student_teacher(objective: Objective, known: Mapping[str, Objective], config: ExperimentConfig) -> None:
    """Refuse a teacher that is no objective, or that does not know the text; and languages that are no targets."""
    key = f"config key objective.{objective.name}"
    targets = config.task.target_languages  # () = all, which `transfer_set.gather` knows
    strange = next((name for name in objective.languages if targets and name not in targets), None)
    if strange is not None:
        raise ConfigError(
            f"{key}.languages has {strange!r}, which is none of task.target_languages: choose from {', '.join(targets)}"
        )
    name = objective.student_teacher
    if name is None:
        return
    if name not in known:
        choices = [*_NO_STUDENTS, *known]
        raise ConfigError(f"{key}.teacher is {name!r}: choose from {', '.join(choices)}{nearest(name, choices)}")
    if name == objective.name:
        raise ConfigError(f"{key}.teacher is {name!r}, which cannot be its own teacher: name another objective")
    knows = known[name].languages
    if knows and (objective.data != "target" or not objective.languages or set(objective.languages) - set(knows)):
        raise ConfigError(
            f"{key}.teacher is {name!r}, which knows {', '.join(knows)} alone: give {objective.name} data 'target' and "
            "languages among these, or another teacher"
        )


def kinds_of_target_text(objectives: Mapping[str, Objective], name: str) -> tuple[str, ...]:
    """Return the kinds of text in target languages that an objective learns from, itself or through its teacher.

    Args:
      objectives: the definitions by name.
      name: an objective; one that is not defined counts as one that learns from none.

    Returns:
      A subset of ("unlabelled text", "translations").
    """
    kinds: set[str] = set()
    seen: set[str] = set()
    while name in objectives and name not in seen:
        kinds.add(objectives[name].data)
        seen.add(name)
        name = objectives[name].teacher
    return tuple(kind for data, kind in _KINDS_OF_TARGET_TEXT.items() if data in kinds)


def scored_languages(only: Sequence[str], sources: Sequence[str], targets: Sequence[str]) -> tuple[str, ...]:
    """Return the languages that the students of an objective are scored in, the source languages first.

    Args:
      only: the objective's own languages, see `Objective.languages`; () stands for all.
      sources: the task's source languages.
      targets: its target languages.
    """
    return tuple(language for language in targets if language in only) if only else (*sources, *targets)


def uses_target_text(objectives: Mapping[str, Objective], name: str) -> bool:
    """Return whether an objective learns from text in target languages, itself or through its teacher.

    Its student is then not zero-shot without target text, although nobody labelled the text. Translations count too.

    Args:
      objectives: the definitions by name.
      name: an objective; one that is not defined counts as one that does not.
    """
    return bool(kinds_of_target_text(objectives, name))


def teacher_objective(config: ExperimentConfig) -> Objective:
    """Return the objective that fine-tunes the teacher: `vanilla`, with the settings in `objective.teacher` alone.

    Raises:
      UserError: its settings are impossible.
    """
    return _defined(config, TEACHER)


def _defined(config: ExperimentConfig, name: str) -> Objective:
    """Return an objective of the table or of the config, or the teacher's, with its settings."""
    settings = config.objective[name] if name in config.objective else ObjectiveConfig()
    common = TransferConfig() if name == TEACHER else config.transfer
    objective = dataclasses.replace(_base(settings, name), name=name)
    given = {key: getattr(settings, key) for key in (*_READS, "student", *_WEIGHTS)}
    objective = dataclasses.replace(objective, **{key: value for key, value in given.items() if value is not None})
    parts = {_SOFT: objective.soft_weight > 0, _HARD: objective.hard_weight > 0, _PSEUDO: objective.pseudo_labels}
    changes: dict[str, Any] = {}
    for key, part in _USED_BY.items():
        value = getattr(settings, key)
        if parts[part]:
            changes[key] = getattr(common, key) if value is None else value
        elif value is not None:
            raise ConfigError(f"config key objective.{name}.{key} is {value!r}, but {name} has no {part}: leave it out")
    objective = dataclasses.replace(objective, **changes)
    validate(objective)
    return objective


def _base(settings: ObjectiveConfig, name: str) -> Objective:
    """Return the objective that another one starts from: itself, if it is in the table."""
    key, bases = f"config key objective.{name}", ", ".join(OBJECTIVES)
    if name in (*OBJECTIVES, TEACHER):
        for field in ("base", *_READS, "student"):
            if getattr(settings, field) is not None:
                raise ConfigError(
                    f"{key}.{field}: what {name} reads is fixed; define an objective of your own under another name"
                )
        return OBJECTIVES["vanilla" if name == TEACHER else name]
    if settings.base is None:
        raise ConfigError(
            f"{key}: no objective {name!r}{nearest(name, OBJECTIVES)}; to define it, set objective.{name}.base to one "
            f"of {bases}"
        )
    if settings.base not in OBJECTIVES:
        raise ConfigError(f"{key}.base is {settings.base!r}: choose one of {bases}{nearest(settings.base, OBJECTIVES)}")
    return OBJECTIVES[settings.base]


def with_class_factors(objective: Objective, labels: Sequence[str], gold: Sequence[int]) -> Objective:
    """Return the objective with the factors of its class weights, or as it is if it has none.

    Args:
      objective: the objective.
      labels: the names of the task's classes, in order.
      gold: the classes of the labelled examples; for `BALANCED`, every class occurs in it.

    Raises:
      UserError: a weight names a class that the task does not have.
    """
    if not objective.class_weights:
        return objective
    if objective.class_weights == BALANCED:
        counts = Counter(gold)
        factors = [len(gold) / (len(labels) * counts[index]) for index in range(len(labels))]
    else:
        weights = _class_weights(objective)
        for name in weights:
            if name not in labels:
                raise ConfigError(
                    f"objective {objective.name!r}: class_weights names the class {name!r}; the task has "
                    f"{', '.join(labels)}{nearest(name, labels)}"
                )
        factors = [weights.get(name, 1.0) for name in labels]
    return dataclasses.replace(objective, class_factors=tuple(factors))


def check_classes(config: ExperimentConfig, labels: Sequence[str], *, multi_label: bool = False) -> None:
    """Refuse what an objective, or the teacher's, does not have in a task: an unknown class, or factors of one label.

    Args:
      config: the experiment.
      labels: the names of the task's classes.
      multi_label: whether a text has any number of labels, so that factors of its one label are not defined.

    Raises:
      UserError: the message names the objective and the setting.
    """
    for objective in (*definitions(config).values(), teacher_objective(config)):
        with_class_factors(objective, labels, range(len(labels)))
        for key in _OF_ONE_LABEL if multi_label else ():
            if getattr(objective, key):
                raise ConfigError(
                    f"objective {objective.name!r}: {key} = {getattr(objective, key)!r}, but it is defined for tasks "
                    "with one label per text, and this one is multi-label: leave it out"
                )


def _class_weights(objective: Objective) -> dict[str, float]:
    """Return the weights "NAME=FACTOR" of an objective by class; a UserError if one has another form."""
    weights: dict[str, float] = {}
    for item in objective.class_weights:
        name, _, text = item.rpartition("=")
        try:
            factor = float(text)
        except ValueError:
            factor = math.nan
        if not name or not (math.isfinite(factor) and factor > 0) or name in weights:
            raise ConfigError(
                f"objective {objective.name!r}: class_weights has {item!r}: give ('balanced',), or NAME=FACTOR at most "
                "once for each class, with a factor above 0"
            )
        weights[name] = factor
    return weights


def describe(objective: Objective) -> str:
    """Return one line that says what an objective reads, and its effective settings."""
    is_student = objective.student_teacher is not None
    logits = f"the {objective.teacher} student's" if is_student else "the teacher's"
    originals = " for the originals" if objective.data == "parallel" else ""
    terms = []
    if objective.hard_weight:
        labels = f"labels and {logits} predictions{originals}" if objective.pseudo_labels else "labels"
        details = [
            f"class weights {', '.join(objective.class_weights)}" if objective.class_weights else "",
            f"label smoothing {objective.label_smoothing:g}" if objective.label_smoothing else "",
            f"focal loss with γ = {objective.focal_gamma:g}" if objective.focal_gamma else "",
            f"predictions from a confidence of {objective.threshold:g}" if objective.threshold else "",
            "predictions weighted by confidence" if objective.confidence_weighted else "",
        ]
        terms.append(f"{_factor(objective.hard_weight)}CE({_listed(labels, details)})")
    if objective.soft_weight:
        details = [
            f"T = {objective.temperature:g}",
            "on both sides" if objective.temperature_on == "both" else "",
            "times T²" if objective.scale_by_t2 else "",
        ]
        terms.append(f"{_factor(objective.soft_weight)}KL({_listed(f'{logits} logits{originals}', details)})")
    languages = ", ".join(objective.languages) or "all target languages"
    text = {
        "labelled": "labelled text",
        "all": "labelled and unlabelled text",
        "target": f"unlabelled text in {languages}",
        "parallel": f"translations into {languages}{'' if objective.languages else ', and their originals'}",
    }[objective.data]
    encoder = f", by students.{objective.student}" if objective.student else ""
    return f"{' + '.join(terms)} on {text}{encoder}"


def effective_settings(config: ExperimentConfig) -> dict[str, str]:
    """Return `describe` of each objective of an experiment by name, and of the teacher's first if one is trained."""
    objectives = {TEACHER: teacher_objective(config), **definitions(config)}
    names = (*([TEACHER] if config.trains_teachers else []), *config.objectives)
    return {name: describe(objectives[name]) for name in names}


def _factor(weight: float) -> str:
    return "" if weight == 1 else f"{weight:g} · "


def _listed(first: str, details: Sequence[str]) -> str:
    text = ", ".join(filter(None, details))
    return f"{first}; {text}" if text else first
