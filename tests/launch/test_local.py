"""launch/local.sh and launch/test.sh with a fake Python that records its calls: what they install and run."""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xtransfer import config
from xtransfer.runs import sweep

ROOT = Path(__file__).parents[2]

# Reports version $FAKE_VERSION and makes a venv that contains itself. As pip, it fails, hangs, or is killed if
# $FAKE_PIP says so. Like the real pip, it answers Ctrl-C with an ordinary failure.
FAKE_PYTHON = r"""#!/bin/bash
if [[ "$1" == -c ]]; then echo "${FAKE_VERSION:-3.11}"; exit 0; fi
{ printf '%s\x1f' "$@"; printf '\x1e'; } >>"$FAKE_LOG"
case "$2 $3" in
  "venv --clear") rm -rf "$4"; mkdir -p "$4/bin"; cp "${BASH_SOURCE[0]}" "$4/bin/python" ;;
  "pip install")
    case "${FAKE_PIP:-0}" in
      killed) kill -9 $$ ;;
      hang)
        trap 'kill $!; exit 1' INT
        sleep 60 >/dev/null 2>&1 &
        touch "$FAKE_LOG.hangs"
        wait ;;
      *) exit "${FAKE_PIP:-0}" ;;
    esac ;;
esac
"""


class Checkout:
    """A copy of the files that the launch scripts read, under a path with a space, and methods that run the scripts."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.cwd = folder / "elsewhere"
        self.log = folder / "calls"
        self.cwd.mkdir()
        (self.root / "launch").mkdir(parents=True)
        for name in ("local.sh", "test.sh", "setup.sh", "requirements.lock"):
            shutil.copy(ROOT / "launch" / name, self.root / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.python = folder / "bin" / "python3"
        self.python.parent.mkdir()
        self.python.write_text(FAKE_PYTHON)
        self.python.chmod(0o755)

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a script from launch/ in another directory, with the fake Python first on the path."""
        self.log.write_text("")
        inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "XTRANSFER_EXTRAS")}
        path = f"{self.python.parent}:{os.environ['PATH']}"
        # A shell's background jobs ignore Ctrl-C, and bash cannot trap a signal that it inherited as ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            return subprocess.Popen(
                [str(self.root / "launch" / script), *arguments],
                cwd=self.cwd,
                env={**inherited, "PATH": path, "FAKE_LOG": str(self.log), **env},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str, list[list[str]]]:
        """Run a script and return its exit code, its stderr, and its calls of Python."""
        process = self.start(script, *arguments, **env)
        stdout, stderr = process.communicate(timeout=20)
        assert stdout == "", "stdout belongs to the program that is launched"
        calls = [call.split("\x1f")[:-1] for call in self.log.read_text().split("\x1e")[:-1]]
        return process.returncode, stderr, calls


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def installed(checkout: Checkout) -> Checkout:
    assert checkout.run("local.sh")[0] == 0
    return checkout


def installs(calls: list[list[str]]) -> list[str]:
    """Return the target of each pip installation."""
    return [call[-1] for call in calls if call[:3] == ["-m", "pip", "install"]]


def test_the_first_run_installs_pinned_packages_and_starts_the_quickstart(checkout: Checkout) -> None:
    code, stderr, calls = checkout.run("local.sh")
    assert code == 0, stderr
    assert calls[0] == ["-m", "venv", "--clear", str(checkout.venv)]
    assert installs(calls) == ["pip", "."]
    assert all(call[call.index("--constraint") + 1] == "launch/requirements.lock" for call in calls[1:3])
    config = str(checkout.root / "configs/quickstart.py")
    assert calls[3:] == [["-m", "xtransfer.main", "--config", config, "--workdir", "runs/quickstart"]]
    assert "making .venv with python3 (3.11)" in stderr and "installing the pinned packages" in stderr


def test_the_second_run_installs_nothing(installed: Checkout) -> None:
    code, stderr, calls = installed.run("local.sh")
    assert code == 0 and len(calls) == 1 and calls[0][1] == "xtransfer.main"
    assert stderr.count("\n") == 1, "only the command that is run"


