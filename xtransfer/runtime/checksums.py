"""Checksums of finished files, so that damage is found before anything uses it.

    <directory>/checksums.json    {"<path below it>": {"size": bytes, "sha256": hex digits}, …}

A directory that takes its name at once, such as a checkpoint, is listed as a whole while it is still hidden
(`write_all`). In a directory that grows file by file, such as the predictions, each file is listed before it takes its
name (`write`). So a file that is not listed is older than this list, and is used as it is.

Rows of a file that grows, or that several commands write, hold a digest of their own (`signed`), so that a kill never
separates the two, and one damaged row costs that row alone. A row without a digest is older than digests.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from xtransfer import storage

CHECKSUMS = "checksums.json"
DIGEST = "digest"
"""The key of a signed row with the digest of its other keys."""

_DIGITS = 8  # hex digits of a row's digest: one wrong row in four billion goes unnoticed


def facts(path: Path) -> dict[str, Any]:
    """Return the size in bytes and the sha256 of a file, as `fault` expects them."""
    return {"size": path.stat().st_size, "sha256": storage.sha256(path)}


def fault(path: Path, expected: Mapping[str, Any], name: str = "") -> str | None:
    """Return in words how a file differs from its recorded facts; None if it does not.

    Args:
      path: the file.
      expected: see `facts`.
      name: the name of the file in the words, by default its own.
    """
    name = name or path.name
    try:
        size = path.stat().st_size
        if size != expected["size"]:  # before the slower look at all bytes
            return f"{name} has {size:,} bytes, not {expected['size']:,}"
        return None if storage.sha256(path) == expected["sha256"] else f"{name} has other bytes than were written"
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:  # a failing disk
        return f"{name} cannot be read: {error.strerror or error}"


def write_all(directory: Path, *, skip: Collection[str] = ()) -> None:
    """List every file below a directory, except those in `skip`, which are paths below it.

    Raises:
      OSError: a file cannot be read.
      UserError: the list cannot be written.
    """
    paths = (path for path in sorted(directory.rglob("*")) if path.is_file())
    by_name = {path.relative_to(directory).as_posix(): path for path in paths}
    left_out = {CHECKSUMS, *skip}
    write_list(directory, {name: facts(path) for name, path in by_name.items() if name not in left_out})


def write(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write a file atomically, and list it in its directory first. Only one process may do so at a time.

    Args:
      path: the file.
      data: its bytes, or pieces of them that need not fit into memory together.

    Raises:
      UserError: the file system refuses.
    """
    digest, size = hashlib.sha256(), 0
    with storage.AtomicFile(path) as file:
        for piece in [data] if isinstance(data, bytes) else data:
            file.write(piece)
            digest.update(piece)
            size += len(piece)
        _list(path, {"size": size, "sha256": digest.hexdigest()})
        file.commit()


def _list(path: Path, entry: dict[str, Any]) -> None:
    """Add the facts of a file to the list of its directory."""
    known = listed(path.parent)
    if known.get(path.name) != entry:
        write_list(path.parent, {**known, path.name: entry})


def read(directory: Path) -> dict[str, dict[str, Any]] | None:
    """Return the facts of each listed file by its path below the directory; None if there is no list.

    Raises:
      ValueError: the list is damaged.
    """
    try:
        listed = storage.read_json((directory / CHECKSUMS).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"{error.strerror or error}") from error
    for name, entry in listed.items() if isinstance(listed, dict) else [("", None)]:
        match entry:
            case {"size": int(), "sha256": str()}:
                pass
            case _:
                raise ValueError(f"{name or 'its content'} has no size and sha256")
    return listed


def fault_below(directory: Path, *, only: Collection[str] = ()) -> str | None:
    """Return in words what is wrong with the first listed file that is not as it was written; None if all are.

    Without a list nothing can be wrong.

    Args:
      directory: the directory of the list.
      only: names in the directory, files or folders, to look at; () = everything.
    """
    try:
        listed = read(directory)
    except ValueError as error:
        return f"{CHECKSUMS} is damaged ({error})"
    names = [name for name in listed or {} if not only or name.partition("/")[0] in only]
    faults = (fault(directory / name, (listed or {})[name], name) for name in sorted(names))
    return next((found for found in faults if found), None)


def listed(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the list of a directory, empty if there is none or it is damaged.

    Files without an entry are used as they are: they may be whole, and reading them shows most faults.
    """
    try:
        return read(directory) or {}
    except ValueError:
        return {}


def fault_of(path: Path, known: Mapping[str, Mapping[str, Any]] | None = None) -> str | None:
    """Return in words how a file differs from its entry in its directory's list; None if it has no entry.

    Args:
      path: the file.
      known: the list from `listed`, for many files of one directory; None reads it.
    """
    known = listed(path.parent) if known is None else known
    return fault(path, known[path.name]) if path.name in known else None


def is_listed(path: Path, data: bytes) -> bool:
    """Return whether its directory's list says that a file holds these data, whatever it holds now."""
    return listed(path.parent).get(path.name) == _entry(data)


def _entry(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def write_list(directory: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the facts of a directory's files by their paths below it; the counterpart of `read`.

    Raises:
      UserError: the list cannot be written.
    """
    storage.write_atomically(directory / CHECKSUMS, json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


def signed(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the digest of its keys and values, which `unsigned` compares."""
    return {**row, DIGEST: _digest(row)}


def unsigned(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object without its digest, if it has one.

    Raises:
      ValueError: the object is not as it was signed.
    """
    rest = {key: value for key, value in row.items() if key != DIGEST}
    if DIGEST in row and row[DIGEST] != _digest(rest):
        raise ValueError("its content does not match its digest")
    return rest


def _digest(row: Mapping[str, Any]) -> str:
    content = json.dumps(row, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(content.encode()).hexdigest()[:_DIGITS]
