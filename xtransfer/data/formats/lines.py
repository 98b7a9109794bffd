"""Rows of TSV, CSV, and JSONL as a stream, from a file or from a member of an archive.

A row is read exactly, or an error names its line. `tables` opens the user's own files.
"""

import collections
import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from xtransfer import storage
from xtransfer.errors import DataError

Lines = Iterable[tuple[int, str]]  # line numbers from 1, and lines with their ending
Row = tuple[int, dict[str, Any]]  # the line it starts on, and values by column name

_BOM = b"\xef\xbb\xbf"
_MAX_LINE = 256 << 20  # bytes, which bounds the memory for one line

DELIMITERS = {"comma": ",", "semicolon": ";", "tab": "\t", "bar": "|"}
"""The characters that may separate columns, by the name that a setting gives them."""

_USUAL = {".tsv": "tab", ".csv": "comma"}


@dataclass(frozen=True)
class Delimiter:
    """The user's choice of the character that separates columns.

    Attributes:
      name: a key of `DELIMITERS`, or "" for the usual one of TSV and CSV.
      advice: how to choose another one, for errors; {} stands for its name.
    """

    name: str = ""
    advice: str = "set task.delimiter to '{}'"


def lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    r"""Yield the lines of a UTF-8 stream with their numbers, from 1. Only "\n" ends a line, and it stays on it.

    A byte-order mark at the start is dropped. One line is in memory at a time.

    Raises:
      UserError: `name`:line for text that is not UTF-8, or for a line of over 256 MiB.
    """
    number = 0
    while data := stream.readline(_MAX_LINE + 1):
        number += 1
        where = f"{name}:{number}"
        if len(data) > _MAX_LINE:
            raise DataError(f"{where}: a line of over {_MAX_LINE >> 20} MiB; is this a text file?")
        if number == 1:
            data = data.removeprefix(_BOM)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"{where}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
        if text:
            yield number, text


def rows(stream: BinaryIO, name: str, ending: str, delimiter: Delimiter | None = None) -> Iterator[Row]:
    """Yield the rows of a stream in the format of an ending, with the line that each starts on.

    TSV has a header and no quoting: a quote is an ordinary character. CSV has a header and quotes as in RFC 4180. JSONL
    has one object per line. One row is in memory at a time.

    Args:
      stream: UTF-8, with or without a byte-order mark.
      name: the name of the file or member, for errors.
      ending: a key of `READERS`, such as ".tsv".
      delimiter: the user's choice for TSV and CSV; None if the user has none.

    Raises:
      UserError: a malformed row, or a line (in CSV, a row) of over 256 MiB; the message starts with `name`:line.
    """
    yield from READERS[ending](lines(stream, name), Path(name), delimiter)


def kind_of(value: Any) -> str:
    """Return the kind of a JSON or Parquet value in words."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    numbers = (int, float)
    return names.get(type(value), "a number" if isinstance(value, numbers) else f"a {type(value).__name__}")


def _read_tsv(numbered: Lines, path: Path, delimiter: Delimiter | None = None) -> Iterator[Row]:
    character = DELIMITERS[_used(delimiter, ".tsv")]
    table = ((n, line.removesuffix("\n").removesuffix("\r").split(character)) for n, line in numbered)
    return _with_header(table, path, ".tsv", delimiter)


def _read_csv(numbered: Lines, path: Path, delimiter: Delimiter | None = None) -> Iterator[Row]:
    # Huge texts are clipped later, not refused. The limit belongs to the process, and another reader may rely on it, so
    # it is not reset.
    csv.field_size_limit(max(csv.field_size_limit(), _MAX_LINE))
    start, size = 1, 0  # of the current row
    following = 1  # the line of the next row, if it starts with the next piece

    def pieces() -> Iterator[str]:
        nonlocal size, following
        for number, line in numbered:
            size += len(line)
            if size > _MAX_LINE:
                raise DataError(f"{path}:{start}: a row of over {_MAX_LINE >> 20} MiB; is a quote not closed?")
            # An unquoted lone "\r" ends a row too, but not a line.
            following = number
            *first, last = io.StringIO(line, newline="") if "\r" in line else (line,)
            yield from first
            following = number + 1
            yield last

    def cells() -> Iterator[tuple[int, list[str]]]:
        nonlocal start, size
        reader = csv.reader(pieces(), strict=True, delimiter=DELIMITERS[_used(delimiter, ".csv")])
        try:
            for row in reader:
                yield start, row
                start, size = following, 0
        except csv.Error as error:
            raise DataError(f"{path}:{start}: malformed CSV: {error}") from None

    return _with_header(cells(), path, ".csv", delimiter)


def _with_header(
    table: Iterable[tuple[int, list[str]]], path: Path, ending: str, delimiter: Delimiter | None
) -> Iterator[Row]:
    header: list[str] | None = None
    for line, cells in table:
        if header is None:
            header = cells
            _check_header(header, f"{path}:{line}", ending, delimiter)
            repeated = [name for name, count in collections.Counter(header).items() if count > 1]
            if repeated:
                raise DataError(f"{path}:{line}: column {min(repeated)!r} occurs twice in the header")
        elif len(cells) != len(header):
            plural = "" if len(cells) == 1 else "s"
            raise DataError(f"{path}:{line}: {len(cells)} column{plural}, expected {len(header)}")
        else:
            yield line, dict(zip(header, cells, strict=True))


def _check_header(header: list[str], where: str, ending: str, delimiter: Delimiter | None) -> None:
    """Refuse a header of another format, whose names would otherwise not be found, or not the rows' number of cells."""
    used = _used(delimiter, ending)
    other = next((name for name, character in DELIMITERS.items() if character in "".join(header)), None)
    if len(header) == 1 and other is not None:
        advice = f", or {delimiter.advice.format(other)}" if delimiter is not None else ""
        raise DataError(
            f"{where}: the columns are separated by {DELIMITERS[other]!r} ({other}), not by {DELIMITERS[used]!r}: save "
            f"the file with {DELIMITERS[used]!r}{advice}"
        )
    if ending == ".tsv" and header and all(len(name) > 2 and name[0] == name[-1] == '"' for name in header):
        advice = f" and {delimiter.advice.format(used)}" if delimiter is not None else " with commas"
        raise DataError(
            f"{where}: the columns are in quotes, which are ordinary characters in a {ending} file: save it without "
            f"quotes, or as .csv{advice}"
        )


def _used(delimiter: Delimiter | None, ending: str) -> str:
    """Return the name of the delimiter of a file: the user's, or the usual one of its ending."""
    return (delimiter.name if delimiter is not None else "") or _USUAL[ending]


def _read_jsonl(numbered: Lines, path: Path, delimiter: Delimiter | None = None) -> Iterator[Row]:
    for line, content in numbered:
        where = f"{path}:{line}"
        try:
            values = storage.read_json(content.removesuffix("\n"))
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: malformed JSON: {error.msg} at column {error.colno}") from None
        except ValueError as error:
            raise DataError(f"{where}: malformed JSON: {error}") from None
        if not isinstance(values, dict):
            raise DataError(f"{where}: expected a JSON object, got {kind_of(values)}")
        yield line, values


READERS: dict[str, Callable[..., Iterator[Row]]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
