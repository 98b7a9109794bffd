"""Several teachers from end to end on tiny files: two of one language, and one of another language."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import load
from xtransfer.describe import __main__ as describe
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.experiment import run
from xtransfer.runs.costs import read_costs
from xtransfer.runs.workdir import Workdir, read_task

FAST = ("--config.student.steps=4", "--config.student.evaluations=1", "--config.teacher.evaluations=1")
FAST += ("--config.objectives=('vanilla','monox_kd')", "--config.task.labelled=24", "--config.teacher.steps=6")
FAST += ("--config.teacher.learning_rate=3e-3",)


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    """Write a config file with teachers of English and German, and its data in three languages."""
    root = tmp_path_factory.mktemp("config_file")
    data = tiny.write_task(root / "data", languages=("en", "de", "fr"))
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    german = tiny.checkpoint(root / "german", seed=3, hidden=12)
    path = tiny.config_file(root / "tiny.py", data, teacher, student)
    entries = {
        "german": {
            "checkpoint": str(german),
            "languages": ("de",),
            "steps": 6,
            "evaluations": 1,
            "learning_rate": 3e-3,
        },
        "second": {"seed": 1, "weight": 3.0, "steps": 1, "evaluations": 1, "learning_rate": 3e-3},
    }
    text = path.read_text().replace("    return config", f"    config.teachers = {entries!r}\n    return config")
    path.write_text(text.replace("config.seeds = (0,)", "config.seeds, config.task.target_languages = (0,), ('fr',)"))
    return path


def start(config_file, workdir, *flags):
    main.main(["--config", str(config_file), "--workdir", str(workdir), *FAST, *flags])


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("several") / "run"
    start(config_file, workdir)
    return workdir


def stores(workdir):
    """Return the manifest, the ids, the logits, and the disagreement of each store, by its number of rows and kind."""
    result = {}
    for directory in (workdir / "logits").iterdir():
        manifest = json.loads((directory / "manifest.json").read_text())
        ids = (directory / "ids.txt").read_text().splitlines()
        path = directory / "disagreement.npy"
        disagreement = np.load(path) if path.exists() else None
        result[directory.name] = manifest, ids, np.load(directory / "shard-00000.npy"), disagreement
    return result


def log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_student_learns_from_the_mean_of_those_that_read_each_language(finished):
    found = list(stores(finished).values())
    (mean,) = [store for store in found if store[3] is not None]
    english = [store for store in found if store[3] is None and "/en/" in store[1][0]]
    (german,) = [store for store in found if store[3] is None and "/de/" in store[1][0]]
    assert len(english) == 2 and len(mean[1]) == 128 and all(len(store[1]) == 64 for store in (*english, german))
    assert not np.allclose(english[0][2], english[1][2])
    rows = {id_: row for id_, row in zip(german[1], log_softmax(german[2]), strict=True)}
    for id_, row, disagreement in zip(mean[1], mean[2], mean[3], strict=True):
        if id_ in rows:
            np.testing.assert_allclose(row, rows[id_], atol=1e-5)
            assert disagreement == pytest.approx(0, abs=1e-6)
    one, three = (np.exp(log_softmax(store[2])) for store in english)
    candidates = [(one + 3 * three) / 4, (3 * one + three) / 4]  # the stores' names do not say whose they are
    actual = np.exp(mean[2][[mean[1].index(id_) for id_ in english[0][1]]])
    assert min(np.abs(actual - candidate).max() for candidate in candidates) < 1e-5
    assert 0 < mean[3].max() <= math.log(2) + 1e-6


def test_each_teacher_has_a_run_of_its_own_and_everything_is_recorded(finished):
    assert {path.parent.relative_to(finished).as_posix() for path in finished.rglob("metrics.jsonl")} == {
        "teacher",
        "teachers/german",
        "teachers/second",
        "students/vanilla/seed-0",
        "students/monox_kd/seed-0",
    }
    assert sorted(path.name for path in (finished / "encoders").iterdir()) == [
        "student",
        "teacher",
        "teachers.german",
        "teachers.second",
    ]
    task = read_task(Workdir(finished))
    assert task.target_languages == ("fr",) and task.teachers.keys() == {"teachers.german", "teachers.second"}
    results = (finished / "report" / "results.md").read_text()
    assert "3 teachers: each example has the mean of the probabilities" in results
    assert "reads de, weight 1." in results and "reads en, weight 3." in results
    languages = {json.loads(line)["language"] for line in (finished / "results.jsonl").read_text().splitlines()}
    assert languages == {"en", "fr"}


def test_it_resumes_and_is_evaluated(config_file, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*.npy")}
    start(config_file, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.npy")} == before
    rows = (finished / "results.jsonl").read_bytes()
    (finished / "results.jsonl").unlink()
    evaluate.main(["--workdir", str(finished)])
    assert sorted((finished / "results.jsonl").read_bytes().splitlines()) == sorted(rows.splitlines())


def test_a_damaged_disagreement_is_computed_again(config_file, finished):
    (path,) = (finished / "logits").glob("*/disagreement.npy")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    shutil.rmtree(finished / "students" / "monox_kd")
    start(config_file, finished)
    assert path.read_bytes() == content


def test_a_changed_weight_is_refused_and_a_moved_teacher_is_not(config_file, finished, tmp_path):
    with pytest.raises(UserError, match=r"teachers\.second\.weight: 3\.0 → 2\.0"):
        run(load(str(config_file), [*FAST, "--config.teachers.second.weight=2"]), finished)
    german = Path(load(str(config_file)).teachers["german"].checkpoint)
    copy = shutil.copytree(german, tmp_path / "elsewhere")
    start(config_file, finished, f"--config.teachers.german.checkpoint={copy}")


def test_the_languages_are_described_before_training_and_the_teachers_once_they_have_labelled(
    config_file, finished, capsys
):
    describe.main(["--config", str(config_file), *FAST])
    page = capsys.readouterr().out
    assert "| none | de | U | 40 |" in page and "with --workdir, once it has labelled this text" in page
    for row in ("| teacher | en | L | 24 |", "| teachers.german | de | U | 40 |", "| student | de | L | 24 |"):
        assert row in page
    assert "| teacher | de | L |" not in page
    describe.main(["--config", str(config_file), *FAST, "--workdir", str(finished)])
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    named = [(line[0].removeprefix("| "), *line[1:4]) for line in lines if len(line) == 9]
    for row in [("teachers.german", "de", "L", "24"), ("teachers.second", "en", "U", "40"), ("mean", "de", "U", "40")]:
        assert row in named
    disagreements = {tuple(line[:3]): line[8] for line in lines if line[0] == "| mean"}
    assert disagreements["| mean", "de", "U"] == "0.000 |" != disagreements["| mean", "en", "U"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.task.target_languages=('fr','de')"], r"teachers\.german\.languages has 'de', which task\.target_l"),
        (["--config.task.target_languages=()"], r"target_languages is empty, which makes 'de' a target, and a teacher"),
        (
            ["--config.teacher.languages=('de',)", "--config.teachers.second.languages=('de',)"],
            r"no teacher reads task",
        ),
        (["--config.teachers.german.languages=('xx',)"], r"no data in 'xx'"),
        (
            ["--config.teachers.german.languages=('de','de')"],
            r"teachers\.german\.languages is .*: name each language once",
        ),
        (["--config.teachers.second.weight=0"], r"teachers\.second\.weight is 0: leave this teacher out instead"),
        (["--config.teachers.third.weight=1"], r"no such teacher \(its teachers: german, second\)"),
        (["--config.teachers.german.stps=1"], r"unknown config key teachers\.german\.stps; did you mean 'steps'"),
        (["--config.teachers.german.checkpoint=/nowhere"], r"/nowhere"),
        (
            ["--config.teachers.german.logits_file=/none.jsonl"],
            r"teachers\.german\.logits_file /none\.jsonl: no such file",
        ),
        (
            ["--config.teachers.second.seed=0", "--config.teachers.second.steps=6", "--config.teachers.second.weight=9"]
            + ["--config.teacher.evaluations=1"],
            r"config keys teacher and teachers\.second are the same teacher",
        ),
        (
            ["--config.task.unlabelled_from=file", "--config.task.unlabelled_file=u.tsv"],
            r"teachers read 2 languages, so name the file's column of the language in task\.language_column",
        ),
    ],
)
def test_teachers_that_make_no_sense_together_are_refused(config_file, tmp_path, flags, message):
    with pytest.raises(UserError, match=message) as caught:
        run(load(str(config_file), [*FAST, *flags]), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "config.json").exists()


def test_settings_of_several_teachers_are_refused_for_one(config_file, tmp_path):
    text = "".join(line for line in config_file.read_text().splitlines(True) if "config.teachers" not in line)
    (tmp_path / "one.py").write_text(text)
    for flag, message in (
        ("--config.teacher.weight=2", r"teacher\.weight is 2, but there is only one teacher"),
        ("--config.transfer.teacher_mean=logits", r"teacher_mean is 'logits', but there is only one teacher"),
    ):
        with pytest.raises(UserError, match=message):
            load(str(tmp_path / "one.py"), [flag])


def test_labels_have_no_mean_of_logits(config_file, tmp_path):
    ids = [f"files/train/de/{i}" for i in range(64)]
    rows = [json.dumps({"id": id_, "label": "good"}) for id_ in ids]
    (tmp_path / "labels.jsonl").write_text("\n".join(rows) + "\n")
    flag = f"--config.teachers.german.logits_file={tmp_path / 'labels.jsonl'}"
    with pytest.raises(UserError, match="teacher_mean is 'logits', and .*labels.jsonl has labels, which have none"):
        run(load(str(config_file), [*FAST, flag, "--config.transfer.teacher_mean=logits"]), tmp_path / "run")
    start(config_file, tmp_path / "run", flag)
    assert not (tmp_path / "run" / "teachers" / "german").exists()
    facts = json.loads((tmp_path / "run" / "task.json").read_text())
    assert facts["teachers_logits"].keys() == {"teachers.german"} and "teacher_logits" not in facts


def test_a_sweep_over_a_weight_trains_every_teacher_once(config_file, tmp_path):
    start(config_file, tmp_path / "sweep", "--sweep", "teachers.second.weight=1,3")
    first, second = (tmp_path / "sweep" / "points" / f"teachers.second.weight={value}" for value in (1, 3))
    trained = [
        {run.run for run in read_costs(Workdir(point)) if run.stage != "evaluation"} for point in (first, second)
    ]
    teachers = {"teacher", "teachers/german", "teachers/second"}
    assert trained[0] == {*teachers, "students/vanilla/seed-0", "students/monox_kd/seed-0"}
    assert trained[1] == {"students/monox_kd/seed-0"}
    means = [next((point / "logits").glob("*/disagreement.npy")).parent.name for point in (first, second)]
    assert means[0] != means[1]
