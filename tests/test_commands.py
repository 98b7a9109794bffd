"""The list of commands, which the package, the README, and the layering rules must agree on."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.test_layering import ABOVE_COMMANDS, COMMANDS
from xtransfer.__main__ import commands, main
from xtransfer.errors import Exit

ROOT = Path(__file__).parents[1]
ALL = sorted((*COMMANDS, *ABOVE_COMMANDS, "report", "pretrain"))


def test_every_command_has_a_one_sentence_summary() -> None:
    assert sorted(commands()) == ALL
    assert all(re.fullmatch(r"[A-Z][a-z]+ .*\.", summary) for summary in commands().values()), commands()


def test_main_prints_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ALL


def test_an_unknown_command_is_refused_and_output_may_be_lost() -> None:
    def run(*arguments: str, output: int | Any = subprocess.PIPE) -> tuple[int, str]:
        argv = [sys.executable, "-m", "xtransfer", *arguments]
        result = subprocess.run(argv, stdout=output, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=120)
        return result.returncode, result.stderr

    status, text = run("predcit")
    assert status == Exit.CONFIG and text.startswith(
        "error: 'predcit' is not a command by itself; did you mean 'predict'?"
    )
    with open("/dev/full", "w") as full:
        status, text = run(output=full)
    assert status == Exit.MACHINE and text.startswith("error: standard output: ") and text.count("\n") == 1


def test_the_readme_lists_the_same_commands() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\| `python -m xtransfer\.(\w+)", table, re.MULTILINE))) == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"xtransfer.{name}", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0 and result.stdout.startswith(f"usage: python -m xtransfer.{name} "), result
