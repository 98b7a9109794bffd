"""The comparison of two objectives: its table, its files, and its errors."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.predicted import workdir
from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.evaluation.significance import mcnemar, wilson
from xtransfer.report import __main__ as report

REPOSITORY = Path(__file__).parents[2]
# Of 40 items: vanilla gets 20, and monox_kd the same ones and more.
HALF, MORE, MOST = [1, 0] * 20, [1, 0] * 10 + [1] * 20, [1] * 38 + [0] * 2
RIGHT = {
    "vanilla": {seed: {"en": HALF, "de": HALF, "fr": HALF} for seed in (0, 1)},
    "monox_kd": {seed: {"en": HALF, "de": MORE, "fr": MOST} for seed in (0, 1)},
}


@pytest.fixture
def run(tmp_path):
    """Return the root of a workdir with two objectives."""
    return workdir(tmp_path / "run", RIGHT, name="sib200").root


def test_the_command_prints_and_writes_the_comparison(run):
    command = [sys.executable, "-m", "xtransfer.report", "--workdir", str(run), "--compare", "monox_kd", "vanilla"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert (result.returncode, result.stderr) == (0, "")
    text = (run / "report" / "compare-monox_kd-vanilla.md").read_text()
    assert text.startswith("# sib200: monox_kd minus vanilla, accuracy on test\n")
    table = [line for line in text.splitlines() if line.startswith("| ")]
    # A difference of 0 for every item and seed; McNemar's p of 10 items against none, and of 19.
    half, more = "50.0 [35.2, 64.8]", "75.0 [59.8, 85.8]"  # Wilson's intervals of 20 and 30 of 40
    assert table[2] == f"| en (source) | 40 | {half} | {half} | +0.0 | [+0.0, +0.0] | 1.000 | – | 1.000 |"
    assert table[3].startswith(f"| de | 40 | {more} | {half} | +25.0 | [+")
    assert table[3].endswith(f"| {mcnemar(10, 0):.3f} |") and table[4].endswith("| <0.001 |")
    assert table[5].startswith("| avg of targets | 80 | 85.0 | 50.0 | +35.0 | [+") and table[5].endswith("| – | – |")
    assert "A text and its translations are resampled together." in text
    for number in ("+25.0", "+45.0", "+35.0", "paired by test item and seed (0, 1)"):
        assert number in " ".join(result.stdout.split())


def test_the_rows_are_shares_for_programs(run):
    report.main(["--workdir", str(run), "--compare", "monox_kd", "vanilla"])
    lines = (run / "report" / "compare-monox_kd-vanilla.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["language"] for row in rows] == ["en", "de", "fr", None]
    german = rows[1]
    assert (german["a"], german["b"], german["split"], german["count"]) == ("monox_kd", "vanilla", "test", 40)
    assert (german["accuracy_a"], german["difference"]) == (0.75, 0.25)
    assert german["accuracy_a_interval"] == list(wilson(0.75, 40))
    assert german["difference_by_seed"] == {"0": 0.25, "1": 0.25}
    assert german["difference_interval"][0] < 0.25 < german["difference_interval"][1]
    # Far out in the tail: 10 items against none, and 19 against 1. Holm doubles the smaller p-value of the two.
    assert german["p"] == german["p_holm"] == pytest.approx(math.erfc(math.sqrt(10 / 2)))
    assert rows[2]["p"] == pytest.approx(math.erfc(18 / math.sqrt(20 * 2)))
    assert rows[2]["p_holm"] == pytest.approx(2 * rows[2]["p"])
    assert (rows[0]["p_holm"], rows[3]["p_holm"], rows[3]["p_mcnemar"]) == (None, None, None)


def test_two_workdirs_are_named_and_paired(tmp_path, capsys):
    first = workdir(tmp_path / "old", {"monox_kd": {0: RIGHT["vanilla"][0]}})
    second = workdir(tmp_path / "new", {"monox_kd": RIGHT["monox_kd"]})
    report.main(["--compare", f"{second.root}:monox_kd", f"{first.root}:monox_kd"])
    output = " ".join(capsys.readouterr().out.split())
    assert "minireviews: new:monox_kd minus old:monox_kd" in output
    assert "p (McNemar) is over items, for this run alone; exact below 25 discordant items" in output
    assert "Interval and p of a difference: items by 10,000 resamples; two-sided." in output
    assert "There is one seed" in output and "Left out, because only one of the two has them: seed 1." in output
    assert "translations" not in output
    assert sorted(path.name for path in (second.root / "report").iterdir()) == [
        "compare-new-monox_kd-old-monox_kd.jsonl",
        "compare-new-monox_kd-old-monox_kd.md",
    ]


def test_workdirs_with_the_same_name_are_told_apart(tmp_path, capsys):
    first, second = (
        workdir(tmp_path / name / "run", {"monox_kd": RIGHT["monox_kd"]}, labelled=labelled)
        for name, labelled in (("a", 64), ("b", 128))
    )
    report.main(["--compare", f"{first.root}:monox_kd", f"{second.root}:monox_kd"])
    output = " ".join(capsys.readouterr().out.split())
    assert "a/run:monox_kd minus b/run:monox_kd" in output
    assert "Settings that differ, A and B: task.labelled 64 and 128." in output
    assert (first.root / "report" / "compare-a-run-monox_kd-b-run-monox_kd.md").exists()


def test_another_split_or_protocol_has_files_of_its_own(run, capsys):
    report.main(["--workdir", str(run), "--compare", "monox_kd", "vanilla"])
    rows = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    storage.write_jsonl(run / "results.jsonl", [*rows, *(row | {"selection": "last"} for row in rows)])
    report.main(["--workdir", str(run), "--compare", "monox_kd", "vanilla", "--selection", "last"])
    names = sorted(path.name for path in (run / "report").glob("*.md"))
    assert names == ["compare-monox_kd-vanilla-last.md", "compare-monox_kd-vanilla.md"]
    output = " ".join(capsys.readouterr().out.split())
    assert "items by 10,000 resamples, seeds by Student's t" in output
    assert "for these runs alone; an item counts for the objective that is right on it in more runs; exact" in output
    assert "There is one seed" not in output and "Settings that differ" not in output


def test_intervals_of_accuracies_are_printed_if_they_fit(run, capsys, monkeypatch):
    for width, fits in ((80, False), (200, True)):
        monkeypatch.setattr("xtransfer.runtime.terminal.console.width", width)
        report.main(["--workdir", str(run), "--compare", "monox_kd", "vanilla"])
        assert ("[35.2, 64.8]" in capsys.readouterr().out) == fits


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--compare", "monox_kd", "vanilla"],
            "--compare monox_kd: name one workdir with --workdir DIR, or write DIR:",
        ),
        (["--workdir", "RUN", "--compare", "vanilla", "vanilla"], "name two objectives, or two workdirs"),
        (["--workdir", "RUN", "--compare", "RUN:vanilla", "vanilla"], "name two objectives, or two workdirs"),
        (["--workdir", "RUN", "--compare", "monox_kd", "vanila"], "did you mean 'vanilla'"),
        (["--workdir", "RUN", "--metric", "macro_f1", "--compare", "a", "b"], "compares accuracy only"),
        (["--workdir", "RUN", "--metric", "acuracy"], "no metric 'acuracy'; did you mean 'accuracy'"),
        (["--workdir", "RUN", "--metric", "log_loss"], "the report is in percent; read this metric in results.jsonl"),
        ([], "name the workdirs to report on: --workdir DIR"),
    ],
)
def test_a_fault_in_the_flags_is_one_line(run, flags, message):
    with pytest.raises(UserError) as caught:
        report.main([flag.replace("RUN", str(run)) for flag in flags])
    assert message in str(caught.value) and "\n" not in str(caught.value)
