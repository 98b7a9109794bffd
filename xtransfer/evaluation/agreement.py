"""A student's metrics against its teacher, from the predictions that both have stored on the same examples.

They need no model, so a workdir that is older than these metrics gets them at its next evaluation.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xtransfer import storage
from xtransfer.errors import DataError
from xtransfer.evaluation.metrics import TEACHER_METRICS, Metric, Score
from xtransfer.evaluation.multi_label import set_of


def scores(student: Path, teacher: Path, labels: Sequence[str], *, multi_label: bool = False) -> list[Score]:
    """Return the metrics of `TEACHER_METRICS`. In a multi-label task, agreement is about the whole set of labels.

    Args:
      student: the file of the student's predictions.
      teacher: the file of the teacher's predictions on the same examples.
      labels: the names of the K classes.
      multi_label: whether a prediction is a list of names.

    Raises:
      UserError: a line is not a prediction, or the files are about different examples.
    """
    (ids, guesses), (teacher_ids, teacher_guesses) = (
        _read(path, labels, multi_label=multi_label) for path in (student, teacher)
    )
    if ids != teacher_ids:
        raise DataError(f"{student} and {teacher}: different examples: remove both files and evaluate again")
    logits = guesses - 0.5 if multi_label else np.eye(len(labels))[guesses]  # [n, K]
    values = ((name, _value(metric, logits, teacher_guesses)) for name, metric in TEACHER_METRICS.items())
    return [Score(name, value, len(ids)) for name, value in values]


def _value(metric: Metric, logits: np.ndarray, labels: np.ndarray) -> float:
    function = metric.for_task(multi_label=labels.ndim == 2)
    assert function is not None, "every metric against a teacher exists for both kinds of task"
    return function(logits, labels)


def _read(path: Path, labels: Sequence[str], *, multi_label: bool) -> tuple[list[str], np.ndarray]:
    """Return the ids of n examples, and the predicted classes: np.int64 [n], or [n, K] of zeros and ones."""
    position = {label: index for index, label in enumerate(labels)}
    ids, classes = [], []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            row = storage.read_json(line.decode("utf-8"))
            ids.append(row["id"])
            guess = row["prediction"]
            if isinstance(guess, list) != multi_label:
                raise TypeError(f"{guess!r} is {'no' if multi_label else 'a'} list of labels")
            classes.append(set_of(guess, position) if multi_label else position[guess])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a prediction ({error}): remove the file and evaluate again"
            ) from error
    return ids, np.array(classes, np.int64)
