"""Examples on which two classifiers disagree, with their texts from the task's data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.corpora import downloads
from xtransfer.data.registry import load_task, shares_items
from xtransfer.data.task import Example, Task, item_of
from xtransfer.errors import UserError
from xtransfer.evaluation.calibration import probabilities, sigmoid
from xtransfer.evaluation.results import BASELINE
from xtransfer.report.page.markup import Child, Html, join, name_of, note, tag, text_in
from xtransfer.report.page.sources import MissingSource, Predictions, Source
from xtransfer.runs.workdir import TEACHER

_LANGUAGES = 13  # with examples
_EXAMPLES = 10  # per language
_CHARACTERS = 400  # of a text


Classes = int | tuple[int, ...]


@dataclass(frozen=True)
class Side:
    """One of two classifiers that are compared, and the language of the texts that it read."""

    objective: str
    language: str


@dataclass(frozen=True)
class Disagreement:
    """An example to which two classifiers give different classes.

    Attributes:
      positions: where it is in the split that each classifier read.
      ids: its two ids.
      gold: the class of its label, or in a multi-label task its classes.
      guesses: the two classes, or the two sets of classes.
      confidences: the probabilities of the two classes; for a set, the one of its least certain decision.
    """

    positions: tuple[int, int]
    ids: tuple[str, str]
    gold: Classes
    guesses: tuple[Classes, Classes]
    confidences: tuple[float, float]


def build(source: Source) -> Html:
    """Return examples by language on which teacher and student disagree, or else a student and the baseline.

    The teacher knows source languages alone. In another language, it is shown what it says of the original, if the
    texts are translations.
    """
    shown = source.shown_languages(_LANGUAGES)
    pairs = {language: pair for language in shown if (pair := _pair(source, language)) is not None}
    if not pairs:
        raise MissingSource("There are no two classifiers to compare: they need the teacher, or two objectives.")
    task = _task(source)
    blocks = []
    for sides in pairs.values():
        first, second = (_predictions(source, side) for side in sides)
        found, total = disagreements(first, second)
        texts = [_texts(task, source, side.language, found[:_EXAMPLES], i) for i, side in enumerate(sides)]
        items = list(zip(found, *texts, strict=False))
        blocks.append(_block(source, sides, (len(found), total), items))
    run = next(iter(source.steps(source.main_objective)))
    texts_of_note = [
        f"Up to {_EXAMPLES} examples per language on which two classifiers disagree. Each list starts with those on "
        f"which both are most certain. Students of {run}."
    ]
    originals = [sides[0].language for sides in pairs.values() if sides[0].language != sides[1].language]
    if originals:
        texts_of_note.append(f"The teacher read the originals, in {originals[0]}.")
    elif TEACHER in source.kinds:
        texts_of_note.append(
            f"The teacher knows {' and '.join(_read_by_teacher(source))} only, so elsewhere {BASELINE} is shown."
        )
    if len(shown) < len(source.languages):
        count = len(shown) - len(source.results.source_languages)
        texts_of_note.append(f"{count} of {len(source.results.target_languages)} target languages are shown.")
    return join([note(" ".join(texts_of_note)), *blocks])


def disagreements(first: Predictions, second: Predictions) -> tuple[list[Disagreement], int]:
    """Return the common items with different predictions, and the number of common items.

    The order is by the smaller of the two confidences, largest first.
    """
    items = [item_of(id_) for id_ in second.ids]
    place = {item_of(id_): index for index, id_ in enumerate(first.ids)}
    common = [(place[item], index) for index, item in enumerate(items) if item in place]
    if not common:
        raise MissingSource("The classifiers were scored on different examples.")
    left, right = np.array(common).T
    sure = [_certainty(side)[at] for side, at in ((first, left), (second, right))]
    differs = first.guesses[left] != second.guesses[right]
    different = np.flatnonzero(differs if differs.ndim == 1 else differs.any(axis=1))
    order = different[np.argsort(-np.minimum(*sure)[different], kind="stable")]
    found = [
        Disagreement(
            positions=(int(left[i]), int(right[i])),
            ids=(first.ids[left[i]], second.ids[right[i]]),
            gold=_classes(second.gold[right[i]]),
            guesses=(_classes(first.guesses[left[i]]), _classes(second.guesses[right[i]])),
            confidences=(float(sure[0][i]), float(sure[1][i])),
        )
        for i in order
    ]
    return found, len(common)


def _certainty(side: Predictions) -> np.ndarray:
    """Return the probability of each prediction [n], of a set the smallest one of its decisions."""
    if side.guesses.ndim == 1:
        return probabilities(side.logits).max(axis=1)
    return sigmoid(np.abs(side.logits)).min(axis=1)


def _classes(value: np.ndarray) -> Classes:
    """Return a class, or the classes of a row of zeros and ones."""
    return int(value) if value.ndim == 0 else tuple(np.flatnonzero(value).tolist())


def _name(labels: Sequence[str], classes: Classes) -> Html:
    if isinstance(classes, int):
        return name_of(labels[classes])
    return name_of(", ".join(labels[index] for index in classes) or "none")


def _pair(source: Source, language: str) -> tuple[Side, Side] | None:
    """Return the two classifiers to compare in a language, or None."""
    student = Side(source.main_objective, language)
    read = _read_by_teacher(source)
    if language in read:
        return Side(TEACHER, language), student
    if read and shares_items(source.config.task):
        return Side(TEACHER, read[0]), student
    if BASELINE in source.students and source.main_objective != BASELINE:
        return Side(BASELINE, language), student
    return None


def _read_by_teacher(source: Source) -> tuple[str, ...]:
    """Return the languages that the teacher is scored in; none without a teacher."""
    return next((tuple(line.languages) for line in source.results.lines if line.objective == TEACHER), ())


def _predictions(source: Source, side: Side) -> Predictions:
    return source.predictions(side.objective, next(iter(source.steps(side.objective))), side.language)


def _task(source: Source) -> Task:
    try:
        with downloads.refused():
            return load_task(source.config.task)
    except UserError as error:
        raise MissingSource(f"The task's data cannot be read: {error}.") from error


def _texts(task: Task, source: Source, language: str, found: Sequence[Disagreement], side: int) -> list[Example]:
    """Return the examples of a side; MissingSource if the data are not the ones that were evaluated."""
    try:
        with downloads.refused():
            examples = task.load(source.results.split, language)
    except UserError as error:
        raise MissingSource(f"The task's data cannot be read: {error}.") from error
    for item in found:
        at, name = item.positions[side], item.ids[side]
        if at >= len(examples) or _facts(examples[at]) != (name, item.gold):
            raise MissingSource(f"The task's data have changed since the evaluation: {name} is another example.")
    return [examples[item.positions[side]] for item in found]


def _facts(example: Example) -> tuple[str, Classes]:
    return example.id, example.label if example.label_set is None else example.label_set


def _block(
    source: Source,
    sides: tuple[Side, Side],
    counts: tuple[int, int],
    items: Sequence[tuple[Disagreement, Example, Example]],
) -> Html:
    second = sides[1]
    names = " and ".join(source.results.name_of(side.objective) for side in sides)
    title = tag(
        "summary",
        text_in(second.language, second.language, "strong"),
        f" {names} disagree on {counts[0]:,} of {counts[1]:,} examples",
    )
    is_open = second.language in source.languages[: len(source.results.source_languages) + 1]
    return tag("details", title, tag("div", *_items(source, sides, items), class_="examples"), open=is_open)


def _items(
    source: Source, sides: tuple[Side, Side], items: Sequence[tuple[Disagreement, Example, Example]]
) -> Iterator[Html]:
    labels = source.task.labels
    for item, original, example in items:
        texts = list(_paragraphs(example, sides[1].language))
        if sides[0].language != sides[1].language:
            texts.append(tag("div", *_paragraphs(original, sides[0].language), class_="original"))
        verdicts: list[Child] = [tag("span", "label ", tag("b", _name(labels, item.gold)))]
        for side, guess, confidence in zip(sides, item.guesses, item.confidences, strict=True):
            is_right = guess == item.gold
            verdicts.append(
                tag(
                    "span",
                    "✓ " if is_right else "✗ ",
                    f"{source.results.name_of(side.objective)} ",
                    tag("b", _name(labels, guess)),
                    f" {confidence:.0%}",
                    class_="right" if is_right else "wrong",
                )
            )
        yield tag("article", tag("div", *texts), tag("p", *verdicts, class_="verdicts"))


def _paragraphs(example: Example, language: str) -> Iterator[Html]:
    return (text_in(language, _shortened(text), "p") for text in (example.text, example.text_pair) if text)


def _shortened(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
