"""The teachers of an experiment: where a ready-made one comes from, and what reports say about it.

A ready-made teacher is a Hugging Face classifier, or the directory of a finished run in any workdir.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.config import ExperimentConfig, FurtherTeacherConfig, ModelConfig, TeacherConfig, user_path
from xtransfer.data.example import Example
from xtransfer.data.examples import ids_of, in_languages, select
from xtransfer.distillation.logits_file import LogitsFile, read_logits_file
from xtransfer.distillation.objectives import configured_objectives, definitions
from xtransfer.distillation.teachers import seed_of
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import ConfigError, UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs.classifier import description_of, selected_run
from xtransfer.runs.draws import draws_of
from xtransfer.runs.find import SelectedRun, selected_steps
from xtransfer.runs.workdir import Workdir, read_config
from xtransfer.train.checkpoints import CHECKPOINTS, Checkpoints
from xtransfer.train.finetuning import TrainedWeights
from xtransfer.train.inputs import SavedEncoder
from xtransfer.train.metrics_log import read_metrics


def with_classes(config: ExperimentConfig, workdir: Workdir | None = None) -> ExperimentConfig:
    """Return the config with the classes of a ready-made teacher in `task.labels`, if the user's files name none.

    If the teacher is gone, they come from the config that the workdir has recorded.

    Raises:
      UserError: the teacher cannot be read, or has no trained head.
    """
    if config.task.name != "files" or config.task.labels or not config.teacher.is_ready_made:
        return config
    try:
        labels = _classes(config.teacher)
    except UserError:
        recorded = read_config(workdir).task.labels if workdir is not None and workdir.config.is_file() else ()
        if not recorded:
            raise
        labels = recorded
    return dataclasses.replace(config, task=dataclasses.replace(config.task, labels=labels))


def ready_made(config: ExperimentConfig, saved: Mapping[str, SavedEncoder]) -> dict[str, TrainedWeights]:
    """Return the finished runs that teach as they are, by role. A Hugging Face classifier is none, and needs no entry.

    Args:
      config: the experiment's config.
      saved: the encoders that the workdir holds. With one of them, the run may be gone.

    Raises:
      UserError: a run is not finished or cannot be read.
    """
    weights = {}
    for member, settings in config.members.items():
        if not settings.is_ready_made:
            continue
        try:
            run = _run(settings)
        except UserError:
            if member in saved:
                continue
            raise
        if run is not None:
            weights[member] = _weights(run)
    return weights


def refuse_target_text(config: ExperimentConfig, targets: Sequence[str]) -> None:
    """Refuse ready-made teachers whose runs learned from text in a target language of this experiment.

    Args:
      config: the experiment's config.
      targets: the target languages.

    Raises:
      UserError: names the teacher and the language.
    """
    for member, settings in config.members.items():
        try:
            run = _run(settings) if settings.is_ready_made else None
        except UserError:  # `ready_made` refuses it, unless the workdir holds what it needs
            continue
        known = _languages_read(run) if run is not None else ()
        taught = [language for language in targets if language in known]
        if taught:
            raise ConfigError(
                f"config key {member}.checkpoint is {settings.checkpoint!r}, which learned from text in "
                f"{' and '.join(taught)}: a target is zero-shot only if no text in it is used, so list other languages "
                "in task.target_languages, or name another teacher"
            )


def _languages_read(run: SelectedRun) -> tuple[str, ...]:
    """Return the languages of all text that a run learned from, itself or through the students that taught it."""
    if run.is_teacher:
        return run.config.languages_of(run.objective)
    languages = [*run.task.source_languages, *run.config.further_sources]
    objectives, name = definitions(run.config), run.objective
    while name in objectives:
        if objectives[name].reads_target_text:
            languages += objectives[name].languages or run.task.target_languages
        name = objectives[name].teacher
    return tuple(dict.fromkeys(languages))


def read_files(
    config: ExperimentConfig, labels: Sequence[str], samples: Iterable[TransferSet]
) -> dict[str, LogitsFile]:
    """Read the files that stand in for teachers, by member, and check that they have the text of all draws.

    Args:
      config: the experiment's config.
      labels: the names of the task's classes, in order.
      samples: the transfer sets of all draws.

    Raises:
      UserError: see `read_logits_file` and `LogitsFile.check`; or labels would have to have a mean of logits.
    """
    samples = list(samples)
    members = [member for member, settings in config.members.items() if settings.is_file]
    return {member: read_file(config, member, labels, samples) for member in members}


def read_file(
    config: ExperimentConfig, member: str, labels: Sequence[str], samples: Iterable[TransferSet]
) -> LogitsFile:
    """Read the file that stands in for one member; see `read_files`."""
    path, kind = config.members[member].logits_file, config.task.multi_label
    file = read_logits_file(path, labels, f"{member}.logits_file", multi_label=kind)
    if file.kind in ("label", "labels") and config.transfer.teacher_mean == "logits":
        raise ConfigError(
            f"config key transfer.teacher_mean is 'logits', and {file.path} has labels, which have none: set it to "
            "'probabilities'"
        )
    objectives = configured_objectives(config)
    taught = (sample.for_monolingual_teacher(objectives) for sample in samples)
    file.check({id_ for examples in taught for id_ in ids_of(read_by(config, member, examples))})
    return file


def read_by(config: ExperimentConfig, member: str, examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples in the languages that a member reads."""
    return select(examples, in_languages(examples, config.languages_of(member)))


