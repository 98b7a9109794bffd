"""Files written whole or not at all, and JSON read strictly."""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from xtransfer.errors import UserError


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file (and its directory) so that a reader finds all of it or what was there before.

    It is on the disk when this returns. A disk that cannot take it is a `UserError` that names the path.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    # One fixed name, so that what a killed writer left behind is overwritten and does not pile up.
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, whole or not at all; NaN and infinities are a ValueError."""
    write_whole(path, "".join(_line(row) for row in rows))


def append_jsonl(path: Path, row: Mapping[str, Any]) -> None:
    """Appends one row and waits until it is on the disk; a full disk is a `UserError`."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def read_json(text: str) -> Any:
    """Parses strict JSON: no NaN or infinity, also none by overflow, and no key twice in an object.

    Raises:
      ValueError: with what is wrong, for the caller to put the place before it.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def read_object(path: Path, remedy: str) -> dict[str, Any]:
    """The JSON object in a file, read strictly; anything else is a `UserError` that ends with the remedy."""
    try:
        found = read_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}): {remedy}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(found).__name__}: {remedy}")
    return found


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large a number")
    return value


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
