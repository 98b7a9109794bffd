"""The costs of stages: what a row holds, and what survives an interruption."""

import json

import pytest

from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.runs.costs import read_costs, recorded
from xtransfer.runs.workdir import Workdir
from xtransfer.train.work import Work


@pytest.fixture
def workdir(tmp_path):
    return Workdir(tmp_path)


def test_a_row_holds_the_work_of_its_block_alone(workdir):
    work = Work(examples=5, real=50.0, slots=80)
    with recorded(workdir, "students", workdir.student("vanilla", 3), work):
        work.add(2, 10.5, 16)
        work.add(1, 4.0, 16)
    (cost,) = read_costs(workdir)
    assert (cost.stage, cost.run) == ("students", "students/vanilla/seed-3")
    assert (cost.examples, cost.real_tokens, cost.tokens) == (3, 14.5, 32)
    assert cost.devices.startswith("8 × ") and cost.memory == "process" and cost.peak_bytes > 2**20


def test_an_interrupted_stage_and_its_resumption_have_a_row_each(workdir):
    work = Work()
    with pytest.raises(SystemExit), recorded(workdir, "teacher", workdir.teacher, work):
        work.add(4, 4.0, 8)
        raise SystemExit(143)
    with recorded(workdir, "teacher", workdir.teacher, work):
        work.add(6, 6.0, 8)
    assert [cost.examples for cost in read_costs(workdir)] == [4, 6]


def test_nothing_processed_is_no_row(workdir):
    with recorded(workdir, "teacher", workdir.teacher, Work()):
        pass
    assert read_costs(workdir) == [] and not workdir.costs.exists()


def test_a_row_that_cannot_be_written_costs_a_warning(workdir, monkeypatch, capsys):
    def fail(path, row):
        raise UserError("disk full")

    monkeypatch.setattr(storage, "append_jsonl", fail)
    work = Work()
    with recorded(workdir, "teacher", workdir.teacher, work):
        work.add(1, 1.0, 1)
    assert "warning: the cost of teacher is not recorded (disk full)" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b'{"stage": "te', b"[]", b"{}", b"\xff", b'{"stage": 1}'])
def test_lines_that_are_no_rows_are_skipped(workdir, line):
    work = Work()
    with recorded(workdir, "teacher", workdir.teacher, work):
        work.add(1, 1.0, 1)
    good = workdir.costs.read_bytes()
    wrong_type = json.dumps(json.loads(good) | {"examples": "1"}).encode()
    workdir.costs.write_bytes(good + line + b"\n" + wrong_type + b"\n" + good)
    assert len(read_costs(workdir)) == 2
