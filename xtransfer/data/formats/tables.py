"""Strict readers of TSV, CSV, JSONL, and Parquet: a row is read exactly, or an error names its file and line."""

import logging
import math
from collections.abc import Collection, Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from xtransfer.data import blank, names
from xtransfer.data.formats import lines, parquet
from xtransfer.data.formats.lines import READERS, Delimiter, Row, kind_of
from xtransfer.errors import DataError, MachineError

_PARQUET = ".parquet"
ENDINGS = (*READERS, _PARQUET)
_OPTIONAL = {"pair": "text_pair", "id": "id"}  # columns to read if the first row has them

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read; "" for none."""

    text: str
    pair: str = ""
    label: str = ""
    id: str = ""
    language: str = ""

    @property
    def named(self) -> tuple[str, ...]:
        """The names that are not empty."""
        return tuple(filter(None, astuple(self)))


@dataclass(frozen=True)
class LabelSets:
    """The form of a label column that holds any number of labels.

    Attributes:
      separator: what separates the labels in a string; "" accepts lists only.
    """

    separator: str = ""


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes:
      line: the line it starts on, from 1; in Parquet the row's number, from 1.
      id: from the id column, or else the number of the data row, from 0.
      text: not empty, see `blank.is_empty`.
      text_pair: not empty, or None without a pair column.
      label: the name of the class, or None without a label column.
      language: "" without a language column.
      label_set: the names of the classes in their order in the file, if the column holds sets of labels; `label` is
        then None.
    """

    line: int
    id: str
    text: str
    text_pair: str | None
    label: str | None
    language: str = ""
    label_set: tuple[str, ...] | None = None

    @property
    def label_names(self) -> tuple[str, ...]:
        """The names of all labels in the row."""
        if self.label_set is not None:
            return self.label_set
        return () if self.label is None else (self.label,)


@dataclass(frozen=True)
class TextTable:
    """A file of texts, and how to read it.

    Attributes:
      path: ends in .tsv, .csv, .jsonl, or .parquet.
      columns: the names of the columns; "" for no pairs or no ids.
      undeclared: columns that no row may have, because the first row lacks them and the user did not name them.
      skip_empty: whether to skip rows without text; otherwise they are an error.
      delimiter: see `lines.rows`.
    """

    path: Path
    columns: Columns
    undeclared: tuple[str, ...]
    skip_empty: bool
    delimiter: Delimiter | None = None


@dataclass(frozen=True)
class Text:
    """A row: its line (in Parquet its number, from 1), its id (or its number, from 0), and its text or texts."""

    line: int
    id: Any
    text: str
    text_pair: str | None

    @property
    def empty(self) -> bool:
        """Whether the text, or the second text of a pair, is missing."""
        return blank.is_empty(self.text) or (self.text_pair is not None and blank.is_empty(self.text_pair))


def read_records(
    path: Path,
    columns: Columns,
    *,
    empty_text: str = "error",
    delimiter: Delimiter | None = None,
    label_sets: LabelSets | None = None,
) -> tuple[list[Record], int]:
    """Read a file whose ending is one of `ENDINGS`.

    Text is UTF-8, with or without a byte-order mark. See `lines.rows` and `parquet.rows` for the formats.

    Args:
      path: the file.
      columns: the columns to read; others are ignored.
      empty_text: "error", or "skip" to leave out rows without text.
      delimiter: see `lines.rows`.
      label_sets: the form of the label column if it holds sets of labels; None for one label per row.

    Returns:
      The records in the file's order, and the number of rows that were left out.

    Raises:
      UserError: a malformed row, or an id that occurs twice in the file (or in a language of it); the message starts
        with file:line.
    """
    records: list[Record] = []
    lines_by_id: dict[tuple[str, str], int] = {}
    skipped = 0
    for record in stream_records(path, columns, delimiter=delimiter, label_sets=label_sets):
        first = lines_by_id.setdefault((record.language, record.id), record.line)
        if len(lines_by_id) == len(records) + skipped:
            raise repeated_id(path, columns, record, first)
        if is_to_skip(path, columns, record, empty_text):
            skipped += 1
        else:
            records.append(record)
    if not records:
        raise DataError(f"{path}: no rows with text")
    return records, skipped


