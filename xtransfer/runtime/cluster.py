"""The number of processes and the index of this one, from flags or from a cluster's environment."""

import argparse
import contextlib
import importlib.util
import os
import re
import signal
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer.errors import BusyError, ConfigError, Exit, MachineError

_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_WORKERS_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_PROBE_SECONDS = 0.5
_STATUS_BY_SIGNAL: dict[int, Exit] = {
    signal.SIGINT: Exit.INTERRUPTED,
    signal.SIGTERM: Exit.PREEMPTED,
    signal.SIGHUP: Exit.PREEMPTED,
}


@dataclass(frozen=True)
class Flags:
    """The command line's flags for processes.

    Attributes:
      coordinator: HOST:PORT where process 0 listens; "" leaves it to the cluster's environment.
      processes: the number of processes.
      process: the index of this one, from 0.
      start_timeout: seconds in which all processes must have started.
      stall_timeout: seconds without progress after which a process gives up; 0 is never, None the default.
    """

    coordinator: str = ""
    processes: int = 1
    process: int = 0
    start_timeout: float = 300.0
    stall_timeout: float | None = None

    @property
    def host(self) -> str:
        """The coordinator's host."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return int(self.coordinator.rpartition(":")[2])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a command that several processes may run together; `parse_flags` reads them."""
    group = parser.add_argument_group(
        "several processes",
        "Start the same command once per process with these three flags. Without them, the environment of a Cloud TPU "
        "pod, of GKE with TPUs, or of a SLURM step describes the processes; elsewhere one process works alone. All of "
        "them need the same storage under --workdir.",
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="where process 0 listens for the others")
    group.add_argument("--processes", type=int, metavar="N", help="the number of processes")
    group.add_argument("--process", type=int, metavar="I", help="the index of this one, from 0 to N - 1")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    group.add_argument(
        "--start-timeout", default=300.0, help="time in which all processes must have started (default: 300)", **seconds
    )
    group.add_argument(
        "--stall-timeout",
        help="time without progress after which a process prints its stacks and exits with status 124; 0 is never "
        "(default: 1800 for several processes, longer than any compilation takes; never for one)",
        **seconds,
    )


def parse_flags(args: argparse.Namespace) -> Flags:
    """Return the checked flags; UserError for only some of the three, no port, or a number out of range."""
    values = {"--coordinator": args.coordinator or None, "--processes": args.processes, "--process": args.process}
    missing = [name for name, value in values.items() if value is None]
    for name, value in (("--start-timeout", args.start_timeout), ("--stall-timeout", args.stall_timeout)):
        if value is not None and not 0 <= value < float("inf"):
            raise ConfigError(f"{name} is {value:g}: expected a number of seconds, 0 or more")
    timeouts = {"start_timeout": args.start_timeout, "stall_timeout": args.stall_timeout}
    if len(missing) == len(values):
        return Flags(**timeouts)
    if missing:
        raise ConfigError(f"{', '.join(missing)} missing: --coordinator, --processes, and --process go together")
    host, _, port = args.coordinator.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise ConfigError(f"--coordinator {args.coordinator}: expected HOST:PORT with a port from 1 to 65535")
    if args.processes < 1:
        raise ConfigError(f"--processes is {args.processes}: expected 1 or more")
    if not 0 <= args.process < args.processes:
        raise ConfigError(
            f"--process is {args.process}: expected 0 to {args.processes - 1} for {args.processes} processes"
        )
    return Flags(args.coordinator, args.processes, args.process, **timeouts)


def in_cluster(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the environment describes one process of several, which JAX can join by itself.

    The systems document these signs: a SLURM step with several tasks; several hosts in TPU_WORKER_HOSTNAMES or
    TPU_PROCESS_ADDRESSES, or MEGASCALE_NUM_SLICES, as GKE and Cloud TPU set them; and, on a machine with TPUs and
    libtpu, several workers according to Google's metadata server. A laptop, a single TPU VM, and a single SLURM task
    are none.
    """
    if slurm_tasks(environment) is not None:
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    if not any(Path(device).exists() for device in _TPU_DEVICES) or importlib.util.find_spec("libtpu") is None:
        return False
    if "MEGASCALE_NUM_SLICES" in environment and environment["MEGASCALE_NUM_SLICES"] not in ("", "1"):
        return True
    for name in ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES"):
        if name in environment:
            return "," in environment[name]
    return "TPU_SKIP_MDS_QUERY" not in environment and "," in _tpu_workers()


def slurm_tasks(environment: Mapping[str, str] = os.environ) -> int | None:
    """Return the number of tasks in this SLURM step, or None unless there are several.

    In an interactive step with one task, SLURM_NTASKS is the whole job's, and JAX would wait for the other tasks.

    Raises:
      UserError: a variable that JAX reads is not a number.
    """
    if not all(name in environment for name in _SLURM):
        return None
    key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    tasks = _number(environment, key)
    for name in ("SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"):
        _number(environment, name)
    return tasks if tasks > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", environment[name]):
        raise MachineError(
            f"{name} is {environment[name]!r}, but SLURM sets a number: start with srun, unset the variable, or "
            "describe the processes with --coordinator, --processes, and --process"
        )
    return int(environment[name])


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """Return all GPUs of a SLURM node's only task, because JAX would take just the first; None leaves it to JAX."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environment or "CUDA_VISIBLE_DEVICES" not in environment:
        return None
    alone = re.fullmatch(r"1(\(x\d+\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
    return list(range(len(environment["CUDA_VISIBLE_DEVICES"].split(",")))) if alone else None


def check_port(flags: Flags) -> None:
    """Check, in process 0, that the coordinator's port is free; JAX would crash otherwise."""
    try:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # otherwise a port just released looks taken
            probe.bind(("", flags.port))
            probe.listen(1)
    except OSError as error:
        raise BusyError(
            f"--coordinator {flags.coordinator}: cannot listen on port {flags.port} here ({error.strerror}): "
            "stop the program that uses it, or give all processes another port"
        ) from error


def await_coordinator(flags: Flags) -> None:
    """Wait, in the other processes, until the coordinator answers; UserError if it does not within `start_timeout`."""
    end = time.monotonic() + flags.start_timeout
    while True:
        try:
            with socket.create_connection((flags.host, flags.port), timeout=_PROBE_SECONDS):
                return
        except OSError as error:
            if time.monotonic() >= end:
                raise MachineError(
                    f"nobody answers at {flags.coordinator} within {flags.start_timeout:g} s "
                    f"({error.strerror or error}): start process 0 with the same --coordinator, and open its port in "
                    "the firewall"
                ) from error
        time.sleep(_PROBE_SECONDS)


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """End this process on Ctrl-C, SIGTERM, or SIGHUP inside the block: no Python handler runs while JAX waits."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        while True:
            number = receiver.recv(1)
            if not number:
                return
            status = _STATUS_BY_SIGNAL.get(number[0])
            if status is not None:
                os._exit(status)

    before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        sender.close()


def _tpu_workers() -> str:
    """Return the hosts of this TPU, comma-separated, from Google's metadata server; "" without one."""
    request = urllib.request.Request(_WORKERS_URL, headers={"Metadata-Flavor": "Google"})
    for _ in range(3):
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(_PROBE_SECONDS)
    return ""
