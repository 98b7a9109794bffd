"""Large text on disk, so that a task's examples need not fit into memory.

    <directory>/<key>/manifest.json    the key, the number of examples, and the size and sha256 of the file
                      examples.arrow   the examples, see `examples.TextFile`

The key hashes the bytes that the text was read from and how they were read, so an entry is never stale, and any entry
may be deleted. An entry exists completely or not at all, and a damaged one is replaced.
"""

import contextlib
import hashlib
import itertools
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from xtransfer import storage
from xtransfer.data.example import Example
from xtransfer.data.examples import BATCH, SCHEMA, Part, StoredExamples, TextFile
from xtransfer.errors import MachineError
from xtransfer.runtime import checksums
from xtransfer.runtime.locks import directory_lock

FORMAT = 2
LARGE = 64 << 20
"""Bytes of a file of text from which on its examples are kept on disk. Memory would take about six times that."""

_FILE = "examples.arrow"

_log = logging.getLogger(__name__)


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
    content = json.dumps({"format": FORMAT, "source": key, "prefix": prefix, "language": language}, sort_keys=True)
    full_key = json.loads(content)  # as a manifest gives it
    entry = directory / hashlib.sha256(content.encode()).hexdigest()[:16]
    file = _open(entry, full_key)
    if file is None:
        with directory_lock(directory, "reading text", wait=True):
            file = _open(entry, full_key, warn=True)
            if file is None:
                _write(entry, full_key, read(), has_numbers=has_numbers)
                file = _open(entry, full_key, warn=True)
        if file is None:
            raise MachineError(f"{entry}: the text written there cannot be read again: the disk is failing")
    return StoredExamples([Part(file, range(len(file)), prefix=prefix)])


def _open(entry: Path, key: dict[str, Any], *, warn: bool = False) -> TextFile | None:
    """Return the file of an entry; None if it does not exist or is damaged."""
    if not entry.exists():
        return None
    try:
        manifest = storage.read_json((entry / "manifest.json").read_text(encoding="utf-8"))
        if manifest["key"] != key:
            raise ValueError("the manifest belongs to other text")
        fault = checksums.fault(entry / _FILE, manifest["file"])
        if fault is not None:
            raise ValueError(fault)
        return TextFile(entry / _FILE, key["prefix"], key["language"])
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        if warn:
            _log.warning("%s: damaged, so reading the text again: %s", entry, error)
        return None


def _write(entry: Path, key: dict[str, Any], examples: Iterable[Example], *, has_numbers: bool) -> None:
    """Write the examples into a temporary directory, which becomes the entry when everything is on the disk."""
    schema = pa.schema({"number": pa.int64() if has_numbers else pa.string(), **SCHEMA})
    batches = _batches(examples, key["prefix"], schema, has_numbers=has_numbers)
    # The examples come from outside the blocks that name the disk, so that an error in them keeps its own words.
    with contextlib.ExitStack() as stack:
        with _disk_errors(entry):
            temporary = stack.enter_context(storage.atomic_directory(entry, locked=True))
            path = temporary / _FILE
            sink = stack.enter_context(pa.OSFile(str(path), "wb"))
            writer = pa.ipc.new_file(sink, schema)
        for batch in batches:
            with _disk_errors(entry):
                writer.write_batch(batch)
        with _disk_errors(entry):
            writer.close()  # only now, because this writes, and would fail again after a failed write
            sink.close()
            with path.open("rb") as file:
                os.fsync(file.fileno())
            manifest = {"key": key, "file": checksums.facts(path)}
            storage.write_atomically(temporary / "manifest.json", json.dumps(manifest, indent=2) + "\n")
            if os.path.lexists(entry):  # it is damaged, or it would have been read
                is_directory = entry.is_dir() and not entry.is_symlink()
                shutil.rmtree(entry) if is_directory else entry.unlink()
            stack.close()  # gives the directory its name


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


@contextlib.contextmanager
def _disk_errors(entry: Path) -> Iterator[None]:
    """Turn a failure of the disk into a UserError that names the entry."""
    try:
        yield
    except OSError as error:
        # Arrow's own words name neither the file nor the reason first.
        reason = os.strerror(error.errno) if error.errno else error
        raise MachineError(
            f"{entry}: the text cannot be written: {reason}; free some space, or choose another task.cache_dir"
        ) from error
