"""The config: defaults, files, overrides, and the error for each kind of mistake."""

import dataclasses
import json
import pwd
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer import config
from xtransfer.config import (
    ExperimentConfig,
    FurtherTeacherConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
    TeacherConfig,
)
from xtransfer.errors import ConfigError, UserError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "some.py"
    path.write_text(
        "from xtransfer import config as settings\n"
        "def get_config(arg=''):\n"
        "    config = settings.default()\n"
        "    config.student.steps = int(arg or 7)\n"
        "    return config\n"
    )
    return path


def test_a_file_takes_an_argument_and_overrides(file):
    loaded = config.load(f"{file}:9", ["--config.student.learning_rate=3e-5", "--config.seeds=(3,4,5)"])
    assert (loaded.student.steps, loaded.student.learning_rate, loaded.seeds) == (9, 3e-5, (3, 4, 5))
    assert config.load(str(file)).student.steps == 7
    assert config.load(str(file)).teacher == TeacherConfig()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.student.learning_rte=3e-5", r"student\.learning_rte.*did you mean 'learning_rate'"),
        ("--config.studnt.steps=3", r"studnt.*did you mean 'student'"),
        ("--config.student.steps.more=3", r"student\.steps\.more"),
        ("--config.student.steps='3'", r"student\.steps"),
        ("--config.student.steps=three", r"student\.steps"),
        ("--config.student.steps=0", r"student\.steps is 0"),
        ("--config.student.warmup_fraction=2", r"student\.warmup_fraction is 2\.0"),
        ("--config.student.learning_rate=nan", r"student\.learning_rate is nan: it must be a finite number"),
        ("--config.student.pooling=max", r"student\.pooling is 'max'.*cls, mean"),
        ("--config.seeds=a", r"seeds"),
        ("--config.student=3", r"student"),
        ("--learning_rate=3", r"--learning_rate=3.*--config\.KEY=VALUE"),
        ("stray", r"stray"),
    ],
)
def test_a_bad_override_is_refused(file, override, message):
    with pytest.raises(UserError, match=message) as caught:
        config.load(str(file), [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", ["None", "3"])
def test_a_file_that_returns_no_config_is_refused(file, value):
    file.write_text(f"def get_config(arg=''):\n    return {value}\n")
    with pytest.raises(UserError, match=r"some\.py"):
        config.load(str(file))


def test_a_missing_or_broken_file_is_refused(file, tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.py.*no such config file"):
        config.load(str(tmp_path / "nowhere.py"))
    file.write_text(file.read_text().replace("config.student.steps", "config.student.stepz"))
    with pytest.raises(UserError, match=r"some\.py.*stepz"):
        config.load(str(file))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student": {"stepz": 3}}, r"student\.stepz; did you mean 'steps'"),
        ({"student": {"steps": 3.0}}, r"student\.steps takes int, not 3\.0"),
        ({"student": {"steps": True}}, r"student\.steps takes int, not True"),
        ({"student": {"packed": 1}}, r"student\.packed takes bool, not 1"),
        ({"student": {"learning_rate": "3"}}, r"student\.learning_rate takes float, not '3'"),
        ({"seeds": 3}, r"seeds takes a tuple, not 3"),
        ({"seeds": ["a"]}, r"seeds\[0\] takes int, not 'a'"),
        ({"task": 3}, r"config key task has keys below it, so it cannot be 3"),
        ({"seeds": ()}, r"seeds"),
        ({"seeds": (1, 1)}, r"seeds"),
        ({"seeds": ([0],)}, r"seeds\[0\] takes int, not \[0\]"),
        ({"teacher_seed": 2**32}, r"teacher_seed is 4294967296"),
        ({"student": {"frozen": ("[",)}}, r"student\.frozen: '\[' is not a regular expression"),
        ({"student": {"row_length": 32, "max_length": 64}}, r"student\.row_length is 32.*student\.max_length 64"),
        (
            {"student": {"accumulation": 9, "batch_size": 8}},
            r"student\.accumulation is 9.*student\.batch_size 8 examples",
        ),
    ],
)
def test_parse_is_strict(values, message):
    with pytest.raises(UserError, match=message):
        config.parse(values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 10, "num_heads": 4}, r"num_heads is 4"),
        ({"masks": 97}, r"masks is 97"),
        ({"row_length": 256}, r"row_length is 256: max_positions is only 128"),
    ],
)
def test_inconsistent_pretraining_settings_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        config.parse(values, PretrainConfig)


def test_integers_are_accepted_as_floats():
    assert config.parse({"student": {"learning_rate": 1}}).student.learning_rate == 1.0


