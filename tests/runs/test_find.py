"""Finding a finished run and its step by objective, seed, and protocol, and the errors if it is missing."""

import json
import shutil

import pytest

from tests.helpers import tiny_run
from xtransfer.errors import UserError
from xtransfer.runs.find import find_run, identify_run, list_runs, selected_steps
from xtransfer.runs.workdir import Workdir, read_task


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a finished workdir with a teacher and one vanilla student."""
    root = tmp_path_factory.mktemp("root")
    tiny_run.workdir(tiny_run.setting(root), root / "run", "--config.objectives=('vanilla',)")
    return root / "run"


@pytest.fixture
def copy(run, tmp_path):
    """Return a copy of the workdir that a test may damage."""
    return shutil.copytree(run, tmp_path / "run")


def update_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_student_is_found(run):
    selected = find_run(Workdir(run), "vanilla", 0, "last")
    assert (selected.directory, selected.step, selected.selection) == (run / "students/vanilla/seed-0", 6, "last")
    assert (selected.is_teacher, selected.languages, selected.settings.max_length) == (False, ("en", "de"), 9)
    assert selected.fingerprint == json.loads((run / "task.json").read_text())["student_checkpoint"]


def test_the_teacher_needs_no_seed_and_has_one_language(run):
    selected = find_run(Workdir(run), "teacher", None, "source_dev")
    assert (selected.directory, selected.seed, selected.step) == (run / "teacher", 0, 2)
    assert (selected.is_teacher, selected.languages, selected.settings.max_length) == (True, ("en",), 12)
    assert selected.fingerprint == json.loads((run / "task.json").read_text())["teacher_checkpoint"]


def test_the_selected_step_is_the_best_on_the_dev_split(run):
    directory = run / "students/vanilla/seed-0"
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["dev_accuracy"], -row["step"]))
    assert selected_steps(directory)["source_dev"] == best["step"]
    assert selected_steps(directory)["last"] == rows[-1]["step"] == 6


def test_the_task_record_is_read(run):
    task = read_task(Workdir(run))
    assert (task.name, task.labels, task.synthetic) == ("files", ("bad", "good"), False)
    assert (task.source_language, task.target_languages) == ("en", ("de",))


def test_every_started_run_is_listed(copy):
    """List runs that the config no longer has, because objectives and seeds may change between starts."""
    for name in ("students/monox_kd/seed-10", "students/monox_kd/seed-2", "students/monox_kd/seed-x"):
        (copy / name).mkdir(parents=True)
    known = "teacher, students/monox_kd/seed-2, students/monox_kd/seed-10, students/vanilla/seed-0"
    assert list_runs(Workdir(copy)) == known
    assert identify_run(Workdir(copy), copy / "students/monox_kd/seed-10") == ("default", "monox_kd", 10)
    assert identify_run(Workdir(copy), copy / "students/monox_kd/seed-x") is None
    assert list_runs(Workdir(copy / "nothing")) == "none yet"


@pytest.mark.parametrize(
    ("objective", "seed", "message"),
    [
        ("vanila", 0, r"no run of 'vanila'; did you mean 'vanilla'\?; runs: teacher, students/vanilla/seed-0"),
        ("vanilla", 7, "no run of vanilla with seed 7; runs: teacher, students/vanilla/seed-0"),
        ("vanilla", None, "vanilla has a run for each seed; name one; runs: teacher, students/vanilla/seed-0"),
        ("teacher", 3, "the teacher's seed is 0, not 3"),
        ("../students/vanilla", 0, "no run of '../students/vanilla'"),
    ],
)
def test_a_missing_run_is_refused_with_a_hint(run, objective, seed, message):
    with pytest.raises(UserError, match=message):
        find_run(Workdir(run), objective, seed, "last")


def test_each_protocol_selects_its_step(copy):
    rows = [{"step": 2, "dev_accuracy": 0.9}, {"step": 4, "dev_accuracy": 0.9}, {"step": 6, "dev_accuracy": 0.1}]
    path = copy / "students" / "vanilla" / "seed-0" / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert find_run(Workdir(copy), "vanilla", 0, "source_dev").step == 2
    assert find_run(Workdir(copy), "vanilla", 0, "last").step == 6


def test_a_score_selects_where_there_is_one(copy):
    losses = {2: 0.4, 4: 0.3, 6: 0.3}
    rows = [{"step": step, "dev_accuracy": loss, "dev_score": -loss} for step, loss in losses.items()]
    path = copy / "students" / "vanilla" / "seed-0" / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert find_run(Workdir(copy), "vanilla", 0, "source_dev").step == 4


@pytest.mark.parametrize("selection", ["target_dev", "lst"])
def test_an_unknown_protocol_is_refused(run, selection):
    with pytest.raises(UserError, match=f"selection '{selection}': one of source_dev, last"):
        find_run(Workdir(run), "teacher", None, selection)


def test_a_teacher_that_was_never_started_is_refused(copy):
    shutil.rmtree(copy / "teacher")
    with pytest.raises(UserError, match="teacher: this run is not finished"):
        find_run(Workdir(copy), "teacher", None, "last")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"labels": ["bad"]}, "expected two or more labels"),
        ({"labels": "bad"}, "labels = 'bad', expected a list of names"),
        ({"target_languages": [1]}, r"target_languages = \[1\], expected a list of names"),
        ({"student_checkpoint": None}, "student_checkpoint = None, expected text"),
        ({"synthetic": 1}, "expected two or more labels, and synthetic as true or false"),
    ],
)
def test_a_broken_task_record_is_refused(copy, values, message):
    update_json(copy / "task.json", **values)
    with pytest.raises(
        UserError, match=f"task.json: {message}.*remove this file and run python -m xtransfer.main again"
    ):
        find_run(Workdir(copy), "teacher", None, "last")


def test_a_workdir_without_its_records_is_refused(copy):
    (copy / "task.json").unlink()
    with pytest.raises(UserError, match=r"task\.json: no such file: start the experiment again"):
        find_run(Workdir(copy), "teacher", None, "last")
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"no config\.json, so no experiment has been started"):
        find_run(Workdir(copy), "teacher", None, "last")
