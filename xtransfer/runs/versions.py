"""The versions of the packages that an experiment ran with, so that a later start can say what was upgraded."""

import json
from collections.abc import Mapping
from importlib import metadata

import xtransfer
from xtransfer import storage
from xtransfer.errors import CheckpointError
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import processes, terminal

FORMAT = 1
"""The format of a working directory. A version that cannot read older ones counts it up."""

_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def installed() -> dict[str, str]:
    """Return the versions of xtransfer and of the packages that compute and store its results."""
    return {"xtransfer": xtransfer.__version__, **{name: metadata.version(name) for name in _PACKAGES}}


def note(workdir: Workdir) -> None:
    """Record the installed versions, and log one line if others are on record.

    Raises:
      CheckpointError: the working directory has another format, or its record is damaged.
    """
    line = processes.on_first(lambda: _note(workdir, installed()))
    if line:
        terminal.log(line)


def _note(workdir: Workdir, versions: Mapping[str, str]) -> str:
    path, record = workdir.versions, {"format": FORMAT, "packages": dict(versions)}
    text = json.dumps(record, indent=2) + "\n"
    if not path.exists():
        storage.write_atomically(path, text)
        return ""
    recorded = storage.read_object(path, "remove this file")
    if recorded.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: this directory has format {recorded.get('format')!r}, and this version reads {FORMAT}: "
            "use the version that wrote it, or choose another directory"
        )
    if recorded == record:
        return ""
    storage.write_atomically(path, text)
    return _changes(recorded.get("packages"), versions)


def _changes(before: object, now: Mapping[str, str]) -> str:
    old = before if isinstance(before, dict) else {}
    changed = [f"{name} {old.get(name, '?')} → {version}" for name, version in now.items() if old.get(name) != version]
    return f"packages differ from the last start ({', '.join(changed)}): numbers may differ in their last digits"
