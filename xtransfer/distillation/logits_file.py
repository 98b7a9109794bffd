"""A file with a teacher's opinion on each example, in place of a teacher: logits, probabilities, or labels.

    {"id": "files/train/en/0", "probabilities": {"bad": 0.2, "good": 0.8}}

In a multi-label task, the probabilities are those of each class by itself, and `labels` is a list.

Such a file may come from a large language model, from people, or from `python -m xtransfer.predict`. Everything in it
is checked before anything is trained, and an error names the file and the row. Its logits then go into the store,
through the same interface as those of a model.
"""

import decimal
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer import storage
from xtransfer.config import user_path
from xtransfer.data.formats import parquet, tables
from xtransfer.data.formats.lines import Row, kind_of
from xtransfer.data.task import label_index
from xtransfer.errors import DataError, MachineError, nearest
from xtransfer.runtime import terminal

KINDS = ("logits", "probabilities", "label")
"""The columns that state an opinion. A file with several of them is read by the first."""

MULTI_LABEL_KINDS = ("logits", "probabilities", "labels")
"""The same columns in a multi-label task."""

_ID = "id"
_TOLERANCE = 1e-3  # by which probabilities may miss a sum of 1
_SMALLEST = 1e-9  # the probability in place of a smaller one, whose logarithm could be infinite
_SURE = math.log(1 - _SMALLEST) - math.log(_SMALLEST)  # the logit of a label in a multi-label task


@dataclass(frozen=True)
class LogitsFile:
    """A file of logits, read and checked.

    Attributes:
      path: the file.
      fingerprint: the sha256 of its bytes.
      kind: one of `KINDS`, or of `MULTI_LABEL_KINDS`.
      row_by_id: the row of each id.
      logits: float32 [n, K], columns in the order of the task's classes.
    """

    path: Path
    fingerprint: str
    kind: str
    row_by_id: Mapping[str, int]
    logits: np.ndarray

    def of(self, ids: Sequence[str]) -> np.ndarray:
        """Return the logits of these examples, float32 [n, K]; `check` has made sure that they exist."""
        return self.logits[[self.row_by_id[id_] for id_ in ids]]

    def check(self, ids: Collection[str]) -> None:
        """Refuse a file that lacks examples, and log how many of its rows belong to none.

        Args:
          ids: the ids of the transfer set, each once.

        Raises:
          UserError: an id has no row.
        """
        missing = [id_ for id_ in ids if id_ not in self.row_by_id]
        if missing:
            known = set(ids)
            others = [id_ for id_ in self.row_by_id if id_ not in known]
            hint = f"; a row that is left over has the id {others[0]!r}" if others else ""
            raise DataError(
                f"{self.path}: no row for {len(missing):,} of {len(ids):,} examples, such as {missing[0]!r}{hint}: "
                "python -m xtransfer.describe --transfer-set FILE writes the texts with their ids"
            )
        extra = len(self.row_by_id) - len(ids)
        if extra:
            terminal.log(
                f"{self.path}: {extra:,} of {len(self.row_by_id):,} rows belong to no example, and are not used"
            )


def read_logits_file(
    path: str, classes: Sequence[str], key: str = "teacher.logits_file", *, multi_label: bool = False
) -> LogitsFile:
    """Read a file whose rows have an id and one of `KINDS`. Its ending is one of `tables.ENDINGS`.

    `logits` is a list in the order of the classes, or an object by class. `probabilities` is an object by class, in
    which a class may be left out if it has 0. `label` is the name of a class, which then has all of the probability.
    In a multi-label task, each class has a probability of its own, and `labels` is a list of names, which may be empty.

    Args:
      path: the file, as the user wrote it.
      classes: the names of the task's classes, in order.
      key: the config key that names it.
      multi_label: whether the task is a multi-label one.

    Raises:
      UserError: a malformed row, an id that occurs twice, an unknown class, a value that is not a finite number, or
        impossible probabilities, which do not sum to 1 or, in a multi-label task, are above 1; the message starts with
        file:line, or file:row for Parquet.
    """
    file = user_path(path)
    names = tables.column_names(file) if file.is_file() else ()
    if not file.is_file():
        raise DataError(f"{key} {file}: no such file")
    kinds = MULTI_LABEL_KINDS if multi_label else KINDS
    kind = next((name for name in kinds if name in names), None)
    if kind is None or _ID not in names:
        missing = f"no column {_ID!r}" if kind is not None else f"none of the columns {', '.join(kinds)}"
        shown = ", ".join(map(repr, names)) or "none: the file is empty"
        raise DataError(f"{file}: {missing}; its columns are {shown}")
    read = {
        "logits": _logits,
        "probabilities": _probabilities_of_each if multi_label else _probabilities,
        "label": _label,
        "labels": _labels,
    }[kind]
    line_by_id: dict[str, int] = {}
    values: list[list[float]] = []
    for line, row in _rows(file, (_ID, kind)):
        where = f"{file}:{line}"
        id_ = _id(row, where)
        if id_ in line_by_id:
            raise DataError(f"{where}: id {id_!r} already occurs in line {line_by_id[id_]}: give each example once")
        line_by_id[id_] = line
        values.append(read(tables.value_of(row, kind, where), classes, where))
    try:
        fingerprint = storage.sha256(file)
    except OSError as error:
        raise MachineError(f"{file}: cannot be read: {error.strerror}") from None
    row_by_id = {id_: index for index, id_ in enumerate(line_by_id)}
    return LogitsFile(file, fingerprint, kind, row_by_id, np.array(values, np.float32).reshape(-1, len(classes)))