@pytest.mark.parametrize(
    ("given", "added"),
    [
        (["--config", "my configs/a b.py"], ["--workdir", "runs/a-b"]),
        (["--config=x/files.py"], ["--workdir", "runs/files"]),
        (["--config=pretrain_mini.py:english"], ["--workdir", "runs/pretrain_mini-english"]),
        (["--workdir", "out put"], ["--config", "DEFAULT"]),
        (["--workdir=out"], ["--config", "DEFAULT"]),
        (["--config", "c.py", "--workdir", "w", "--config.seeds=(0, 1)"], []),
        (["--config=c.py", "--workdir=w"], []),
        (["--config.seeds=3"], ["--config", "DEFAULT", "--workdir", "runs/quickstart"]),
        (["--config.name", "--workdir"], ["--config", "DEFAULT"]),
        (["--config.task.label", ""], ["--config", "DEFAULT", "--workdir", "runs/quickstart"]),
        (["--", "--config", "c.py"], ["--config", "DEFAULT", "--workdir", "runs/quickstart"]),
        (["--config", "*", "--workdir", "$HOME"], []),
    ],
)
def test_defaults_are_added_only_for_flags_not_given(installed: Checkout, given: list[str], added: list[str]) -> None:
    """Pass each argument on unchanged, spaces and stars included, and do not take a flag's value for a flag."""
    added = [str(installed.root / "configs/quickstart.py") if word == "DEFAULT" else word for word in added]
    code, stderr, calls = installed.run("local.sh", *given)
    assert code == 0, stderr
    assert calls == [["-m", "xtransfer.main", *added, *given]]


def test_test_sh_adds_the_test_extras_and_passes_its_arguments_to_pytest(installed: Checkout) -> None:
    code, stderr, calls = installed.run("test.sh", "tests/test_x.py", "-k", "a or b")
    assert code == 0, stderr
    assert installs(calls) == ["pip", ".[test]"]
    assert calls[-1] == ["-m", "pytest", "tests/test_x.py", "-k", "a or b"]
    run_all = ["-m", "pytest", "-n", "auto", "--dist", "worksteal"]
    assert installed.run("test.sh")[2] == [run_all]
    assert len(installed.run("local.sh")[2]) == 1, "the extras do not make the base stale"


def test_an_environment_variable_adds_extras(installed: Checkout) -> None:
    assert installs(installed.run("local.sh", XTRANSFER_EXTRAS="tpu")[2]) == ["pip", ".[tpu]"]
    assert installs(installed.run("local.sh", XTRANSFER_EXTRAS="tpu")[2]) == []
    assert installs(installed.run("test.sh", XTRANSFER_EXTRAS="dev,cuda")[2]) == ["pip", ".[test,dev,cuda]"]


@pytest.mark.parametrize("extra", ["tpuu", ".*", "name", "--help"])
def test_an_unknown_extra_is_refused(checkout: Checkout, extra: str) -> None:
    code, stderr, calls = checkout.run("local.sh", XTRANSFER_EXTRAS=extra)
    assert code == 1 and calls == []
    names = "tpu, cuda, tensorboard, torch, test, dev"
    assert stderr == f"error: XTRANSFER_EXTRAS: setup.cfg has no extra '{extra}', only {names}\n"


@pytest.mark.parametrize("name", ["setup.cfg", "pyproject.toml", "launch/requirements.lock"])
def test_a_changed_requirement_is_installed(installed: Checkout, name: str) -> None:
    path = installed.root / name
    path.write_text(path.read_text() + "# changed\n")
    calls = installed.run("local.sh")[2]
    assert installs(calls) == ["pip", "."]
    assert not any("venv" in call for call in calls), "the installed packages are kept"


def test_a_moved_clone_is_installed_again(installed: Checkout) -> None:
    """Reinstall, because an editable installation points to the old path. Reaching the clone by a link is no move."""
    moved = installed.root.with_name("moved clone")
    installed.root.rename(moved)
    installed.root.symlink_to(moved)
    calls = installed.run("local.sh")[2]
    assert installs(calls) == ["pip", "."]
    assert not any("venv" in call for call in calls), "the installed packages are kept"
    installed.root = moved
    assert len(installed.run("local.sh")[2]) == 1


