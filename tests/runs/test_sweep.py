"""Sweeps: their points, their names, their record, and what runs share."""

import ast
import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.config import FurtherTeacherConfig, load
from xtransfer.distillation.objectives import definitions
from xtransfer.errors import UserError
from xtransfer.runs import sharing, sweep
from xtransfer.runs import workdir as workdirs
from xtransfer.runs.draws import draws_of
from xtransfer.runs.workdir import TEACHER, Workdir, read_config

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.py")


def parse(*flags, overrides=()):
    return sweep.parse(QUICKSTART, overrides, flags)


def test_every_combination_is_a_point():
    points = parse("transfer.temperature=0.1,2", "task.labelled=64,128", overrides=("--config.student.steps=7",))
    assert [point.name for point in points] == [
        "transfer.temperature=0.1,task.labelled=64",
        "transfer.temperature=0.1,task.labelled=128",
        "transfer.temperature=2,task.labelled=64",
        "transfer.temperature=2,task.labelled=128",
    ]
    assert [(p.config.transfer.temperature, p.config.task.labelled) for p in points] == [
        (0.1, 64), (0.1, 128), (2.0, 64), (2.0, 128),
    ]  # fmt: skip
    assert {point.config.student.steps for point in points} == {7}
    assert points[0].values == {"transfer.temperature": 0.1, "task.labelled": 64}


def test_the_commands_of_the_shipped_sweeps_are_valid():
    file = Path(QUICKSTART).with_name("sweeps.py")
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    commands = re.findall(r"python -m xtransfer\.main --config (\S+) --workdir \S+ *\\?\s+--sweep (\S+)", docstring)
    assert [source for source, _ in commands] == ["configs/sweeps.py"] * 2
    values = [[dict(point.values) for point in sweep.parse(str(file), (), [flag])] for _, flag in commands]
    assert values[0] == [{"transfer.temperature": value} for value in (0.1, 0.5, 1.0, 2.0, 4.0)]
    assert values[1] == [{"task.labelled": value} for value in (64, 128, 256, 512, 2000)]
    assert len(draws_of(load(str(file)))) == 5


def test_a_comma_inside_brackets_belongs_to_its_value():
    points = parse("student.frozen=('a','b,'),()", "student.pooling=cls,mean")
    assert [point.config.student.frozen for point in points] == [("a", "b,"), ("a", "b,"), (), ()]
    assert len({point.name for point in points}) == 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("transfer.temprature=1,2",), "unknown config key transfer.temprature; did you mean 'temperature'"),
        (("task.labelled=64,many",), "labelled"),
        (("transfer.temperature=0,1",), "transfer.temperature is 0.0: it must be between"),
        (("transfer.temperature",), "write KEY=VALUE,VALUE"),
        (("=1,2",), "write KEY=VALUE,VALUE"),
        (("transfer.temperature=1,,2",), "write KEY=VALUE,VALUE"),
        (("transfer.temperature=",), "write KEY=VALUE,VALUE"),
        (("transfer.temperature=1,1.0",), "transfer.temperature=1 is given twice"),
        (("transfer.temperature=1", "transfer.temperature=2"), "is given twice"),
        (("student.steps=1,2",), "--sweep student.steps and --config.student.steps: leave one of them out"),
        (("transfer=1,2",), "transfer"),
    ],
)
def test_a_wrong_flag_is_refused(flags, message):
    with pytest.raises(UserError) as caught:
        parse(*flags, overrides=("--config.student.steps=7",))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=200),
        max_size=6,
        unique=True,
    )
)
def test_names_are_distinct_and_safe(texts):
    config = load(QUICKSTART)
    names = []
    for text in texts:
        object.__setattr__(config.task, "path", text)
        names.append(sweep._point(("task.path",), config).name)
    assert len(set(names)) == len(texts)
    assert all("/" not in name and len(name.encode()) <= 200 and name not in (".", "..") for name in names)


def test_a_setting_of_one_objective_is_swept():
    points = parse(
        "objective.monox_kd.temperature=0.1,2",
        "objective.mix.hard_weight=0.5",
        overrides=("--config.objective.mix.base=monox_kd",),
    )
    assert [definitions(point.config)["monox_kd"].temperature for point in points] == [0.1, 2.0]
    assert {definitions(point.config)["mix"].hard_weight for point in points} == {0.5}
    assert points[0].name == "objective.monox_kd.temperature=0.1,objective.mix.hard_weight=0.5"


def test_a_record_is_read_back_and_its_faults_are_named(tmp_path):
    points = parse("transfer.temperature=0.1,2")
    sweep.record(tmp_path, points)
    recorded = sweep.read(tmp_path)
    assert recorded.keys == ("transfer.temperature",)
    assert recorded.points == {point.name: point.values for point in points}
    with pytest.raises(UserError, match="holds a sweep: name one of the workdirs in"):
        read_config(Workdir(tmp_path))
    for content in ("[]", "{}", '{"keys": ["a"], "points": [{"name": "x", "values": {"b": 1}}]}'):
        (tmp_path / sweep.RECORD).write_text(content)
        with pytest.raises(UserError, match=r"sweep\.json.*: start the sweep again"):
            sweep.read(tmp_path)


