"""A checkout of the launch scripts beside fakes of the tools that they call, which write down how they were called."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]

# A value that a shell would change wherever it is quoted once too few: spaces, both quotes, $, a star, a newline.
NASTY = """--config.task.name=a  b 'c' "d" $HOME `id` * \\ & ; | > {x} $(id) %s\n@NAME@ é"""

# Each fake begins so: `calls` has the arguments of each call, a list that was put there is taken one by one.
HEAD = f"""#!{sys.executable} -IS
import fcntl, json, os, sys
HERE, ARGV = os.environ["FAKES"], sys.argv[1:]
lock = open(f"{{HERE}}/lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
with open(f"{{HERE}}/calls", "a") as calls:
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *ARGV]) + "\\n")
def take(name, default):
    file = f"{{HERE}}/{{name}}"
    left = json.load(open(file)) if os.path.exists(file) else []
    if left:
        json.dump(left[1:], open(file, "w"))
    return left[0] if left else default
def value(flag):
    pairs = [(word.partition("=")[0], word.partition("=")[2]) for word in ARGV] + list(zip(ARGV, ARGV[1:]))
    return next((found for name, found in pairs if name == flag and found), None)
def leave(status=0, said=""):
    print(said, file=sys.stderr if status else sys.stdout, end="")
    sys.exit(status)
"""

# Stands for a machine's Python and, as it copies itself, for that of its .venv; `main` is the fake main below.
PYTHON = """#!/bin/bash
case "$1 $2" in
  -c\\ *) echo 3.11 ;;
  "-m venv") mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  "-m pip") echo '["pip"]' >>"$FAKES/calls" ;;
  "-m xtransfer.main") exec main "${@:3}" ;;
esac
"""

# Ends as `statuses` says, and leaves what a run leaves.
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
    """A checkout under a path with a space, `bin` of fakes, and runs of the scripts."""

    def __init__(self, folder: Path) -> None:
        self.root, self.fakes, self.cwd = folder / "a clone", folder / "fakes", folder / "elsewhere"
        for place in (self.root, self.fakes / "bin", self.cwd):
            place.mkdir(parents=True)
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("setup.cfg", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        self.fake("python3", PYTHON, head="")
        self.fake("main", MAIN)

    def fake(self, name: str, body: str, head: str = HEAD) -> None:
        """Puts a program of that name first on the path."""
        path = self.fakes / "bin" / name
        path.write_text(head + body)
        path.chmod(0o755)

    def will(self, **lists: list) -> None:
        """What the fakes take one by one."""
        for name, values in lists.items():
            (self.fakes / name).write_text(json.dumps(values))

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Starts a script of launch/ in another directory."""
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
        """The script's exit code, stdout and stderr."""
        process = self.start(script, *arguments, **env)
        stdout, stderr = process.communicate(timeout=60)
        return process.returncode, stdout, stderr

    def calls(self, tool: str, *contains: str) -> list[list[str]]:
        """The arguments of the calls of a tool that hold all these words, in order."""
        calls = _lines(self.fakes / "calls")
        return [call[1:] for call in calls if call[0] == tool and set(contains) <= set(call)]

    def mains(self) -> list[list[str]]:
        """For each start of xtransfer.main: its HOME, its directory, its arguments."""
        return _lines(self.fakes / "mains")


def _lines(file: Path) -> list[list[str]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def wait_until(condition: Callable[[], bool]) -> None:
    """Returns as soon as the condition holds; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
