"""A sweep: one experiment for every combination of some settings' values.

    <directory>/sweep.json              the keys, and the points of the last start
                points/<name>/          the workdir of each point, such as transfer.temperature=0.1,task.labelled=64

Every workdir is complete by itself: it resumes, is evaluated, predicts, and exports like any other. Values may be added
later, because a point keeps its name.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer import config as settings
from xtransfer import storage
from xtransfer.config import ExperimentConfig
from xtransfer.data.names import within_limit
from xtransfer.errors import CheckpointError, ConfigError
from xtransfer.runs.workdir import Workdir

RECORD = "sweep.json"
_UNSAFE = re.compile(r"[^\w.=,+-]")  # characters that a name does not keep
_LONGEST = 120  # characters of a name, before its digest; see also `names.MAX_BYTES`
_REMEDY = "start the sweep again with python -m xtransfer.main"


@dataclass(frozen=True)
class Point:
    """One combination of values.

    Attributes:
      name: its directory.
      values: the values by config key, in the order of the flags.
      config: the experiment.
    """

    name: str
    values: Mapping[str, Any]
    config: ExperimentConfig


@dataclass(frozen=True)
class Sweep:
    """A recorded sweep.

    Attributes:
      keys: the config keys, in the order of the flags.
      points: the values by key of each point, by the point's name.
    """

    keys: tuple[str, ...]
    points: Mapping[str, Mapping[str, Any]]


def parse(source: str, overrides: Sequence[str], flags: Sequence[str]) -> list[Point]:
    """Return the points of a sweep, in the order of the flags' values; the last key varies fastest.

    Args:
      source: the config, FILE or FILE:ARG.
      overrides: the flags that hold for every point, `--config.KEY=VALUE`.
      flags: KEY=VALUE,VALUE,… for each key. A comma inside brackets or quotes belongs to its value.

    Raises:
      UserError: a flag of another form, an unknown key, a value that its key does not take, or one that is given twice.
    """
    values_by_key: dict[str, list[str]] = {}
    for flag in flags:
        key, separator, text = flag.partition("=")
        values = _split(text)
        if not separator or not key or not all(values):
            raise ConfigError(f"--sweep {flag}: write KEY=VALUE,VALUE,…, such as transfer.temperature=0.5,1,2")
        if key in values_by_key:
            raise ConfigError(f"--sweep {key} is given twice: put all of its values into one flag")
        if any(override.startswith(f"--config.{key}=") for override in overrides):
            raise ConfigError(f"--sweep {key} and --config.{key}: leave one of them out")
        values_by_key[key] = values
    points: dict[str, Point] = {}
    for combination in itertools.product(*values_by_key.values()):
        changes = [f"--config.{key}={value}" for key, value in zip(values_by_key, combination, strict=True)]
        config = settings.load(source, [*overrides, *changes])
        point = _point(tuple(values_by_key), config)
        if point.name in points:
            raise ConfigError(f"--sweep: {point.name} is given twice: give each value once")
        points[point.name] = point
    return list(points.values())


def directory(root: Path, name: str) -> Path:
    """Return the workdir of a point."""
    return root / "points" / name


def workdirs(root: Path) -> list[Workdir]:
    """Return the workdirs of all points, those of earlier starts too, in the order of their names."""
    return [Workdir(path) for path in sorted((root / "points").glob("*")) if (path / "config.json").is_file()]


def record(root: Path, points: Sequence[Point]) -> None:
    """Add points to the record of a sweep; those of earlier starts stay, and come first.

    Raises:
      UserError: the directory holds a sweep of other settings.
    """
    keys = list(points[0].values)
    found = [{"name": point.name, "values": dict(point.values)} for point in points]
    if is_sweep(root):
        earlier = read(root)
        if list(earlier.keys) != keys:
            raise ConfigError(
                f"{root} holds a sweep of {', '.join(earlier.keys)}, and this one is of {', '.join(keys)}: choose "
                "another --workdir"
            )
        known = [{"name": name, "values": dict(values)} for name, values in earlier.points.items()]
        found = [*known, *(point for point in found if point["name"] not in earlier.points)]
    facts = {"keys": keys, "points": found}
    storage.write_atomically(root / RECORD, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


def is_sweep(root: Path) -> bool:
    """Return whether a directory holds a sweep."""
    return (root / RECORD).is_file()


def read(root: Path) -> Sweep:
    """Read the record of a sweep; a UserError says if it is missing or broken."""
    path = root / RECORD
    facts = storage.read_object(path, _REMEDY)
    match facts:
        case {"keys": list(keys), "points": list(points)} if keys and points:
            pass
        case _:
            raise CheckpointError(f"{path}: expected keys and points: {_REMEDY}")
    by_name = {}
    for point in points:
        match point:
            case {"name": str(name), "values": dict(values)} if list(values) == keys:
                by_name[name] = values
            case _:
                raise CheckpointError(f"{path}: expected points with a name and a value of each key: {_REMEDY}")
    return Sweep(tuple(keys), by_name)


def _point(keys: Sequence[str], config: ExperimentConfig) -> Point:
    values = {key: settings.lookup(config, key) for key in keys}
    text = ",".join(f"{key}={_text(value)}" for key, value in values.items())
    name = _UNSAFE.sub("_", text)
    if name != text or len(name) > _LONGEST:  # two texts may have become the same name
        name = f"{name[:_LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return Point(within_limit(name), values, config)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def _split(text: str) -> list[str]:
    """Return the parts of a text between commas that are not inside brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        if character == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += character
    return parts