def shared(*changes):
    """Return the runs that a changed config shares with the quickstart."""
    runs = (TEACHER, "vanilla", "monox_kd", "monox_pl", "self_training")
    changed, base = load(QUICKSTART, [f"--config.{change}" for change in changes]), load(QUICKSTART)
    return {run for run in runs if sharing.settings_of(base, run) == sharing.settings_of(changed, run)}


def test_runs_are_shared_exactly_if_no_setting_of_theirs_differs():
    everything = {TEACHER, "vanilla", "monox_kd", "monox_pl", "self_training"}
    assert shared() == everything
    assert shared("transfer.temperature=2.0") == {TEACHER, "vanilla", "monox_pl"}
    assert shared("transfer.threshold=0.5") == everything - {"monox_pl"}
    assert shared("transfer.label_smoothing=0.1") == everything - {"vanilla", "monox_pl", "self_training"}
    assert shared("objective.monox_kd.temperature=2.0") == everything - {"monox_kd"}
    assert shared("objective.vanilla.focal_gamma=1.0") == everything - {"vanilla", "self_training"}
    assert shared("objective.teacher.focal_gamma=1.0") == {"vanilla", "self_training"}
    assert shared("objective.mix.base=monox_kd") == everything
    assert shared("task.labelled=64") == shared("task.labelled_seed=1") == set()
    assert shared("task.unlabelled=99") == {TEACHER, "vanilla"}
    assert shared("teacher.learning_rate=1e-3") == shared("teacher_seed=1") - {TEACHER} == {"vanilla", "self_training"}
    assert shared("student.steps=9") == {TEACHER}
    assert shared("selection_metric=macro_f1") == set()
    assert shared("seeds=(7,)", "metrics=('accuracy',)", "task.target_languages=('de',)", "mesh.data=2") == everything


def test_each_of_several_teachers_is_shared_by_its_own_settings(tmp_path):
    file = tmp_path / "several.py"
    entries = {"german": {"languages": ("de",), "steps": 5}, "second": {"seed": 1, "steps": 7}}
    text = (
        Path(QUICKSTART)
        .read_text()
        .replace("    return config\n", f"    config.teachers = {entries!r}\n    return config\n")
    )
    file.write_text(text)
    runs = (TEACHER, "teachers.german", "teachers.second", "vanilla", "monox_kd", "self_training")

    def shared(*changes):
        flags = ["--config.task.target_languages=('fr',)"]
        changed, base = load(str(file), [*flags, *(f"--config.{change}" for change in changes)]), load(str(file), flags)
        return {run for run in runs if sharing.settings_of(base, run) == sharing.settings_of(changed, run)}

    assert shared("teachers.second.weight=2.0") == {*runs} - {"monox_kd"} == shared("transfer.teacher_mean=logits")
    assert shared("teachers.german.steps=6") == {*runs} - {"monox_kd", "teachers.german"}
    assert shared("teachers.second.checkpoint=x", "teachers.german.remat=True") == {*runs}  # the fingerprints count
    assert shared("teachers.german.languages=('en','de')") == {*runs} - {"monox_kd", "teachers.german"}
    assert shared("teachers.german.languages=('es',)") == {TEACHER, "teachers.second"}  # other labelled text
    assert shared("teacher.max_length=32") == {"vanilla", "self_training"}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"teachers": {"teachers.german": "other"}}, {TEACHER, "teachers.soft", "vanilla"}),
        ({"teachers_logits": {"teachers.soft": "other"}}, {TEACHER, "teachers.german", "vanilla"}),
        ({"teacher_checkpoint": "other"}, {"teachers.german", "teachers.soft", "vanilla"}),
        ({"teacher_logits": "other"}, {"teachers.german", "teachers.soft", "vanilla"}),
        ({}, {TEACHER, "teachers.german", "teachers.soft", "vanilla", "monox_kd"}),
    ],
)
def test_the_checkpoints_and_files_of_further_teachers_count(tmp_path, changed, expected):
    config = dataclasses.replace(
        load(QUICKSTART),
        teachers={"german": FurtherTeacherConfig(languages=("de",)), "soft": FurtherTeacherConfig(logits_file="soft")},
    )
    facts = {"teacher_checkpoint": "1", "student_checkpoint": "2"}
    facts |= {"teachers": {"teachers.german": "3"}, "teachers_logits": {"teachers.soft": "4"}}
    other = Workdir(tmp_path)
    other.task.write_text(json.dumps(facts | changed))
    runs = (TEACHER, "teachers.german", "teachers.soft", "vanilla", "monox_kd")
    roles = {run: sharing.roles_of(config, run) for run in runs}
    assert {run for run in runs if sharing.has_same_checkpoints(other, facts, roles[run])} == expected


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ("teacher_checkpoint", {"vanilla", "self_training"}),
        ("student_checkpoint", {TEACHER}),
        ("nothing", {TEACHER, "vanilla", "monox_kd", "monox_pl", "self_training"}),
    ],
)
def test_a_run_is_shared_if_the_checkpoints_that_it_starts_from_are_the_same(tmp_path, changed, expected):
    facts = {"name": "reviews", "labels": ["a", "b"], "source_language": "en", "data": "1"}
    facts |= {"teacher_checkpoint": "2", "student_checkpoint": "3"}
    other = Workdir(tmp_path)
    other.config.write_text("{}")
    other.task.write_text(json.dumps(facts | {changed: "other"}))
    runs = (TEACHER, "vanilla", "monox_kd", "monox_pl", "self_training")
    assert sharing.has_same_data(other, facts)
    roles = {run: sharing.roles_of(load(QUICKSTART), run) for run in runs}
    assert {run for run in runs if sharing.has_same_checkpoints(other, facts, roles[run])} == expected
    assert not sharing.has_same_data(other, facts | {"data": "other"})