def test_differences_name_changed_keys_except_seeds_and_objectives():
    old = dataclasses.asdict(ExperimentConfig())
    new = dataclasses.asdict(ExperimentConfig(student=ModelConfig(steps=5), seeds=(9,), objectives=("vanilla",)))
    assert config.differences(old, new) == ["student.steps: 1000 → 5"]
    more = dataclasses.asdict(ExperimentConfig(students={"x": ModelConfig()}, teachers={"y": FurtherTeacherConfig()}))
    assert config.differences(old, more) == ["teachers.y: added"]
    assert config.differences(more, old) == ["students.x: left out", "teachers.y: left out"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_every_config_in_the_repository_loads(path):
    schema = PretrainConfig if path.name.startswith("pretrain") else ExperimentConfig
    assert isinstance(config.load(str(path), [], schema), schema)


def test_without_a_home_directory_the_cache_must_be_named(monkeypatch, tmp_path):
    """As in a container whose user is a number without an entry in /etc/passwd."""

    def unknown_user(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown_user)
    with pytest.raises(
        UserError, match=r"^no home directory for downloads: set HOME or --config\.task\.cache_dir=DIR$"
    ):
        config.cache_dir(config.TaskConfig(name="xnli"))
    assert config.cache_dir(config.TaskConfig(name="xnli", cache_dir=str(tmp_path))) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert config.cache_dir(config.TaskConfig(name="xnli")) == tmp_path / ".cache" / "xtransfer"


def test_the_last_value_of_a_key_counts(file):
    twice = ["--config.seeds=(0,)", "--config.student.steps=3", "--config.seeds=(1,)", "--config.student.steps=4"]
    loaded = config.load(str(file), twice)
    assert (loaded.seeds, loaded.student.steps) == ((1,), 4)
    assert config.load(str(file), ["--config.task.labels=('a','b')", "--config.task.labels=()"]).task.labels == ()


def test_a_folder_may_have_a_colon_in_its_name(file):
    folder = file.parent / "c:d"
    folder.mkdir()
    moved = file.rename(folder / "some.py")
    assert config.load(str(moved)).student.steps == 7
    assert config.load(f"{moved}:9").student.steps == 9
    with pytest.raises(UserError, match=r"c:d/nowhere\.py: no such config file"):
        config.load(str(folder / "nowhere.py"))


@pytest.fixture
def file_with_an_objective(file):
    definition = "    config.objective.mix = {'base': 'monox_kd', 'temperature': 2, 'class_weights': ('a=2',)}\n"
    file.write_text(file.read_text().replace("    return config\n", f"{definition}    return config\n"))
    return str(file)


def test_objectives_have_settings_in_files_and_flags(file_with_an_objective):
    mix = ObjectiveConfig(base="monox_kd", temperature=2.0, class_weights=("a=2",))
    assert config.load(file_with_an_objective).objective == {"mix": mix}
    flags = ["objective.mix.temperature=0.5", "objective.mix.scale_by_t2=True", "objective.monox_kd.temperature=3"]
    loaded = config.load(file_with_an_objective, [f"--config.{flag}" for flag in flags])
    assert loaded.objective == {
        "mix": dataclasses.replace(mix, temperature=0.5, scale_by_t2=True),
        "monox_kd": ObjectiveConfig(temperature=3.0),
    }
    balanced = ["--config.objective.x.class_weights=balanced", "--config.transfer.class_weights=('a=2','b=3')"]
    loaded = config.load(file_with_an_objective, balanced)
    assert loaded.objective["x"] == ObjectiveConfig(class_weights=("balanced",))
    assert loaded.transfer.class_weights == ("a=2", "b=3")
    assert config.load(file_with_an_objective, ["--config.transfer.class_weights=balanced"]).transfer.class_weights == (
        "balanced",
    )
    off = config.load(file_with_an_objective, ["--config.objective.mix.class_weights=()"])
    assert off.objective["mix"].class_weights == ()
    assert config.parse(json.loads(json.dumps(dataclasses.asdict(loaded)))) == loaded


def test_a_file_sets_a_key_of_a_usual_objective(file):
    text = file.read_text()
    line = "    config.objective.monox_kd.temperature = 2\n    return config\n"
    file.write_text(text.replace("    return config\n", line))
    assert config.load(str(file)).objective == {"monox_kd": ObjectiveConfig(temperature=2.0)}
    flagged = config.load(str(file), ["--config.objective.monox_kd.scale_by_t2=True"])
    assert flagged.objective == {"monox_kd": ObjectiveConfig(temperature=2.0, scale_by_t2=True)}
    file.write_text(text.replace("    return config\n", line.replace("temperature", "temprature")))
    with pytest.raises(UserError, match=r"some\.py: .*temprature"):
        config.load(str(file))


def test_a_reference_between_settings_still_follows_a_flag(file_with_an_objective):
    """Entries are completed in place, so that they leave the rest of the config as it is."""
    text = Path(file_with_an_objective).read_text()
    reference = "    config.teacher.steps = config.student.get_ref('steps')\n    return config\n"
    Path(file_with_an_objective).write_text(text.replace("    return config\n", reference))
    flags = ["--config.student.steps=5", "--config.objective.mix.temperature=0.5"]
    assert config.load(file_with_an_objective, flags).teacher.steps == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("objective.mix.tempreture=2", r"objective\.mix\.tempreture; did you mean 'temperature'"),
        ("objective.mix.temperature=0", r"objective\.mix\.temperature is 0\.0: it must be between 0\.001"),
        ("objective.mix.temperature=hot", r"objective\.mix\.temperature"),
        (
            "objective.mix.temperature_on=student",
            r"objective\.mix\.temperature_on is 'student': choose one of teacher, both",
        ),
        ("objective.mix.base.x=1", r"unknown config key objective\.mix\.base\.x"),
        ("objective.mix=3", r"objective\.mix has keys below it: set one of them"),
        ("objective.a/b.base=vanilla", r"'a/b' cannot be a name here; use letters, digits, _, and -"),
        ("objective..base=vanilla", r"'' cannot be a name here"),
        ("objective=3", r"objective=3"),
        ("objectve.mix.base=vanilla", r"objectve; did you mean 'objective'"),
    ],
)
def test_a_bad_setting_of_an_objective_is_refused(file_with_an_objective, override, message):
    with pytest.raises(UserError, match=message) as caught:
        config.load(file_with_an_objective, [f"--config.{override}"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mix": 3}, r"config key objective\.mix has keys below it, so it cannot be 3"),
        (3, r"config key objective has keys below it, so it cannot be 3"),
        ({"mix": {"hard_weight": "1"}}, r"objective\.mix\.hard_weight takes float, not '1'"),
        ({"mix": {"hard_weight": -1}}, r"objective\.mix\.hard_weight is -1\.0: it must be between 0 and"),
        ({"mix": {"pseudo_labels": 1}}, r"objective\.mix\.pseudo_labels takes bool, not 1"),
        ({"mix": {"class_weights": "balanced"}}, r"objective\.mix\.class_weights takes a tuple"),
        ({"mix": {"name": "x"}}, r"unknown config key objective\.mix\.name"),
        ({"..": {}}, r"objective\.\.\.: '\.\.' cannot be a name here"),
        ({1: {}}, r"objective\.1: 1 cannot be a name here"),
    ],
)
def test_the_settings_of_an_objective_are_parsed_strictly(values, message):
    with pytest.raises(UserError, match=message):
        config.parse({"objective": values})


