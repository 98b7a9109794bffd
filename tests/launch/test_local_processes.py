"""launch/local_processes.sh with a fake Python that records its calls, and once with the real one."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny_run
from tests.helpers.launching import NASTY, ROOT, Launcher, wait_until

# Records its arguments and environment. Process I ends as $ENDS[I] says: with an exit status, "waits" (until a signal),
# "imports" (until Ctrl-C breaks an import), "deaf" (ignores SIGTERM), or "killed".
PYTHON = r"""
if ARGV[:1] == ["-c"]:
    finish(text="3.11\n")
if ARGV[:2] == ["-m", "venv"]:
    import shutil
    os.makedirs(f"{ARGV[-1]}/bin")
    shutil.copy(sys.argv[0], f"{ARGV[-1]}/bin/python")
if ARGV[:2] == ["-m", "xtransfer.main"]:
    import signal, time
    index = value("--process")
    def report_signal(number, frame):
        print(f"process {index} got {number}", flush=True)
        os._exit(128 + number)
    ending = os.environ.get("ENDS", "").split(",")[int(index)] or "0"
    if "waits" in ending:
        signal.signal(signal.SIGTERM, report_signal)
        signal.signal(signal.SIGINT, report_signal)
    if ending == "imports":  # like an import that turns Ctrl-C into another error
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(1))
    if ending == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(f"{HERE}/mains", "a") as mains:
        mains.write(json.dumps([os.environ["XLA_FLAGS"], os.environ["JAX_PLATFORMS"], *ARGV]) + "\n")
    fcntl.flock(lock, fcntl.LOCK_UN)
    print(f"process {index} begins", flush=True)
    if ending == "killed":
        os.killpg(0, signal.SIGKILL)
    while not ending.isdigit() or len(open(f"{HERE}/mains").readlines()) < int(value("--processes")):
        time.sleep(0.02)
    print(f"process {index} ends", flush=True)
    sys.exit(int(ending))
"""

# Sourced by bash before the script. The first read of a status waits until all processes have ended, then times out.
FIRST_READ_TIMES_OUT = r"""
read() {
  if [[ "$*" == *"-t 1 index status" && -z "${timed_out:-}" ]]; then
    timed_out=true
    while any_alive; do sleep 0.02; done
    return 142
  fi
  builtin read "$@"
}
"""

# Sourced by bash before the script. Sends $SIGNAL when the script is about to run a command that begins with $BEFORE.
SIGNAL_BEFORE_COMMAND = r"""
set -T
trap 'if [[ -n "$BEFORE" && "$BASH_COMMAND" == "$BEFORE"* ]]; then BEFORE="" && kill "-$SIGNAL" $$; fi' DEBUG
"""

# Installs nothing, and runs xtransfer.main with the tests' own Python, $REAL.
REAL_PYTHON = r"""#!/bin/bash
case "$1 $2" in
  -c\ *) echo 3.11 ;;
  "-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m xtransfer.main") exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    instance = Launcher(tmp_path)
    instance.fake("python3", PYTHON)
    return instance


def all_started(launcher: Launcher, count: int) -> bool:
    return len(launcher.mains()) == count


def test_each_process_gets_the_same_flags_and_its_index(launcher: Launcher) -> None:
    flags = ("--config=configs/x.py", "--workdir", "out put", NASTY)
    code, stdout, stderr = launcher.run("local_processes.sh", "3", *flags, ENDS="0,0,0", XTRANSFER_PORT="4321")
    assert code == 0, stderr
    assert sorted(launcher.mains()) == [
        ["--xla_force_host_platform_device_count=1", "cpu", "-m", "xtransfer.main"]
        + ["--coordinator", "127.0.0.1:4321", "--processes", "3", "--process", str(index), *flags]
        for index in range(3)
    ]
    assert stdout == "process 0 begins\nprocess 0 ends\n"
    for index in range(3):
        log = (launcher.cwd / f"out put.logs/process-{index}.log").read_text()
        assert log == f"process {index} begins\nprocess {index} ends\n"


def test_defaults_include_a_device_count_and_a_shared_port(launcher: Launcher) -> None:
    env = {"XLA_FLAGS": "--xla_x=1", "XTRANSFER_DEVICES_PER_PROCESS": "4", "ENDS": "0,0"}
    assert launcher.run("local_processes.sh", "2", **env)[0] == 0
    mains = launcher.mains()
    assert {main[0] for main in mains} == {"--xla_x=1 --xla_force_host_platform_device_count=4"}
    assert len({main[5] for main in mains}) == 1
    assert mains[0][-4:] == ["--config", f"{launcher.root}/configs/quickstart.py", "--workdir", "runs/quickstart"]


