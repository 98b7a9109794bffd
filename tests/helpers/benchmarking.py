"""Start the benchmark as a process, with tiny bursts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.helpers.compilation import QUICK_COMPILE

ROOT = Path(__file__).parents[2]
_HANGS_AFTER_SECONDS = 900
TINY = ("--seconds", "0.001", "--pairs", "2", "--config.student.packed=False", "--config.student.max_length=16")


def run(*flags: str) -> subprocess.CompletedProcess:
    """Run the command to its end, on one device."""
    process = start(*flags)
    try:
        output, errors = process.communicate(timeout=_HANGS_AFTER_SECONDS)
    finally:
        process.kill()
    return subprocess.CompletedProcess(flags, process.returncode, output, errors)


def start(*flags: str, **options: Any) -> subprocess.Popen:
    """Return the running command, on one device, with pipes for its output and its errors."""
    return subprocess.Popen(
        [sys.executable, "-m", "xtransfer.benchmark", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": QUICK_COMPILE},
        **options,
    )
