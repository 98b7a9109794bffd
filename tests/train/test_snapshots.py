"""Snapshots of checkpoints: whole or unreadable, never wrong, whatever a deletion has taken already."""

import errno
import os
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import tiny, tiny_run
from xtransfer.config import ModelConfig
from xtransfer.errors import UserError
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.snapshots import committed_steps, file_names, snapshot


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a directory of checkpoints with two steps."""
    root = tmp_path_factory.mktemp("snapshots")
    settings = ModelConfig(checkpoint=str(tiny.checkpoint(root / "base", hidden=8)))
    tiny_run.run(root / "run", settings, ("bad", "good"), seed=0)
    return root / "run" / "checkpoints"


def arrays(directory, step=2):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.restore_arrays(step)


def test_a_snapshot_outlives_its_checkpoint_and_takes_no_space(checkpoints, tmp_path):
    original, source = arrays(checkpoints), shutil.copytree(checkpoints, tmp_path / "checkpoints")
    name = min(name for name in file_names(source, 2) if "/params/" in name)
    inode = os.stat(name).st_ino
    with snapshot(source, 2, tmp_path / "private") as private:
        assert os.stat(name.replace(str(source), str(private))).st_ino == inode
        shutil.rmtree(source / "2")
        copies = arrays(private)
    assert committed_steps(source) == [6] and list((tmp_path / "private").iterdir()) == []
    jax.tree.map(np.testing.assert_array_equal, copies, original)


def test_files_are_copied_where_links_are_refused(checkpoints, tmp_path, monkeypatch):
    def refuse(*args, **settings):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    with snapshot(checkpoints, 2, tmp_path / "private") as private:
        jax.tree.map(np.testing.assert_array_equal, arrays(private), arrays(checkpoints))


def test_a_half_deleted_checkpoint_is_read_whole_or_not_at_all(checkpoints, tmp_path):
    original, unreadable = arrays(checkpoints), set()
    names = sorted(name.removeprefix(f"{checkpoints}/") for name in file_names(checkpoints, 2))
    for number, name in enumerate(names):
        source = shutil.copytree(checkpoints, tmp_path / str(number))
        (source / name).unlink()
        with snapshot(source, 2, tmp_path / "private") as private:
            try:
                jax.tree.map(np.testing.assert_array_equal, arrays(private), original)
            except UserError:
                unreadable.add(name)
        shutil.rmtree(source)
    assert {"2/params/manifest.ocdbt", "2/params/_METADATA"} < unreadable


def test_a_deleted_checkpoint_is_told_from_a_damaged_one(checkpoints, tmp_path):
    assert committed_steps(checkpoints) == [2, 6] and committed_steps(tmp_path / "none") == []
    with pytest.raises(FileNotFoundError), snapshot(checkpoints, 4, tmp_path / "private"):
        raise AssertionError("there is no step 4")
    with pytest.raises(FileNotFoundError):
        file_names(checkpoints, 4)
    (tmp_path / "file").write_text("")
    message, private = "snapshot of a checkpoint cannot be written: Not a directory", tmp_path / "file" / "private"
    with pytest.raises(UserError, match=message), snapshot(checkpoints, 2, private):
        raise AssertionError("it cannot be written")