@pytest.mark.parametrize("other", ["waits", "deaf"])
def test_if_one_process_fails_the_others_are_stopped(launcher: Launcher, other: str) -> None:
    ends = f"{other},1,{other}"
    code, _, stderr = launcher.run("local_processes.sh", "3", ENDS=ends, XTRANSFER_GRACE_SECONDS="1")
    assert code == 1, stderr
    assert "process 1 failed with status 1" in stderr and "process 1 ends" in stderr
    logs = [(launcher.cwd / f"runs/quickstart.logs/process-{index}.log").read_text() for index in (0, 2)]
    assert all(("got 15" in log) == (other == "waits") for log in logs)


def test_a_status_that_arrives_late_is_read(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "bash_env").write_text(FIRST_READ_TIMES_OUT)
    code, _, stderr = launcher.run("local_processes.sh", "2", ENDS="0,3", BASH_ENV=str(tmp_path / "bash_env"))
    assert code == 3 and "process 1 failed with status 3" in stderr


def test_a_process_without_a_status_counts_as_failed(launcher: Launcher) -> None:
    code, _, stderr = launcher.run("local_processes.sh", "2", ENDS="0,killed")
    assert code == 1 and "ended without a status (logs: runs/quickstart.logs)" in stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_every_process_and_sets_the_status(launcher: Launcher, number: signal.Signals) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = launcher.start("local_processes.sh", "2", ENDS="waits,waits")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_until(lambda: all_started(launcher, 2))
    os.kill(process.pid, number)
    stdout, stderr = process.communicate(timeout=20)
    assert process.returncode == 128 + number, stderr
    assert f"process 0 got {int(number)}" in stdout and "failed" not in stderr
    assert f"got {int(number)}" in (launcher.cwd / "runs/quickstart.logs/process-1.log").read_text()


def test_ctrl_c_during_imports_is_not_reported_as_a_failure(launcher: Launcher) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = launcher.start("local_processes.sh", "2", ENDS="imports,imports")
    finally:
        signal.signal(signal.SIGINT, before)
    wait_until(lambda: all_started(launcher, 2))
    os.kill(process.pid, signal.SIGINT)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 130 and "failed" not in stderr, stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("before_command", ["mkfifo", "set +m"])  # before a process starts, and before it is recorded
def test_a_signal_during_start_up_is_not_lost(
    launcher: Launcher, tmp_path: Path, number: signal.Signals, before_command: str
) -> None:
    (tmp_path / "bash_env").write_text(SIGNAL_BEFORE_COMMAND)
    name = number.name.removeprefix("SIG")
    env = {"BASH_ENV": str(tmp_path / "bash_env"), "BEFORE": before_command, "SIGNAL": name, "ENDS": "waits,waits"}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _, stderr = launcher.run("local_processes.sh", "2", **env)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 128 + number and "failed" not in stderr, stderr


@pytest.mark.parametrize("position", [0, 1, 2, 5])
def test_a_dry_run_prints_the_commands(launcher: Launcher, position: int) -> None:
    flags = ("--workdir=w", "--config", "c.py", NASTY)
    arguments = ["2", *flags]
    arguments.insert(position, "--dry-run")
    code, stdout, _ = launcher.run("local_processes.sh", *arguments, XTRANSFER_PORT="1")
    assert code == 0 and not (launcher.fakes / "calls").exists() and list(launcher.cwd.iterdir()) == []
    words = shlex.split(stdout)
    assert words.count("env") == 2 and words[-len(flags) :] == list(flags)
    for index in range(2):
        assert words[index * 16 + 6 :][:6] == [*words[6:11], str(index)]


@pytest.mark.parametrize("arguments", [(), ("two",), ("0",), ("08",), ("257",), ("--config=x",)])
def test_a_missing_process_count_is_refused(launcher: Launcher, arguments: tuple[str, ...]) -> None:
    code, _, stderr = launcher.run("local_processes.sh", *arguments)
    assert code == 1 and stderr.startswith("error: how many processes?") and stderr.count("\n") == 1


def test_two_real_processes_find_each_other(launcher: Launcher, tmp_path: Path) -> None:
    """Use main's real flags. Both processes find the same error, 40 labels from 24 examples, and it is printed once."""
    launcher.fake("python3", REAL_PYTHON, head="")
    flags = ("--config", str(tiny_run.setting(tmp_path)), "--workdir", str(tmp_path / "run"))
    process = launcher.start("local_processes.sh", "2", *flags, REAL=sys.executable, PYTHONPATH=str(ROOT))
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 2, stderr
    assert "error: task.labelled 40, balanced over classes, is more than available" in stdout
    assert (tmp_path / "run.logs/process-1.log").read_text() == ""
