"""The list of commands, which the package, the README, and the layering rules must agree on."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_layering import COMMANDS
from xtransfer.__main__ import commands, main

ROOT = Path(__file__).parents[1]
ALL = sorted((*COMMANDS, "report", "pretrain"))


def test_every_command_has_a_one_sentence_summary() -> None:
    assert sorted(commands()) == ALL
    assert all(re.fullmatch(r"[A-Z][a-z]+ .*\.", summary) for summary in commands().values()), commands()


def test_main_prints_the_list_of_commands(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:]] == ALL


def test_the_readme_lists_the_same_commands() -> None:
    table = (ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"^\| `python -m xtransfer\.(\w+)", table, re.MULTILINE))) == ALL


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"xtransfer.{name}", "--help"], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert result.returncode == 0 and result.stdout.startswith(f"usage: python -m xtransfer.{name} "), result
