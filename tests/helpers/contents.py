"""Everything that a command leaves in a directory, for comparisons bit by bit."""

import json
from collections.abc import Mapping
from pathlib import Path

from xtransfer.train.checkpoints import AVERAGE, PARAMS, RESUME, Checkpoints

Contents = dict[str, object]
"""By path: the bytes of a file, the arrays of a checkpoint, or None for a directory."""


def of(directory: Path, ignored: Mapping[str, str] = {}) -> Contents:  # noqa: B006
    """Return everything below a directory, hidden or not.

    The files of a checkpoint hold times and random names, so its arrays and its score stand for them.

    Args:
      directory: the directory.
      ignored: the files that may differ, each with the reason.
    """
    contents: Contents = {}
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory).as_posix()
        if name in ignored or _is_inside_checkpoint(path):
            continue
        if _is_checkpoint(path):
            contents[name] = _arrays(path)
        else:
            contents[name] = path.read_bytes() if path.is_file() else None
    return contents


def differences(actual: Contents, expected: Contents) -> list[str]:
    """Return the paths that differ, and how."""
    lines = [f"{name} is missing" for name in expected.keys() - actual.keys()]
    lines += [f"{name} is left over" for name in actual.keys() - expected.keys()]
    for name in expected.keys() & actual.keys():
        if actual[name] != expected[name]:
            lines.append(f"{name} differs: {_shown(actual[name])} instead of {_shown(expected[name])}")
    return sorted(lines)


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return f"{len(value)} arrays"
    return "a directory" if value is None else str(value[-300:])


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == "checkpoints" and path.name.isdecimal()


def _is_inside_checkpoint(path: Path) -> bool:
    return any(_is_checkpoint(parent) for parent in path.parents)


def _arrays(step: Path) -> dict[str, tuple[object, ...]]:
    """Return the dtype, shape, and bytes of every array of a checkpoint, and its scores and the names of its items."""
    arrays: dict[str, tuple[object, ...]] = {}
    with Checkpoints(step.parent, read_only=True) as checkpoints:
        for item in (PARAMS, RESUME, AVERAGE):
            if (step / item).exists():
                for name, array in checkpoints.restore_arrays(int(step.name), item).items():
                    arrays[f"{item}.{name}"] = (str(array.dtype), array.shape, array.tobytes())
    scores = step / "metrics" / "metrics"
    content = json.loads(scores.read_bytes()) if scores.exists() else {}
    # A copy of the rows of metrics.jsonl, which is compared itself unless it is ignored.
    content.pop("rows", None)
    arrays["scores"] = (content,)
    arrays["names"] = tuple(sorted(path.name for path in step.iterdir()))
    return arrays
