"""Python in real processes that start quickly: each is forked from one that has imported what commands import."""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.compilation import QUICK_COMPILE

ROOT = Path(__file__).parents[2]
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "tests.helpers.forkserver",
        "xtransfer.main",
        *(f"xtransfer.{name}.__main__" for name in ("evaluate", "export", "predict", "pretrain", "report", "trim")),
        # What the commands import only when they need it.
        *("sklearn.metrics", "transformers.models.auto.tokenization_auto", "matplotlib.figure"),
    ]
)
_INHERITED = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGHUP: signal.SIG_DFL,
    signal.SIGTERM: signal.SIG_DFL,
}
"""The signals that a process ignores if its parent does, and what it does otherwise."""


class Process:
    """A process that runs Python. It has the part of the interface of `subprocess.Popen` that tests need.

    Args:
      arguments: Python's own: "-m" and a module, or "-c" and a program, and then the arguments for these.
      out: the file to which stdout is appended.
      err: the file to which stderr is appended; None stands for `out`.
      devices: the number of virtual devices.
      environment: further variables of the environment.
    """

    def __init__(
        self, arguments: Sequence[str], out: Path, err: Path | None = None, *, devices: int = 1, **environment: str
    ):
        flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": flags, **environment}
        for path in (out, err or out):
            path.touch()
        ignored = [number for number in _INHERITED if signal.getsignal(number) is signal.SIG_IGN]
        # Unlike others, a daemon does not keep a failed test run from ending.
        self._process = context.Process(
            target=_python, args=(list(arguments), out, err or out, variables, ignored), daemon=True
        )
        self._process.start()

    @property
    def pid(self) -> int:
        """The process id."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while the process runs."""
        return self._process.exitcode

    def wait(self, seconds: float | None = None) -> int:
        """Wait for the end, and return the exit status.

        Raises:
          TimeoutExpired: the process still runs.
        """
        self._process.join(seconds)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(str(self._process), seconds or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)


def redirect(out: Path, err: Path) -> None:
    """Append what this process prints to files."""
    for descriptor, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, descriptor)
        os.close(file)


def _python(
    arguments: Sequence[str], out: Path, err: Path, environment: Mapping[str, str], ignored: Sequence[int]
) -> None:
    """Do what Python does with these arguments, if its parent ignores these signals."""
    for number, default in _INHERITED.items():
        signal.signal(number, signal.SIG_IGN if number in ignored else default)
    redirect(out, err)
    os.environ.clear()
    os.environ.update(environment)
    kind, program, *rest = arguments
    sys.argv = [program if kind == "-m" else kind, *rest]
    try:
        if kind == "-m":
            for name in (program, f"{program}.__main__"):  # runpy warns about a module that has been imported
                sys.modules.pop(name, None)
            runpy.run_module(program, run_name="__main__", alter_sys=True)
        else:
            exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
