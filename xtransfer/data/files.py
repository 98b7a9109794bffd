"""Strict readers of TSV, CSV and JSONL: every row is read as it stands, or an error names its file and line."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.errors import UserError, nearest

_BOM = b"\xef\xbb\xbf"
Row = tuple[int, dict[str, Any]]  # the line it starts on, values by column name


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read; "" = there is none."""

    text: str
    pair: str = ""
    label: str = ""
    id: str = ""


@dataclass(frozen=True)
class Record:
    """One row of a file.

    Attributes:
      line: where it starts, from 1.
      id: of the id column, else the number of the data row, from 0.
      text: never empty.
      text_pair: never empty, or None without a pair column.
      label: name of the class, or None without a label column.
    """

    line: int
    id: str
    text: str
    text_pair: str | None
    label: str | None


def read_records(path: Path, columns: Columns, *, empty_text: str = "error") -> tuple[list[Record], int]:
    """Reads a file whose ending is .tsv, .csv or .jsonl.

    TSV has a header and no quoting: a quote is a character. CSV has a header and quotes as in RFC 4180. JSONL has one
    object a line, and only "\\n" ends a line. All are UTF-8, with or without a byte-order mark.

    Args:
      path: the file.
      columns: what to read; other columns are ignored.
      empty_text: "error", or "skip" to leave rows without text out.

    Returns:
      The records in the order of the file, and the number of rows that were left out.

    Raises:
      UserError: file:line and what is wrong there.
    """
    records: list[Record] = []
    lines_by_id: dict[str, int] = {}
    skipped = 0
    for number, (line, values) in enumerate(read_rows(path)):
        where = f"{path}:{line}"
        record = Record(
            line=line,
            id=_name(values, columns.id, where) if columns.id else str(number),
            text=_text(values, columns.text, where),
            text_pair=_text(values, columns.pair, where) if columns.pair else None,
            label=_name(values, columns.label, where) if columns.label else None,
        )
        if record.id in lines_by_id:
            raise UserError(f"{where}: id {record.id!r} already stands in line {lines_by_id[record.id]}")
        lines_by_id[record.id] = line
        if record.text.strip() and (record.text_pair is None or record.text_pair.strip()):
            records.append(record)
        elif empty_text == "skip":
            skipped += 1
        else:
            column = columns.pair if record.text.strip() else columns.text
            raise UserError(f"{where}: column {column!r} is empty; mend it, or set task.empty_text to 'skip'")
    if not records:
        raise UserError(f"{path}: no rows with text")
    return records, skipped


def read_rows(path: Path) -> list[Row]:
    """All rows of a file by the reader of its ending, with the line that each starts on.

    Raises:
      UserError: as `read_records`, for all that needs no column names.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: the ending {path.suffix!r} is not one of {', '.join(READERS)}")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return list(reader(_decode(path, data.removeprefix(_BOM)), path))


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _read_tsv(text: str, path: Path) -> Iterator[Row]:
    return _with_header(((n, line.removesuffix("\r").split("\t")) for n, line in enumerate(_lines(text), 1)), path)


def _read_csv(text: str, path: Path) -> Iterator[Row]:
    def cells() -> Iterator[tuple[int, list[str]]]:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        line = 1
        previous = csv.field_size_limit(max(len(text), 1))  # huge texts are clipped later, not refused
        try:
            for row in reader:
                yield line, row
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{line}: malformed CSV: {error}") from None
        finally:
            csv.field_size_limit(previous)

    return _with_header(cells(), path)


def _with_header(rows: Iterable[tuple[int, list[str]]], path: Path) -> Iterator[Row]:
    header: list[str] | None = None
    for line, cells in rows:
        if header is None:
            header = cells
            double = sorted({name for name in header if header.count(name) > 1})
            if double:
                raise UserError(f"{path}:{line}: column {double[0]!r} occurs twice in the header")
        elif len(cells) != len(header):
            plural = "" if len(cells) == 1 else "s"
            raise UserError(f"{path}:{line}: {len(cells)} column{plural}, expected {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _read_jsonl(text: str, path: Path) -> Iterator[Row]:
    for line, content in enumerate(_lines(text), 1):
        where = f"{path}:{line}"
        try:
            values = storage.read_json(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise UserError(f"{where}: malformed JSON: {error}") from None
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a JSON object, got {_kind(values)}")
        yield line, values


READERS: dict[str, Callable[[str, Path], Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}


def _value(values: dict[str, Any], column: str, where: str) -> Any:
    if column not in values:
        near = nearest(column, values)
        raise UserError(f"{where}: no column {column!r} among {', '.join(map(repr, values))}{near}")
    value = values[column]
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: column {column!r} has half of a surrogate pair (\\ud800..\\udfff)") from None
    return value


def _text(values: dict[str, Any], column: str, where: str) -> str:
    value = _value(values, column, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: column {column!r} is {_kind(value)}, expected text")
    return value


def _name(values: dict[str, Any], column: str, where: str) -> str:
    """The value of a label or id column, for which JSON may have an integer."""
    value = _value(values, column, where)
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise UserError(f"{where}: column {column!r} is {_kind(value)}, expected text or an integer")
    if value == "":
        raise UserError(f"{where}: column {column!r} is empty")
    return str(value)


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
