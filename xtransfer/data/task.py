"""What a task is made of: examples, splits, languages, and the task itself."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from xtransfer.config import TaskConfig
from xtransfer.errors import UserError, nearest

SPLITS = ("train", "dev", "test", "unlabelled")
UNLABELLED = "unlabelled"

_SHOWN = 60  # languages in an error


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
      name: as in `xtransfer.data.registry.TASKS`.
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


def example_id(task: str, split: str, language: str, number: str) -> str:
    """The id of an example: task/split/language/number."""
    return f"{task}/{split}/{language}/{number}"


def label_index(name: str, labels: Sequence[str], where: str) -> int:
    """The index of a label's name; a UserError that begins with `where` lists the names where it is not one of them."""
    if name not in labels:
        raise UserError(f"{where}: label {name!r} is not one of {', '.join(labels)}{nearest(name, labels)}")
    return labels.index(name)


def target_languages(config: TaskConfig, known: Sequence[str]) -> tuple[str, ...]:
    """The target languages of a config, by default every one that the task knows but the source language.

    Raises:
      UserError: a language that the task does not know, or one that is named twice or is the source language.
    """
    source, targets = config.source_language, tuple(config.target_languages)
    for key, language in [("source_language", source), *(("target_languages", target) for target in targets)]:
        if language not in known:
            shown = ", ".join(known[:_SHOWN]) + (f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else "")
            raise UserError(f"task.{key}: no data of {language!r}; there is {shown}{_near(language, known)}")
    if source in targets or len(set(targets)) < len(targets):
        raise UserError(f"task.target_languages {', '.join(targets)}: each once, and not the source language {source}")
    return targets or tuple(language for language in known if language != source)


def check_request(split: str, language: str, config: TaskConfig, targets: Sequence[str]) -> None:
    """Refuses a split that there is not (ValueError) and a language that the task was not made for (UserError)."""
    if split not in SPLITS:
        raise ValueError(f"split {split!r} is not one of {', '.join(SPLITS)}")
    if language != config.source_language and language not in targets:
        languages = ", ".join((config.source_language, *targets))
        raise UserError(f"task {config.name!r} has no language {language!r} here; there is {languages}")


def _near(language: str, known: Sequence[str]) -> str:
    """The nearest name; of tags as long as "eng_Latn" or "en-US" those that begin like the language."""
    alike = [tag for tag in known if tag.startswith(language)]
    return f"; did you mean {alike[0]!r}?" if alike and language else nearest(language, known)
