"""The workdir and the config recorded in it."""

import dataclasses
import json

import pytest

from xtransfer.config import ExperimentConfig, ModelConfig, ObjectiveConfig, PretrainConfig, TransferConfig
from xtransfer.errors import CheckpointError, UserError
from xtransfer.runs.workdir import (
    Workdir,
    as_record,
    check_config_unchanged,
    check_settings_unchanged,
    check_unchanged,
    read_config,
    read_task,
    record,
)


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


def test_a_workdir_from_before_objectives_had_settings_is_resumed_and_still_refuses_changes(tmp_path):
    old = as_record(ExperimentConfig(transfer=TransferConfig(temperature=2.0)))
    del old["objective"]
    old["transfer"] = {
        key: old["transfer"][key] for key in ("temperature", "temperature_on", "scale_by_t2", "threshold")
    }
    record(Workdir(tmp_path).config, old)
    now = read_config(Workdir(tmp_path))
    assert now == ExperimentConfig(transfer=TransferConfig(temperature=2.0))
    check_config_unchanged(Workdir(tmp_path), now)
    for key, value, change in (
        ("monox_kd", ObjectiveConfig(temperature=1.0), "objective.monox_kd.temperature: None → 1.0"),
        ("teacher", ObjectiveConfig(focal_gamma=1.0), "objective.teacher.focal_gamma: None → 1.0"),
    ):
        with pytest.raises(UserError) as caught:
            check_config_unchanged(Workdir(tmp_path), dataclasses.replace(now, objective={key: value}))
        assert f"({change})" in str(caught.value)
    with pytest.raises(UserError, match=r"\(transfer\.focal_gamma: 0\.0 → 1\.0\)"):
        smoothed = dataclasses.replace(now.transfer, focal_gamma=1.0)
        check_config_unchanged(Workdir(tmp_path), dataclasses.replace(now, transfer=smoothed))


def test_an_objective_may_be_added_to_a_workdir_and_neither_changed_nor_removed(tmp_path):
    config, mix = ExperimentConfig(), ObjectiveConfig(base="monox_kd", hard_weight=0.5)
    begin(Workdir(tmp_path).config, config)
    wider = dataclasses.replace(config, objectives=("vanilla", "mix"), objective={"mix": mix})
    check_config_unchanged(Workdir(tmp_path), wider)
    record(Workdir(tmp_path).config, as_record(wider))
    assert read_config(Workdir(tmp_path)) == wider
    check_config_unchanged(Workdir(tmp_path), dataclasses.replace(wider, objectives=("vanilla",)))
    other = dataclasses.replace(wider, objective={"mix": dataclasses.replace(mix, hard_weight=0.7)})
    with pytest.raises(UserError, match=r"\(objective\.mix\.hard_weight: 0\.5 → 0\.7\)"):
        check_config_unchanged(Workdir(tmp_path), other)
    with pytest.raises(
        UserError, match=r"objective\.mix\.base: 'monox_kd' → None; objective\.mix\.hard_weight: 0\.5 →"
    ):
        check_config_unchanged(Workdir(tmp_path), config)


def test_an_older_recipe_of_pretraining_resumes_too(tmp_path):
    path = tmp_path / "config.json"
    old = as_record(PretrainConfig())
    del old["schedule"], old["adam_b2"]
    record(path, old)
    check_settings_unchanged(path, PretrainConfig())
    with pytest.raises(UserError, match=r"adam_b2: 0\.98 → 0\.999"):
        check_settings_unchanged(path, PretrainConfig(adam_b2=0.999))


def test_a_missing_or_broken_record_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json"):
        read_config(Workdir(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        read_config(Workdir(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_languages": ["de", "de", "fr"]}, "target_languages has 'de' twice"),
        ({"labels": ["a", "a"]}, "labels has 'a' twice"),
        ({"teachers": []}, "teachers = \\[\\], expected an object by name"),
    ],
)
def test_a_task_record_that_cannot_be_is_named_with_a_remedy_that_keeps_the_work(tmp_path, change, message):
    facts = {"name": "files", "labels": ["a", "b"], "synthetic": False, "source_language": "en"}
    facts |= {"target_languages": ["de"], "teacher_checkpoint": "1", "student_checkpoint": "2"}
    workdir = Workdir(tmp_path)
    record(workdir.task, facts)
    assert read_task(workdir).target_languages == ("de",)
    workdir.task.write_text(json.dumps(facts | change))
    with pytest.raises(CheckpointError, match=f"{message}: remove this file and run python -m xtransfer.main again"):
        read_task(workdir)


def test_further_teachers_of_another_kind_in_a_record_are_named(tmp_path):
    path = tmp_path / "config.json"
    for value in ([], {"x": 5}):
        record(path, as_record(ExperimentConfig()) | {"teachers": value})
        with pytest.raises(
            CheckpointError, match=r"config\.json: teachers = .*, expected an object by name: restore it"
        ):
            check_settings_unchanged(path, ExperimentConfig())
        path.unlink()