def stream_records(
    path: Path, columns: Columns, *, delimiter: Delimiter | None = None, label_sets: LabelSets | None = None
) -> Iterator[Record]:
    """Yield the rows of a file one by one, also those without text; see `read_records`. Ids are not compared."""
    lists = () if label_sets is None else (columns.label,)
    for number, (line, values) in enumerate(read_rows(path, columns.named, delimiter, lists=lists)):
        where = f"{path}:{line}"
        yield Record(
            line=line,
            id=_row_id(values, columns.id, where) if columns.id else str(number),
            text=text_of(values, columns.text, where),
            text_pair=text_of(values, columns.pair, where) if columns.pair else None,
            label=_name(values, columns.label, where) if columns.label and label_sets is None else None,
            language=_name(values, columns.language, where) if columns.language else "",
            label_set=_names(values, columns.label, where, label_sets) if columns.label and label_sets else None,
        )


def is_to_skip(path: Path, columns: Columns, record: Record, empty_text: str) -> bool:
    """Return whether a row has no text and is to be skipped; UserError if it is not to be skipped."""
    column = _empty_column(record, columns)
    if column is not None and empty_text != "skip":
        raise DataError(
            f"{path}:{record.line}: column {column!r} is empty; fill it in, or set task.empty_text to 'skip'"
        )
    return column is not None


def repeated_id(path: Path, columns: Columns, record: Record, first: int) -> DataError:
    """Return the error about a row whose id occurs in an earlier line, in CSV perhaps the same one."""
    scope = f" of {record.language!r}" if columns.language else ""
    return DataError(f"{path}:{record.line}: id {record.id!r}{scope} already occurs in {_unit(path)} {first}")


def size(path: Path) -> int:
    """Return the bytes of a file, or of its columns without compression in Parquet; 0 if there is no such file.

    Raises:
      UserError: a file that is damaged or not Parquet.
    """
    if not path.is_file():
        return 0
    return parquet.size(path) if path.suffix.lower() == _PARQUET else path.stat().st_size


def column_names(path: Path, delimiter: Delimiter | None = None) -> tuple[str, ...]:
    """Return the names of the first row's columns; none without a row.

    Raises:
      UserError: see `read_rows`.
    """
    if path.suffix.lower() == _PARQUET:
        return parquet.column_names(path)
    return tuple(next(read_rows(path, None, delimiter), (0, {}))[1])


def column_values(path: Path, column: str, delimiter: Delimiter | None = None) -> Iterator[tuple[int, str]]:
    """Yield the lines and the values of a column of names (labels, languages), row by row.

    Raises:
      UserError: a malformed row, as far as this column shows it; the message starts with file:line.
    """
    for line, values in read_rows(path, (column,), delimiter):
        yield line, _name(values, column, f"{path}:{line}")


def inspect(
    path: Path,
    text: str,
    pair: str | None,
    id_: str | None,
    *,
    skip_empty: bool,
    delimiter: Delimiter | None = None,
) -> TextTable:
    """Return the `TextTable` of a file, with the columns that are named ("" for none) or else found in its first row.

    Raises:
      UserError: there is no row.
    """
    if not path.is_file() and path.exists():
        raise DataError(f"{path}: not a file")
    available = column_names(path, delimiter)
    if not available:
        raise DataError(f"{path}: no rows with text")
    columns, undeclared = {"pair": pair, "id": id_}, []
    if id_ is None and path.suffix.lower() == _PARQUET:
        type_ = parquet.unreadable(path).get(_OPTIONAL["id"])
        if type_ is not None:  # nobody asked for it, so it is no reason to stop
            _log.warning("%s: column 'id' is of type %s, not text or a number: the ids are row numbers", path, type_)
            columns["id"] = ""
    for key, name in _OPTIONAL.items():
        if columns[key] is None:
            if name not in available:
                undeclared.append(name)
            columns[key] = name if name in available else ""
    columns_to_read = Columns(text, columns["pair"] or "", id=columns["id"] or "")
    return TextTable(path, columns_to_read, tuple(undeclared), skip_empty, delimiter)


def read_texts(source: TextTable) -> Iterator[Text]:
    """Yield the rows of a file one by one, including those without text if they are to be skipped.

    Raises:
      UserError: a malformed row; the message starts with file:line.
    """
    columns = source.columns
    for number, (line, values) in enumerate(read_rows(source.path, columns.named, source.delimiter)):
        where = f"{source.path}:{line}"
        for name in source.undeclared:
            if name in values:
                raise DataError(f"{where}: column {name!r} is not in the first row; add it to all rows, or to none")
        row = Text(
            line=line,
            id=_id(values, columns.id, where) if columns.id else number,
            text=text_of(values, columns.text, where),
            text_pair=text_of(values, columns.pair, where) if columns.pair else None,
        )
        column = _empty_column(row, columns)
        if column is not None and not source.skip_empty:
            raise DataError(f"{where}: column {column!r} is empty; fill it in, or pass --empty-text skip")
        yield row


