"""Examples on which two classifiers disagree, with their texts from the task's data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.corpora import downloads
from xtransfer.data.registry import load_task
from xtransfer.data.task import Example, Task
from xtransfer.errors import UserError
from xtransfer.evaluation.calibration import probabilities
from xtransfer.evaluation.results import BASELINE
from xtransfer.report.page.markup import Child, Html, join, name_of, note, tag, text_in
from xtransfer.report.page.sources import MissingSource, Predictions, Source
from xtransfer.runs.workdir import TEACHER

_LANGUAGES = 13  # with examples
_EXAMPLES = 10  # per language
_CHARACTERS = 400  # of a text


@dataclass(frozen=True)
class Disagreement:
    """An example to which two classifiers give different classes.

    Attributes:
      index: its position in its split.
      id: its id.
      gold: the class of its label.
      guesses: the two classes.
      confidences: the probabilities of the two classes.
    """

    index: int
    id: str
    gold: int
    guesses: tuple[int, int]
    confidences: tuple[float, float]


def build(source: Source) -> Html:
    """Return examples by language: teacher against student in the source language, else objective against baseline."""
    shown = source.shown_languages(_LANGUAGES)
    pairs = {language: pair for language in shown if (pair := _pair(source, language)) is not None}
    if not pairs:
        raise MissingSource("There are no two classifiers to compare: they need the teacher, or two objectives.")
    task = _task(source)
    blocks = []
    for language, (first, second) in pairs.items():
        found = disagreements(_predictions(source, first, language), _predictions(source, second, language))
        texts = _texts(task, source, language, found[:_EXAMPLES])
        blocks.append(_block(source, language, (first, second), len(found), list(zip(found, texts, strict=False))))
    run = next(iter(source.steps(source.main_objective)))
    students = f"Students of {run}."
    omitted = (
        f" {len(shown) - 1} of {len(source.results.target_languages)} target languages are shown."
        if len(shown) < len(source.languages)
        else ""
    )
    return join(
        [
            note(
                f"Up to {_EXAMPLES} examples per language on which two classifiers disagree. Each list starts with "
                f"those on which both are most certain. {students}{omitted}"
            ),
            *blocks,
        ]
    )


def disagreements(first: Predictions, second: Predictions) -> list[Disagreement]:
    """Return the examples with different predictions, by the smaller of the two confidences, largest first."""
    if first.ids != second.ids:
        raise MissingSource("The classifiers were scored on different examples.")
    sure = [probabilities(side.logits).max(axis=1) for side in (first, second)]
    different = np.flatnonzero(first.guesses != second.guesses)
    order = different[np.argsort(-np.minimum(*sure)[different], kind="stable")]
    return [
        Disagreement(
            index=int(index),
            id=first.ids[index],
            gold=int(first.gold[index]),
            guesses=(int(first.guesses[index]), int(second.guesses[index])),
            confidences=(float(sure[0][index]), float(sure[1][index])),
        )
        for index in order
    ]


def _pair(source: Source, language: str) -> tuple[str, str] | None:
    """Return the names of the two classifiers to compare in a language, or None."""
    if language == source.results.source_language and TEACHER in source.kinds:
        return TEACHER, source.main_objective
    if BASELINE in source.students and source.main_objective != BASELINE:
        return BASELINE, source.main_objective
    return None


def _predictions(source: Source, objective: str, language: str) -> Predictions:
    return source.predictions(objective, next(iter(source.steps(objective))), language)


def _task(source: Source) -> Task:
    try:
        with downloads.refused():
            return load_task(source.config.task)
    except UserError as error:
        raise MissingSource(f"The task's data cannot be read: {error}.") from error


def _texts(task: Task, source: Source, language: str, found: Sequence[Disagreement]) -> list[Example]:
    """Return the examples, in their order; MissingSource if the data are not the ones that were evaluated."""
    try:
        with downloads.refused():
            examples = task.load(source.results.split, language)
    except UserError as error:
        raise MissingSource(f"The task's data cannot be read: {error}.") from error
    for item in found:
        if item.index >= len(examples) or (examples[item.index].id, examples[item.index].label) != (item.id, item.gold):
            raise MissingSource(f"The task's data have changed since the evaluation: {item.id} is another example.")
    return [examples[item.index] for item in found]


def _block(
    source: Source,
    language: str,
    names: tuple[str, str],
    total: int,
    items: Sequence[tuple[Disagreement, Example]],
) -> Html:
    count = source.results.counts[language]
    title = tag(
        "summary",
        text_in(language, language, "strong"),
        f" {names[0]} and {names[1]} disagree on {total:,} of {count:,} examples",
    )
    is_open = language in source.languages[:2]
    return tag("details", title, tag("div", *_items(source, language, names, items), class_="examples"), open=is_open)


def _items(
    source: Source, language: str, names: tuple[str, str], items: Sequence[tuple[Disagreement, Example]]
) -> Iterator[Html]:
    labels = source.task.labels
    for item, example in items:
        texts: list[Child] = [
            text_in(language, _shortened(text), "p") for text in (example.text, example.text_pair) if text
        ]
        verdicts: list[Child] = [tag("span", "label ", tag("b", name_of(labels[item.gold])))]
        for name, guess, confidence in zip(names, item.guesses, item.confidences, strict=True):
            is_right = guess == item.gold
            verdicts.append(
                tag(
                    "span",
                    "✓ " if is_right else "✗ ",
                    f"{name} ",
                    tag("b", name_of(labels[guess])),
                    f" {confidence:.0%}",
                    class_="right" if is_right else "wrong",
                )
            )
        yield tag("article", tag("div", *texts), tag("p", *verdicts, class_="verdicts"))


def _shortened(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
