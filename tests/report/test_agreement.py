"""The table of students' agreement with their teacher."""

import json

import pytest

from tests.report.test_report import make_rows, make_workdir
from xtransfer.errors import UserError
from xtransfer.report import __main__ as report
from xtransfer.runs import sweep

AGREEMENT = {"vanilla": {0: (0.7,), 1: (0.8,)}, "monox_kd": {0: (0.95,), 1: (0.95,)}}


def test_agreement_and_accuracy_stand_side_by_side(tmp_path, capsys):
    root = make_workdir(tmp_path / "a", make_rows() + make_rows(AGREEMENT, metric="teacher_agreement"))
    report.main(["--workdir", str(root), "--metric", "teacher_agreement"])
    text = (root / "report" / "teacher_agreement.md").read_text()
    assert "| objective | teacher_agreement, en (source) | accuracy, en (source) |" in text
    # sd of 0.7 and 0.8 is 0.1 / √2
    assert "| teacher | – | 90.0 |" in text
    assert "| vanilla | 75.0 ± 7.1 | 72.0 ± 2.8 |" in text and "| monox_kd | 95.0 ± 0.0 | 81.0 ± 1.4 |" in text
    assert "over 2 seeds; one labelled sample and one teacher. Checkpoint of each student: best on the source" in text
    assert "the share of 1,000 examples on which a student predicts the same class" in text
    assert [path.name for path in (root / "report").iterdir()] == ["teacher_agreement.md"]
    assert "75.0 ± 7.1" in capsys.readouterr().out


def test_other_selections_have_files_of_their_own(tmp_path):
    rows = make_rows(AGREEMENT, metric="teacher_agreement", selection="last")
    root = make_workdir(tmp_path / "a", rows)
    report.main(["--workdir", str(root), "--metric", "teacher_agreement", "--selection", "last"])
    assert "| vanilla | 75.0 ± 7.1 | – |" in (root / "report" / "teacher_agreement-last.md").read_text()


def test_what_it_cannot_do_is_one_line(tmp_path):
    root = make_workdir(tmp_path / "a", make_rows())
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / sweep.RECORD).write_text(json.dumps({}))
    for flags, message in (
        ([str(root)], f"no teacher_agreement on split test, .*: run python -m xtransfer.evaluate --workdir {root}"),
        ([str(root), "--protocols"], "it has a table of its own: leave out --protocols and --output"),
        ([str(tmp_path / "sweep")], "holds a sweep: name one of the workdirs in"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            report.main(["--metric", "teacher_agreement", "--workdir", *flags])
        assert "\n" not in str(caught.value)
