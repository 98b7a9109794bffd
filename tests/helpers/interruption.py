"""Kill, stop, or hold this process at a chosen file operation of a chosen stage.

A stage is known by the directory that it writes to. An audit hook counts the operations that change a file there
(opening it to write, renaming, removing, creating a directory) in every thread, so a kill may fall between any two of
them, and with a delay anywhere else: into a computation, or into a write below Python.
"""

import collections
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONG_AGO = 1e6  # seconds

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")


@dataclass(frozen=True)
class Interruption:
    """What happens to a process, and when.

    Attributes:
      stage: the stage that is interrupted.
      number: before the stage's operation of this number, from 1.
      delay: seconds from there.
      action: "kill", "terminate" (SIGTERM), "stall" (sleep, as if for long already), or "hold" (wait for a file).
      release: the file to wait for. While a process waits, `<release>.held` exists.
    """

    stage: str
    number: int
    delay: float = 0.0
    action: str = "kill"
    release: str = ""


def install(stages: Mapping[str, Sequence[str]], interruption: Interruption | None) -> Mapping[str, int]:
    """Count the operations of each stage in this process from now on, and interrupt it; return the live counts."""
    counts: collections.Counter[str] = collections.Counter()
    roots = sorted(((path, stage) for stage, paths in stages.items() for path in paths), key=lambda root: -len(root[0]))
    lock = threading.Lock()

    def stage_of(path: str) -> str | None:
        return next((stage for root, stage in roots if path == root or path.startswith(f"{root}/")), None)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not (event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)):
            return
        target = arguments[1] if event == "os.rename" else arguments[0]
        stage = stage_of(os.fsdecode(target)) if isinstance(target, str | bytes | os.PathLike) else None
        if stage is None:
            return
        with lock:
            counts[stage] += 1
            is_due = interruption is not None and (stage, counts[stage]) == (interruption.stage, interruption.number)
        if is_due:
            _interrupt(interruption)

    sys.addaudithook(hook)
    return counts


def _interrupt(interruption: Interruption) -> None:
    if interruption.action == "stall":
        _stall()
    if interruption.action == "hold":
        Path(f"{interruption.release}.held").touch()
        while not Path(interruption.release).exists():
            time.sleep(0.05)
        return
    number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM}[interruption.action]
    if interruption.delay:
        timer = threading.Timer(interruption.delay, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), number)


def _stall() -> None:
    from xtransfer.runtime import processes

    # It has slept since long ago, so no test has to wait. Nothing else here makes progress meanwhile.
    while True:
        processes._group.last_progress = time.monotonic() - LONG_AGO
        time.sleep(0.1)
