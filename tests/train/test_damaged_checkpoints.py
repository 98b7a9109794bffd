"""Damaged checkpoints are named, a run falls back to an earlier one only when asked, and kills leave none behind."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import group
from tests.runtime.test_checksums import flipped
from tests.train.test_loop import PLAN, TinyRun, abstract_params, steps_on_disk
from xtransfer.errors import UserError
from xtransfer.runtime import checksums
from xtransfer.train import loop, metrics_log, state
from xtransfer.train.checkpoints import Checkpoints, fall_back, remove_leftovers

ROOT = Path(__file__).parents[2]
UNLISTED = {"_CHECKPOINT_METADATA", "commit_success.txt", "checksums.json"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, np.ndarray]:
    """Return the directory of a finished run, with the steps 15 and 20, and its final weights."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    return directory, TinyRun().fit(directory, PLAN)


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def restore(directory: Path, step: int = 20) -> list[np.ndarray]:
    import jax

    run = TinyRun()
    with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore(step, state.abstract(run.params, run.tx, run.mesh))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def files(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def test_every_flipped_bit_is_found_or_changes_nothing(copy):
    expected, step, draw = restore(copy), copy / "checkpoints" / "20", random.Random(0)
    assert {path.relative_to(step).as_posix() for path in files(step)} - set(checksums.read(step)) == UNLISTED
    for path in files(step):
        content, is_listed = path.read_bytes(), path.relative_to(step).as_posix() not in UNLISTED
        for _ in range(20 if is_listed else 4):
            path.write_bytes(flipped(content, draw.randrange(8 * len(content))))
            if is_listed:
                assert checksums.fault_below(step) is not None
                continue
            try:
                arrays = restore(copy)
            except UserError as error:
                assert str(step) in str(error)
            else:
                for a, b in zip(arrays, expected, strict=True):
                    np.testing.assert_array_equal(a, b)
        path.write_bytes(content)
    assert checksums.fault_below(step) is None


DAMAGE = {
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes(), 100)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
}


def damage(directory: Path, kind: str = "flipped", step: int = 20, item: str = "params") -> str:
    """Damage the largest file of an item of a checkpoint, and return its path below the checkpoint."""
    path = max(files(directory / "checkpoints" / str(step) / item), key=lambda path: path.stat().st_size)
    DAMAGE[kind](path)
    return path.relative_to(directory / "checkpoints" / str(step)).as_posix()


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("item", ["params", "resume"])
def test_every_restore_names_the_damaged_file_and_the_whole_step(copy, kind, item):
    name, run = damage(copy, kind, item=item), TinyRun()
    message = (
        rf"checkpoints/20: this checkpoint is damaged: {name} .*; step 15 is whole: train with --from-earlier-step"
    )
    with pytest.raises(UserError, match=message):
        restore(copy)
    with Checkpoints(copy / "checkpoints", read_only=True) as checkpoints:
        if item == "params":
            with pytest.raises(UserError, match=message):
                checkpoints.restore_params(20, abstract_params(run))
            with pytest.raises(UserError, match=message):
                checkpoints.restore_arrays(20)
        else:
            checkpoints.restore_params(20, abstract_params(run))  # which does not read the optimizer's state
        checkpoints.restore_arrays(15)


@pytest.mark.parametrize("item", ["params", "resume"])
def test_a_run_falls_back_only_when_asked_and_ends_with_the_same_bits(finished, copy, item):
    longer = loop.Plan("test", steps=30, evaluations=6, seed=5)
    damage(copy, item=item)
    before = steps_on_disk(copy)
    with pytest.raises(UserError, match="this checkpoint is damaged"):
        TinyRun().fit(copy, longer)
    assert steps_on_disk(copy) == before == [15, 20]
    fall_back(copy / "checkpoints")
    assert steps_on_disk(copy) == [15]
    again = TinyRun()
    np.testing.assert_array_equal(again.fit(copy, PLAN), finished[1])
    assert again.batches == list(range(15, 20))
    assert metrics_log.read_metrics(copy) == metrics_log.read_metrics(finished[0])


def test_nothing_is_removed_from_whole_checkpoints(copy):
    before = files(copy)
    fall_back(copy / "checkpoints")
    damage(copy, step=15)  # the run does not need it
    fall_back(copy / "checkpoints")
    fall_back(copy / "nothing")
    assert files(copy) == before


def test_without_a_whole_step_only_the_checkpoints_are_to_be_removed(finished, copy):
    damage(copy)
    damage(copy, "deleted", step=15)
    message = rf"checkpoints/20: .*; there is no other whole step, so remove {copy}/checkpoints to train this run again"
    for use in (restore, lambda directory: fall_back(directory / "checkpoints")):
        with pytest.raises(UserError, match=message):
            use(copy)
    assert steps_on_disk(copy) == [15, 20]
    shutil.rmtree(copy / "checkpoints")
    assert not metrics_log.finished(copy, 20)
    np.testing.assert_array_equal(TinyRun().fit(copy, PLAN), finished[1])


def test_a_damaged_best_checkpoint_is_named_with_the_newest_one(copy):
    name = damage(copy, step=15)
    fall_back(copy / "checkpoints")  # which is for training, and training does not need it
    with pytest.raises(UserError) as caught:
        restore(copy, 15)
    assert str(caught.value).partition("; ")[2] == (
        "step 20 is whole: predict and export take it with --selection last; restore step 15 from a copy, or remove "
        f"{copy}/checkpoints to train this run again"
    )
    assert name in str(caught.value)
    shutil.rmtree(copy / "checkpoints" / "15")
    with pytest.raises(UserError, match=r"no such checkpoint \(the steps here: 20\); .* with --selection last, or"):
        restore(copy, 15)


