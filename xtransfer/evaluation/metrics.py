"""Metrics of a complete set of predictions: functions of logits and labels. A new metric is a new entry in `METRICS`.

A metric of each class has one value per class. "class_f1" names all of them, and "class_f1/LABEL" names one. Those of
multi-label tasks are functions in `multi_label`.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from xtransfer.errors import ConfigError, DataError, UserError, nearest
from xtransfer.evaluation import calibration, multi_label

SIGNIFICANCE = 0.05
"""The level at which a result is better than chance, by a one-sided exact binomial test."""


class Score(NamedTuple):
    """One metric on one set: its name, its value, and the number of examples."""

    metric: str
    value: float
    count: int  # type: ignore[assignment]  # hides tuple.count: these are the keys of a row of results


@dataclass(frozen=True)
class Metric:
    """A metric, its range, and its direction.

    Attributes:
      function: returns the value, a float, for logits [n, K] and labels [n] in 0 .. K − 1; for a metric of each class,
        the values [K]. None if it does not exist for tasks with one label per text.
      low: the smallest possible value.
      high: the largest possible value.
      higher_is_better: the direction.
      binary: whether it exists for two classes only. The second class is the positive one, and both must occur.
      per_class: whether it has a value for each class.
      multi_label: the same for labels [n, K], 0 or 1, of a multi-label task; None if it does not exist there.
      needs: in a multi-label task, what a class must have to have a value: "nothing", an example ("positive"), or also
        an example of another class ("both").
    """

    function: Callable[[np.ndarray, np.ndarray], Any] | None = None
    low: float = 0.0
    high: float = 1.0
    higher_is_better: bool = True
    binary: bool = False
    per_class: bool = False
    multi_label: Callable[[np.ndarray, np.ndarray], Any] | None = None
    needs: Literal["nothing", "positive", "both"] = "nothing"

    def for_task(self, *, multi_label: bool) -> Callable[[np.ndarray, np.ndarray], Any] | None:
        """Return the function for a kind of task, or None."""
        return self.multi_label if multi_label else self.function

    @property
    def is_share(self) -> bool:
        """Whether values go from 0 to 1, so that they can be written in percent."""
        return (self.low, self.high) == (0, 1)


def confusion_matrix(predictions: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Count how often gold class i was predicted as class j.

    Args:
      predictions: integers [n] in 0 .. K − 1.
      labels: integers [n] in 0 .. K − 1.
      num_classes: K.

    Returns:
      np.int64 [K, K]; rows are gold classes, columns predictions.

    Raises:
      UserError: no examples, different lengths, or a class out of range, such as an unlabelled example's.
    """
    from sklearn.metrics import confusion_matrix as count

    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.shape != labels.shape or labels.ndim != 1:
        raise DataError(f"predictions of shape {predictions.shape} for labels of shape {labels.shape}")
    if len(labels) == 0:
        raise DataError("no examples to score")
    for name, values in (("label", labels), ("prediction", predictions)):
        bad = np.flatnonzero((values < 0) | (values >= num_classes))
        if len(bad):
            raise DataError(f"{name} {values[bad[0]]} at position {bad[0]}: expected 0 to {num_classes - 1}")
    return count(labels, predictions, labels=np.arange(num_classes)).astype(np.int64)


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the share of examples whose largest logit is their label's."""
    confusion = _confusion(logits, labels)
    return float(np.trace(confusion) / confusion.sum())


def macro_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur as gold or prediction.

    This is scikit-learn's `f1_score(average="macro")`: a class that occurs on one side only has F1 = 0.
    """
    confusion = _confusion(logits, labels)
    correct = np.diag(confusion)
    total = confusion.sum(axis=0) + confusion.sum(axis=1)
    return float(np.mean(2 * correct[total > 0] / total[total > 0]))


def weighted_f1(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean F1 of the classes, weighted by their numbers of gold examples."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, logits.argmax(1), average="weighted", zero_division=0))


def class_precision(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of each class's predictions that are right [K]; 0 for a class that is never predicted."""
    return _per_class(logits, labels)[0]


