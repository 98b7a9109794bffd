"""Rows of a Parquet file, a few at a time. Row numbers, from 1, take the place of other formats' line numbers."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import types

from xtransfer.data import names
from xtransfer.data.formats.lines import Row
from xtransfer.errors import DataError, MachineError, one_line

_BUFFER = 1 << 20  # bytes of each column to read ahead
_BATCH_BYTES = 16 << 20  # bytes of text, roughly
_BATCH_ROWS = 512


def column_names(path: Path) -> tuple[str, ...]:
    """Return the names of the columns in the file's order; none if there are no rows.

    Raises:
      UserError: see `rows`.
    """
    with _open(path) as file:
        return tuple(file.schema_arrow.names) if file.metadata.num_rows else ()


def unreadable(path: Path) -> dict[str, str]:
    """Return the types of the columns that `rows` cannot read, such as timestamps, by name.

    Raises:
      UserError: see `rows`.
    """
    with _open(path) as file:
        return {field.name: str(field.type) for field in file.schema_arrow if not _is_readable(field.type)}


def size(path: Path) -> int:
    """Return the bytes of all columns before compression.

    Raises:
      UserError: see `rows`.
    """
    with _open(path) as file:
        groups = range(file.metadata.num_row_groups)
        return sum(file.metadata.row_group(number).total_byte_size for number in groups)


def rows(path: Path, requested: Collection[str], lists: Collection[str] = (), *, nested: bool = False) -> Iterator[Row]:
    """Yield the rows of a file with their numbers, from 1, and their requested columns.

    Columns hold text, numbers, or truth values, and may be dictionary-encoded; those in `lists` may hold lists of them.
    If `nested`, all may hold lists, structures (objects by field), and maps (lists of pairs). A few rows are in memory
    at a time, whatever the size of the row groups.

    Raises:
      UserError: a missing column, another type, text that is not UTF-8, or a file that is damaged or not Parquet; the
        message starts with path or path:row.
    """
    number = 0
    with _open(path) as file:
        columns = _columns(file.schema_arrow, requested, lists, path, nested=nested) if file.metadata.num_rows else []
        batches = file.iter_batches(_batch_rows(file.metadata, columns), columns=columns, use_threads=False)
        while batch := _next(batches, path, number):
            table = {name: _values(batch.column(name), name, path, number) for name in columns}
            for cells in zip(*table.values(), strict=True):
                number += 1
                yield number, dict(zip(columns, cells, strict=True))
        if number != file.metadata.num_rows:
            raise DataError(f"{path}: has {number} rows, but its metadata say {file.metadata.num_rows}: it is damaged")


@contextmanager
def _open(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        path.open("rb").close()  # its errors say more than Arrow's
        file = pq.ParquetFile(path, buffer_size=_BUFFER, pre_buffer=False, page_checksum_verification=True)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pa.ArrowException, OSError) as error:
        reason = getattr(error, "strerror", None)
        if reason:
            raise MachineError(f"{path}: cannot be read: {reason}") from None
        raise DataError(f"{path}: damaged, or not a Parquet file: {one_line(error)}") from None
    with file:
        yield file


def _next(batches: Iterator[pa.RecordBatch], path: Path, number: int) -> pa.RecordBatch | None:
    try:
        # An empty batch is not the end.
        return next((batch for batch in batches if batch.num_rows), None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged after row {number}: {one_line(error)}") from None


def _columns(
    schema: pa.Schema, requested: Collection[str], lists: Collection[str], path: Path, *, nested: bool
) -> list[str]:
    """Return the requested columns, each once, in the file's order."""
    for name in requested:
        if name not in schema.names:
            shown = ", ".join(map(repr, schema.names))
            raise DataError(f"{path}: no column {name!r} among {shown}{names.similar(name, schema.names)}")
        if schema.names.count(name) > 1:
            raise DataError(f"{path}: column {name!r} occurs twice")
        names.check_columns(schema.names, (name,), str(path))
        type_ = schema.field(name).type
        if name in lists and any(is_list(type_) for is_list in _LISTS):
            type_ = type_.value_type
        if not (_is_readable(type_) or (nested and _is_readable_below(type_))):
            raise DataError(f"{path}: column {name!r} is of type {type_}, expected text or a number")
    return [name for name in schema.names if name in requested]


def _is_readable(type_: pa.DataType) -> bool:
    inner = type_.value_type if types.is_dictionary(type_) else type_
    return any(fits(inner) for fits in _READABLE)


def _is_readable_below(type_: pa.DataType) -> bool:
    """Return whether a list, structure, or map has readable types inside, and each field once."""
    if not types.is_nested(type_):
        return _is_readable(type_) or types.is_decimal(type_) or types.is_float16(type_)
    fields = [type_.field(i) for i in range(type_.num_fields)]
    distinct = len({field.name for field in fields}) == len(fields)
    return distinct and all(_is_readable_below(field.type) for field in fields)


_LISTS = (types.is_list, types.is_large_list, types.is_fixed_size_list)

# Other types have no counterpart in the other formats. A column of type null has no value, and its texts are
# empty.
_READABLE = (
    types.is_string,
    types.is_large_string,
    types.is_string_view,
    types.is_integer,
    types.is_float32,
    types.is_float64,
    types.is_boolean,
    types.is_null,
)


def _batch_rows(metadata: pq.FileMetaData, columns: Sequence[str]) -> int:
    """Return the number of rows to read at once."""
    largest = 1  # bytes per row, in the row group with the largest rows on average
    for i in range(metadata.num_row_groups):
        group = metadata.row_group(i)
        chunks = [group.column(j) for j in range(group.num_columns)]
        # The path of a list continues below its column's name.
        size = sum(chunk.total_uncompressed_size for chunk in chunks if _column_of(chunk.path_in_schema, columns))
        largest = max(largest, size // max(group.num_rows, 1))
    return min(max(_BATCH_BYTES // largest, 1), _BATCH_ROWS)


def _column_of(path: str, columns: Sequence[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in columns)


def _values(column: pa.Array, name: str, path: Path, before: int) -> list[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        for i, cell in enumerate(column, before + 1):
            try:
                cell.as_py()
            except UnicodeDecodeError as error:
                byte = f"byte 0x{error.object[error.start]:02x}"
                raise DataError(f"{path}:{i}: column {name!r}: {byte} is not UTF-8") from None
        raise
