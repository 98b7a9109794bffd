"""A workdir keeps what its runs need of the base checkpoints, so that they outlive them."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.helpers import tiny_run
from xtransfer import config as settings
from xtransfer import experiment
from xtransfer.errors import UserError
from xtransfer.evaluate import __main__ as evaluate
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import encoders
from xtransfer.runs.classifier import open_classifier
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import sharding
from xtransfer.train.inputs import SavedEncoder

FLAGS = ("--config.objectives=('vanilla',)", f"--config.teacher.steps={tiny_run.STEPS}", "--config.task.labelled=8")


def save_encoders(workdir: Workdir, root: Path) -> None:
    for role in ("teacher", "student"):
        base = root / role
        encoders.save(workdir, role, SavedEncoder(base, hf_checkpoint.fingerprint_files(base)))


@pytest.fixture
def moved(tmp_path: Path) -> tuple[Path, Workdir]:
    """Return a directory with a finished workdir whose base checkpoints have been moved from it to `elsewhere`."""
    workdir = tiny_run.workdir(tiny_run.setting(tmp_path), tmp_path / "run", *FLAGS)
    save_encoders(workdir, tmp_path)
    for role in ("teacher", "student"):
        (tmp_path / "elsewhere").mkdir(exist_ok=True)
        (tmp_path / role).rename(tmp_path / "elsewhere" / role)
    return tmp_path, workdir


def test_the_copy_has_the_config_and_tokenizer_and_no_weights(moved):
    root, workdir = moved
    for role in ("teacher", "student"):
        names = {path.name for path in workdir.encoder(role).iterdir()}
        assert {"config.json", "tokenizer.json", "digests.json"} <= names and "model.safetensors" not in names
        for name in names - {"digests.json"}:
            assert (workdir.encoder(role) / name).read_bytes() == (root / "elsewhere" / role / name).read_bytes()


def test_a_run_opens_without_its_base_checkpoint(moved):
    root, workdir = moved
    run, mesh = workdir.student("vanilla", 0), sharding.make_mesh()
    opened = open_classifier(run, mesh)
    assert opened.directory == workdir.encoder("student")
    shutil.rmtree(workdir.encoder("student"))
    with pytest.raises(UserError, match=f"^{root}/student: not a directory"):
        open_classifier(run, mesh)
    shutil.copytree(root / "elsewhere" / "student", root / "student")
    with_base = open_classifier(run, mesh)
    assert with_base.directory == root / "student"
    assert (opened.architecture, opened.labels) == (with_base.architecture, with_base.labels)
    assert opened.tokenizer("the film").input_ids == with_base.tokenizer("the film").input_ids
    for first, second in zip(jax.tree.leaves(opened.params), jax.tree.leaves(with_base.params), strict=True):
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_evaluation_and_a_finished_experiment_need_no_base_checkpoint(moved, capsys):
    root, workdir = moved
    evaluate.main(["--workdir", str(workdir.root)])
    rows = workdir.results.read_bytes()
    assert "student: " in capsys.readouterr().out and rows

    def load(*flags: str) -> settings.ExperimentConfig:
        return settings.load(str(root / "tiny.py"), [*FLAGS, *flags])

    experiment.run(load(), workdir.root)
    assert workdir.results.read_bytes() == rows
    with pytest.raises(
        UserError, match=r"student\.checkpoint .* is gone, .* set --config\.student\.checkpoint to where"
    ):
        experiment.run(load("--config.seeds=(0,1)"), workdir.root)
    new = [f"--config.{role}.checkpoint={root}/elsewhere/{role}" for role in ("teacher", "student")]
    experiment.run(load(*new), workdir.root)
    assert json.loads(workdir.config.read_text())["student"]["checkpoint"] == f"{root}/elsewhere/student"
    with pytest.raises(UserError, match="made with other settings or data .student_checkpoint: "):
        experiment.run(load(new[0], f"--config.student.checkpoint={root}/elsewhere/teacher"), workdir.root)


def test_a_damaged_copy_is_refused(moved):
    _, workdir = moved
    path = workdir.encoder("student") / "tokenizer.json"
    path.write_bytes(path.read_bytes().replace(b"film", b"filn"))
    with pytest.raises(UserError, match=r"student/tokenizer\.json: missing or changed .*: copy this file alone from"):
        open_classifier(workdir.student("vanilla", 0), sharding.make_mesh())
    path.unlink()
    with pytest.raises(UserError, match=r"student/tokenizer\.json: missing or changed"):
        open_classifier(workdir.student("vanilla", 0), sharding.make_mesh())
    digests = workdir.encoder("teacher") / "digests.json"
    digests.write_text(json.dumps(json.loads(digests.read_text()) | {"checkpoint": "other"}))
    with pytest.raises(UserError, match=r"digests\.json: not of the checkpoint that .*task\.json records"):
        open_classifier(workdir.teacher, sharding.make_mesh())
