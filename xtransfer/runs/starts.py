"""How an experiment was started: commands, versions, and machines, in `starts.jsonl`."""

import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import jax

import xtransfer
from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import processes, terminal

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Start:
    """One start of an experiment; a row of `starts.jsonl`.

    Attributes:
      command: the command line.
      xtransfer: the version of this package.
      python: the version of Python.
      packages: the versions of the packages that decide the numbers, by name.
      system: the operating system and the processor.
      devices: the number and kind of the devices.
      processes: the number of processes.
    """

    command: str
    xtransfer: str
    python: str
    packages: Mapping[str, str]
    system: str
    devices: str
    processes: int


def current() -> Start:
    """Return the facts about this process."""
    return Start(
        command=_command(),
        xtransfer=xtransfer.__version__,
        python=platform.python_version(),
        packages={name: importlib.metadata.version(name) for name in _PACKAGES},
        system=f"{platform.system()} {platform.machine()}",
        devices=f"{jax.device_count()} × {jax.devices()[0].device_kind}",
        processes=processes.count(),
    )


def record(workdir: Workdir) -> None:
    """Add this start to `starts.jsonl`, unless it repeats the one before, and log which packages have changed since.

    A failure costs a warning.
    """
    if not processes.is_first():
        return
    try:
        start, last = current(), read_starts(workdir)[-1:]
        if last != [start]:
            storage.append_jsonl(workdir.starts, asdict(start))
        changes = [change for before in last for change in _changes(_versions(before), _versions(start))]
        if changes:
            terminal.log(
                f"packages differ from the last start ({', '.join(changes)}): numbers may differ in their last digits"
            )
    except (UserError, OSError, importlib.metadata.PackageNotFoundError) as error:
        terminal.log(f"warning: this start is not recorded ({error})")


def _versions(start: Start) -> dict[str, str]:
    return {"xtransfer": start.xtransfer, **start.packages}


def _changes(before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for name, version in now.items():
        if before.get(name) != version:
            yield f"{name} {before.get(name, '?')} → {version}"


def read_starts(workdir: Workdir) -> list[Start]:
    """Return the recorded starts, oldest first; lines that a killed process left incomplete are skipped."""
    if not workdir.starts.is_file():
        return []
    return [start for line in workdir.starts.read_bytes().split(b"\n") if (start := _parsed(line)) is not None]


def _parsed(line: bytes) -> Start | None:
    try:
        row: Any = storage.read_json(line.decode("utf-8"))
    except ValueError:
        return None
    match row:
        case {
            "command": str(),
            "xtransfer": str(),
            "python": str(),
            "packages": dict(),
            "system": str(),
            "devices": str(),
            "processes": int(),
        } if len(row) == len(Start.__dataclass_fields__):
            return Start(**row)
    return None


def _command() -> str:
    """Return this process's command line, with the module's name in place of its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else sys.argv[0]
    return shlex.join(["python", "-m", name, *sys.argv[1:]])
