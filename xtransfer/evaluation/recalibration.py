"""Recalibration: a temperature and a decision threshold, fitted to finished weights on the source dev split.

Temperature scaling is from Guo, Pleiss, Sun, and Weinberger, "On Calibration of Modern Neural Networks", ICML 2017: the
logits are divided by one number, which changes confidences and no prediction. A threshold changes predictions and no
confidence. Both stay zero-shot, because they see the source language only. In a multi-label task, each class has its
own threshold.
"""

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer import storage
from xtransfer.config import CalibrationConfig
from xtransfer.errors import CheckpointError, ConfigError
from xtransfer.evaluation import metrics
from xtransfer.evaluation.calibration import probabilities, sigmoid
from xtransfer.runs.find import SelectedRun
from xtransfer.runtime import checksums, processes, terminal

_log = logging.getLogger(__name__)

TEMPERATURES = (0.05, 20.0)
"""The lowest and the highest temperature. Without a bound, a dev split without errors would have no lowest one."""

_REMEDY = "run python -m xtransfer.evaluate to fit it again"


@dataclass(frozen=True)
class Recalibration:
    """What was fitted to one set of weights, or what is to be applied of it.

    Attributes:
      temperature: what to divide the logits by; None if it was not fitted.
      log_odds: of two classes, the second one is predicted if its logit exceeds the first one's by more than this; None
        if it was not fitted. It applies to logits that no temperature has divided.
      class_log_odds: in a multi-label task, a class is predicted if its logit exceeds its value here; None if it was
        not fitted. It applies as `log_odds` does.
    """

    temperature: float | None = None
    log_odds: float | None = None
    class_log_odds: tuple[float, ...] | None = None

    @property
    def class_thresholds(self) -> tuple[float, ...] | None:
        """The probabilities that `class_log_odds` stand for, without a temperature."""
        return None if self.class_log_odds is None else tuple(sigmoid(np.array(self.class_log_odds)).tolist())

    @property
    def has_threshold(self) -> bool:
        """Whether a threshold, or one for each class, was fitted."""
        return self.log_odds is not None or self.class_log_odds is not None

    @property
    def threshold(self) -> float | None:
        """The probability of the second class that `log_odds` stands for, without a temperature."""
        return None if self.log_odds is None else float(probabilities(np.array([[0.0, self.log_odds]]))[0, 1])

    def has(self, *, temperature: bool, threshold: bool) -> bool:
        """Return whether everything that is asked for was fitted."""
        return not (temperature and self.temperature is None) and not (threshold and not self.has_threshold)

    def only(self, *, temperature: bool, threshold: bool) -> "Recalibration":
        """Return what is asked for, without the rest."""
        fitted = self if threshold else UNCHANGED
        return Recalibration(self.temperature if temperature else None, fitted.log_odds, fitted.class_log_odds)

    def scaled(self, logits: np.ndarray) -> np.ndarray:
        """Return the logits [n, K] divided by the temperature, float64."""
        return np.asarray(logits, np.float64) / (1.0 if self.temperature is None else self.temperature)

    def shifted(self, logits: np.ndarray) -> np.ndarray:
        """Return logits [n, K] float64 that predict by the threshold: by argmax, or each by 0 in a multi-label task."""
        logits = np.asarray(logits, np.float64)
        if self.class_log_odds is not None:
            return logits - np.array(self.class_log_odds)
        return logits if self.log_odds is None else logits - np.array([0.0, self.log_odds])

    def folded(self, kernel: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a linear head [H, K], [K] whose logits are scaled and shifted, in its own dtypes.

        The logits are linear in both, so nothing but rounding differs. A threshold shifts the probabilities too.
        """
        return self.scaled(kernel).astype(kernel.dtype), self.scaled(self.shifted(bias)).astype(bias.dtype)


UNCHANGED = Recalibration()
"""Neither a temperature nor a threshold."""


def metrics_of(settings: CalibrationConfig, *, multi_label: bool = False) -> tuple[str, ...]:
    """Return the metrics whose values before and after recalibration are scored in a kind of task."""
    return tuple(metrics.EFFECTS[name] for name in effects_of(settings, multi_label=multi_label))


def effects_of(settings: CalibrationConfig, *, multi_label: bool = False) -> tuple[str, ...]:
    """Return the names of the scores after recalibration in a kind of task."""
    wanted = {"calibrated": settings.temperature, "thresholded": settings.threshold}
    return tuple(
        name
        for name, metric in metrics.EFFECTS.items()
        if wanted[name.rpartition("_")[2]] and metrics.METRICS[metric].for_task(multi_label=multi_label)
    )


def effects(
    fitted: Recalibration, names: Sequence[str], logits: np.ndarray, labels: np.ndarray, classes: Sequence[str]
) -> Iterator[metrics.Score]:
    """Yield scores after recalibration.

    Args:
      fitted: what was fitted.
      names: keys of `metrics.EFFECTS`.
      logits: [n, K], as the weights give them.
      labels: integers [n] in 0 .. K − 1; in a multi-label task [n, K], 0 or 1.
      classes: the names of the K classes.
    """
    for name in names:
        changed = fitted.scaled(logits) if name.endswith("_calibrated") else fitted.shifted(logits)
        yield metrics.Score(name, metrics.score(changed, labels, classes, metrics.EFFECTS[name]), len(labels))


def check(settings: CalibrationConfig, classes: Sequence[str], dev_labels: Sequence[int] | np.ndarray) -> None:
    """Refuse to fit a threshold to a task that has other than two classes, or to a dev split that has one of them.

    A multi-label task may have any number of classes. One without an example in dev keeps the threshold 0.5.
    """
    if np.ndim(dev_labels) == 2:
        return
    if settings.threshold and len(classes) != 2:
        raise ConfigError(
            f"config key calibration.threshold needs a task with 2 classes, and this one has {len(classes)}: set it to "
            "False"
        )
    if settings.threshold and len(np.unique(dev_labels)) < 2:
        raise ConfigError(
            "config key calibration.threshold: every dev example has the same label, so any threshold fits: add others "
            "or set it to False"
        )


def fit(
    settings: CalibrationConfig, recorded: Recalibration, logits: np.ndarray, labels: np.ndarray, name: str
) -> Recalibration:
    """Return what the settings ask for: what was recorded, and the rest fitted. A temperature at a bound is a warning.

    Args:
      settings: what to fit.
      recorded: what was fitted before.
      logits: [n, K] on the dev split.
      labels: integers [n] in 0 .. K − 1; in a multi-label task [n, K], 0 or 1.
      name: the weights, for the warning.
    """
    temperature, log_odds, class_log_odds = recorded.temperature, recorded.log_odds, recorded.class_log_odds
    if settings.temperature and temperature is None:
        temperature = fit_temperature(logits, labels)
        if temperature in TEMPERATURES:
            terminal.log(
                f"warning: the temperature of {name} is {temperature:g}, which is a bound: the source dev split is too "
                "easy, too hard, or too small to fit one"
            )
    if settings.threshold and not recorded.has_threshold:
        if labels.ndim == 2:
            class_log_odds = fit_class_log_odds(logits, labels)
        else:
            log_odds = fit_log_odds(logits, labels)
    return Recalibration(temperature, log_odds, class_log_odds)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the lowest log loss, within `TEMPERATURES`; 1 if none is better than another.

    The log loss is convex in 1 / T. Its derivative is the mean over examples of E[z] − z_label, where E is over the
    classes, and has one root at most. In a multi-label task, each decision is a choice between two classes, whose
    logits are 0 and z.

    Args:
      logits: finite [n, K].
      labels: integers [n] in 0 .. K − 1; in a multi-label task [n, K], 0 or 1.
    """
    from scipy.optimize import brentq

    logits = np.asarray(logits, np.float64)
    if labels.ndim == 2:
        logits, labels = np.column_stack([np.zeros(logits.size), logits.ravel()]), labels.ravel()
    logits = logits - logits[np.arange(len(labels)), labels][:, None]  # relative to the label's

    def slope(inverse: float) -> float:
        return float((probabilities(inverse * logits) * logits).sum(axis=1).mean())

    lowest, highest = TEMPERATURES
    if not logits.any():
        return 1.0
    if slope(1 / highest) >= 0:  # even the flattest probabilities are too sure
        return highest
    if slope(1 / lowest) <= 0:
        return lowest
    return 1 / float(brentq(slope, 1 / highest, 1 / lowest, xtol=1e-13))


def fit_log_odds(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the `log_odds` with the highest macro-F1: among equals the nearest to 0, and then the lower one.

    The candidates are 0 and the middle between any two neighbouring values.

    Args:
      logits: finite [n, 2].
      labels: integers [n], 0 or 1, and both occur.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    odds = logits[:, 1] - logits[:, 0]  # [n]
    values = np.unique(odds)  # [v], ascending
    candidates = np.unique([0.0, *((values[1:] + values[:-1]) / 2)])  # [c]
    negatives, positives = np.sort(odds[labels == 0]), np.sort(odds[labels == 1])
    # The numbers of examples of each class at or below each candidate, which are predicted as class 0.
    below = [np.searchsorted(part, candidates, side="right") for part in (negatives, positives)]
    predicted_0, predicted_1 = below[0] + below[1], len(odds) - below[0] - below[1]
    f1 = 2 * below[0] / (len(negatives) + predicted_0) + 2 * (len(positives) - below[1]) / (
        len(positives) + predicted_1
    )  # [c], the sum over both classes
    scores = np.round(f1, 12)  # so that equal fractions are equal numbers
    return float(min(candidates[scores == scores.max()], key=lambda value: (abs(value), value)))


def fit_class_log_odds(logits: np.ndarray, labels: np.ndarray) -> tuple[float, ...]:
    """Return for each class the logit above which it is predicted, for the highest F1 of the class.

    The candidates are 0 and the middle between any two neighbouring logits of the class. Among equals, the nearest to 0
    counts, and then the lower one. So a class without an example keeps 0, the probability 0.5.

    Args:
      logits: finite [n, K].
      labels: integers [n, K], 0 or 1.
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    return tuple(_best_cut(logits[:, index], labels[:, index] > 0) for index in range(logits.shape[1]))


def _best_cut(logits: np.ndarray, is_positive: np.ndarray) -> float:
    """Return the cut of one class's logits [n] with the highest F1 of the positive examples, see above."""
    values = np.unique(logits)  # [v], ascending
    candidates = np.unique([0.0, *((values[1:] + values[:-1]) / 2)])  # [c]
    ordered, positives = np.sort(logits), np.sort(logits[is_positive])
    predicted = len(ordered) - np.searchsorted(ordered, candidates, side="right")  # above each candidate, [c]
    right = len(positives) - np.searchsorted(positives, candidates, side="right")
    # Rounded, so that equal fractions are equal numbers.
    f1 = np.round(2 * right / np.maximum(predicted + len(positives), 1), 12)
    return float(min(candidates[f1 == f1.max()], key=lambda value: (abs(value), value)))


def recorded(path: Path, name: str) -> Recalibration:
    """Return what the file `Workdir.calibration` records for the weights of this name; nothing if it does not exist.

    Raises:
      UserError: the entry is malformed, or not as it was written.
    """
    entry = _read(path).get(name, {})
    try:
        entry = checksums.unsigned(entry) if isinstance(entry, dict) else entry
    except ValueError as error:
        raise CheckpointError(f"{path}: {name}: {error}: {_REMEDY}") from error
    values: list[Any] = [entry.get(key) for key in ("temperature", "log_odds")] if isinstance(entry, dict) else ["?"]
    cuts = entry.get("class_log_odds") if isinstance(entry, dict) else None
    if not all(value is None or _is_number(value) for value in values):
        raise CheckpointError(
            f"{path}: {name} = {entry!r}, expected temperature and log_odds as numbers or null: {_REMEDY}"
        )
    if cuts is not None and not (isinstance(cuts, list) and all(map(_is_number, cuts))):
        raise CheckpointError(f"{path}: {name}: class_log_odds = {cuts!r}, expected a list of numbers: {_REMEDY}")
    fitted = Recalibration(values[0], values[1], None if cuts is None else tuple(map(float, cuts)))
    if fitted.temperature is not None and not fitted.temperature > 0:
        raise CheckpointError(f"{path}: {name}: temperature = {fitted.temperature!r}, expected more than 0: {_REMEDY}")
    return fitted


def usable(path: Path, name: str) -> Recalibration:
    """Return what is recorded, like `recorded`; nothing, with a warning, if the file or the entry is damaged."""
    try:
        return recorded(path, name)
    except CheckpointError as error:
        _log.warning("%s", str(error).removesuffix(f": {_REMEDY}") + ", so it is fitted again")
        return UNCHANGED


def fitted_to(run: SelectedRun, *, temperature: bool, threshold: bool) -> Recalibration:
    """Return what is asked for of what was fitted to a run's selected weights.

    Raises:
      UserError: it was not fitted; the message names the setting.
    """
    fitted = recorded(run.workdir.calibration(run.directory), run.weights_name)
    for key, is_fitted, is_requested in (
        ("temperature", fitted.temperature is not None, temperature),
        ("threshold", fitted.has_threshold, threshold),
    ):
        if is_requested and not is_fitted:
            raise ConfigError(
                f"{run.directory}: no {key} was fitted to step {run.weights_name} ({run.selection}): run python -m "
                f"xtransfer.main again with --config.calibration.{key}=True"
            )
    return fitted.only(temperature=temperature, threshold=threshold)


def record(path: Path, name: str, fitted: Recalibration, examples: int) -> None:
    """Add an entry to the file, with the number of dev examples. Entries of a file that cannot be read are dropped."""
    entry = {**dataclasses.asdict(fitted), "threshold": fitted.threshold, "examples": examples}
    if fitted.class_log_odds is None:
        del entry["class_log_odds"]
    else:
        entry["class_thresholds"] = fitted.class_thresholds
    try:
        others = _read(path)
    except CheckpointError:
        others = {}
    content = {**others, name: checksums.signed(entry)}
    storage.write_atomically(path, json.dumps(dict(sorted(content.items())), indent=2) + "\n")


def fit_and_record(
    path: Path,
    name: str,
    settings: CalibrationConfig,
    recorded: Recalibration,
    logits: np.ndarray,
    labels: np.ndarray,
    *,
    title: str,
) -> Recalibration:
    """Return what the settings ask for, see `fit`. All processes take part, and process 0 fits and writes.

    Args:
      path: see `Workdir.calibration`.
      name: the name of the weights.
      settings: what to fit.
      recorded: what was fitted before.
      logits: [n, K] on the dev split.
      labels: the labels of the dev split, see `task.gold`.
      title: the weights, for a warning.
    """

    def make() -> Recalibration:
        fitted = fit(settings, recorded, logits, labels, title)
        record(path, name, fitted, len(labels))
        return fitted

    # Process 0 fits for all, because other hosts may round the logits differently.
    return _broadcast(make)


def recorded_everywhere(path: Path, name: str) -> Recalibration:
    """Return what `usable` returns in process 0, in all processes."""
    return _broadcast(lambda: usable(path, name))


def _broadcast(make: Callable[[], Recalibration]) -> Recalibration:
    values = processes.on_first(lambda: dataclasses.asdict(make()))
    cuts = values["class_log_odds"]
    return Recalibration(values["temperature"], values["log_odds"], None if cuts is None else tuple(cuts))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read(path: Path) -> Mapping[str, Any]:
    return storage.read_object(path, _REMEDY) if path.is_file() else {}