@given(st.text())
def test_an_objective_has_a_name_that_can_be_a_folder_or_is_refused(name):
    try:
        loaded = config.parse({"objective": {name: {"base": "vanilla"}}})
    except ConfigError as error:
        assert "\n" not in name or "cannot be a name here" in str(error)
        return
    assert list(loaded.objective) == [name]
    assert Path("students", name).parts == ("students", name) and not name.startswith((".", "-")) and name.isprintable()


def test_a_file_without_get_config_is_refused(file):
    file.write_text("x = 1\n")
    with pytest.raises(UserError, match=r"some\.py has no function get_config"):
        config.load(str(file))


def test_bytes_that_are_not_utf8_are_refused(file):
    with pytest.raises(UserError, match=r"config key task\.data_dir is '/x/\\udcff', which is not UTF-8: rename"):
        config.load(str(file), ["--config.task.data_dir=/x/\udcff"])


@pytest.mark.parametrize("name", ["[a]", "a*", "b?"])
def test_a_path_that_is_a_pattern_is_refused_also_if_only_the_current_directory_is(monkeypatch, tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    with pytest.raises(UserError, match="would not be found again: choose another task.cache_dir, or a link to it"):
        config.cache_dir(config.TaskConfig(cache_dir=str(folder)))
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match="choose another --workdir"):
        config.refuse_pattern(Path("w"), "--workdir")
    (tmp_path / "link").symlink_to(folder)
    assert config.refuse_pattern(tmp_path / "link", "--workdir") == tmp_path / "link"


@pytest.mark.parametrize(
    "key", ["task.data_dir", "task.cache_dir", "task.unlabelled_file", "teacher.checkpoint", "student.checkpoint"]
)
def test_object_storage_is_refused_for_every_path(file, key):
    with pytest.raises(UserError, match=f"^config key {key}: 'gs://bucket/x' is an address and not a path: give"):
        config.load(str(file), [f"--config.{key}=gs://bucket/x"])
    config.load(str(file), ["--config.task.text_column=http://schema.org/text"])


