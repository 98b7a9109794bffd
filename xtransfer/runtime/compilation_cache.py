"""A cache of compiled programs on disk: a restart, or another run with the same shapes, does not compile them again.

JAX's own cache does the work. Its keys cover the program, the compiler's options, and the devices. The folder's name
adds JAX's version and the processor's instructions, because a home directory may be shared by different machines.
"""

import hashlib
import os
import platform
import shutil
import time
from contextlib import suppress
from pathlib import Path

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from xtransfer import config
from xtransfer.errors import UserError

MAX_BYTES = 1 << 29  # beyond this the programs that were used least recently are removed
_MIN_SECONDS = 0.3  # programs that compile faster are not kept
_UNUSED_SECONDS = 30 * 24 * 3600  # after which the folder of another version is removed


def enable_default() -> None:
    """Keep compiled programs below the default cache directory, if there is a home directory."""
    try:
        enable(config.cache_dir(config.TaskConfig()))
    except UserError:
        return


def enable(cache_dir: Path) -> None:
    """Keep compiled programs below `cache_dir` from now on.

    If the environment names another folder (JAX_COMPILATION_CACHE_DIR), that one is used, and if `cache_dir` cannot be
    written to, none is.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    root = cache_dir / "compiled"
    folder = root / f"jax-{jax.__version__}-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The lock is JAX's own. Without it in time, the halves stay: they cost a warning each.
        with suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=10):
            _remove_halves(folder)
        os.utime(folder)
        _remove_unused(root)
    except OSError:  # a read-only home, for example: compiling again is slower, and nothing else
        return
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX looks at the settings only once


def _processor() -> str:
    """Return eight characters that name the processor's architecture and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(f"{platform.machine()} {instructions}".encode()).hexdigest()[:8]


def _remove_halves(folder: Path) -> None:
    """Remove entries that a killed process left without their time of last use: JAX fails on them at every write."""
    for program in folder.glob("*-cache"):
        used = program.with_name(f"{program.name.removesuffix('cache')}atime")
        if not used.exists() or not used.stat().st_size:
            program.unlink(missing_ok=True)
            used.unlink(missing_ok=True)


def _remove_unused(root: Path) -> None:
    """Remove the folders of other versions and processors that nobody has used for a month."""
    for folder in root.iterdir():
        if folder.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