def _rows(file: Path, columns: Sequence[str]) -> Iterator[Row]:
    if file.suffix.lower() == ".parquet":
        return parquet.rows(file, columns, nested=True)
    return tables.read_rows(file, columns)


def _id(row: Mapping[str, Any], where: str) -> str:
    value = tables.value_of(dict(row), _ID, where)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: column {_ID!r} is {kind_of(value)}, expected the id of an example")
    return str(value)


def _logits(value: Any, classes: Sequence[str], where: str) -> list[float]:
    values = value
    if not isinstance(value, list) or _is_map(value):
        named = _by_class(value, classes, where, "logits")
        missing = [name for name in classes if name not in named]
        if missing:
            raise DataError(f"{where}: column 'logits' has no class {missing[0]!r}: give one number for each class")
        values = [named[name] for name in classes]
    if len(values) != len(classes):
        raise DataError(
            f"{where}: column 'logits' has {len(values)} numbers, expected {len(classes)}, in the order "
            f"{', '.join(classes)}"
        )
    numbers = [_number(item, f"{where}: column 'logits'") for item in values]
    largest = float(np.finfo(np.float32).max)
    if max(map(abs, numbers)) > largest:
        raise DataError(f"{where}: column 'logits' has {max(numbers, key=abs):g}, which is too large for a float32")
    return numbers


def _shares(value: Any, classes: Sequence[str], where: str) -> list[float]:
    """Return the probability of each class, which is not below 0."""
    named = _by_class(value, classes, where, "probabilities")
    numbers = [_number(named[name], f"{where}: column 'probabilities'") if name in named else 0.0 for name in classes]
    for name, number in zip(classes, numbers, strict=True):
        if number < 0:
            raise DataError(f"{where}: the probability of {name!r} is {number:g}, which is below 0")
    return numbers


def _probabilities(value: Any, classes: Sequence[str], where: str) -> list[float]:
    numbers = _shares(value, classes, where)
    total = math.fsum(numbers)
    if abs(total - 1) > _TOLERANCE:
        raise DataError(f"{where}: the probabilities sum to {total:.6g}, expected 1 (within {_TOLERANCE:g})")
    return [math.log(max(number / total, _SMALLEST)) for number in numbers]


def _probabilities_of_each(value: Any, classes: Sequence[str], where: str) -> list[float]:
    numbers = _shares(value, classes, where)
    for name, number in zip(classes, numbers, strict=True):
        if number > 1 + _TOLERANCE:
            raise DataError(f"{where}: the probability of {name!r} is {number:g}, which is above 1")
    bounded = [min(max(number, _SMALLEST), 1 - _SMALLEST) for number in numbers]
    return [math.log(number) - math.log1p(-number) for number in bounded]


def _labels(value: Any, classes: Sequence[str], where: str) -> list[float]:
    if not isinstance(value, list):
        raise DataError(f"{where}: column 'labels' is {kind_of(value)}, expected a list of classes")
    present = set()
    for item in value:
        if isinstance(item, bool) or not isinstance(item, str | int):
            raise DataError(f"{where}: column 'labels' has {kind_of(item)}, expected the name of a class")
        index = label_index(str(item), classes, where)
        if index in present:
            raise DataError(f"{where}: column 'labels' has {str(item)!r} twice: remove one of them")
        present.add(index)
    return [_SURE if index in present else -_SURE for index in range(len(classes))]


def _label(value: Any, classes: Sequence[str], where: str) -> list[float]:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: column 'label' is {kind_of(value)}, expected the name of a class")
    index = label_index(str(value), classes, where)
    return [0.0 if other == index else math.log(_SMALLEST) for other in range(len(classes))]


def _by_class(value: Any, classes: Sequence[str], where: str, column: str) -> dict[str, Any]:
    """Return an object's values by class, without those that a Parquet structure has only for other rows."""
    if _is_map(value):
        keys = [name for name, _ in value]
        twice = next((name for name in keys if keys.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{where}: column {column!r} has the class {twice!r} twice: remove one of them")
        value = dict(value)
    if not isinstance(value, dict):
        kinds = "a list or an object by class" if column == "logits" else "an object by class"
        raise DataError(f"{where}: column {column!r} is {kind_of(value)}, expected {kinds}")
    named = {name: number for name, number in value.items() if number is not None}
    for name in named:
        if name not in classes:
            raise DataError(
                f"{where}: column {column!r} has the class {name!r}, which is not one of {', '.join(classes)}"
                f"{nearest(str(name), classes)}"
            )
    return named


def _is_map(value: Any) -> bool:
    """Return whether a value is Parquet's map: a list of pairs."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, tuple) for item in value)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | decimal.Decimal):
        raise DataError(f"{where} has {kind_of(value)}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # an integer of hundreds of digits
        number = math.inf
    if not math.isfinite(number):
        raise DataError(f"{where} has {number}, expected a finite number")
    return number
