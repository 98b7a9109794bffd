"""Taking finished work over from one workdir to another: which settings decide a run, and how its files are copied.

A temperature changes `monox_kd`, and neither the teacher nor `vanilla`. So a sweep over temperatures trains these once:
every point has a workdir of its own, complete and usable by itself, with copies of the runs that it shares.
"""

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.config import ExperimentConfig, is_changeable
from xtransfer.distillation.objectives import configured_objective, teacher_objective
from xtransfer.errors import MachineError, UserError
from xtransfer.runs.encoders import STUDENT
from xtransfer.runs.workdir import TEACHER, Workdir, as_record, read_config
from xtransfer.train.checkpoints import CHECKPOINTS
from xtransfer.train.metrics_log import read_metrics
from xtransfer.train.tracking import IDENTITY_FILE

_log = logging.getLogger(__name__)

_UNLABELLED = ("task.unlabelled_from", "task.unlabelled", "task.unlabelled_file")
_TARGET_TEXT = ("task.target_text_from", "task.target_text", "task.target_text_file")
_PARALLEL = ("task.parallel_file", "task.parallel")
_SAME_FACTS = ("name", "labels", "source_language", "data")


def settings_of(config: ExperimentConfig, objective: str) -> dict[str, Any]:
    """Return the settings that decide the training of one run, by dotted key, apart from its seed.

    Settings are left out and not listed: a setting that is new counts for every run until somebody says otherwise here.

    Args:
      config: the config of one draw.
      objective: the student's objective, or a teacher's config key.
    """
    settings = _flat(as_record(config))
    # The objective holds its part of the settings of losses.
    settings = {key: value for key, value in settings.items() if not key.startswith(("transfer.", "objective."))}
    ignored = {"evaluation_splits", *filter(is_changeable, settings)}
    if not config.oracle:  # which reads the target languages' dev splits in training
        ignored.add("task.target_languages")
    if objective in config.members:
        others = tuple(f"{member}." for member in config.members if member != objective)
        ignored |= {key for key in settings if key.startswith(("student.", "students.", *others))}
        # The run's own seed is the teacher's.
        ignored |= {f"{objective}.weight", "teacher_seed", *_UNLABELLED, *_TARGET_TEXT, *_PARALLEL}
        settings |= _flat(asdict(teacher_objective(config)), "objective.")
    else:
        configured, encoder = configured_objective(config, objective), config.encoder_of(objective)
        others = tuple(f"{role}." for role in config.encoders if role != encoder)
        ignored |= {key for key in settings if key.startswith(others)} if others else set()
        settings |= _flat(asdict(configured), "objective.")
        if configured.pseudo_labels:
            settings["transfer.fitted_thresholds"] = config.transfer.fitted_thresholds
        if configured.teacher == "monolingual":
            settings |= _flat(asdict(teacher_objective(config)), "objective_of_teacher.")
            settings["transfer.teacher_mean"] = config.transfer.teacher_mean
        else:
            # The teachers' languages are those of the labelled text too.
            ignored |= {"teacher_seed", *(key for key in settings if key.startswith(("teacher.", "teachers.")))}
            settings["further_sources"] = list(config.further_sources)
        if configured.student_teacher is not None:
            taught_by = settings_of(config, configured.student_teacher)
            settings |= {f"teacher_run {key}": value for key, value in taught_by.items()}
        if configured.reads_target_text:
            ignored.discard("task.target_languages")
        if configured.data != "target":
            ignored |= {*_TARGET_TEXT}
        if configured.data != "parallel":
            ignored |= {*_PARALLEL}
        if configured.data != "all":
            ignored |= {*_UNLABELLED}
    return {key: value for key, value in settings.items() if key not in ignored}


def has_same_data(other: Workdir, facts: Mapping[str, Any]) -> bool:
    """Return whether a workdir has an experiment on the same data as `facts` (see `Models.facts`).

    A damaged record is a warning: nothing is taken over from that workdir.
    """
    if not (other.config.is_file() and other.task.is_file()):
        return False
    try:
        theirs = _read_facts(other)
        read_config(other)
    except UserError as error:
        _log.warning("nothing is taken over from %s: %s", other.root, error)
        return False
    return _agree(theirs, facts, _SAME_FACTS)


def has_same_checkpoints(other: Workdir, facts: Mapping[str, Any], roles: Sequence[str]) -> bool:
    """Return whether a workdir with the same data has the same base checkpoints and files as here in some roles.

    Args:
      other: the workdir.
      facts: the facts here, see `Models.facts`.
      roles: the roles that count, see `roles_of`.
    """
    theirs = _read_facts(other)
    return all(_fingerprints(theirs, role) == _fingerprints(facts, role) for role in roles)


def roles_of(config: ExperimentConfig, objective: str) -> tuple[str, ...]:
    """Return the roles whose base checkpoints, or files of logits, decide the training of a run.

    A student without a monolingual teacher never sees the teachers'.

    Args:
      config: the config of one draw.
      objective: the student's objective, or a teacher's config key.
    """
    if objective in config.members:
        return (objective,)
    configured = configured_objective(config, objective)
    members = tuple(config.members) if configured.teacher == "monolingual" else ()
    taught_by = roles_of(config, configured.student_teacher) if configured.student_teacher is not None else ()
    return tuple(dict.fromkeys((*members, *taught_by, config.encoder_of(objective))))


def is_whole(run: Path) -> bool:
    """Return whether the scores of another workdir's run can be read; if they are damaged, name them in a warning."""
    try:
        read_metrics(run)
    except UserError as error:
        _log.warning("%s is not taken over: %s", run, error)
        return False
    return True


def copy_run(source: Path, target: Path) -> None:
    """Copy a finished run, see `copy_first`. Its id for trackers stays behind, because no two runs share one."""
    copy_first([source], target, leave_out=(IDENTITY_FILE,))


def copy_first(sources: Sequence[Path], target: Path, *, leave_out: Sequence[str] = ()) -> None:
    """Copy the first of some directories that exists, unless the target does; all of it appears at once.

    Checkpoints are large and never change, so they become hard links if the file system allows it.

    Args:
      sources: the directories, in the order of preference.
      target: the copy.
      leave_out: names of files that are not copied.

    Raises:
      UserError: the target cannot be written.
    """
    source = next((source for source in sources if source.is_dir()), None)
    if source is None or target.exists():
        return
    try:
        with storage.atomic_directory(target) as partial:
            shutil.copytree(
                source,
                partial,
                dirs_exist_ok=True,
                ignore=shutil.ignore_patterns(*leave_out),
                copy_function=_link_checkpoints,
            )
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


def _read_facts(other: Workdir) -> dict[str, Any]:
    return storage.read_object(other.task, "restore it, or start its experiment again")


def _agree(theirs: Mapping[str, Any], ours: Mapping[str, Any], keys: Sequence[str]) -> bool:
    return all(key in theirs and theirs[key] == ours[key] for key in keys)


def _fingerprints(facts: Mapping[str, Any], role: str) -> tuple[Any, Any]:
    """Return the fingerprints of a role's checkpoint and of the file in its place; see `TaskRecord`."""
    if role in (TEACHER, STUDENT):
        return facts.get(f"{role}_checkpoint"), facts.get(f"{role}_logits")
    kind = "students" if role.startswith("students.") else "teachers"
    return facts.get(kind, {}).get(role), facts.get("teachers_logits", {}).get(role)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result
