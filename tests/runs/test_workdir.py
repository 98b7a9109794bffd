"""The workdir and the config recorded in it."""

import dataclasses

import pytest

from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.errors import UserError
from xtransfer.runs.workdir import Workdir, as_record, check_config_unchanged, check_unchanged, read_config, record


def begin(path, config):
    """Check and record a config, as a command does before it starts."""
    check_unchanged(path, as_record(config))
    record(path, as_record(config))


def test_a_config_is_recorded_and_read_back(tmp_path):
    config = ExperimentConfig(student=ModelConfig(checkpoint="x"))
    begin(Workdir(tmp_path).config, config)
    assert read_config(Workdir(tmp_path)) == config
    begin(Workdir(tmp_path).config, config)


def test_a_changed_config_is_refused_with_the_difference(tmp_path):
    begin(Workdir(tmp_path).config, ExperimentConfig())
    with pytest.raises(UserError, match=r"student\.steps: 1000 → 5"):
        begin(Workdir(tmp_path).config, ExperimentConfig(student=ModelConfig(steps=5)))
    assert read_config(Workdir(tmp_path)) == ExperimentConfig()


def test_seeds_and_objectives_may_change(tmp_path):
    begin(Workdir(tmp_path).config, ExperimentConfig())
    wider = dataclasses.replace(ExperimentConfig(), seeds=(0, 1, 2), objectives=("vanilla",))
    begin(Workdir(tmp_path).config, wider)
    assert read_config(Workdir(tmp_path)) == wider


def test_a_setting_that_is_newer_than_the_record_counts_as_its_default(tmp_path):
    old = as_record(ExperimentConfig())
    del old["selection_metric"], old["student"]["patience"]
    record(Workdir(tmp_path).config, old)
    check_config_unchanged(Workdir(tmp_path), ExperimentConfig())
    with pytest.raises(UserError, match=r"student\.patience: 0 → 3"):
        check_config_unchanged(Workdir(tmp_path), ExperimentConfig(student=ModelConfig(patience=3)))
    with pytest.raises(UserError, match="selection_metric: 'accuracy' → 'ece'"):
        check_config_unchanged(Workdir(tmp_path), ExperimentConfig(selection_metric="ece"))
    check_config_unchanged(Workdir(tmp_path), ExperimentConfig(metrics=("accuracy", "ece")))  # changeable
    record(Workdir(tmp_path).config, old | {"old_key": 1})
    with pytest.raises(UserError, match="old_key: 1 → None"):
        check_config_unchanged(Workdir(tmp_path), ExperimentConfig())


def test_a_missing_or_broken_record_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(Workdir(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(Workdir(tmp_path))
