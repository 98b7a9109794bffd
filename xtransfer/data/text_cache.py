"""Large text on disk, so that a task's examples need not fit into memory.

An entry (see `entries`) has one file, examples.arrow, see `examples.TextFile`. Its key hashes the bytes that the text
was read from and how they were read.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from xtransfer.data.entries import Entry
from xtransfer.data.example import Example
from xtransfer.data.examples import BATCH, SCHEMA, Part, StoredExamples, TextFile

FORMAT = 3
LARGE = 64 << 20
"""Bytes of a file of text from which on its examples are kept on disk. Memory would take about six times that."""

_FILE = "examples.arrow"


def stored(
    directory: Path,
    key: Any,
    prefix: str,
    language: str,
    read: Callable[[], Iterable[Example]],
    *,
    has_numbers: bool,
) -> StoredExamples:
    """Return examples from the disk, or read and write them first. A second process waits for the one that writes.

    Args:
      directory: holds the entries.
      key: everything that decides the examples, which JSON can hold.
      prefix: the start of every id.
      language: the language of every example.
      read: returns the examples one by one; their order stays.
      has_numbers: whether the rest of each id is a number.

    Raises:
      UserError: from `read`; or the directory cannot be written (a full disk), with its path.
    """
    entry = Entry(
        directory,
        {"format": FORMAT, "source": key, "prefix": prefix, "language": language},
        {"examples": _FILE},
        lambda path: _open(path / _FILE, prefix, language),
        content="text",
        work="reading the text",
        lock="reading text",
    )
    file = entry.get(lambda: _write(entry, read(), prefix, has_numbers=has_numbers))
    return StoredExamples([Part(file, range(len(file)), prefix=prefix)])


def _open(path: Path, prefix: str, language: str) -> TextFile:
    try:
        return TextFile(path, prefix, language)
    except pa.ArrowException as error:
        raise ValueError(error) from error


def _write(entry: Entry[TextFile], examples: Iterable[Example], prefix: str, *, has_numbers: bool) -> None:
    """Write the examples as the entry, a batch at a time."""
    schema = pa.schema({"number": pa.int64() if has_numbers else pa.string(), **SCHEMA})
    # The examples come from outside the blocks that name the disk, so that an error in them keeps its own words.
    with entry.written() as temporary, contextlib.ExitStack() as stack:
        with entry.disk_errors():
            sink = stack.enter_context(pa.OSFile(str(temporary / _FILE), "wb"))
            writer = pa.ipc.new_file(sink, schema)
        for batch in _batches(examples, prefix, schema, has_numbers=has_numbers):
            with entry.disk_errors():
                writer.write_batch(batch)
        with entry.disk_errors():
            writer.close()  # only now, because this writes, and would fail again after a failed write
            sink.close()
            with (temporary / _FILE).open("rb") as file:
                os.fsync(file.fileno())


def _batches(
    examples: Iterable[Example], prefix: str, schema: pa.Schema, *, has_numbers: bool
) -> Iterator[pa.RecordBatch]:
    iterator = iter(examples)
    while group := list(itertools.islice(iterator, BATCH)):
        numbers = [example.id.removeprefix(prefix) for example in group]
        columns = [
            [int(number) for number in numbers] if has_numbers else numbers,
            [example.text for example in group],
            [example.text_pair for example in group],
            [example.label for example in group],
            [example.label_set for example in group],
        ]
        arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
        yield pa.record_batch(arrays, schema=schema)