def test_object_storage_is_refused_for_a_checkpoint_to_start_from():
    with pytest.raises(UserError, match="^config key start_from: 's3://x' is an address"):
        config.parse({"start_from": "s3://x"}, PretrainConfig)
    with pytest.raises(UserError, match="^'s3://x' is an address"):
        config.user_path("s3://x")


@pytest.fixture
def file_with_teachers(file):
    """Return a config file with further teachers that set little."""
    entries = {
        "second": {"seed": 1},
        "ready": {"checkpoint": "classifier", "steps": 0},
        "adapted": {"lora": {"rank": 4}, "steps": 5},
        "soft": {"logits_file": "soft.jsonl"},
    }
    file.write_text(
        file.read_text().replace("    return config\n", f"    config.teachers = {entries!r}\n    return config\n")
    )
    return str(file)


def test_further_teachers_take_what_they_do_not_set_from_the_teacher(file_with_teachers):
    flags = ["--config.teacher.epochs=3", "--config.teacher.patience=2", "--config.teacher.lora.alpha=8"]
    flags += ["--config.teacher.lora.rank=2", "--config.teacher.max_length=77", "--config.teacher.languages=('en',)"]
    loaded = config.load(file_with_teachers, [*flags, "--config.teachers.second.learning_rate=1e-3"])
    teachers = loaded.teachers
    assert list(teachers) == ["adapted", "ready", "second", "soft"]
    assert {teacher.max_length for teacher in teachers.values()} == {77}
    second = teachers["second"]
    assert (second.epochs, second.patience, second.lora.rank, second.learning_rate) == (3.0, 2, 2, 1e-3)
    assert second.known_steps is None and second.learns and second.seed == 1 and second.languages == ()
    assert (teachers["adapted"].known_steps, teachers["adapted"].epochs) == (5, 0.0)
    assert (teachers["adapted"].lora.rank, teachers["adapted"].lora.alpha) == (4, 8.0)
    # Nothing trains these two, so they take no settings of training.
    assert teachers["ready"].is_ready_made and teachers["soft"].is_file
    assert {(one.patience, one.epochs, one.lora.rank) for one in (teachers["ready"], teachers["soft"])} == {(0, 0.0, 0)}


def test_an_epoch_of_a_teacher_is_no_ready_made_teacher(file):
    settings = config.load(str(file), ["--config.teacher.steps=0", "--config.teacher.epochs=2"])
    assert settings.teacher.learns and not settings.teacher.is_ready_made and settings.teacher.known_steps is None
    settings = config.load(str(file), ["--config.teacher.steps=0"])
    assert settings.teacher.is_ready_made and settings.teacher.known_steps == 0 and settings.student.learns


@pytest.mark.parametrize("kind", ["steps=0", "logits_file=soft.jsonl"])
@pytest.mark.parametrize("flag", ["lora.rank=4", "ema_decay=0.9", "reinit_layers=1", "patience=1"])
def test_settings_of_training_are_refused_for_a_teacher_that_is_not_trained(file, kind, flag):
    key = flag.partition("=")[0].replace(".", r"\.")
    with pytest.raises(
        UserError, match=rf"teacher\.{key} is [\d.]+, but this teacher is not trained here: set it to 0"
    ):
        config.load(str(file), [f"--config.teacher.{kind}", f"--config.teacher.{flag}"])


def test_the_loss_of_a_teacher_that_is_not_trained_is_refused(file_with_an_objective):
    flags = ["--config.teacher.steps=0", "--config.objective.teacher.label_smoothing=0.1"]
    with pytest.raises(UserError, match=r"objective\.teacher has settings, but no teacher is trained here: leave them"):
        config.load(file_with_an_objective, flags)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"german": 3}, r"config key teachers\.german has keys below it, so it cannot be 3"),
        (3, r"config key teachers has keys below it, so it cannot be 3"),
        ({"german": {"stps": 1}}, r"unknown config key teachers\.german\.stps; did you mean 'steps'"),
        ({"German": {"seed": 1}}, r"a teacher's name becomes the name of a folder, so 'German' must"),
        ({"a/b": {"seed": 1}}, r"config key teachers\.a/b: 'a/b' cannot be a name here"),
        ({"same": {}}, r"config keys teacher and teachers\.same are the same teacher"),
        ({"german": {"lora": {"rnk": 1}}}, r"unknown config key teachers\.german\.lora\.rnk; did you mean 'rank'"),
    ],
)
def test_further_teachers_are_parsed_strictly(values, message):
    with pytest.raises(UserError, match=message):
        config.parse({"teachers": values})


def test_a_flag_changes_a_group_of_settings_of_a_further_teacher(file_with_teachers):
    loaded = config.load(file_with_teachers, ["--config.teachers.second.lora.rank=3"])
    assert loaded.teachers["second"].lora.rank == 3 and loaded.teacher.lora.rank == 0
