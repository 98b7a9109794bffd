"""A student's metrics against its teacher, from the predictions that both have stored on the same examples.

They need no model, so a workdir that is older than these metrics gets them at its next evaluation.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from xtransfer import storage
from xtransfer.errors import DataError
from xtransfer.evaluation.metrics import TEACHER_METRICS, Score


def scores(student: Path, teacher: Path, labels: Sequence[str]) -> list[Score]:
    """Return the metrics of `TEACHER_METRICS`.

    Args:
      student: the file of the student's predictions.
      teacher: the file of the teacher's predictions on the same examples.
      labels: the names of the K classes.

    Raises:
      UserError: a line is not a prediction, or the files are about different examples.
    """
    (ids, guesses), (teacher_ids, teacher_guesses) = _read(student, labels), _read(teacher, labels)
    if ids != teacher_ids:
        raise DataError(f"{student} and {teacher}: different examples: remove both files and evaluate again")
    one_hot = np.eye(len(labels))[guesses]  # [n, K]
    return [
        Score(name, metric.function(one_hot, teacher_guesses), len(ids)) for name, metric in TEACHER_METRICS.items()
    ]


def _read(path: Path, labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """Return the ids of n examples, and the predicted classes, np.int64 [n]."""
    position = {label: index for index, label in enumerate(labels)}
    ids, classes = [], []
    for number, line in enumerate(path.read_bytes().removesuffix(b"\n").split(b"\n"), start=1):
        try:
            row = storage.read_json(line.decode("utf-8"))
            ids.append(row["id"])
            classes.append(position[row["prediction"]])
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: not a prediction ({error}): remove the file and evaluate again"
            ) from error
    return ids, np.array(classes, np.int64)
