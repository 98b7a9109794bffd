"""Experiments in several real processes match one in a single process, and resume with a different number of processes.

These tests take about three minutes on two cores, because every process compiles separately.
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
# The main command, which also records the batches that its process trains on, next to the workdir.
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
    """Return the arguments for Python that start the experiment. The caller appends the workdir."""
    root = tmp_path_factory.mktemp("setting")
    data = tiny.write_task(root / "data")
    teacher, student = tiny.checkpoint(root / "teacher", seed=1), tiny.checkpoint(root / "student", seed=2, hidden=8)
    config = tiny.config_file(root / "tiny.py", data, teacher, student, steps=STEPS, evaluations=STEPS // EVERY)
    flags = [f"--config.objectives={OBJECTIVES!r}", "--config.teacher.steps=20", "--config.teacher.evaluations=1"]
    return ["-c", RECORDED, "--config", str(config), *flags, "--workdir"]


@pytest.fixture(scope="module")
def single_process(command, tmp_path_factory):
    """Return the workdir of a run in one process with four devices."""
    workdir = tmp_path_factory.mktemp("single_process") / "run"
    group.run([*command, str(workdir)], 1, 4, workdir)
    return workdir


@pytest.fixture(scope="module")
def preempted(command, tmp_path_factory):
    """Return the workdir of two processes, the second of which got SIGTERM while a student was training."""
    workdir = tmp_path_factory.mktemp("preempted") / "run"
    metrics = workdir / "students" / "monox_kd" / "seed-0" / "metrics.jsonl"
    with Group([*command, str(workdir)], 2, 2, workdir) as pair:
        pair.wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 1)
        pair.processes[1].send_signal(signal.SIGTERM)
        assert pair.statuses(60) == [143, 143], pair.outputs()
        assert pair.err(0) == "stopping as soon as the work is saved; run the same command again to resume\n"
        assert pair.out(1) == pair.err(1) == ""
    assert not (workdir / "results.jsonl").exists()
    return workdir


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def batches(workdir, count):
    """Return the tokens and labels of every training batch, joined from all processes and without empty rows."""
    joined = []
    for step in zip(*(rows(Path(f"{workdir}.{i}.batches")) for i in range(count)), strict=True):
        parts = {record["part"][0]: record for record in step}
        assert sorted(parts) == list(range(step[0]["part"][1]))
        assert all(record == parts[record["part"][0]] for record in step)
        pairs = [pair for _, part in sorted(parts.items()) for pair in zip(part["rows"], part["labels"], strict=True)]
        joined.append([pair for pair in pairs if any(pair[0])])
    return joined


def scores(workdir):
    """Return every value in results.jsonl by the other fields of its row."""
    fields = ("objective", "seed", "step", "selection", "split", "language", "metric")
    return {tuple(row[field] for field in fields): row["value"] for row in rows(workdir / "results.jsonl")}


def assert_same(workdir, single_process, resumed_from=0):
    """Check that every run has the same steps, losses, and scores, and that the results are the same.

    A row holds the mean loss since the previous row. If a student resumed between the two, at `resumed_from`, the loss
    covers fewer steps, so only the dev accuracy is compared.
    """
    for path in sorted(single_process.rglob("metrics.jsonl")):
        actual, expected = rows(workdir / path.relative_to(single_process)), rows(path)
        assert [row["step"] for row in actual] == [row["step"] for row in expected]
        for row, expected_row in zip(actual, expected, strict=True):
            partial = path.parts[-3] == "monox_kd" and row["step"] - EVERY < resumed_from < row["step"]
            for key in ["dev_accuracy"] if partial else [key for key in expected_row if key != "digest"]:
                assert row[key] == pytest.approx(expected_row[key], abs=1e-5), (path, row["step"], key)
    # At this tolerance, a single prediction that differs would show.
    assert scores(workdir) == pytest.approx(scores(single_process), abs=1e-9)


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_match_one(command, single_process, tmp_path, count):
    processes = group.run([*command, str(tmp_path / "run")], count, 4 // count, tmp_path / "run")
    assert f"4 cpu device(s) of {count} processes" in processes.out(0) and "monox_kd" in processes.out(0)
    assert "Gloo" not in processes.out(0)
    assert processes.err(0) == ""
    for index in range(1, count):
        assert processes.out(index) == processes.err(index) == ""
    assert_same(tmp_path / "run", single_process)
    expected = batches(single_process, 1)
    assert len(expected) == 20 + STEPS and batches(tmp_path / "run", count) == expected


@pytest.mark.parametrize(
    ("count", "devices", "mesh"), [(1, 4, ()), (4, 1, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2"))]
)
def test_a_preempted_run_resumes_with_another_number_of_processes(
    command, single_process, preempted, tmp_path, count, devices, mesh
):
    """Resume also on a mesh that divides parameters and rows between processes differently."""
    shutil.copytree(preempted, tmp_path / "run")
    resumed = group.run([*command, str(tmp_path / "run"), *mesh], count, devices, tmp_path / "run")
    resumed_from = int(re.search(r"resuming from step (\d+)", resumed.out(0))[1])
    assert EVERY <= resumed_from < STEPS
    assert batches(tmp_path / "run", count) == batches(single_process, 1)[resumed_from - STEPS :]
    assert_same(tmp_path / "run", single_process, resumed_from)


def test_a_second_group_is_refused_in_one_line(command, preempted):
    from xtransfer.runtime.locks import directory_lock

    with directory_lock(preempted), Group([*command, str(preempted)], 2, 1, preempted.with_name("second")) as second:
        assert second.statuses(60) == [6, 6]
        assert "is in use by process" in second.err(0) and second.err(0).count("\n") == 1
        assert second.err(1) == second.out(1) == ""