def runs(workdir: Workdir, config: ExperimentConfig) -> list[tuple[str, str, Path]]:
    """Return (member, draw, directory) of each teacher's run, draw by draw, without files."""
    members = [member for member, settings in config.members.items() if not settings.is_file]
    return [
        (member, draw.name, workdir.at(draw.name).member(member)) for draw in draws_of(config) for member in members
    ]


def seed(config: ExperimentConfig, member: str) -> int:
    """Return the seed of a member's training, for the config of one draw."""
    settings = config.members[member]
    return seed_of(config.teacher_seed, settings.seed if isinstance(settings, FurtherTeacherConfig) else 0)


def description_directory(settings: ModelConfig) -> Path | None:
    """Return the config and tokenizer of a run that a role takes its weights from; None for any other checkpoint.

    Raises:
      UserError: see `ready_made`.
    """
    is_ready_made = isinstance(settings, TeacherConfig) and settings.is_ready_made
    run = _run(settings) if is_ready_made else None
    return None if run is None else description_of(run)


def origins(config: ExperimentConfig) -> list[str]:
    """Return one line on each teacher for reports; none on the only one, if it was trained here."""
    if not config.teachers:
        if config.teacher.is_file:
            return [f"The teacher's logits come from a file: {config.teacher.logits_file}."]
        if config.teacher.is_ready_made:
            return [f"The teacher is ready-made and was not trained here: {config.teacher.checkpoint}."]
        return []
    lines = [
        f"{len(config.members)} teachers: each example has the mean of the {config.transfer.teacher_mean} of those "
        "that read its language."
    ]
    for member, settings in config.members.items():
        origin = f"logits of {settings.logits_file}" if settings.is_file else settings.checkpoint
        kind = ", ready-made" if settings.is_ready_made else ""
        reads = ", ".join(config.languages_of(member))
        lines.append(f"{member}: {origin}{kind}, reads {reads}, weight {settings.weight:g}.")
    return lines


def _run(settings: ModelConfig) -> SelectedRun | None:
    path = user_path(settings.checkpoint)
    # Anything but a directory is an embedded name or a hub id; others are refused later, by their key.
    return selected_run(path, "source_dev") if settings.checkpoint and path.is_dir() else None


def _classes(settings: ModelConfig) -> tuple[str, ...]:
    run = _run(settings)
    return hf_checkpoint.trained_classes(hf_checkpoint.resolve(settings.checkpoint)) if run is None else run.task.labels


def _weights(run: SelectedRun) -> TrainedWeights:
    return TrainedWeights(
        encoder=SavedEncoder(description_of(run), _fingerprint(run)),
        labels=run.task.labels,
        pooling=run.settings.pooling,
        multi_label=run.task.multi_label,
        restore=functools.partial(_restore, run),
    )


def _restore(run: SelectedRun, abstract_params: Any) -> Any:
    with Checkpoints(run.directory / CHECKPOINTS, read_only=True) as checkpoints:
        return checkpoints.restore_params(run.step, abstract_params, run.item)


def _fingerprint(run: SelectedRun) -> str:
    """Return the sha256 over the files of a run's selected weights, and of its base checkpoint's."""
    directory = run.directory / CHECKPOINTS / str(run.step) / run.item
    digest = hashlib.sha256(f"{run.fingerprint}\n".encode())
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(directory).as_posix()} {storage.sha256(path)}\n".encode())
    return digest.hexdigest()


def fingerprint(run: Path) -> str | None:
    """Return the fingerprint of a run's selected weights, as the keys of logits stores have it; None without a run."""
    if not read_metrics(run):
        return None
    with Checkpoints(run / CHECKPOINTS, read_only=True) as checkpoints:
        arrays = checkpoints.restore_arrays(selected_steps(run)["source_dev"])
    return hf_checkpoint.fingerprint_arrays(arrays)
