"""Commands in real processes that are killed, stopped, or held at a chosen file operation of a chosen stage.

A stage is known by the directory that it writes to. An audit hook counts the operations that change a file there
(opening it to write, renaming, removing, creating a directory) in every thread, so a kill may fall between any two of
them, and with a delay anywhere else: into a computation, or into a write below Python.
"""

import collections
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import QUICK_COMPILE

COMPILED = Path(__file__).parents[2] / ".pytest_cache" / "compiled-for-kills"
"""Programs that interrupted processes compiled; apart from those of all other tests, because kills may damage them."""

LONG_AGO = 1e6  # seconds

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
_CHANGES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate")
# Children are forked from a process that has imported all of these, so they start in no time.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "tests.helpers.interruption",
        "xtransfer.main",
        *(f"xtransfer.{name}.__main__" for name in ("evaluate", "export", "predict", "pretrain", "report", "trim")),
    ]
)


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


def home(root: Path) -> Path:
    """Return a new home directory below `root`, whose cache has the programs that earlier tests compiled."""
    cache = root / "home" / ".cache" / "xtransfer"
    for directory in (cache, COMPILED):
        directory.mkdir(parents=True, exist_ok=True)
    (cache / "compiled").symlink_to(COMPILED)
    return root / "home"


def run(
    module: str,
    arguments: Sequence[str],
    stages: Mapping[str, Sequence[Path]],
    home: Path,
    interruption: Interruption | None = None,
) -> tuple[int, dict[str, int]]:
    """Run a command in a process with one device, and interrupt it.

    Args:
      module: the command's module.
      arguments: its arguments.
      stages: the paths that each stage writes; of two that hold a path, the longer one counts.
      home: from `home`; the output is appended to `log` there.
      interruption: None to let the command end.

    Returns:
      The exit status, and the number of each stage's operations; none for a process that was interrupted.
    """
    counts = home / "counts"
    counts.unlink(missing_ok=True)
    paths = {stage: [str(path) for path in paths] for stage, paths in stages.items()}
    process = _context.Process(target=_child, args=(module, list(arguments), paths, str(home), interruption))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the command did not end: {log(home)}")
    return process.exitcode, json.loads(counts.read_text()) if counts.exists() else {}


def log(home: Path) -> str:
    """Return what all commands of a home directory have printed."""
    return (home / "log").read_text()


def _child(
    module: str, arguments: list[str], stages: dict[str, list[str]], home: str, interruption: Interruption | None
) -> None:
    output = os.open(f"{home}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # One device, and the command's own compilation cache, which kills may damage.
    os.environ |= {"HOME": home, "MPLCONFIGDIR": str(COMPILED), "XLA_FLAGS": QUICK_COMPILE}
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    import jax

    from xtransfer.data.tokens import cache
    from xtransfer.runtime import terminal

    cache._WORTH_KEEPING = 0  # so that the tokens of a few texts are stored too
    jax.config.update("jax_compilation_cache_dir", None)
    sys.argv = [module, *arguments]
    counts = install(stages, interruption)
    terminal.run(importlib.import_module(module).main)
    Path(home, "counts").write_text(json.dumps(counts))


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
