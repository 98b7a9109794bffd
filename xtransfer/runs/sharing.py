"""Taking finished work over from one workdir to another: which settings decide a run, and how its files are copied.

A temperature changes `monox_kd`, and neither the teacher nor `vanilla`. So a sweep over temperatures trains these once:
every point has a workdir of its own, complete and usable by itself, with copies of the runs that it shares.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.config import CHANGEABLE, ExperimentConfig
from xtransfer.distillation.objectives import OBJECTIVES, configured_objective
from xtransfer.errors import MachineError
from xtransfer.runs.workdir import TEACHER, Workdir, as_record
from xtransfer.train.loop import CHECKPOINTS

_UNLABELLED = ("task.unlabelled_from", "task.unlabelled", "task.unlabelled_file")
_SAME_FACTS = ("name", "labels", "source_language", "data", "teacher_checkpoint", "student_checkpoint")


def settings_of(config: ExperimentConfig, objective: str) -> dict[str, Any]:
    """Return the settings that decide the training of one run, by dotted key, apart from its seed.

    Settings are left out and not listed: a setting that is new counts for every run until somebody says otherwise here.

    Args:
      config: the config of one draw.
      objective: the student's objective, or "teacher".
    """
    settings = _flat(as_record(config))
    ignored = {*CHANGEABLE, "evaluation_splits"}
    if not config.oracle:  # which reads the target languages' dev splits in training
        ignored.add("task.target_languages")
    if objective == TEACHER:
        ignored |= {key for key in settings if key.startswith(("student.", "transfer."))}
        ignored |= {"teacher_seed", *_UNLABELLED}  # the run's own seed is the teacher's
    else:
        # The objective holds its part of the transfer settings.
        ignored |= {key for key in settings if key.startswith("transfer.")}
        settings |= _flat(asdict(configured_objective(config, objective)), "objective.")
        if OBJECTIVES[objective].teacher != "monolingual":
            ignored |= {"teacher_seed", *(key for key in settings if key.startswith("teacher."))}
        if OBJECTIVES[objective].data == "labelled":
            ignored |= {*_UNLABELLED}
    return {key: value for key, value in settings.items() if key not in ignored}


def has_same_data(other: Workdir, facts: Mapping[str, Any]) -> bool:
    """Return whether a workdir has an experiment with the same data and base checkpoints as `facts` (see `Models`)."""
    if not (other.config.is_file() and other.task.is_file()):
        return False
    theirs = storage.read_object(other.task, "remove this directory, or start its experiment again")
    return all(key in theirs and theirs[key] == facts[key] for key in _SAME_FACTS)


def copy_first(sources: Sequence[Path], target: Path) -> None:
    """Copy the first of some directories that exists, unless the target does; all of it appears at once.

    Checkpoints are large and never change, so they become hard links if the file system allows it.

    Raises:
      UserError: the target cannot be written.
    """
    source = next((source for source in sources if source.is_dir()), None)
    if source is None or target.exists():
        return
    try:
        with storage.atomic_directory(target) as partial:
            shutil.copytree(source, partial, dirs_exist_ok=True, copy_function=_link_checkpoints)
    except (OSError, shutil.Error) as error:
        raise MachineError(
            f"{target} cannot be written ({error}): free some space, or choose another directory"
        ) from error


def _link_checkpoints(source: str, target: str) -> None:
    if CHECKPOINTS in Path(source).parts:
        try:
            os.link(source, target)
            return
        except OSError:  # no links here
            pass
    shutil.copy2(source, target)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
