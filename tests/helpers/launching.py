"""A copy of the launch scripts, with fakes of the tools that they call. The fakes record their arguments."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A value that a shell changes if one level of quoting is missing: spaces, both quotes, $, a star, a newline.
NASTY = """--config.task.name=a  b 'c' "d" $HOME `id` * \\ & ; | > {x} $(id) %s\n@NAME@ é"""

# The start of each fake. It records the arguments in `calls`, and `take` pops the next value queued by Launcher.will.
HEAD = f"""#!{sys.executable} -IS
import fcntl, json, os, sys
HERE, ARGV = os.environ["FAKES"], sys.argv[1:]
lock = open(f"{{HERE}}/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with open(f"{{HERE}}/calls", "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *ARGV]) + "\\n")
def take(name, default):
    file = f"{{HERE}}/{{name}}"
    remaining = json.load(open(file)) if os.path.exists(file) else []
    if remaining:
        json.dump(remaining[1:], open(file, "w"))
    return remaining[0] if remaining else default
def value(flag):
    pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in ARGV] + list(zip(ARGV, ARGV[1:]))
    return next((text for name, text in pairs if name == flag and text), None)
def finish(status=0, text=""):
    print(text, file=sys.stderr if status else sys.stdout, end="")
    sys.exit(status)
"""

# A stand-in for a machine's Python. It copies itself into a .venv, and starts the fake `main` below for xtransfer.main.
PYTHON = """#!/bin/bash
case "$1 $2" in
  -c\\ *) echo 3.11 ;;
  "-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m pip") echo '["pip"]' >>"$FAKES/calls" ;;
  "-m xtransfer.main") exec main "${@:3}" ;;
esac
"""

# A stand-in for xtransfer.main. It writes a run's files and exits with the next status in `statuses`.
MAIN = """
import time
with open(f"{HERE}/mains", "a") as mains:
    mains.write(json.dumps([os.environ["HOME"], os.getcwd(), *ARGV]) + "\\n")
workdir = value("--workdir")
if not os.path.isabs(workdir):
    os.makedirs(f"{workdir}/teacher/checkpoints", exist_ok=True)
    for name in ("teacher/checkpoints/weights", "results.jsonl"):
        open(f"{workdir}/{name}", "w").close()
status = take("statuses", 0)
print("main begins", flush=True)
fcntl.flock(lock, fcntl.LOCK_UN)
while os.path.exists(f"{HERE}/hang"):
    time.sleep(0.02)
print(f"main ends with {status}", flush=True)
sys.exit(status)
"""


class Launcher:
    """A checkout under a path with a space, a `bin` of fakes, and methods that run the scripts."""

    def __init__(self, folder: Path) -> None:
        self.root, self.fakes, self.cwd = folder / "a clone", folder / "fakes", folder / "elsewhere"
        for directory in (self.root, self.fakes / "bin", self.cwd):
            directory.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.fake("python3", PYTHON, head="")
        self.fake("main", MAIN)

    def fake(self, name: str, body: str, head: str = HEAD) -> None:
        """Put a program of this name first on the path."""
        path = self.fakes / "bin" / name
        path.write_text(head + body)
        path.chmod(0o755)

    def will(self, **lists: list) -> None:
        """Queue the values that the fakes take one by one."""
        for name, values in lists.items():
            (self.fakes / name).write_text(json.dumps(values))

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start a script from launch/ in another directory."""
        unset = ("PYTHON", "XTRANSFER_EXTRAS", "XLA_FLAGS", "JAX_PLATFORMS")
        inherited = {k: v for k, v in os.environ.items() if k not in unset}
        path = f"{self.fakes / 'bin'}:{os.environ['PATH']}"
        return subprocess.Popen(
            [str(self.root / "launch" / script), *arguments],
            cwd=self.cwd,
            env={**inherited, "PATH": path, "FAKES": str(self.fakes), "XTRANSFER_POLL_SECONDS": "0", **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str, **env: str) -> tuple[int, str, str]:
        """Run a script and return its exit code, stdout, and stderr."""
        process = self.start(script, *arguments, **env)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def calls(self, tool: str, *contains: str) -> list[list[str]]:
        """Return the arguments of each call of a tool that contains all these words, in order."""
        calls = _lines(self.fakes / "calls")
        return [call[1:] for call in calls if call[0] == tool and set(contains) <= set(call)]

    def mains(self) -> list[list[str]]:
        """Return the HOME, working directory, and arguments of each start of xtransfer.main."""
        return _lines(self.fakes / "mains")


def _lines(file: Path) -> list[list[str]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait until the condition is true. Fail after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
