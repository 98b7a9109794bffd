"""launch/worker.sh: whether a run counts as in progress if its files outlive its processes."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.helpers.launching import Launcher, wait_until

COMMAND = ("bash", "-c", "echo begins; sleep 60")


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def start_run(launcher: Launcher, home: Path) -> tuple[subprocess.Popen[str], int]:
    """Start a run "a", and return the process that follows it and the process id of the run."""
    home.mkdir()
    follower = launcher.start("worker.sh", "run", "a", *COMMAND, HOME=str(home))
    log = home / ".xtransfer-runs/a/log"
    wait_until(lambda: log.exists() and log.read_text() == "begins\n")
    assert launcher.run("worker.sh", "running", HOME=str(home))[0] == 0
    return follower, int((home / ".xtransfer-runs/a/pid").read_text())


def test_another_process_with_the_pid_of_a_run_is_not_mistaken_for_it(launcher: Launcher, tmp_path: Path) -> None:
    home = tmp_path / "home"
    follower, pid = start_run(launcher, home)
    os.killpg(pid, signal.SIGKILL)
    assert follower.wait(timeout=10) == 137
    (home / ".xtransfer-runs/a/pid").write_text(f"{os.getpid()}\n")
    assert launcher.run("worker.sh", "running", HOME=str(home))[0] == 1
    code, stdout, stderr = launcher.run("worker.sh", "run", "a", *COMMAND, HOME=str(home))
    assert (code, stdout) == (137, "begins\n") and "run a ended with status 137" in stderr
    code, stdout, _ = launcher.run("worker.sh", "run", "b", "echo", "another", HOME=str(home))
    assert (code, stdout) == (0, "another\n")


def test_a_run_from_before_a_reboot_is_over(launcher: Launcher, tmp_path: Path) -> None:
    home = tmp_path / "home"
    follower, pid = start_run(launcher, home)
    start_record = home / ".xtransfer-runs/a/born"
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[19]
    assert start_record.read_text() == f"{boot} {started}\n"
    start_record.write_text(f"another-boot {started}\n")
    assert launcher.run("worker.sh", "running", HOME=str(home))[0] == 1
    os.killpg(pid, signal.SIGKILL)
    assert follower.wait(timeout=10) == 137