def class_recall(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the share of each class's gold examples that are found [K]; 0 for a class without any."""
    return _per_class(logits, labels)[1]


def class_f1(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return each class's F1 [K]; 0 for a class without a correct prediction."""
    return _per_class(logits, labels)[2]


def matthews_correlation(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return Matthews' correlation of predictions and labels, Gorodkin's for K > 2; 0 if either is constant."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, logits.argmax(1)))


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean of −log p(label), in nats."""
    from scipy.special import log_softmax

    # scikit-learn's takes probabilities, which round to 0 and are then clipped.
    return float(-log_softmax(logits, axis=1)[np.arange(len(labels)), labels].mean())


def brier_score(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared distance of the probabilities [K] from the label's one-hot vector, from 0 to 2.

    This is Brier's original sum over classes, also for two classes, where other software may report half of it.
    """
    from sklearn.metrics import brier_score_loss

    classes = np.arange(logits.shape[1])
    return float(brier_score_loss(labels, calibration.probabilities(logits), labels=classes, scale_by_half=False))


def ece(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error over `calibration.BINS` bins of equal width."""
    return calibration.expected_error(calibration.equal_width_bins(logits, labels))


def adaptive_ece(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the expected calibration error over `calibration.BINS` bins with equal numbers of predictions."""
    return calibration.expected_error(calibration.equal_mass_bins(logits, labels))


def auroc(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the probability that a positive example ranks above a negative one, and half of it for ties."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(labels, _positive_margin(logits)))


def recall_at_fpr(rate: float, logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the largest share of positive examples above a threshold that at most `rate` of the negative ones pass."""
    from sklearn.metrics import roc_curve

    false_positive_rate, recall, _ = roc_curve(labels, _positive_margin(logits), drop_intermediate=False)
    return float(recall[false_positive_rate <= rate].max())


def majority_share(labels: np.ndarray) -> float:
    """Return the accuracy of always predicting the most frequent gold class, or the most frequent set of labels."""
    if labels.ndim == 2:
        return multi_label.majority_share(labels)
    return float(np.bincount(labels).max() / len(labels))


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        "accuracy": Metric(accuracy),
        "macro_f1": Metric(macro_f1, multi_label=multi_label.macro_f1),
        "weighted_f1": Metric(weighted_f1, multi_label=multi_label.weighted_f1),
        "class_precision": Metric(class_precision, per_class=True, multi_label=multi_label.class_precision),
        "class_recall": Metric(class_recall, per_class=True, multi_label=multi_label.class_recall),
        "class_f1": Metric(class_f1, per_class=True, multi_label=multi_label.class_f1),
        "matthews_correlation": Metric(matthews_correlation, low=-1.0),
        "log_loss": Metric(log_loss, high=math.inf, higher_is_better=False, multi_label=multi_label.log_loss),
        "brier_score": Metric(brier_score, high=2.0, higher_is_better=False, multi_label=multi_label.brier_score),
        "ece": Metric(ece, higher_is_better=False, multi_label=ece),
        "adaptive_ece": Metric(adaptive_ece, higher_is_better=False, multi_label=adaptive_ece),
        "auroc": Metric(auroc, binary=True),
        "recall_at_fpr_0.01": Metric(functools.partial(recall_at_fpr, 0.01), binary=True),
        "recall_at_fpr_0.05": Metric(functools.partial(recall_at_fpr, 0.05), binary=True),
        # Only multi-label tasks have these.
        "subset_accuracy": Metric(multi_label=multi_label.subset_accuracy),
        "hamming_loss": Metric(multi_label=multi_label.hamming_loss, higher_is_better=False),
        "micro_f1": Metric(multi_label=multi_label.micro_f1),
        "class_auroc": Metric(per_class=True, multi_label=multi_label.class_auroc, needs="both"),
        "macro_auroc": Metric(multi_label=multi_label.macro_auroc, needs="both"),
        "class_average_precision": Metric(
            per_class=True, multi_label=multi_label.class_average_precision, needs="positive"
        ),
        "macro_average_precision": Metric(multi_label=multi_label.macro_average_precision, needs="positive"),
    }
)
"""The metrics by name."""

TEACHER_METRICS: Mapping[str, Metric] = MappingProxyType(
    {"teacher_agreement": Metric(accuracy, multi_label=multi_label.subset_accuracy)}
)
"""The metrics of a student against its teacher, functions of logits and of the classes that the teacher predicts.

Labels play no part, and a student alone does not have them, so none can be chosen or select a checkpoint. Every student
is scored by them, in the source language, against the selected checkpoint of its own draw's teacher.
"""

EFFECTS: Mapping[str, str] = MappingProxyType(
    {
        "log_loss_calibrated": "log_loss",
        "ece_calibrated": "ece",
        "accuracy_thresholded": "accuracy",
        "macro_f1_thresholded": "macro_f1",
        "micro_f1_thresholded": "micro_f1",
    }
)
"""The scores after recalibration, and the metrics that they are scores of (see `recalibration.Recalibration`)."""

CHANCE = "majority_share"
"""The name of the row beside the metrics that holds `majority_share`, the accuracy that needs no model."""


def scores(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], names: Sequence[str]) -> list[Score]:
    """Return the named metrics, and `CHANCE`.

    Args:
      logits: finite floats [n, K].
      labels: integers [n] in 0 .. K − 1; in a multi-label task [n, K], 0 or 1.
      classes: the names of the K classes.
      names: names that `check_names` accepts.

    Raises:
      UserError: see `confusion_matrix` and `multi_label.check`; or the labels do not define a metric.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if labels.ndim == 2:
        multi_label.check(logits, labels)
    else:
        _confusion(logits, labels)  # checks them
    check_defined(names, labels, f"{len(labels):,} examples", classes)
    values = [item for name in names for item in _values(name, logits, labels, classes)]
    return [Score(name, value, len(labels)) for name, value in [*values, (CHANCE, majority_share(labels))]]


def score(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str) -> float:
    """Return one metric that `check_single` accepts; see `scores`."""
    return scores(logits, labels, classes, (name,))[0].value


def score_names(names: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Return the names of the scores that `scores` returns."""
    return [full for name in names for full, _ in _cases(name, classes)] + [CHANCE]


def names_of(*, multi_label: bool) -> list[str]:
    """Return the names of the metrics that a kind of task has."""
    return [name for name, metric in METRICS.items() if metric.for_task(multi_label=multi_label) is not None]


def metric_of(name: str, *, multi_label: bool | None = None) -> Metric:
    """Return the metric that a score's name belongs to, such as "class_f1/positive" or "ece_calibrated".

    Args:
      name: the name.
      multi_label: the kind of task whose metrics the message names; None names all.

    Raises:
      UserError: there is no such metric; the message names the nearest one.
    """
    kind, known = _kind(name), {**METRICS, **TEACHER_METRICS}
    if kind not in known:
        names = list(known) if multi_label is None else names_of(multi_label=multi_label)
        hint = nearest(kind, names) or f"; the metrics are {', '.join(names)}"
        raise ConfigError(f"no metric {name!r}{hint}")
    return known[kind]


def value_range(name: str) -> tuple[float, float]:
    """Return the smallest and the largest value of a score; an unknown one is a share."""
    kind = _kind(name)
    return (METRICS[kind].low, METRICS[kind].high) if kind in METRICS else (0.0, 1.0)


def higher_is_better(name: str) -> bool:
    """Return the direction of a score; of an unknown one, more is better."""
    kind = _kind(name)
    return METRICS[kind].higher_is_better if kind in METRICS else True


def check_names(where: str, names: Sequence[str], classes: Sequence[str], *, multi_label: bool = False) -> None:
    """Refuse metrics that do not exist for a task with these classes; `where` names the key or flag in the message."""
    for name in names:
        if name in TEACHER_METRICS:
            raise ConfigError(
                f"{where}: {name} is not a metric to choose: it depends on a second model, the teacher, and every "
                "experiment scores it in the source language"
            )
        if name in EFFECTS:
            setting = "temperature" if name.endswith("_calibrated") else "threshold"
            raise ConfigError(f"{where}: {name} is not a metric to choose: calibration.{setting} adds it")
        try:
            metric = metric_of(name, multi_label=multi_label)
        except UserError as error:
            raise ConfigError(f"{where}: {error}") from error
        kind, has_class, label = name.partition("/")
        if metric.for_task(multi_label=multi_label) is None:
            task = "a multi-label task" if multi_label else "a task with one label per text"
            known = ", ".join(names_of(multi_label=multi_label))
            raise ConfigError(f"{where}: {task} has no {kind}; the metrics are {known}")
        if metric.binary and len(classes) != 2:
            raise ConfigError(f"{where}: {kind} needs a task with 2 classes, and this one has {len(classes)}")
        if has_class and not metric.per_class:
            raise ConfigError(f"{where}: {kind} has one value for all classes: write {kind!r}, not {name!r}")
        if has_class and label not in classes:
            raise ConfigError(
                f"{where}: {name!r} names no class; the classes are {', '.join(classes)}{nearest(label, classes)}"
            )


def check_single(where: str, name: str, classes: Sequence[str], *, multi_label: bool = False) -> None:
    """Refuse a metric that does not have exactly one value for a task with these classes; see `check_names`."""
    check_names(where, (name,), classes, multi_label=multi_label)
    if metric_of(name).per_class and "/" not in name:
        raise ConfigError(f"{where}: {name} has a value for each class: name one, such as {name}/{classes[0]}")


def check_defined(
    names: Sequence[str], labels: Sequence[int] | np.ndarray, where: str, classes: Sequence[str] = ()
) -> None:
    """Refuse metrics that labels do not define, such as binary ones for labels of a single class.

    Args:
      names: the metrics.
      labels: integers [n]; in a multi-label task [n, K], 0 or 1.
      where: names the examples, for the message.
      classes: the names of the K classes; only a multi-label task needs them.
    """
    if isinstance(labels, np.ndarray) and labels.ndim == 2:
        _check_each_class(names, labels, where, classes)
        return
    binary = [name for name in names if metric_of(name).binary]
    if binary and len(np.unique(labels)) < 2:
        raise ConfigError(f"{where}: all have the same label, so {binary[0]} is not defined: choose another metric")


def _check_each_class(names: Sequence[str], labels: np.ndarray, where: str, classes: Sequence[str]) -> None:
    """Refuse metrics of a multi-label task for which a class lacks examples, or, for a mean, all classes do."""
    for name in names:
        metric = metric_of(name)
        if metric.needs == "nothing":
            continue
        is_defined = multi_label.defined_classes(labels, needs_negative=metric.needs == "both")
        cases = [(full, index) for full, index in _cases(name, classes) if index is not None]
        missing = next((full for full, index in cases if not is_defined[index]), None)
        if missing is not None or not is_defined.any():
            raise ConfigError(
                f"{where}: no class has examples with and without it, so {name} is not defined: choose another metric"
                if missing is None
                else f"{where}: {missing} is not defined, because no example, or every one, has this label: name other "
                f"classes, or choose macro_{missing.partition('/')[0].removeprefix('class_')}, the mean over the rest"
            )


def at_chance(accuracy: float, count: int, majority: float) -> bool:
    """Return whether an accuracy over `count` examples is no better than always predicting the majority class.

    This is an exact binomial test at `SIGNIFICANCE` against that class's share, which is 1/K for balanced classes. A
    set with a single class (share 1) says nothing either way, so the result is False.
    """
    from scipy.stats import binomtest

    if majority == 1:
        return False
    test = binomtest(round(accuracy * count), count, majority, alternative="greater")
    return bool(test.pvalue >= SIGNIFICANCE)


def described_constant(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> str | None:
    """Name the class, or the set of classes, that every example was given; None as in `constant_prediction`."""
    if labels.ndim == 2:
        constant_set = multi_label.constant_prediction(multi_label.predictions(logits), labels)
        return None if constant_set is None else ", ".join(classes[index] for index in constant_set) or "no label"
    constant = constant_prediction(logits.argmax(-1), labels)
    return None if constant is None else classes[constant]


def constant_prediction(predictions: np.ndarray, labels: np.ndarray) -> int | None:
    """Return the class that every example was given, or None if predictions differ or all labels are that class.

    Args:
      predictions: integers [n].
      labels: integers [n].
    """
    if len(predictions) == 0 or np.any(predictions != predictions[0]) or np.all(labels == predictions[0]):
        return None
    return int(predictions[0])


def _kind(name: str) -> str:
    """Return the key of `METRICS` that a score's name belongs to, if there is one."""
    kind = name.partition("/")[0]
    return EFFECTS.get(kind, kind)


def _cases(name: str, classes: Sequence[str]) -> list[tuple[str, int | None]]:
    """Return the scores of a metric: their names, and the index of the class, or None for all classes together."""
    kind, has_class, label = name.partition("/")
    if not METRICS[kind].per_class:
        return [(name, None)]
    labels = [label] if has_class else classes
    return [(f"{kind}/{label}", list(classes).index(label)) for label in labels]


def _values(name: str, logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> list[tuple[str, float]]:
    function = metric_of(name).for_task(multi_label=labels.ndim == 2)
    if function is None:
        raise ValueError(f"{name} for labels of shape {labels.shape}")
    result = function(logits, labels)
    return [(full, float(result if index is None else result[index])) for full, index in _cases(name, classes)]


def _confusion(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return confusion_matrix(logits.argmax(axis=-1), labels, logits.shape[-1])


def _per_class(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return precision, recall, F1, and the number of gold examples of each class, all [K]."""
    from sklearn.metrics import precision_recall_fscore_support

    classes = np.arange(logits.shape[1])
    return precision_recall_fscore_support(labels, logits.argmax(1), labels=classes, average=None, zero_division=0)


def _positive_margin(logits: np.ndarray) -> np.ndarray:
    """Return how far the logit of the positive class is above the other one [n]."""
    return logits[:, 1] - logits[:, 0]
