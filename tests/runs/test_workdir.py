"""The workdir: its config on record, its lock."""

import dataclasses
import os
import resource
import signal
import subprocess
import sys

import pytest

from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.errors import UserError
from xtransfer.runs.workdir import Workdir, as_record, check_unchanged, read_config, record
from xtransfer.runtime.locks import directory_lock


def begin(path, config):
    """What a binary does with a config before it works."""
    check_unchanged(path, as_record(config))
    record(path, as_record(config))


def test_config_is_recorded_and_read_back(tmp_path):
    config = ExperimentConfig(student=ModelConfig(checkpoint="x"))
    begin(Workdir(tmp_path).config, config)
    assert read_config(Workdir(tmp_path)) == config
    begin(Workdir(tmp_path).config, config)


def test_another_config_is_refused_with_the_difference(tmp_path):
    begin(Workdir(tmp_path).config, ExperimentConfig())
    with pytest.raises(UserError, match=r"student\.steps: 1000 → 5"):
        begin(Workdir(tmp_path).config, ExperimentConfig(student=ModelConfig(steps=5)))
    assert read_config(Workdir(tmp_path)) == ExperimentConfig()


def test_more_seeds_and_objectives_are_welcome(tmp_path):
    begin(Workdir(tmp_path).config, ExperimentConfig())
    wider = dataclasses.replace(ExperimentConfig(), seeds=(0, 1, 2), objectives=("vanilla",))
    begin(Workdir(tmp_path).config, wider)
    assert read_config(Workdir(tmp_path)) == wider


def test_a_directory_without_experiment_and_a_broken_record(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(Workdir(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(Workdir(tmp_path))


def test_a_second_process_is_refused_and_a_dead_one_leaves_no_lock(tmp_path):
    enter = f"with directory_lock(pathlib.Path({str(tmp_path)!r})): print(1)"
    code = f"import pathlib\nfrom xtransfer.runtime.locks import directory_lock\n{enter}"
    command = [sys.executable, "-c", code]
    with directory_lock(tmp_path):
        second = subprocess.run(command, capture_output=True, text=True)
        assert second.returncode != 0
        assert f"in use by process {os.getpid()}" in second.stderr
    assert subprocess.run(command, capture_output=True, text=True).stdout == "1\n"


def test_a_workdir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written to"), directory_lock(tmp_path / "file" / "below"):
        pass


def test_a_full_disk_is_named_when_it_is_locked(tmp_path):
    with (tmp_path / ".run.lock").open("w") as file:
        file.write("1\n")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        message = r"\.run\.lock cannot be written: File too large; make room"
        with pytest.raises(UserError, match=message), directory_lock(tmp_path):
            raise AssertionError("it is not held")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
