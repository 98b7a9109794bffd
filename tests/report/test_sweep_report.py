"""The report of a sweep: its points in every state, and the names of its files."""

import json

import pytest

from tests.report.test_report import RECORD, make_rows
from xtransfer.config import ExperimentConfig
from xtransfer.errors import UserError
from xtransfer.report import __main__ as report
from xtransfer.report.sweep_report import report_sweep
from xtransfer.runs import sweep
from xtransfer.runs.workdir import as_record

KEY = "student.learning_rate"
GOOD, OTHER = f"{KEY}=0.1", f"{KEY}=0.2"
ONE_TEACHER = [row for row in make_rows() if row["objective"] == "teacher"]
NO_JAPANESE = [row for row in make_rows() if row["language"] != "ja"]


def make_sweep(root, **points):
    """Write a sweep with the rows of each point, by its learning rate; None is a point that has only started."""
    rates = {name: float(name.replace("_", ".")) for name in points}
    config = ExperimentConfig()
    sweep.record(root, [sweep.Point(f"{KEY}={rate}", {KEY: rate}, config) for rate in rates.values()])
    for name, rows in points.items():
        directory = sweep.directory(root, f"{KEY}={rates[name]}")
        directory.mkdir(parents=True)
        record = as_record(config)
        record["task"] |= {"name": "files", "source_language": "en", "target_languages": ["de", "ja"]}
        (directory / "config.json").write_text(json.dumps(record))
        (directory / "task.json").write_text(json.dumps(RECORD))
        if rows is not None:
            (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.mark.parametrize(
    ("rows", "note"),
    [
        (None, f"No results yet: {OTHER}."),
        (ONE_TEACHER, f"No results yet: {OTHER}."),
        ([], f"No results yet: {OTHER}."),
        (NO_JAPANESE, f"Left out: {OTHER}: ROOT/points/{OTHER}: vanilla seed 0 has no test accuracy in ja: evaluate"),
    ],
)
def test_a_point_without_complete_results_is_named_and_the_others_are_reported(tmp_path, capsys, rows, note):
    root = make_sweep(tmp_path, **{"0_1": make_rows(), "0_2": rows})
    report.main(["--workdir", str(root), "--output", str(tmp_path / "pages")])
    text = (root / "report" / "sweep.md").read_text()
    assert "| 0.1 | 90.0 | 60.5 ± 0.7 | 67.0 ± 1.4 | +6.5 [-12.6, +25.6] |" in text and "| 0.2 |" not in text
    assert f"- {note.replace('ROOT', str(root))}" in text
    assert (root / "report" / "sweep.png").is_file()
    assert not (sweep.directory(root, OTHER) / "report").exists()


def test_a_damaged_point_is_left_out(tmp_path):
    root = make_sweep(tmp_path, **{"0_1": make_rows(), "0_2": make_rows()})
    results = sweep.directory(root, OTHER) / "results.jsonl"
    results.write_bytes(results.read_bytes()[:-9])
    report_sweep(root)
    assert f"Left out: {OTHER}: {results}:13: the last line is cut off" in (root / "report" / "sweep.md").read_text()


def test_a_sweep_in_which_no_point_has_a_student_says_so(tmp_path):
    root = make_sweep(tmp_path, **{"0_1": ONE_TEACHER, "0_2": None})
    with pytest.raises(UserError, match="no point of the sweep has results yet: start it again with"):
        report_sweep(root)


def test_a_metric_that_no_point_has_is_the_error(tmp_path):
    root = make_sweep(tmp_path, **{"0_1": make_rows(), "0_2": None})
    with pytest.raises(UserError, match="no results: macro_f1 on split test, .* available: metric accuracy"):
        report_sweep(root, metric="macro_f1")


def test_an_oracle_is_named_and_replaces_no_file(tmp_path, monkeypatch):
    titles = []
    monkeypatch.setattr("xtransfer.report.sweep_plot.plot", lambda panels, title, note: titles.append(title) or b"")
    oracle = make_rows(selection="target_dev")
    root = make_sweep(tmp_path, **{"0_1": make_rows() + oracle})
    report_sweep(root)
    headline = {path: path.read_bytes() for path in (root / "report").iterdir()}
    report_sweep(root, selection="target_dev")
    assert {path: path.read_bytes() for path in headline} == headline
    names = {path.name for path in (root / "report").iterdir()}
    assert {"sweep-target_dev.md", "sweep-target_dev.jsonl", "sweep-target_dev.png"} < names
    description = "best on each language's own dev split: an oracle, not zero-shot"
    assert titles[1].endswith(f"checkpoint: {description}") and "oracle" not in titles[0]
    assert (root / "report" / "sweep-target_dev.md").read_text().startswith(f"# {titles[1]}\n")


def test_the_intervals_of_gains_say_what_they_go_over(tmp_path):
    root = make_sweep(tmp_path, **{"0_1": make_rows()})
    report_sweep(root)
    text = (root / "report" / "sweep.md").read_text()
    assert (
        "paired by run, with 95 % intervals by Student's t over 2 seeds; one labelled sample and one teacher; " in text
    )
    root = make_sweep(tmp_path / "single", **{"0_1": [row for row in make_rows() if row["seed"] == 0]})
    report_sweep(root)
    assert "paired by run." in (root / "report" / "sweep.md").read_text()
