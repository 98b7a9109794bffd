"""The config and tokenizer of each base checkpoint, kept in the workdir, so that its runs need nothing else.

    <workdir>/encoders/<role>/config.json, tokenizer.json, …    copies of the checkpoint's files, without its weights
                              digests.json                      their sha256, and the checkpoint's fingerprint

A run holds all parameters itself. With these files it predicts, exports, and is evaluated after its base checkpoint has
been moved, deleted, or changed.
"""

import json
import shutil

from xtransfer import storage
from xtransfer.errors import CheckpointError, MachineError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs.workdir import TEACHER, TaskRecord, Workdir, read_task
from xtransfer.train.inputs import SavedEncoder

STUDENT = "student"
DIGESTS = "digests.json"


def save(workdir: Workdir, role: str, base: SavedEncoder) -> None:
    """Copy the config and tokenizer of a base checkpoint into the workdir, unless they are there.

    Raises:
      UserError: the disk is full or the workdir cannot be written to.
    """
    target = workdir.encoder(role)
    if target.is_dir():
        return
    try:
        with storage.atomic_directory(target) as partial:
            for path in hf_checkpoint.description_files(base.directory):
                shutil.copyfile(path, partial / path.name)
            digests = {
                "checkpoint": base.fingerprint,
                "files": {path.name: storage.sha256(path) for path in sorted(partial.iterdir())},
            }
            (partial / DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{target} cannot be written: {error.strerror or error}") from error


def saved(workdir: Workdir) -> dict[str, SavedEncoder]:
    """Return the encoders that a workdir holds, by role; none before the experiment has started.

    Raises:
      UserError: see `saved_encoder`.
    """
    if not workdir.task.is_file():
        return {}
    task = read_task(workdir)
    encoders = {role: saved_encoder(workdir, task, role) for role in (TEACHER, STUDENT, *task.teachers, *task.students)}
    return {role: encoder for role, encoder in encoders.items() if encoder is not None}


def saved_encoder(workdir: Workdir, task: TaskRecord, role: str) -> SavedEncoder | None:
    """Return the encoder of a role, or None if the workdir is older than these copies.

    Raises:
      UserError: a file is missing or has changed.
    """
    directory = workdir.encoder(role)
    if not directory.is_dir():
        return None
    main = {TEACHER: task.teacher_checkpoint, STUDENT: task.student_checkpoint}
    fingerprints = {**main, **task.teachers, **task.students}
    fingerprint = fingerprints[role]
    remedy = f"restore it, or remove {directory} to read the base checkpoint instead"
    path = directory / DIGESTS
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: {remedy}")
    digests = storage.read_object(path, remedy)
    files = digests.get("files")
    if digests.get("checkpoint") != fingerprint or not isinstance(files, dict):
        raise CheckpointError(f"{path}: not of the checkpoint that {workdir.task} records: {remedy}")
    for name, digest in files.items():
        file = directory / name
        if not file.is_file() or storage.sha256(file) != digest:
            raise CheckpointError(
                f"{file}: missing or changed since the experiment started: copy this file alone from the base "
                f"checkpoint or a backup (sha256 {digest})"
            )
    return SavedEncoder(directory, fingerprint)
