"""The task `files`: the user's own files, one for each language and split; and the user's file of unlabelled text."""

import dataclasses
import glob
import hashlib
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from xtransfer.config import TaskConfig
from xtransfer.data import files, sampling
from xtransfer.data.examples import (
    SPLITS,
    UNLABELLED,
    Example,
    Task,
    check_request,
    example_id,
    label_index,
    target_languages,
)
from xtransfer.errors import UserError

_log = logging.getLogger(__name__)


def task(config: TaskConfig) -> Task:
    """The task of the files that a config names.

    A language with a train file and without a dev file gets a dev split that is held out of train.

    Raises:
      UserError: a file that is needed is missing, or a setting does not fit.
    """
    _check_pattern(config)
    source = config.source_language
    known = _languages_on_disk(config)
    if not known:
        raise UserError(f"task.path {config.path!r}: no file of split 'test' is so named below {config.data_dir}")
    targets = target_languages(config, known)
    for split, language in [("train", source), ("test", source), *(("test", language) for language in targets)]:
        _existing_file(config, split, language)
    labels = config.labels or _labels_found(config)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"task.labels {', '.join(map(repr, labels))}: expected two or more different names")
    if _holds_out(config, source):
        _log.warning("no dev file of %s: %s of train is held out for it", source, config.held_out_dev or "a tenth")

    def load(split: str, language: str) -> list[Example]:
        check_request(split, language, config, targets)
        if split in ("train", "dev") and _holds_out(config, language):
            train = _read(config, labels, "train", language)
            return sampling.train_and_dev(train, config)[split == "dev"]
        return _read(config, labels, split, language)

    return Task(
        name=config.name,
        labels=labels,
        source_language=source,
        target_languages=targets,
        load=load,
        fingerprint=lambda: _hash_files(config, labels, (source, *targets)),
        synthetic=False,
        pretraining=lambda language: {language: [example.text for example in load(UNLABELLED, language)]},
        parallel=lambda first, second: [],
    )


def with_unlabelled_file(task: Task, config: TaskConfig) -> Task:
    """The task with the rows of `config.unlabelled_file` as the unlabelled split of its source language.

    Raises:
      UserError: when made, for a missing file; when loaded, for a malformed one, or one that has single texts for a
        task of pairs or the other way round.
    """
    path = Path(config.unlabelled_file).expanduser()
    if not path.is_file():
        raise UserError(f"task.unlabelled_file {path}: no such file")
    columns = _columns(config, labelled=False)

    def load(split: str, language: str) -> list[Example]:
        if (split, language) != (UNLABELLED, task.source_language):
            return task.load(split, language)
        has_pairs = any(example.text_pair is not None for example in task.load("test", language)[:1])
        if has_pairs != bool(config.pair_column):
            wanted = "name the column of the second texts" if has_pairs else "the task has single texts: leave it empty"
            raise UserError(f"task.pair_column {config.pair_column!r}, which {path} is read by: {wanted}")
        return _examples(config, path, columns, (), split, language)

    def fingerprint() -> str:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        whole = json.dumps([task.fingerprint(), digest, dataclasses.astuple(columns), config.empty_text])
        return hashlib.sha256(whole.encode()).hexdigest()

    return dataclasses.replace(task, load=load, fingerprint=fingerprint)


def _read(config: TaskConfig, labels: Sequence[str], split: str, language: str) -> list[Example]:
    path = _existing_file(config, split, language)
    return _examples(config, path, _columns(config, labelled=split != UNLABELLED), labels, split, language)


def _examples(
    config: TaskConfig, path: Path, columns: files.Columns, labels: Sequence[str], split: str, language: str
) -> list[Example]:
    records, skipped = files.read_records(path, columns, empty_text=config.empty_text)
    if skipped:
        _log.warning("%s: %d rows without text were skipped", path, skipped)
    return [
        Example(
            id=example_id(config.name, split, language, record.id),
            text=record.text,
            text_pair=record.text_pair,
            label=-1 if record.label is None else label_index(record.label, labels, f"{path}:{record.line}"),
            language=language,
        )
        for record in records
    ]


def _check_pattern(config: TaskConfig) -> None:
    if not config.data_dir:
        raise UserError("task.data_dir is empty: give the directory that task.path starts from")
    if not Path(config.data_dir).expanduser().is_dir():
        raise UserError(f"task.data_dir {config.data_dir}: no such directory")
    fields = re.findall(r"{(.*?)}", config.path)
    if sorted(set(fields)) != ["language", "split"]:
        raise UserError(f"task.path {config.path!r}: expected {{language}} and {{split}} in it, and no other {{}}")
    if Path(config.path).is_absolute() or ".." in Path(config.path).parts:
        raise UserError(f"task.path {config.path!r}: expected a path below task.data_dir, without '..'")


def _file(config: TaskConfig, split: str, language: str) -> Path:
    path = config.path.replace("{language}", language).replace("{split}", split)
    return Path(config.data_dir).expanduser() / path


def _existing_file(config: TaskConfig, split: str, language: str) -> Path:
    path = _file(config, split, language)
    if path.is_file():
        return path
    if split == UNLABELLED:
        raise UserError(f"{path}: no such file; without one, set task.unlabelled_from to 'train_rest' or 'none'")
    raise UserError(f"{path}: no such file; task.path says that split {split!r} of {language!r} is there")


def _holds_out(config: TaskConfig, language: str) -> bool:
    """Whether the language has train and no dev, so that dev is held out of train."""
    return _file(config, "train", language).is_file() and not _file(config, "dev", language).is_file()


def _languages_on_disk(config: TaskConfig) -> tuple[str, ...]:
    """The languages of which there is a test file, sorted."""
    root = Path(config.data_dir).expanduser()
    parts = PurePosixPath(config.path).as_posix().replace("{split}", "test").split("{language}")
    before, *others = map(re.escape, parts)
    pattern = re.compile(f"{before}(?P<language>[^/]+){'(?P=language)'.join(others)}")
    found = root.glob("*".join(map(glob.escape, parts)))
    matches = [pattern.fullmatch(path.relative_to(root).as_posix()) for path in found]
    return tuple(sorted(match["language"] for match in matches if match))


def _columns(config: TaskConfig, *, labelled: bool) -> files.Columns:
    label = config.label_column if labelled else ""
    return files.Columns(config.text_column, config.pair_column, label, config.id_column)


def _labels_found(config: TaskConfig) -> tuple[str, ...]:
    path = _file(config, "train", config.source_language)
    records, _ = files.read_records(path, _columns(config, labelled=True), empty_text=config.empty_text)
    return tuple(sorted({record.label for record in records if record.label is not None}))


def _hash_files(config: TaskConfig, labels: Sequence[str], languages: Sequence[str]) -> str:
    """sha256 over the bytes of all files there are, and over how they are read."""
    columns = dataclasses.astuple(_columns(config, labelled=True))
    whole = hashlib.sha256(json.dumps([columns, list(labels), config.empty_text]).encode())
    for language in languages:
        for split in SPLITS:
            path = _file(config, split, language)
            if path.is_file():
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                whole.update(json.dumps([split, language, digest]).encode())
        if _holds_out(config, language):
            whole.update(json.dumps([language, config.held_out_dev, config.held_out_seed]).encode())
    return whole.hexdigest()
