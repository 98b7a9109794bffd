"""An objective that a config defines: configs/own_objective.py in a tiny run, from the plan to predictions."""

import json
from pathlib import Path

import pytest

from tests.helpers import tiny
from xtransfer import experiment, main
from xtransfer.config import load
from xtransfer.errors import UserError
from xtransfer.export.model_card import model_card
from xtransfer.predict import __main__ as predict
from xtransfer.runs.find import find_run
from xtransfer.runs.workdir import Workdir

CONFIG = Path(__file__).parents[1] / "configs" / "own_objective.py"
LOSS = "0.5 · CE(labels; label smoothing 0.1) + 0.5 · KL(the teacher's logits; T = 2) on labelled and unlabelled text"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Return the flags that give the config a tiny task of 30 bad and 10 good examples, and tiny encoders."""
    root = tmp_path_factory.mktemp("own")
    data = tiny.write_task(root / "data")
    lines = (data / "en" / "train.tsv").read_text().splitlines()
    bad, good = (sorted(line for line in lines[1:] if line.endswith(label)) for label in ("bad", "good"))
    (data / "en" / "train.tsv").write_text("\n".join([lines[0], *bad[:30], *good[:10], ""]))
    (data / "en" / "unlabelled.tsv").write_text("\n".join([lines[0], *bad[30:], *good[10:], ""]))
    settings = {"task.name": "files", "task.data_dir": data, "task.labelled": 0, "task.unlabelled": 0, "seeds": "(0,)"}
    for role in ("teacher", "student"):
        settings |= {f"{role}.checkpoint": tiny.checkpoint(root / role), f"{role}.steps": 12, f"{role}.evaluations": 1}
        settings |= {f"{role}.pooling": "mean", f"{role}.max_length": 12, f"{role}.learning_rate": 1e-2}
    settings["objectives"] = "('vanilla','labels_and_kd')"
    settings["objective.vanilla.class_weights"] = "('balanced',)"
    return [f"--config.{key}={value}" for key, value in settings.items()]


@pytest.fixture(scope="module")
def finished(arguments, tmp_path_factory):
    """Return the workdir of a finished run, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        log = []
        patch.setattr(experiment.terminal, "log", log.append)
        main.main(["--config", str(CONFIG), "--workdir", str(workdir), *arguments])
    return workdir, "\n".join(log)


def test_the_plan_has_the_effective_settings(finished):
    log = finished[1].splitlines()
    start = log.index("objectives, with their effective settings:")
    assert log[start + 1 : start + 4] == [
        "  teacher        CE(labels) on labelled text",
        "  vanilla        CE(labels; class weights balanced) on labelled text",
        f"  labels_and_kd  {LOSS}",
    ]
    # 40 / (2 · 30) and 40 / (2 · 10)
    assert "balanced class weights: bad 0.6667, good 2" in log


def test_its_name_is_in_results_reports_and_predictions(finished):
    workdir, _ = finished
    rows = [json.loads(line) for line in (workdir / "results.jsonl").read_text().splitlines()]
    assert {row["objective"] for row in rows} == {"teacher", "vanilla", "labels_and_kd"}
    table = [
        line.split("|")[1].strip() for line in (workdir / "report/results.md").read_text().splitlines() if "|" in line
    ]
    assert table[2:] == ["teacher", "vanilla", "labels_and_kd"]
    page = (workdir / "report/report.html").read_text()
    assert LOSS.replace("'", "&#x27;") in page and "CE(labels; class weights balanced)" in page
    predictions = next((workdir / "predictions/students/labels_and_kd/seed-0").glob("*/test-de.jsonl"))
    assert len(predictions.read_text().splitlines()) == 17


def test_it_is_compared_with_vanilla_in_the_headline(finished):
    headline = (finished[0] / "report/results.md").read_text().splitlines()[2]
    assert headline.startswith("labels_and_kd ") and "direct fine-tuning (vanilla)" in headline


def test_it_predicts_and_has_a_card(finished, tmp_path):
    workdir, _ = finished
    (tmp_path / "texts.jsonl").write_text('{"text": "the film is good"}\n')
    model = workdir / "students" / "labels_and_kd" / "seed-0"
    predict.main(
        ["--model", str(model), "--input", str(tmp_path / "texts.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    )
    assert json.loads((tmp_path / "out.jsonl").read_text())["label"] in ("bad", "good")
    card = model_card(find_run(Workdir(workdir), "labels_and_kd", 0, "source_dev"), [])
    assert f"(knowledge distillation, temperature 2) and gold labels. Loss: {LOSS}." in card
    assert "from the unlabelled split" in card and "- **Teacher**" in card


def test_a_change_of_its_definition_is_refused(finished, arguments):
    changed = "--config.objective.labels_and_kd.hard_weight=0.7"
    with pytest.raises(UserError, match=r"\(objective\.labels_and_kd\.hard_weight: 0\.5 → 0\.7\)"):
        main.main(["--config", str(CONFIG), "--workdir", str(finished[0]), *arguments, changed])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "objective.vanilla.class_weights=('god=2',)",
            r"objective 'vanilla': .*'god'; the task has bad, good; did you mean",
        ),
        ("objective.teacher.class_weights=('god=2',)", r"objective 'teacher': .*'god'"),
        (
            "objective.labels_and_kds.temperature=1",
            r"no objective 'labels_and_kds'.*set objective\.labels_and_kds\.base",
        ),
        ("objective.labels_and_kd.threshold=0.5", r"but labels_and_kd has no pseudo-labels"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_before_anything_is_written(arguments, tmp_path, flag, message):
    with pytest.raises(UserError, match=message):
        main.main(["--config", str(CONFIG), "--workdir", str(tmp_path / "run"), *arguments, f"--config.{flag}"])
    assert not (tmp_path / "run" / "config.json").exists()
    with pytest.raises(UserError, match=message):
        experiment.check(load(str(CONFIG), [*arguments, f"--config.{flag}"]))
