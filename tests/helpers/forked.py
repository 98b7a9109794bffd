"""Commands in real processes that start quickly, and may be interrupted (see `interruption`)."""

import importlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.compilation import QUICK_COMPILE
from tests.helpers.forkserver import context, redirect
from tests.helpers.interruption import Interruption, install

COMPILED = Path(__file__).parents[2] / ".pytest_cache" / "compiled-for-kills"
"""Programs that interrupted processes compiled; apart from those of all other tests, because kills may damage them."""


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
    process = context.Process(target=_child, args=(module, list(arguments), paths, str(home), interruption))
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
    redirect(Path(home, "log"), Path(home, "log"))
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
