"""A cache of compiled programs on disk: a restart, or another run with the same shapes, does not compile them again.

JAX's own cache does the work. Its keys cover the program, the compiler's options, and the devices. The folder's name
adds JAX's version and the processor's instructions, because a home directory may be shared by different machines.

A damaged program might compute something else, and JAX never replaces one that it cannot read. So a list holds the
sha256 of each program from the end of the process that wrote it, or else from the next start, and each start removes
the programs that differ.
"""

import atexit
import functools
import hashlib
import os
import platform
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import filelock
import jax
from jax.experimental.compilation_cache import compilation_cache

from xtransfer import config
from xtransfer.errors import UserError
from xtransfer.runtime import checksums

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
        # The lock is JAX's own. Without it in time, damaged programs stay: they cost a warning each.
        with suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=10):
            _remove_damaged(folder)
            _list_new(folder)
        os.utime(folder)
        _remove_unused(root)
    except (OSError, UserError):  # a read-only home, for example: compiling again is slower, and nothing else
        return
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    compilation_cache.reset_cache()  # JAX looks at the settings only once
    _list_at_exit(folder)


def _processor() -> str:
    """Return eight characters that name the processor's architecture and instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    instructions = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(f"{platform.machine()} {instructions}".encode()).hexdigest()[:8]


@functools.cache  # once per folder
def _list_at_exit(folder: Path) -> None:
    def list_new() -> None:
        with suppress(OSError, UserError, filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
            _list_new(folder)

    atexit.register(list_new)


def _remove_damaged(folder: Path) -> None:
    """Remove programs that are not as they were listed, and those that a killed process left without a time of use.

    JAX fails on these at every write. The caller holds the lock.
    """
    listed = _listed(folder)
    for program in folder.glob("*-cache"):
        used = program.with_name(f"{program.name.removesuffix('cache')}atime")
        is_half = not used.exists() or not used.stat().st_size
        if is_half or (program.name in listed and checksums.fault(program, listed[program.name])):
            program.unlink(missing_ok=True)
            used.unlink(missing_ok=True)


def _list_new(folder: Path) -> None:
    """Add the programs that are not listed yet, and drop those that are gone. The caller holds the lock."""
    listed, programs = _listed(folder), sorted(folder.glob("*-cache"))
    facts = {program.name: listed.get(program.name) or checksums.facts(program) for program in programs}
    if facts != listed:
        checksums.write_list(folder, facts)


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        return checksums.read(folder) or {}
    except ValueError:  # a damaged list
        return {}


def _remove_unused(root: Path) -> None:
    """Remove the folders of other versions and processors that nobody has used for a month."""
    for folder in root.iterdir():
        if folder.stat().st_mtime < time.time() - _UNUSED_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)
