"""Groups of real processes for tests: each with its own virtual devices, all one run."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import QUICK_COMPILE

ROOT = Path(__file__).parents[2]
MAIN = ("-m", "xtransfer.main")
# Each snippet is a binary's `main` after the flags are read and the processes have met.
BINARY = """
import argparse, functools, os, sys, threading, time
from xtransfer.runtime import cluster, preemption, processes, terminal
from xtransfer.errors import UserError

def together(x):
    from jax.experimental import multihost_utils
    import numpy as np
    return int(multihost_utils.process_allgather(np.int32(x)).sum())

def main(argv):
    parser = argparse.ArgumentParser()
    cluster.add_flags(parser)
    terminal.start(cluster.parse_flags(parser.parse_args([*argv, *{flags!r}])))
    me, first = processes.index(), processes.on_first
{body}

terminal.run(main)
"""


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Group:
    """`count` processes of one command, which ends with their flags; without flags where there is one.

    Attributes:
      command: what Python runs.
      count: how many processes.
      devices: of each, or of one after the other.
      log: `<log>.<index>.out` and `.err` take what they say.
    """

    command: Sequence[str]
    count: int
    devices: int | Sequence[int]
    log: Path
    port: int = field(default_factory=free_port)
    processes: list[subprocess.Popen] = field(default_factory=list)

    def __enter__(self) -> "Group":
        for index in range(self.count):
            devices = self.devices if isinstance(self.devices, int) else self.devices[index]
            flags = f"--xla_force_host_platform_device_count={devices} {QUICK_COMPILE}"
            environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": flags}
            command = [sys.executable, *self.command]
            if self.count > 1:
                command += ["--coordinator", f"127.0.0.1:{self.port}"]
                command += ["--processes", str(self.count), "--process", str(index)]
            with self._file(index, "out").open("w") as out, self._file(index, "err").open("w") as err:
                self.processes.append(subprocess.Popen(command, env=environment, stdout=out, stderr=err))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()

    def _file(self, index: int, kind: str) -> Path:
        return self.log.with_name(f"{self.log.name}.{index}.{kind}")

    def out(self, index: int) -> str:
        """What a process wrote on stdout."""
        return self._file(index, "out").read_text()

    def err(self, index: int) -> str:
        """What a process wrote on stderr."""
        return self._file(index, "err").read_text()

    def said(self) -> str:
        """All of it, for a failing test."""
        return "\n".join(f"[{i}] {self.out(i)[-3000:]}\n{self.err(i)[-3000:]}" for i in range(self.count))

    def statuses(self, seconds: float = 600) -> list[int]:
        """The exit statuses, when all have ended."""
        end = time.monotonic() + seconds
        return [process.wait(max(end - time.monotonic(), 0.1)) for process in self.processes]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Returns when it is true; AssertionError where a process ends before that."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and all(p.poll() is None for p in self.processes), self.said()
            time.sleep(0.02)


def run(command: Sequence[str], count: int, devices: int, log: Path) -> Group:
    """A group that came to its end."""
    with Group(command, count, devices, log) as group:
        assert group.statuses() == [0] * count, group.said()
    return group


def snippet(tmp_path: Path, body: str, *flags: str, count: int = 2, devices: Sequence[int] = ()) -> Group:
    """Processes that run a few lines, each with one device where nothing else is said."""
    indented = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    return Group(["-c", BINARY.format(body=indented, flags=list(flags))], count, devices or 1, tmp_path / "log")
