"""The record of how an experiment was started."""

import json
import sys
from importlib import metadata

from xtransfer.runs import starts
from xtransfer.runs.workdir import Workdir


def test_a_start_is_recorded_once_and_another_one_again(tmp_path, monkeypatch):
    workdir = Workdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "a b.py"])
    starts.record(workdir)
    starts.record(workdir)
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", "c.py"])
    starts.record(workdir)
    commands = [start.command for start in starts.read_starts(workdir)]
    assert len(commands) == 2
    assert commands[0].startswith("python -m ") and commands[0].endswith(" --config 'a b.py'")
    assert commands[1].endswith(" --config c.py")


def test_lines_that_are_no_starts_are_skipped(tmp_path):
    workdir = Workdir(tmp_path)
    starts.record(workdir)
    with workdir.starts.open("ab") as file:
        file.write(b'{"command": "python\n[]\n')
    assert len(starts.read_starts(workdir)) == 1


def test_upgraded_packages_are_named_once(tmp_path, capsys):
    workdir = Workdir(tmp_path)
    starts.record(workdir)
    old = json.loads(workdir.starts.read_text())
    old["packages"] |= {"jax": "0.1.2"}
    del old["packages"]["flax"]
    workdir.starts.write_text(json.dumps(old) + "\n")
    starts.record(workdir)
    jax, flax = metadata.version("jax"), metadata.version("flax")
    expected = f"packages differ from the last start (jax 0.1.2 → {jax}, flax ? → {flax}): numbers may differ"
    assert capsys.readouterr().out == f"{expected} in their last digits\n"
    starts.record(workdir)
    assert capsys.readouterr().out == ""
