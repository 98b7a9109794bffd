"""An experiment by several real processes is that of one; it may be preempted, and go on with another number of them.

Takes about three minutes on two cores: every process compiles for itself.
"""

import json
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers import group, tiny
from tests.helpers.group import Group

OBJECTIVES = ("monox_kd",)
STEPS, EVERY = 30, 6
# The program, which also writes down what this process trains on, next to the workdir.
RECORDED = """
import json, sys
from xtransfer import main
from xtransfer.runtime import processes, sharding, terminal
from xtransfer.train import loop

place_batch, workdir = loop.place_batch, sys.argv[sys.argv.index("--workdir") + 1]

def recorded(mesh, batch, num_slices):
    row = {"part": sharding.process_slice(mesh), "rows": batch["input_ids"].tolist(), "labels": batch["label"].tolist()}
    with open(f"{workdir}.{processes.index()}.batches", "a") as file:
        file.write(json.dumps(row) + "\\n")
    return place_batch(mesh, batch, num_slices)

loop.place_batch = recorded
terminal.run(main.main)
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """What starts the experiment; the workdir comes last."""
    root = tmp_path_factory.mktemp("setting")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    config = tiny.config_file(root / "tiny.py", data, teacher, student, steps=STEPS, evaluations=STEPS // EVERY)
    flags = [f"--config.objectives={OBJECTIVES!r}", "--config.teacher.steps=20", "--config.teacher.evaluations=1"]
    return ["-c", RECORDED, "--config", str(config), *flags, "--workdir"]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The workdir of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    group.run([*command, str(workdir)], 1, 4, workdir)
    return workdir


@pytest.fixture(scope="module")
def preempted(command, tmp_path_factory):
    """The workdir of two processes of which the second was sent SIGTERM when a student was under way."""
    workdir = tmp_path_factory.mktemp("preempted") / "run"
    metrics = workdir / "students" / "monox_kd" / "seed-0" / "metrics.jsonl"
    with Group([*command, str(workdir)], 2, 2, workdir) as two:
        two.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1)
        two.processes[1].send_signal(signal.SIGTERM)
        assert two.statuses(60) == [143, 143], two.said()
        assert two.err(0) == "stopping as soon as the work is saved; run the same command again to resume\n"
        assert two.out(1) == two.err(1) == ""
    assert not (workdir / "results.jsonl").exists()
    return workdir


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches(workdir, count):
    """Every batch of the training in its order, from the parts of all processes: tokens and labels of the used rows."""
    found = []
    for step in zip(*(rows(Path(f"{workdir}.{i}.batches")) for i in range(count)), strict=True):
        parts = {each["part"][0]: each for each in step}
        assert sorted(parts) == list(range(step[0]["part"][1]))
        assert all(each == parts[each["part"][0]] for each in step)
        pairs = [pair for _, each in sorted(parts.items()) for pair in zip(each["rows"], each["labels"], strict=True)]
        found.append([pair for pair in pairs if any(pair[0])])
    return found


def assert_same(workdir, alone, resumed_from=0):
    """The same steps, losses and scores of every run, and the same results.

    A row tells the mean loss since the row before it, or since a student went on at `resumed_from`.
    """
    for path in sorted(alone.rglob("metrics.jsonl")):
        found, expected = rows(workdir / path.relative_to(alone)), rows(path)
        assert [row["step"] for row in found] == [row["step"] for row in expected]
        for row, other in zip(found, expected, strict=True):
            cut = path.parts[-3] == "monox_kd" and row["step"] - EVERY < resumed_from < row["step"]
            for key in ("dev_accuracy",) if cut else other:
                assert row[key] == pytest.approx(other[key], abs=1e-5), (path, row["step"], key)
    place = ("objective", "seed", "step", "selection", "split", "language", "metric")
    found, expected = (
        {tuple(row[key] for key in place): row["value"] for row in rows(each / "results.jsonl")}
        for each in (workdir, alone)
    )
    assert found == pytest.approx(expected, abs=1e-9)  # no example is answered otherwise


@pytest.mark.parametrize("count", [2, 4])
def test_processes_make_what_one_makes(command, alone, tmp_path, count):
    several = group.run([*command, str(tmp_path / "run")], count, 4 // count, tmp_path / "run")
    assert f"4 cpu device(s) of {count} processes" in several.out(0) and "monox_kd" in several.out(0)
    assert "Gloo" not in several.out(0)
    assert {several.err(0)} | {said(i) for said in (several.out, several.err) for i in range(1, count)} == {""}
    assert_same(tmp_path / "run", alone)
    expected = batches(alone, 1)
    assert len(expected) == 20 + STEPS and batches(tmp_path / "run", count) == expected


@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(1, 4, ()), (4, 1, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2"))]
)
def test_what_two_processes_began_others_end(command, alone, preempted, tmp_path, count, devices, mesh):
    """Also where parameters and rows are shared by processes in another way."""
    shutil.copytree(preempted, tmp_path / "run")
    ended = group.run([*command, str(tmp_path / "run"), *mesh], count, devices, tmp_path / "run")
    resumed_from = int(re.search(r"resuming from step (\d+)", ended.out(0))[1])
    assert EVERY <= resumed_from < STEPS
    assert batches(tmp_path / "run", count) == batches(alone, 1)[resumed_from - STEPS :]
    assert_same(tmp_path / "run", alone, resumed_from)


def test_a_second_group_is_refused_in_one_line(command, preempted):
    from xtransfer.runtime.locks import directory_lock

    with directory_lock(preempted), Group([*command, str(preempted)], 2, 1, preempted.with_name("second")) as second:
        assert second.statuses(60) == [1, 1]
        assert "is in use by process" in second.err(0) and second.err(0).count("\n") == 1
        assert second.err(1) == second.out(1) == ""