def test_a_failed_installation_is_retried(checkout: Checkout) -> None:
    code, stderr, calls = checkout.run("local.sh", FAKE_PIP="1")
    assert code == 1 and calls[-1][1] == "pip", "nothing is run"
    assert stderr.splitlines()[-1].startswith("error: the packages could not be installed")
    code, stderr, calls = checkout.run("local.sh")
    assert code == 0 and installs(calls) == ["pip", "."] and "making .venv" not in stderr
    assert len(checkout.run("local.sh")[2]) == 1


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_killed_installation_starts_over(checkout: Checkout, signal_number: signal.Signals) -> None:
    """Discard the .venv, because pip takes a half-written package for an installed one."""
    process = checkout.start("local.sh", FAKE_PIP="hang")
    wait_until(Path(f"{checkout.log}.hangs").exists)
    busy = checkout.run("local.sh")
    assert busy[0] == 1 and f"process {process.pid} is installing" in busy[1] and busy[2] == []
    os.killpg(process.pid, signal_number)
    process.communicate(timeout=20)
    assert process.returncode in (-signal_number, 128 + signal_number)
    code, stderr, calls = checkout.run("local.sh")
    assert code == 0 and "interrupted; recreating .venv" in stderr
    assert calls[0][1] == "venv" and installs(calls) == ["pip", "."]
    assert len(checkout.run("local.sh")[2]) == 1


def test_an_installation_whose_pip_was_killed_starts_over(checkout: Checkout) -> None:
    code, stderr, _ = checkout.run("local.sh", FAKE_PIP="killed")
    assert code == 1 and "could not be installed" in stderr
    code, stderr, calls = checkout.run("local.sh")
    assert code == 0 and "interrupted; recreating .venv" in stderr and calls[0][1] == "venv"


def test_a_broken_venv_is_replaced(installed: Checkout) -> None:
    (installed.venv / "bin" / "python").unlink()
    code, stderr, calls = installed.run("local.sh")
    assert code == 0, stderr
    assert calls[0][1] == "venv" and installs(calls) == ["pip", "."]


def test_a_named_python_that_is_too_old_is_refused(checkout: Checkout) -> None:
    code, stderr, calls = checkout.run("local.sh", PYTHON=str(checkout.python), FAKE_VERSION="3.10")
    assert code == 1 and calls == []
    assert stderr.splitlines() == [
        f"error: Python 3.11 or newer is needed ({checkout.python} is 3.10): "
        "install it, or name it with PYTHON=/path/to/python3.11"
    ]
    code, stderr, _ = checkout.run("local.sh", PYTHON="/nowhere/python")
    assert code == 1 and "/nowhere/python does not run" in stderr
    assert "interrupted" not in checkout.run("local.sh")[1]


def test_a_newer_python_is_used_if_python3_is_too_old(checkout: Checkout) -> None:
    newer = checkout.python.with_name("python3.14")
    newer.write_text(FAKE_PYTHON.replace("${FAKE_VERSION:-3.11}", "4.0"))
    newer.chmod(0o755)
    code, stderr, _ = checkout.run("local.sh", FAKE_VERSION="2.7")
    assert code == 0 and "making .venv with python3.14 (4.0)" in stderr


def test_the_commands_in_the_readme_exist() -> None:
    """Check that the scripts and configs exist, and that the configs accept the flags as the shell passes them."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines if line.startswith("launch/")]
    assert len(commands) >= 5 and all((ROOT / command[0]).is_file() for command in commands)
    flag_lists = [command[1:] for command in commands if len(command) > 1]
    assert len(flag_lists) >= 3
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="configs/quickstart.py")
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--sweep", action="append", default=[])
    for flags in flag_lists:
        known, overrides = parser.parse_known_args(flags)
        config.load(str(ROOT / known.config), overrides)
        if known.sweep:
            sweep.parse(str(ROOT / known.config), overrides, known.sweep)
        assert overrides or known.sweep, "the remaining flags override the config"


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["README.md", "launch/README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_no_page_contains_a_placeholder(name: str) -> None:
    assert re.findall(r"<<.*?>>|<!-- tpu table -->|TODO|XXX", (ROOT / name).read_text(encoding="utf-8")) == []
