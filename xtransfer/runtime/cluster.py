"""How many processes there are and which one this is: from flags, or from the cluster's own environment."""

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

from xtransfer.errors import UserError

_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_WORKERS_URL = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/worker-network-endpoints"
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_PROBE_SECONDS = 0.5


@dataclass(frozen=True)
class Flags:
    """What the command line says of processes.

    Attributes:
      coordinator: HOST:PORT where process 0 listens; "" = the cluster's environment says.
      processes: how many there are.
      process: which one this is, 0 the first.
      start_timeout: seconds in which all have to have come.
      stall_timeout: seconds without progress after which a process gives up; 0 = never; None = the default.
    """

    coordinator: str = ""
    processes: int = 1
    process: int = 0
    start_timeout: float = 300.0
    stall_timeout: float | None = None

    @property
    def host(self) -> str:
        """Of the coordinator."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Of the coordinator."""
        return int(self.coordinator.rpartition(":")[2])


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a binary that many processes may run together; `flags_of` reads them."""
    group = parser.add_argument_group(
        "many processes",
        "Start the same command once per process, with the three flags. Without them the environment of a Cloud TPU "
        "pod, of GKE with TPUs or of a SLURM step says who takes part; elsewhere one process works alone. All need the "
        "same storage under --workdir.",
    )
    group.add_argument("--coordinator", default="", metavar="HOST:PORT", help="where process 0 listens for the others")
    group.add_argument("--processes", type=int, metavar="N", help="how many processes there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0 to N - 1")
    seconds: dict[str, Any] = {"type": float, "metavar": "SECONDS"}
    group.add_argument(
        "--start-timeout", default=300.0, help="in which all processes have to have come (default: 300)", **seconds
    )
    group.add_argument(
        "--stall-timeout",
        help="without progress, after which a process prints its stacks and exits with status 124; 0 = never "
        "(default: 1800 where there are many processes, which no compilation takes; never where there is one)",
        **seconds,
    )


def flags_of(args: argparse.Namespace) -> Flags:
    """The flags, checked. UserError: only some of the three, no port, an index that is not below the number."""
    three = {"--coordinator": args.coordinator or None, "--processes": args.processes, "--process": args.process}
    missing = [name for name, value in three.items() if value is None]
    for name, value in (("--start-timeout", args.start_timeout), ("--stall-timeout", args.stall_timeout)):
        if value is not None and not 0 <= value < float("inf"):
            raise UserError(f"{name} is {value:g}: give a number of seconds, 0 or more")
    timeouts = {"start_timeout": args.start_timeout, "stall_timeout": args.stall_timeout}
    if len(missing) == len(three):
        return Flags(**timeouts)
    if missing:
        raise UserError(f"{', '.join(missing)} missing: --coordinator, --processes and --process go together")
    host, _, port = args.coordinator.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UserError(f"--coordinator {args.coordinator}: give HOST:PORT, a port from 1 to 65535")
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}: give 1 or more")
    if not 0 <= args.process < args.processes:
        raise UserError(f"--process is {args.process}: of {args.processes} processes give 0 to {args.processes - 1}")
    return Flags(args.coordinator, args.processes, args.process, **timeouts)


def in_cluster(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the environment is that of one process of many, which JAX can join by itself.

    By what the systems document: a step of SLURM with several tasks; TPU_WORKER_HOSTNAMES or TPU_PROCESS_ADDRESSES of
    several hosts, or MEGASCALE_NUM_SLICES, as GKE and Cloud TPU set them; on a machine with TPUs and libtpu, several
    workers by Google's metadata server. A laptop, a single TPU VM, one task of SLURM are none.
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
    """The number of tasks of this step of SLURM, where there are several.

    An interactive step of one task has the SLURM_NTASKS of its job, by which JAX would wait for others. UserError: what
    JAX reads of SLURM is no number.
    """
    if not all(name in environment for name in _SLURM):
        return None
    key = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    tasks, *_ = (_number(environment, name) for name in (key, "SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"))
    return tasks if tasks > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int:
    if not re.fullmatch(r"[0-9]{1,18}", environment[name]):
        raise UserError(
            f"{name} is {environment[name]!r}, where SLURM gives a number: start it with srun, unset the variable, or "
            "say who takes part with --coordinator, --processes and --process"
        )
    return int(environment[name])


def local_devices(environment: Mapping[str, str] = os.environ) -> list[int] | None:
    """The GPUs of the only task on a SLURM node, of which JAX would take the first alone; None leaves it to JAX."""
    if "SLURM_STEP_TASKS_PER_NODE" not in environment or "CUDA_VISIBLE_DEVICES" not in environment:
        return None
    alone = re.fullmatch(r"1(\(x\d+\))?", environment["SLURM_STEP_TASKS_PER_NODE"])
    return list(range(len(environment["CUDA_VISIBLE_DEVICES"].split(",")))) if alone else None


def check_port(flags: Flags) -> None:
    """For process 0: UserError where the coordinator's port is taken, which JAX would not survive."""
    try:
        with socket.socket(socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # else a port just left counts as taken
            probe.bind(("", flags.port))
            probe.listen(1)
    except OSError as error:
        raise UserError(
            f"--coordinator {flags.coordinator}: port {flags.port} of this machine cannot be listened at "
            f"({error.strerror}): end what uses it, or give all processes another port"
        ) from error


def await_coordinator(flags: Flags) -> None:
    """For the other processes: returns when somebody answers. UserError: nobody does within `start_timeout`."""
    end = time.monotonic() + flags.start_timeout
    while True:
        try:
            with socket.create_connection((flags.host, flags.port), timeout=_PROBE_SECONDS):
                return
        except OSError as error:
            if time.monotonic() >= end:
                raise UserError(
                    f"nobody answers at {flags.coordinator} within {flags.start_timeout:g} s "
                    f"({error.strerror or error}): start process 0 too, with the same --coordinator, and let its port "
                    "through the firewall"
                ) from error
        time.sleep(_PROBE_SECONDS)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM end this process: JAX waits for the others where no handler of Python's is run."""
    end, wake = socket.socketpair()
    wake.setblocking(False)

    def listen() -> None:
        while number := end.recv(1):
            if number[0] in (signal.SIGINT, signal.SIGTERM):
                os._exit(128 + number[0])

    before = signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, name="signals", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        wake.close()


def _tpu_workers() -> str:
    """The hosts of this TPU, comma-separated, as Google's metadata server names them; nothing without one."""
    request = urllib.request.Request(_WORKERS_URL, headers={"Metadata-Flavor": "Google"})
    for _ in range(3):
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(_PROBE_SECONDS)
    return ""
