"""A task: its examples, splits, and languages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.config import TaskConfig
from xtransfer.data import names
from xtransfer.data.example import Example, example_id, item_of
from xtransfer.data.examples import gold
from xtransfer.errors import ConfigError, DataError, MissingSplitError

SPLITS = ("train", "dev", "test", "unlabelled")
UNLABELLED = "unlabelled"

# Those of `example` and `examples` are here too, because they belong to a task.
__all__ = ["SPLITS", "UNLABELLED", "Example", "Task", "TextSource", "example_id", "gold", "item_of"]

_SHOWN = 60  # the most languages in an error


@dataclass(frozen=True)
class Pairs:
    """Texts in source languages, and in the same order their translations into one target language.

    The ids of a text and its translation end alike.
    """

    originals: Sequence[Example]
    translations: Sequence[Example]


@dataclass(frozen=True)
class Task:
    """A classification task in a source language, or several, and target languages.

    Attributes:
      name: a key of `data.registry.TASKS`.
      labels: the class names, in canonical order.
      source_language: the language of the labelled training text, of several the main one.
      target_languages: the languages to transfer to, without the source languages.
      load: returns the examples of a (split, language), always in the same order, perhaps on disk. Labels in
        "unlabelled" are −1. It raises a UserError for missing or malformed data.
      fingerprint: returns a hash of the data, of every split in the source and target languages, whether used or not.
      synthetic: whether the text was generated; everything that names the task says so.
      pretraining: returns a language's texts to pretrain on by group ("en/books", or "en"), never from dev or test.
      parallel: returns translation pairs (text, text) for two languages; none if the task has no parallel text.
      multi_label: whether a text has any number of labels, and not exactly one.
      other_sources: the source languages after the main one.
      translations: returns the pairs of a target language in the user's file (`data.parallel`); None without a file.
    """

    name: str
    labels: tuple[str, ...]
    source_language: str
    target_languages: tuple[str, ...]
    load: Callable[[str, str], Sequence[Example]]
    fingerprint: Callable[[], str]
    synthetic: bool
    pretraining: Callable[[str], dict[str, list[str]]]
    parallel: Callable[[str, str], list[tuple[str, str]]]
    multi_label: bool = False
    other_sources: tuple[str, ...] = ()
    translations: Callable[[str], Pairs] | None = None

    @property
    def source_languages(self) -> tuple[str, ...]:
        """The source languages, the main one first."""
        return (self.source_language, *self.other_sources)

    @property
    def languages(self) -> tuple[str, ...]:
        """The source languages, then the target languages."""
        return (*self.source_languages, *self.target_languages)

    def gold(self, examples: Sequence[Example]) -> np.ndarray:
        """Return the labels of n examples as an array, see `gold`."""
        return gold(examples, len(self.labels), multi_label=self.multi_label)


@dataclass(frozen=True)
class TextSource:
    """A task's text to pretrain on; see `Task` for the two functions."""

    pretraining: Callable[[str], dict[str, list[str]]]
    parallel: Callable[[str, str], list[tuple[str, str]]]


def load_if_present(task: Task, split: str, language: str) -> Sequence[Example] | None:
    """Return the examples of a split, or None if the task has no such split in the language.

    Raises:
      UserError: the split exists, and is malformed.
    """
    try:
        return task.load(split, language)
    except MissingSplitError:
        return None


def is_on_pairs(task: Task, language: str) -> bool:
    """Return whether a task classifies pairs of texts, as its test split in a language shows."""
    return any(example.text_pair is not None for example in task.load("test", language)[:1])


def label_index(name: str, labels: Sequence[str], where: str) -> int:
    """Return the index of a label's name; the UserError for an unknown one starts with `where` and lists the names."""
    if name not in labels:
        raise DataError(f"{where}: label {name!r} is not one of {', '.join(labels)}{names.similar(name, labels)}")
    return labels.index(name)


def target_languages(config: TaskConfig, known: Sequence[str]) -> tuple[str, ...]:
    """Return the target languages of a config, by default every language of the task except its source languages.

    Raises:
      UserError: a language is unknown to the task, named twice, or a source language; or there is no target language.
    """
    sources, targets = config.sources, tuple(config.target_languages)
    key = "source_languages" if config.source_languages else "source_language"
    keys_and_languages = [(key, source) for source in sources] + [("target_languages", target) for target in targets]
    for key, language in keys_and_languages:
        if language not in known:
            shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
            raise ConfigError(f"task.{key}: no data in {language!r}; there are {shown}{_near(language, known)}")
    if set(sources) & set(targets) or len(set(targets)) < len(targets):
        raise ConfigError(
            f"task.target_languages {', '.join(targets)}: name each language once, and not the source language "
            f"{' or '.join(sources)}"
        )
    targets = targets or tuple(language for language in known if language not in sources)
    if not targets:
        raise ConfigError(
            f"task.target_languages: there is no language but {' and '.join(sources)}, so nothing to transfer to: add "
            "one"
        )
    return targets


def check_languages(languages: Sequence[str], where: str) -> None:
    """Refuse languages that look alike, and names of languages that cannot be a part of a path.

    Raises:
      UserError: the message starts with `where`.
    """
    for language in languages:
        names.check_path_part(language, where)
    names.check_distinct(languages, where, "correct one of them")


def check_request(split: str, language: str, config: TaskConfig, targets: Sequence[str]) -> None:
    """Refuse an unknown split (ValueError), and a language that the task was not made for (UserError)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if language != config.source_language and language not in targets:
        languages = ", ".join((config.source_language, *targets))
        raise ConfigError(f"task {config.name!r} was set up without language {language!r}; it has {languages}")


def _near(language: str, known: Sequence[str]) -> str:
    """Return a hint with the nearest name; for tags like "eng_Latn" or "en-US", with one that starts alike."""
    with_prefix = [tag for tag in known if tag.startswith(language)]
    return f"; did you mean {with_prefix[0]!r}?" if with_prefix and language else names.similar(language, known)
