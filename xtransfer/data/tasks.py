"""The registry of tasks, and the choice of labelled and unlabelled examples from one.

A new task is a factory `TaskConfig -> Task` and its line in `TASKS`.
"""

import dataclasses
import glob
import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from xtransfer.config import TaskConfig, cache_dir
from xtransfer.data import files
from xtransfer.data.builders import minireviews
from xtransfer.errors import UserError, nearest

SPLITS = ("train", "dev", "test", "unlabelled")
UNLABELLED = "unlabelled"

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One text, or pair of texts, to classify.

    Attributes:
      id: task/split/language/id, the same in every run.
      text: never empty.
      text_pair: the second text, or None.
      label: index into the task's labels, −1 where there is none.
      language: as the task names it.
    """

    id: str
    text: str
    text_pair: str | None
    label: int
    language: str


@dataclass(frozen=True)
class Task:
    """A classification task in a source language and others.

    Attributes:
      name: as in `TASKS`.
      labels: names of the classes in canonical order.
      source_language: the language of the labelled training text.
      target_languages: the languages to transfer to; never the source language.
      load: (split, language) -> examples, always the same ones in the same order. Labels of "unlabelled" are −1.
        Raises UserError for data that are missing or malformed.
      fingerprint: hash of what the data are: of every split of the source and the target languages, also of those
        that are not asked for.
      synthetic: whether the text was generated; whatever names the task says so.
      pretraining: language -> texts to pretrain on, by group ("en/books", or just "en"); never of dev or test.
      parallel: two languages -> translation pairs (text, text); none where the task has no parallel text.
    """

    name: str
    labels: tuple[str, ...]
    source_language: str
    target_languages: tuple[str, ...]
    load: Callable[[str, str], list[Example]]
    fingerprint: Callable[[], str]
    synthetic: bool
    pretraining: Callable[[str], dict[str, list[str]]]
    parallel: Callable[[str, str], list[tuple[str, str]]]


def get_task(config: TaskConfig) -> Task:
    """The task that a config names.

    Raises:
      UserError: there is no such task, or it cannot be made of this config.
    """
    if config.name not in TASKS:
        raise UserError(f"task.name {config.name!r} is not one of {', '.join(TASKS)}{nearest(config.name, TASKS)}")
    return TASKS[config.name](config)


def without_labels(examples: Sequence[Example]) -> list[Example]:
    """The examples with label −1."""
    return [dataclasses.replace(example, label=-1) for example in examples]


def labelled_subset(examples: Sequence[Example], n: int, seed: int, names: Sequence[str] = ()) -> list[Example]:
    """Draws n labelled examples, the same number of each class or one more.

    The draws of one seed are nested: those for a smaller n are the first of those for a larger one.

    Args:
      examples: labelled examples with distinct ids.
      n: how many; 0 = all of them, as they stand.
      seed: of the draw.
      names: the classes' names, for the error.

    Raises:
      UserError: a class has too few examples.
      ValueError: an example has no label.
    """
    if any(example.label < 0 for example in examples):
        raise ValueError("an example without a label among the labelled ones")
    if n == 0:
        return list(examples)
    by_class: dict[int, list[Example]] = {label: [] for label in range(len(names))}
    for example in examples:
        by_class.setdefault(example.label, []).append(example)
    turns = _shuffled(sorted(by_class), seed, 0)
    draws = {label: _shuffled(by_class[label], seed, 1 + label) for label in turns}
    available = {label: len(draw) for label, draw in draws.items()}
    if any(available[label] <= (n - 1 - turn) // len(turns) for turn, label in enumerate(turns)) or not turns:
        have = ", ".join(f"{names[label] if names else label} {available[label]}" for label in sorted(available))
        raise UserError(f"task.labelled {n}, equally of each class, is more than there is: {have or 'nothing'}")
    return [draws[turns[i % len(turns)]][i // len(turns)] for i in range(n)]


def unlabelled_examples(task: Task, kind: str, limit: int, seed: int, labelled: Sequence[Example]) -> list[Example]:
    """Source-language examples without labels, none of them an example of `labelled`.

    Args:
      task: where they come from.
      kind: "none", "split" (the task's unlabelled split) or "train_rest" (what `labelled` leaves of train).
      limit: how many; 0 = all there are. For one seed, fewer are a subset of more.
      seed: of the choice.
      labelled: examples to leave out, by id.

    Raises:
      UserError: there are fewer than `limit`, or there is no such split.
      ValueError: an unknown kind.
    """
    if kind not in ("none", "split", "train_rest"):
        raise ValueError(f"unlabelled kind {kind!r}")
    if kind == "none":
        return []
    taken = {example.id for example in labelled}
    everything = task.load(UNLABELLED if kind == "split" else "train", task.source_language)
    examples = [example for example in everything if example.id not in taken]
    if limit > len(examples):
        raise UserError(f"task.unlabelled {limit} is more than there is: {len(examples)}; 0 takes all")
    if limit:
        chosen = _shuffled(range(len(examples)), seed, 0)[:limit]
        examples = [examples[i] for i in sorted(chosen)]
    return without_labels(examples)


def _minireviews(config: TaskConfig) -> Task:
    """The embedded synthetic reviews; the first use of a language writes them below the cache directory."""

    def load(split: str, language: str) -> list[Example]:
        _check_request(split, language, config, targets)
        return [
            Example(
                id=_example_id(config.name, split, language, row["id"]),
                text=row["text"],
                text_pair=None,
                label=-1 if split == UNLABELLED else int(row["label"]),
                language=language,
            )
            for row in prepared(language, split)
        ]

    def pretraining(language: str) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for row in prepared(f"{language}-pretraining", "pretraining"):
            groups.setdefault(f"{language}/{row['domain']}", []).append(row["text"])
        return groups

    def parallel(first: str, second: str) -> list[tuple[str, str]]:
        return [(row["text"], row["text_pair"]) for row in prepared(f"{first}-{second}", "parallel")]

    def prepared(name: str, split: str) -> list[dict[str, Any]]:
        minireviews.prepare(name, cache_dir(config))
        return minireviews.read(name, split, cache_dir(config))

    targets = _targets(config, minireviews.LANGUAGES)
    return Task(
        name=config.name,
        labels=tuple(minireviews.LABELS),
        source_language=config.source_language,
        target_languages=targets,
        load=load,
        fingerprint=minireviews.fingerprint,
        synthetic=True,
        pretraining=pretraining,
        parallel=parallel,
    )


def _files(config: TaskConfig) -> Task:
    """The user's own files, one for each language and split."""
    _check_pattern(config)
    source = config.source_language
    known = _languages_on_disk(config)
    if not known:
        raise UserError(f"task.path {config.path!r}: no file of split 'test' is so named below {config.data_dir}")
    targets = _targets(config, known)
    needed = [("train", source), ("dev", source), ("test", source), *(("test", language) for language in targets)]
    for split, language in needed:
        _existing_file(config, split, language)
    labels = config.labels or _labels_found(config)
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise UserError(f"task.labels {', '.join(map(repr, labels))}: expected two or more different names")

    def load(split: str, language: str) -> list[Example]:
        _check_request(split, language, config, targets)
        path = _existing_file(config, split, language)
        columns = _columns(config, labelled=split != UNLABELLED)
        records, skipped = files.read_records(path, columns, empty_text=config.empty_text)
        if skipped:
            _log.warning("%s: %d rows without text were skipped", path, skipped)
        return [
            Example(
                id=_example_id(config.name, split, language, record.id),
                text=record.text,
                text_pair=record.text_pair,
                label=-1 if record.label is None else _label_index(record.label, labels, f"{path}:{record.line}"),
                language=language,
            )
            for record in records
        ]

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


TASKS: dict[str, Callable[[TaskConfig], Task]] = {"minireviews": _minireviews, "files": _files}


def _targets(config: TaskConfig, known: Sequence[str]) -> tuple[str, ...]:
    """The target languages, by default every other one that the task knows."""
    source, targets = config.source_language, tuple(config.target_languages)
    for key, language in [("source_language", source), *(("target_languages", target) for target in targets)]:
        if language not in known:
            near = nearest(language, known)
            raise UserError(f"task.{key}: no data of {language!r}; there is {', '.join(known)}{near}")
    if source in targets or len(set(targets)) < len(targets):
        raise UserError(f"task.target_languages {', '.join(targets)}: each once, and not the source language {source}")
    return targets or tuple(language for language in known if language != source)


def _check_request(split: str, language: str, config: TaskConfig, targets: Sequence[str]) -> None:
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if language != config.source_language and language not in targets:
        languages = ", ".join((config.source_language, *targets))
        raise UserError(f"task {config.name!r} has no language {language!r} here; there is {languages}")


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


def _label_index(name: str, labels: Sequence[str], where: str) -> int:
    if name not in labels:
        raise UserError(f"{where}: label {name!r} is not one of {', '.join(labels)}{nearest(name, labels)}")
    return labels.index(name)


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
    return whole.hexdigest()


def _example_id(task: str, split: str, language: str, number: str) -> str:
    return f"{task}/{split}/{language}/{number}"


def _shuffled(items: Sequence[T], seed: int, stream: int) -> list[T]:
    return [items[i] for i in np.random.default_rng([seed, stream]).permutation(len(items))]