def test_a_copied_run_has_no_id_for_trackers(tmp_path):
    run = tmp_path / "a" / "run"
    (run / "tensorboard").mkdir(parents=True)
    for name in ("metrics.jsonl", "tracking.json", "tensorboard/events"):
        (run / name).write_text("x")
    sharing.copy_run(run, tmp_path / "b" / "run")
    copied = {path.relative_to(tmp_path / "b" / "run").as_posix() for path in (tmp_path / "b").rglob("*")}
    assert copied == {".", "metrics.jsonl", "tensorboard", "tensorboard/events"}


def test_a_damaged_record_of_another_point_is_a_warning(tmp_path, caplog):
    workdir = Workdir(tmp_path)
    facts = dict.fromkeys(sharing._SAME_FACTS, "x")
    workdirs.record(workdir.config, workdirs.as_record(load(QUICKSTART)))
    workdirs.record(workdir.task, facts)
    assert sharing.has_same_data(workdir, facts) and not sharing.has_same_data(workdir, facts | {"data": "y"})
    for path in (workdir.task, workdir.config):
        content = path.read_text()
        path.write_text(content[:-3])
        assert not sharing.has_same_data(workdir, facts)
        assert f"nothing is taken over from {tmp_path}: {path}: not valid JSON" in caplog.text
        path.write_text(content)


def test_the_damaged_scores_of_another_point_are_a_warning(tmp_path, caplog):
    assert sharing.is_whole(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("?\n")
    assert not sharing.is_whole(tmp_path)
    assert f"{tmp_path} is not taken over: {tmp_path}/metrics.jsonl:1: this row is damaged" in caplog.text


def test_a_copy_is_complete_and_links_checkpoints(tmp_path):
    run = tmp_path / "a" / "run"
    (run / "checkpoints" / "7").mkdir(parents=True)
    (run / "checkpoints" / "7" / "weights").write_text("w")
    (run / "metrics.jsonl").write_text("m")
    sharing.copy_first([tmp_path / "none", run], tmp_path / "b" / "run")
    copy = tmp_path / "b" / "run"
    assert (copy / "checkpoints" / "7" / "weights").read_text() == "w" and (copy / "metrics.jsonl").read_text() == "m"
    assert os.path.samefile(copy / "checkpoints/7/weights", run / "checkpoints/7/weights")
    assert not os.path.samefile(copy / "metrics.jsonl", run / "metrics.jsonl")
    sharing.copy_first([tmp_path / "none"], tmp_path / "b" / "other")
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["run"]


def test_a_copy_works_without_links_and_never_replaces(tmp_path, monkeypatch):
    def refuse(*paths):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a" / "checkpoints").mkdir(parents=True)
    (tmp_path / "a" / "checkpoints" / "x").write_text("1")
    sharing.copy_first([tmp_path / "a"], tmp_path / "b")
    (tmp_path / "a" / "checkpoints" / "x").write_text("2")
    sharing.copy_first([tmp_path / "a"], tmp_path / "b")
    assert (tmp_path / "b" / "checkpoints" / "x").read_text() == "1"


def test_more_values_are_added_to_a_sweep_and_other_keys_are_refused(tmp_path):
    sweep.record(tmp_path, parse("transfer.temperature=1,2"))
    sweep.record(tmp_path, parse("transfer.temperature=2,4"))
    names = [f"transfer.temperature={value}" for value in (1, 2, 4)]
    assert list(sweep.read(tmp_path).points) == names
    with pytest.raises(UserError, match="holds a sweep of transfer.temperature, and this one is of task.labelled"):
        sweep.record(tmp_path, parse("task.labelled=64"))
    assert list(sweep.read(tmp_path).points) == names
