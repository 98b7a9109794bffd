"""The predictions of two objectives on the same test items: files of workdirs to arrays of correctness."""

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
from xtransfer.runs.selection import PROTOCOLS, weights_name
from xtransfer.runs.workdir import TEACHER, RunId, TaskRecord, Workdir, read_config, read_task
from xtransfer.runtime import checksums


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
      a: the outcomes of objective A. The source language comes first.
      b: the outcomes of objective B.
      shares_items: whether the languages have the same items, in translation.
      left_out: the runs that only one of the objectives has.
    """

    a: Outcomes
    b: Outcomes
    shares_items: bool
    left_out: tuple[RunId, ...]


def load(a: Students, b: Students, *, split: str, selection: str) -> Pair:
    """Read the predictions of two objectives, for every run that both have, in every language of their task.

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
    languages = (task.source_language, *task.target_languages)
    if len(languages) == 1:
        raise DataError(f"{a.workdir.root}: the task has no target language to compare objectives in")
    is_shared = all(shares_items(read_config(students.workdir).task) for students in (a, b))
    right: list[dict[tuple[str, str], list[bool]]] = [{}, {}]  # for A and B: correctness by language and item
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
                predictions = _read(path, example_id(task.name, split, language, ""), students.workdir)
                reference = reference or predictions
                _check_same(reference, predictions)
                for item in reference.labels:
                    is_right = predictions.guesses[item] == predictions.labels[item]
                    right[side].setdefault((language, item), []).append(is_right)
    names = {key: key[1] if is_shared else "/".join(key) for key in right[0]}
    outcomes = [_outcomes(languages, runs, names, values) for values in right]
    return Pair(outcomes[0], outcomes[1], is_shared, tuple(_sorted(steps_a.keys() ^ own_b.keys())))


def differences_of(pair: Pair, source: str, targets: Sequence[str]) -> list[Difference]:
    """Return the differences in the source language, in each target language, and on average over these."""
    in_source, *_ = significance.compare(pair.a.select((source,)), pair.b.select((source,)))
    in_targets = significance.compare(pair.a.select(targets), pair.b.select(targets))
    return [replace(in_source, p_holm=None), *in_targets]


def _common_task(a: Students, b: Students) -> TaskRecord:
    """Return the task of both workdirs, or raise a UserError that names what differs."""
    first, second = read_task(a.workdir), read_task(b.workdir)
    for key in ("name", "source_language", "target_languages", "labels"):
        values = [getattr(task, key) for task in (first, second)]
        if values[0] != values[1]:
            texts = [", ".join(value) if isinstance(value, tuple) else value for value in values]
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
    """The content of a predictions file: gold labels and predicted labels by item, without the language."""

    path: Path
    labels: Mapping[str, str]
    guesses: Mapping[str, str]


def _read(path: Path, prefix: str, workdir: Workdir) -> _Predictions:
    """Read a predictions file, whose ids all start with `prefix`."""
    command = f"run python -m xtransfer.evaluate --workdir {shlex.quote(str(workdir.root))} to write it again"
    fault = checksums.fault_of(path)
    if fault is not None:
        raise DataError(f"{path} is damaged: {fault}: {command}")
    remedy = f"remove it and {command}" if path.exists() else command
    labels: dict[str, str] = {}
    guesses: dict[str, str] = {}
    for number, row in _rows(path, remedy):
        where = f"{path}:{number}"
        match row:
            case {"id": str(full), "label": str(label), "prediction": str(guess)}:
                item = full.removeprefix(prefix)
            case _:
                raise DataError(f"{where}: expected an object with the texts id, label, and prediction: {remedy}")
        if item == full or item in labels:
            fault = f"does not start with {prefix}" if item == full else "occurs twice"
            raise DataError(f"{where}: id {full!r} {fault}: {remedy}")
        labels[item], guesses[item] = label, guess
    return _Predictions(path, labels, guesses)


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
                f"{second.path}: item {item} has the label {second.labels[item]!r}, and {label!r} in {first.path}: "
                "evaluate both objectives on the same items"
            )


def _outcomes(
    languages: tuple[str, ...],
    runs: tuple[RunId, ...],
    names: Mapping[tuple[str, str], str],
    right: Mapping[tuple[str, str], Sequence[bool]],
) -> Outcomes:
    """Return correctness by (language, item) as an array; `names` holds the id of the item in that language."""
    column = {name: index for index, name in enumerate(dict.fromkeys(names.values()))}
    row = {language: index for index, language in enumerate(languages)}
    correct = np.full((len(runs), len(languages), len(column)), np.nan)
    for key, values in right.items():
        correct[:, row[key[0]], column[names[key]]] = values
    return Outcomes(languages, runs, tuple(column), correct)


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