def test_a_checkpoint_without_checksums_is_used_with_a_warning(finished, copy, capsys):
    for step in (15, 20):
        (copy / "checkpoints" / str(step) / "checksums.json").unlink()
    run = TinyRun()
    np.testing.assert_array_equal(run.fit(copy, PLAN), finished[1])
    assert capsys.readouterr().out.count("20 has no checksums.json, so damage to it may go unnoticed") == 1
    damage(copy, "truncated", item="resume")
    for path in files(copy / "checkpoints" / "20" / "resume"):
        path.write_bytes(b"")
    with pytest.raises(UserError, match="this checkpoint is damaged: .*; remove it to resume from step 15"):
        restore(copy)


def killed(directory: Path, body: str) -> None:
    """Run `TinyRun().fit` in a process that kills itself in `body`."""
    script = ["import os, pathlib, shutil, signal", "from tests.train.test_loop import PLAN, TinyRun"]
    script += ["from xtransfer.train import checkpoints", "kill = lambda: os.kill(os.getpid(), signal.SIGKILL)", body]
    script += [f"TinyRun().fit(pathlib.Path({str(directory)!r}), PLAN)"]
    process = subprocess.run(
        [sys.executable, "-c", "\n".join(script)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert process.returncode == -signal.SIGKILL


BEFORE_CHECKSUMS = "write = checkpoints.checksums.write_all"
AT_STEP_15 = "'15.' in str(directory)"
KILLS = {
    "after the checksums, before the name": f"""
def write_all(directory, skip):
    write(directory, skip=skip)
    if {AT_STEP_15}: kill()
""",
    "in the middle of the checksums": f"""
def write_all(directory, skip):
    (pathlib.Path(directory) / "checksums.json").write_text('{{"params/')
    if {AT_STEP_15}: kill()
    write(directory, skip=skip)
""",
}


@pytest.mark.parametrize("moment", KILLS)
def test_a_kill_while_checksums_are_written_loses_that_step_alone(finished, tmp_path, moment):
    killed(tmp_path, f"{BEFORE_CHECKSUMS}\n{KILLS[moment]}\ncheckpoints.checksums.write_all = write_all")
    assert steps_on_disk(tmp_path)[-1] == 10
    again = TinyRun()
    np.testing.assert_array_equal(again.fit(tmp_path, PLAN), finished[1])
    assert again.batches == list(range(10, 20))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir() if path.name != "metadata") == ["15", "20"]


def test_a_half_deleted_step_is_not_offered_and_is_purged(finished, tmp_path):
    killed(
        tmp_path,
        "def half(path, **options):\n"
        "    steps = sorted(path.glob('*/params'))\n"
        "    if steps:\n"
        "        (steps[0] / '_METADATA').unlink()\n"
        "        kill()\n"
        "checkpoints.shutil.rmtree = half",
    )
    (rubbish,) = (tmp_path / "checkpoints" / ".removed").iterdir()
    assert int(rubbish.name) not in steps_on_disk(tmp_path)
    np.testing.assert_array_equal(TinyRun().fit(tmp_path, PLAN), finished[1])
    assert not (tmp_path / "checkpoints" / ".removed").exists()
    assert steps_on_disk(tmp_path) == [15, 20]


def test_all_processes_of_a_run_learn_of_the_damage(copy, tmp_path):
    name = damage(copy)
    body = f"""
import pathlib
from xtransfer.train.checkpoints import Checkpoints
with Checkpoints(pathlib.Path({str(copy / "checkpoints")!r}), read_only=True) as checkpoints:
    checkpoints.restore_arrays(20)
"""
    with group.snippet(tmp_path, body) as both:
        assert both.statuses() == [4, 4], both.outputs()
        assert f"checkpoints/20: this checkpoint is damaged: {name} " in both.err(0)
        assert "Traceback" not in both.err(0) + both.err(1)


@pytest.fixture
def unfinished_deletions(copy) -> Path:
    """Return checkpoints as a kill just after the last save may leave them, with a worse step 10."""
    checkpoints = copy / "checkpoints"
    shutil.copytree(checkpoints / "15", checkpoints / "10")
    (checkpoints / "10" / "metrics" / "metrics").write_text('{"score": -1.0, "step": 10}')
    checksums.write_all(checkpoints / "10")
    for name in (".removed/5/params", "25.orbax-checkpoint-tmp/params"):
        (checkpoints / name).mkdir(parents=True)
    return checkpoints


def test_what_a_process_was_about_to_delete_when_it_was_killed_is_deleted_later(finished, unfinished_deletions):
    remove_leftovers(unfinished_deletions)
    names = {path.name for path in unfinished_deletions.iterdir()}
    assert names == {path.name for path in (finished[0] / "checkpoints").iterdir()} and {"15", "20"} <= names
    remove_leftovers(unfinished_deletions.parent / "nothing")
    remove_leftovers(unfinished_deletions / "15")  # a directory without any step


def test_no_step_is_deleted_if_a_score_is_damaged(unfinished_deletions):
    (unfinished_deletions / "20" / "metrics" / "metrics").write_text('{"score": -9.0, "step": 20}')
    remove_leftovers(unfinished_deletions)
    assert {"10", "15", "20"} <= {path.name for path in unfinished_deletions.iterdir()}