def _empty_column(row: Record | Text, columns: Columns) -> str | None:
    """Return the first column without text in a row, or None."""
    if blank.is_empty(row.text):
        return columns.text
    return columns.pair if row.text_pair is not None and blank.is_empty(row.text_pair) else None


def _id(values: dict[str, Any], column: str, where: str) -> Any:
    value = value_of(values, column, where)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: column {column!r} is {kind_of(value)}, expected text or a number")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: column {column!r} is {value}, expected text or a number")
    return value


def read_rows(
    path: Path,
    requested: Collection[str] | None = None,
    delimiter: Delimiter | None = None,
    *,
    lists: Collection[str] = (),
) -> Iterator[Row]:
    """Yield the rows of a file in the format of its ending, with the line (in Parquet, the row) that each starts on.

    One row is in memory at a time, or a few for Parquet, so a file may be larger than memory.

    Args:
      path: the file.
      requested: the columns to read from Parquet, which must have them; None reads all. Other formats give all columns.
      delimiter: see `lines.rows`.
      lists: columns that may hold lists in Parquet; JSONL gives whatever a row has.

    Raises:
      UserError: see `read_records`, as far as it needs no column names; another column that looks like a requested one;
        or a line (in CSV, a row) of over 256 MiB.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise DataError(f"{path}: the ending {path.suffix!r} is not one of {', '.join(ENDINGS)}")
    if ending == _PARQUET:
        yield from parquet.rows(path, parquet.column_names(path) if requested is None else requested, lists)
        return
    checked: tuple[str, ...] = ()
    try:
        with path.open("rb") as file:
            for line, values in lines.rows(file, str(path), ending, delimiter):
                columns = tuple(values)
                if columns != checked:
                    names.check_columns(columns, requested or (), f"{path}:{line}")
                    checked = columns
                yield line, values
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from None


def _unit(path: Path) -> str:
    return "row" if path.suffix.lower() == _PARQUET else "line"


def value_of(values: dict[str, Any], column: str, where: str) -> Any:
    """Return a column's value in the row at `where`; UserError without that column, or with half a surrogate pair."""
    if column not in values:
        near = names.similar(column, values)
        raise DataError(f"{where}: no column {column!r} among {', '.join(map(repr, values))}{near}")
    value = values[column]
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError(f"{where}: column {column!r} has half of a surrogate pair (\\ud800..\\udfff)") from None
    return value


def text_of(values: dict[str, Any], column: str, where: str) -> str:
    """Return a text to classify, which may be empty, as a null is; UserError as in `string_of`."""
    return "" if value_of(values, column, where) is None else string_of(values, column, where)


def string_of(values: dict[str, Any], column: str, where: str) -> str:
    """Return a column's string, which may be empty; UserError as in `value_of`, or if it is not a string."""
    value = value_of(values, column, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} is {kind_of(value)}, expected text")
    return value


def _row_id(values: dict[str, Any], column: str, where: str) -> str:
    """Return the value of the id column, which must be one line, because files list ids in lines."""
    name = _name(values, column, where)
    if name.splitlines() != [name]:
        raise DataError(f"{where}: column {column!r} is {name!r}, which has a line separator: remove it")
    return name


def _names(values: dict[str, Any], column: str, where: str, form: LabelSets) -> tuple[str, ...]:
    """Return the labels in a column of label sets: a list, or a string of names with blanks around them dropped."""
    value = value_of(values, column, where)
    if isinstance(value, str) and form.separator:
        parts = [blank.strip(part) for part in value.split(form.separator)] if not blank.is_empty(value) else []
        if form.separator == " ":
            parts = [part for part in parts if part]
    elif isinstance(value, list):
        parts = [_name({column: item}, column, where) for item in value]
    else:
        remedy = "; name what separates them in task.label_separator" if isinstance(value, str) else ""
        raise DataError(f"{where}: column {column!r} is {kind_of(value)}, expected a list of labels{remedy}")
    if "" in parts:
        raise DataError(f"{where}: column {column!r} is {value!r}: there is no label between two separators")
    twice = next((part for index, part in enumerate(parts) if part in parts[:index]), None)
    if twice is not None:
        raise DataError(f"{where}: column {column!r} has the label {twice!r} twice: remove one of them")
    return tuple(parts)


def _name(values: dict[str, Any], column: str, where: str) -> str:
    """Return the value of a label, language, or id column, which may be an integer in JSON."""
    value = value_of(values, column, where)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise DataError(f"{where}: column {column!r} is {kind_of(value)}, expected text or an integer")
    if blank.is_empty(str(value)):
        raise DataError(f"{where}: column {column!r} is empty")
    return str(value)
