"""Groups of real processes that share one run, each with its own virtual devices."""

import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers import forkserver

MAIN = ("-m", "xtransfer.main")
# Each snippet becomes the end of a command's `main`, after the flags are parsed and the processes are connected.
BINARY = """
import argparse, functools, os, sys, threading, time
from xtransfer.runtime import cluster, preemption, processes, terminal
from xtransfer.errors import DataError, Exit

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
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Group:
    """Processes that run one command together. A single process gets no cluster flags.

    Attributes:
      command: the arguments for Python, to which the cluster flags are appended.
      count: the number of processes.
      devices: the number of virtual devices of every process, or a list with one number for each.
      log: the path prefix of the output files, `<log>.<index>.out` and `<log>.<index>.err`.
      port: the coordinator's port.
      processes: the started processes, in order.
    """

    command: Sequence[str]
    count: int
    devices: int | Sequence[int]
    log: Path
    port: int = field(default_factory=free_port)
    processes: list[forkserver.Process] = field(default_factory=list)

    def __enter__(self) -> "Group":
        for index in range(self.count):
            devices = self.devices if isinstance(self.devices, int) else self.devices[index]
            command = [*self.command]
            if self.count > 1:
                command += ["--coordinator", f"127.0.0.1:{self.port}"]
                command += ["--processes", str(self.count), "--process", str(index)]
            out, err = self._file(index, "out"), self._file(index, "err")
            self.processes.append(forkserver.Process(command, out, err, devices=devices))
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def _file(self, index: int, kind: str) -> Path:
        return self.log.with_name(f"{self.log.name}.{index}.{kind}")

    def out(self, index: int) -> str:
        """Return the stdout of a process."""
        return self._file(index, "out").read_text()

    def err(self, index: int) -> str:
        """Return the stderr of a process."""
        return self._file(index, "err").read_text()

    def outputs(self) -> str:
        """Return the end of every process's output, to explain a failed assertion."""
        return "\n".join(f"[{i}] {self.out(i)[-3000:]}\n{self.err(i)[-3000:]}" for i in range(self.count))

    def statuses(self, seconds: float = 600) -> list[int]:
        """Wait until all processes have exited, and return their statuses."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(deadline - time.monotonic(), 0.1)) for process in self.processes]

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> None:
        """Wait until the condition is true. Fail if a process exits before that."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline and all(p.poll() is None for p in self.processes), self.outputs()
            time.sleep(0.02)


def run(command: Sequence[str], count: int, devices: int, log: Path) -> Group:
    """Run a group of processes until all have exited with status 0, and return it."""
    with Group(command, count, devices, log) as group:
        assert group.statuses() == [0] * count, group.outputs()
    return group


def snippet(tmp_path: Path, body: str, *flags: str, count: int = 2, devices: Sequence[int] = ()) -> Group:
    """Return a group that runs a few lines of Python, with one device per process unless `devices` says otherwise."""
    indented = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    return Group(["-c", BINARY.format(body=indented, flags=list(flags))], count, devices or 1, tmp_path / "log")
