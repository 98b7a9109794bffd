"""Private copies of checkpoints that another process writes and deletes.

A training run keeps two checkpoints, so it may delete one while somebody else reads it. Orbax deletes file by file, in
place. A snapshot links the files of a step first, which takes no space and almost no time, and reads the links. A step
gets its name when it is complete, and its files never change after that. If the deletion has begun before the snapshot,
a file is missing, and then the parameters are either whole or cannot be read: they are never wrong.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from xtransfer.errors import MachineError


def committed_steps(checkpoints: Path) -> list[int]:
    """Return the steps of a directory of checkpoints, ascending, without opening it; none if it does not exist."""
    try:
        return sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal())
    except FileNotFoundError:
        return []


def file_names(checkpoints: Path, step: int) -> frozenset[str]:
    """Return the names of a step's files below its directory.

    Raises:
      FileNotFoundError: the step is being deleted or has been.
    """
    directory = checkpoints / str(step)
    with os.scandir(directory):  # os.walk does not say that there is nothing to walk
        return frozenset(os.path.join(folder, name) for folder, _, names in os.walk(directory) for name in names)


@contextmanager
def snapshot(checkpoints: Path, step: int, private: Path) -> Iterator[Path]:
    """Yield a directory of checkpoints with this one step, which nobody else deletes; it is removed after the block.

    Files are hard-linked, or copied if the file system refuses, as between two disks.

    Args:
      checkpoints: the directory of the run's checkpoints.
      step: the step.
      private: a directory of the caller's own, best on the same disk. It is created.

    Raises:
      FileNotFoundError: the step is being deleted or has been.
      UserError: the snapshot cannot be written.
    """
    target = private / str(step)
    shutil.rmtree(target, ignore_errors=True)
    try:
        try:
            private.mkdir(parents=True, exist_ok=True)
            _link_tree(checkpoints / str(step), target)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise MachineError(
                f"{target}: the snapshot of a checkpoint cannot be written: {error.strerror or error}: free some space"
            ) from error
        yield private
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _link_tree(source: Path, target: Path) -> None:
    with os.scandir(source) as entries:  # before the target exists, so that a missing source leaves nothing
        target.mkdir()
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _link_tree(Path(entry.path), target / entry.name)
            else:
                _link(Path(entry.path), target / entry.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except FileNotFoundError:
        raise
    except OSError:  # another disk, a file system without hard links, or the files of another user
        shutil.copyfile(source, target)
