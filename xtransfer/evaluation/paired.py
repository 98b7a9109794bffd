"""The predictions of two objectives on the same test items: files of workdirs to arrays of a score for each item.

An item scores 1 if its prediction is right, and 0 if not, so that their mean is the accuracy. A multi-label task is
compared by micro-F1, which is a ratio of sums over items and no mean over them. There an item's score is its influence

    F + (a − F · b) / mean(b)

where a = 2 · TP and b = 2 · TP + FP + FN of the item, and F is micro-F1 of all items. The mean is exactly F, and the
mean of a resample is F of the resample to first order (the Taylor linearisation of a ratio, as in survey statistics).
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xtransfer import storage
from xtransfer.data.registry import shares_items
from xtransfer.data.task import example_id
from xtransfer.errors import ConfigError, DataError, nearest
from xtransfer.evaluation import significance
from xtransfer.evaluation.results import read_rows, run_id
from xtransfer.evaluation.significance import Difference, Outcomes
from xtransfer.runs import draws
from xtransfer.runs.find import known_languages
from xtransfer.runs.selection import PROTOCOLS, weights_name
from xtransfer.runs.workdir import TEACHER, RunId, TaskRecord, Workdir, read_config, read_task
from xtransfer.runtime import checksums

Labels = str | frozenset[str]


@dataclass(frozen=True)
class Students:
    """The students of one objective in one workdir, one for each draw and seed."""

    workdir: Workdir
    objective: str


@dataclass(frozen=True)
class Pair:
    """The outcomes of two objectives on the same items in the same languages, with the same draws and seeds.

    Runs have the names of the workdir of A. The seeds of a draw pair it with one of the other workdir, because each
    workdir has a default draw of its own.

    Attributes:
      a: the outcomes of objective A. The source languages come first.
      b: the outcomes of objective B.
      shares_items: whether the languages have the same items, in translation.
      left_out: the runs that only one of the objectives has.
    """

    a: Outcomes
    b: Outcomes
    shares_items: bool
    left_out: tuple[RunId, ...]


def load(a: Students, b: Students, *, split: str, selection: str) -> Pair:
    """Read the predictions of two objectives, for every run that both have, in every language that both know.

    Args:
      a: objective A.
      b: objective B, of the same workdir or of another one with the same test items.
      split: the split that was evaluated.
      selection: the protocol that selected the checkpoints.

    Raises:
      UserError: the teacher, which knows one language; no results, no run in common, a predictions file that is
        missing or malformed, or different tasks, languages, items, or labels.
    """
    task = _common_task(a, b)
    steps_a, steps_b = (_steps(students, split, selection) for students in (a, b))
    own_b = _by_name_in(a.workdir, b.workdir, steps_b)  # runs of B by their names in A
    runs = tuple(_sorted(steps_a.keys() & own_b.keys()))
    if not runs:
        raise DataError(
            f"no run in common: {_name(a)} has {_listed(a.workdir, steps_a)}, and {_name(b)} has "
            f"{_listed(b.workdir, steps_b)}; train both with the same seeds"
        )
    if not task.target_languages:
        raise DataError(f"{a.workdir.root}: the task has no target language to compare objectives in")
    known = [known_languages(read_config(one.workdir), task, one.objective) for one in (a, b)]
    languages = tuple(language for language in known[0] if language in known[1])
    if not languages:
        texts = [f"{_name(one)} knows {', '.join(knows)}" for one, knows in zip((a, b), known, strict=True)]
        raise ConfigError(f"no language in common: {' and '.join(texts)}")
    is_shared = all(shares_items(read_config(students.workdir).task) for students in (a, b))
    right: list[dict[tuple[str, str], list[float]]] = [{}, {}]  # for A and B: scores by language and item
    for language in languages:
        reference: _Predictions | None = None
        for side, (students, steps) in enumerate(((a, steps_a), (b, steps_b))):
            for run in runs if side == 0 else map(own_b.__getitem__, runs):
                directory = students.workdir.at(run.draw).student(students.objective, run.seed)
                step = steps[run].get(language)
                if step is None:
                    raise DataError(
                        f"{students.workdir.results}: no {split} results of {students.objective} {run} in "
                        f"{language}: run python -m xtransfer.evaluate"
                    )
                weights = weights_name(step, PROTOCOLS[selection].item)
                path = students.workdir.predictions(directory, weights, split, language)
                prefix = example_id(task.name, split, language, "")
                predictions = _read(path, prefix, students.workdir, multi_label=task.multi_label)
                reference = reference or predictions
                _check_same(reference, predictions)
                for item, score in _item_scores(reference.labels, predictions, multi_label=task.multi_label):
                    right[side].setdefault((language, item), []).append(score)
    names = {key: key[1] if is_shared else "/".join(key) for key in right[0]}
    outcomes = [_outcomes(languages, runs, names, values, multi_label=task.multi_label) for values in right]
    return Pair(outcomes[0], outcomes[1], is_shared, tuple(_sorted(steps_a.keys() ^ own_b.keys())))


def differences_of(pair: Pair, sources: Sequence[str], targets: Sequence[str]) -> list[Difference]:
    """Return the differences in each source language, in each target language, and on average over the targets.

    A language that the pair lacks is left out.
    """
    targets = [language for language in targets if language in pair.a.languages]
    in_sources = [
        significance.compare(pair.a.select((source,)), pair.b.select((source,)))[0]
        for source in sources
        if source in pair.a.languages
    ]
    in_targets = significance.compare(pair.a.select(targets), pair.b.select(targets))
    return [*(replace(difference, p_holm=None) for difference in in_sources), *in_targets]


def _common_task(a: Students, b: Students) -> TaskRecord:
    """Return the task of both workdirs, or raise a UserError that names what differs."""
    first, second = read_task(a.workdir), read_task(b.workdir)
    for key in ("name", "source_language", "source_languages", "target_languages", "labels", "multi_label"):
        values = [getattr(task, key) for task in (first, second)]
        if values[0] != values[1]:
            texts = [", ".join(value) if isinstance(value, tuple) else str(value) for value in values]
            raise ConfigError(
                f"{a.workdir.root} and {b.workdir.root}: {key} is {texts[0]} in one and {texts[1]} in the other; "
                "compare workdirs with the same test items"
            )
    return first


def _steps(students: Students, split: str, selection: str) -> dict[RunId, dict[str, int]]:
    """Return the evaluated step of each run and language."""
    path, objective = students.workdir.results, students.objective
    if objective == TEACHER:
        raise ConfigError("--compare teacher: it knows the source language only; compare two objectives of students")
    rows = [row for row in read_rows(path) if (row["split"], row["selection"]) == (split, selection)]
    names = sorted({row["objective"] for row in rows} - {TEACHER})
    if objective not in names:
        available = f"; there are {', '.join(names)}" if names else ""
        raise ConfigError(
            f"{path}: no {split} results of {objective!r}, checkpoints selected by {selection}"
            f"{nearest(objective, names) or available}"
        )
    steps: dict[RunId, dict[str, int]] = {}
    for row in rows:
        if row["objective"] != objective:
            continue
        of_run = steps.setdefault(run_id(row), {})
        of_run.setdefault(row["language"], row["step"])
        same = [of_run[row["language"]]] if PROTOCOLS[selection].per_language else of_run.values()
        other = next((step for step in same if step != row["step"]), None)
        if other is not None:
            raise DataError(
                f"{path}: {objective} {run_id(row)} has two different results: steps {other} and "
                f"{row['step']}; remove the file and run python -m xtransfer.evaluate"
            )
    return steps


@dataclass(frozen=True)
class _Predictions:
    """The content of a predictions file: gold and predicted labels by item, without the language.

    Labels are a name, or in a multi-label task a set of names.
    """

    path: Path
    labels: Mapping[str, Labels]
    guesses: Mapping[str, Labels]


def _read(path: Path, prefix: str, workdir: Workdir, *, multi_label: bool) -> _Predictions:
    """Read a predictions file, whose ids all start with `prefix`."""
    command = f"run python -m xtransfer.evaluate --workdir {shlex.quote(str(workdir.root))} to write it again"
    fault = checksums.fault_of(path)
    if fault is not None:
        raise DataError(f"{path} is damaged: {fault}: {command}")
    remedy = f"remove it and {command}" if path.exists() else command
    labels: dict[str, Labels] = {}
    guesses: dict[str, Labels] = {}
    is_valid = _is_list_of_texts if multi_label else _is_text
    for number, row in _rows(path, remedy):
        where = f"{path}:{number}"
        match row:
            case {"id": str(full), "label": label, "prediction": guess} if all(map(is_valid, (label, guess))):
                item = full.removeprefix(prefix)
            case _:
                kinds = "text id, and the lists label" if multi_label else "texts id, label,"
                raise DataError(f"{where}: expected an object with the {kinds} and prediction: {remedy}")
        if item == full or item in labels:
            fault = f"does not start with {prefix}" if item == full else "occurs twice"
            raise DataError(f"{where}: id {full!r} {fault}: {remedy}")
        labels[item], guesses[item] = (frozenset(label), frozenset(guess)) if multi_label else (label, guess)
    return _Predictions(path, labels, guesses)


def _shown(label: Labels) -> str:
    return repr(label if isinstance(label, str) else sorted(label))


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of_texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _item_scores(items: Iterable[str], predictions: _Predictions, *, multi_label: bool) -> Iterator[tuple[str, float]]:
    """Yield the score of each item: whether it is right, or its influence on micro-F1, see above."""
    if not multi_label:
        for item in items:
            yield item, predictions.guesses[item] == predictions.labels[item]
        return
    items = list(items)
    pairs = [(frozenset(predictions.labels[item]), frozenset(predictions.guesses[item])) for item in items]
    scores = influences(
        np.array([2 * len(gold & guess) for gold, guess in pairs]),
        np.array([len(gold) + len(guess) for gold, guess in pairs]),
    )
    yield from zip(items, scores.tolist(), strict=True)


def influences(numerators: np.ndarray, denominators: np.ndarray) -> np.ndarray:
    """Return scores [n] whose mean is the ratio of the sums of [n] and [n], see above; zeros if the latter is 0."""
    mean = denominators.mean()
    if not mean:
        return np.zeros(len(denominators))
    ratio = numerators.mean() / mean
    return ratio + (numerators - ratio * denominators) / mean


def _rows(path: Path, remedy: str) -> Iterator[tuple[int, object]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}: {remedy}") from error
    for number, line in enumerate(content.removesuffix(b"\n").split(b"\n"), start=1):
        try:
            yield number, storage.read_json(line.decode("utf-8"))
        except ValueError as error:
            raise DataError(f"{path}:{number}: not strict JSON: {error}: {remedy}") from error


def _check_same(first: _Predictions, second: _Predictions) -> None:
    """Refuse files with different items or labels; the error names the first item that differs."""
    for one, other in ((first, second), (second, first)):
        absent = next((item for item in one.labels if item not in other.labels), None)
        if absent is not None:
            raise DataError(
                f"{other.path} lacks item {absent}, which {one.path} has: evaluate both objectives on the same items"
            )
    for item, label in first.labels.items():
        if second.labels[item] != label:
            raise DataError(
                f"{second.path}: item {item} has the label {_shown(second.labels[item])}, and {_shown(label)} in "
                f"{first.path}: "
                "evaluate both objectives on the same items"
            )


def _outcomes(
    languages: tuple[str, ...],
    runs: tuple[RunId, ...],
    names: Mapping[tuple[str, str], str],
    right: Mapping[tuple[str, str], Sequence[float]],
    *,
    multi_label: bool,
) -> Outcomes:
    """Return the scores by (language, item) as an array; `names` holds the id of the item in that language."""
    column = {name: index for index, name in enumerate(dict.fromkeys(names.values()))}
    row = {language: index for index, language in enumerate(languages)}
    correct = np.full((len(runs), len(languages), len(column)), np.nan)
    for key, values in right.items():
        correct[:, row[key[0]], column[names[key]]] = values
    return Outcomes(languages, runs, tuple(column), correct, multi_label)


def _name(students: Students) -> str:
    return f"{students.objective} in {students.workdir.root}"


def _by_name_in(workdir: Workdir, other: Workdir, runs: Iterable[RunId]) -> dict[RunId, RunId]:
    """Return the runs of another workdir by the names that they would have in this one."""
    config, others = read_config(workdir), read_config(other)
    by_name = {run.draw: draws.named(others, run.draw) for run in runs}
    names = {name: draws.name_in(config, draw) if draw is not None else name for name, draw in by_name.items()}
    return {RunId(names[run.draw], run.seed): run for run in runs}


def _listed(workdir: Workdir, runs: Iterable[RunId]) -> str:
    """Name runs by all of their seeds, because the default draw of another workdir may be another one."""
    config = read_config(workdir)
    texts: dict[str, list[str]] = {}
    for run in _sorted(runs):
        draw = draws.named(config, run.draw)
        name = f"labelled_seed {draw.labelled_seed}, teacher_seed {draw.teacher_seed}" if draw else run.draw
        texts.setdefault(name, []).append(str(run.seed))
    return " and ".join(f"{name}, seed {', '.join(seeds)}" for name, seeds in texts.items()) or "none"


def _sorted(runs: Iterable[RunId]) -> list[RunId]:
    return sorted(runs, key=lambda run: (draws.order(run.draw), run.seed))
