"""Samples of labelled, unlabelled, and held-out examples. Each is a function of the examples and a seed.

Those of multi-label tasks are drawn in `stratification`.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from xtransfer.config import TaskConfig
from xtransfer.data import stratification
from xtransfer.data.task import UNLABELLED, Example, Task
from xtransfer.errors import ConfigError

T = TypeVar("T")

_HELD_OUT = 1 << 20  # the first random stream of held-out samples, above the streams of labelled ones
_DEFAULT_FRACTION = 10  # by default one example in this many is held out


def without_labels(examples: Sequence[Example]) -> list[Example]:
    """Return the examples with label −1, and without a set of labels."""
    return [dataclasses.replace(example, label=-1, label_set=None) for example in examples]


def labelled_subset(examples: Sequence[Example], n: int, seed: int, names: Sequence[str] = ()) -> list[Example]:
    """Draw n labelled examples with equal numbers for all classes, to within one; see `stratification` for label sets.

    For one seed, samples are nested: a smaller one is the beginning of a larger one.

    Args:
      examples: labelled examples with distinct ids.
      n: the size of the sample; 0 takes all examples in their order.
      seed: the seed of the sample.
      names: the class names, for the error.

    Raises:
      UserError: a class has too few examples.
      ValueError: an example has no label.
    """
    _check_labelled(examples)
    if n == 0:
        return list(examples)
    if _has_label_sets(examples):
        if n > len(examples):
            raise ConfigError(f"task.labelled {n} is more than available: {len(examples)}; 0 takes all")
        return [examples[i] for i in stratification.balanced([x.classes or () for x in examples], n, seed)]
    by_class: dict[int, list[Example]] = {label: [] for label in range(len(names))}
    for example in examples:
        by_class.setdefault(example.label, []).append(example)
    turns = _shuffled(sorted(by_class), seed, 0)
    draws = {label: _shuffled(by_class[label], seed, 1 + label) for label in turns}
    available = {label: len(draw) for label, draw in draws.items()}
    if any(available[label] <= (n - 1 - turn) // len(turns) for turn, label in enumerate(turns)) or not turns:
        have = ", ".join(f"{names[label] if names else label} {available[label]}" for label in sorted(available))
        raise ConfigError(f"task.labelled {n}, balanced over classes, is more than available: {have or 'nothing'}")
    return [draws[turns[i % len(turns)]][i // len(turns)] for i in range(n)]


def unlabelled_examples(task: Task, kind: str, limit: int, seed: int, labelled: Sequence[Example]) -> list[Example]:
    """Return source-language examples that are not in `labelled`, without their labels.

    Args:
      task: the source of the examples.
      kind: "none", "split" (the task's unlabelled split), "file" (the user's file, which replaces that split), or
        "train_rest" (the rest of train).
      limit: the number of examples; 0 takes all. For one seed, a smaller sample is a subset of a larger one.
      seed: the seed of the sample.
      labelled: the examples to leave out, by id.

    Raises:
      UserError: there are fewer than `limit`, or there is no such split.
      ValueError: an unknown kind.
    """
    if kind not in ("none", "split", "file", "train_rest"):
        raise ValueError(f"unlabelled kind {kind!r}")
    if kind == "none":
        return []
    labelled_ids = {example.id for example in labelled}
    everything = task.load("train" if kind == "train_rest" else UNLABELLED, task.source_language)
    examples = [example for example in everything if example.id not in labelled_ids]
    if limit > len(examples):
        raise ConfigError(f"task.unlabelled {limit} is more than available: {len(examples)}; 0 takes all")
    if limit:
        indices = _shuffled(range(len(examples)), seed, 0)[:limit]
        examples = [examples[i] for i in sorted(indices)]
    return without_labels(examples)


def target_examples(examples: Sequence[Example], limit: int, seed: int, language: str) -> list[Example]:
    """Return examples in a target language without their labels, in their order.

    Args:
      examples: the whole split.
      limit: the number of examples; 0 takes all. For one seed, a smaller sample is a subset of a larger one.
      seed: the seed of the sample.
      language: the language, for the error.

    Raises:
      UserError: there are fewer than `limit`, or none.
    """
    if limit > len(examples) or not examples:
        raise ConfigError(
            f"task.target_text {limit} is more than available in {language}: {len(examples)}; 0 takes all"
        )
    if limit:
        indices = _shuffled(range(len(examples)), seed, 0)[:limit]
        examples = [examples[i] for i in sorted(indices)]
    return without_labels(examples)


def held_out(examples: Sequence[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Split labelled examples into a training set and a held-out set, both in the given order.

    Each class is represented in the held-out set in proportion, to within one example, but its last example stays in
    the training set. Other classes make up for that. See `stratification` for label sets.

    Args:
      examples: labelled examples.
      n: the size of the held-out set; 0 is a tenth, rounded up, or as many as the classes can spare.
      seed: the seed of the sample.

    Returns:
      (training set, held-out set), which together are `examples`.

    Raises:
      UserError: the classes cannot spare that many examples.
      ValueError: an example has no label.
    """
    _check_labelled(examples)
    if _has_label_sets(examples):
        return _held_out_of_sets(examples, n, seed)
    by_class: dict[int, list[int]] = {}
    for i, example in enumerate(examples):
        by_class.setdefault(example.label, []).append(i)
    spare = len(examples) - len(by_class)
    if not spare or n > spare:
        raise ConfigError(
            f"task.held_out_dev {n}: {len(examples)} training examples of {len(by_class)} classes can spare {spare}, "
            f"because each class keeps one: {'lower it, or ' if spare else ''}add a dev split"
        )
    n = n or min(-(-len(examples) // _DEFAULT_FRACTION), spare)
    labels = _shuffled(sorted(by_class), seed, _HELD_OUT)  # breaks ties between equal shares
    exact = {label: len(by_class[label]) * n / len(examples) for label in labels}
    shares = {label: min(int(exact[label]), len(by_class[label]) - 1) for label in labels}
    for _ in range(n - sum(shares.values())):
        able = [label for label in labels if shares[label] < len(by_class[label]) - 1]
        shares[max(able, key=lambda label: exact[label] - shares[label])] += 1
    draws = (_shuffled(by_class[label], seed, _HELD_OUT + 1 + label)[: shares[label]] for label in labels)
    held_out_indices = {i for draw in draws for i in draw}
    rest = [example for i, example in enumerate(examples) if i not in held_out_indices]
    return rest, [example for i, example in enumerate(examples) if i in held_out_indices]


def _held_out_of_sets(examples: Sequence[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    label_sets = [example.classes or () for example in examples]
    kept = stratification.cover(label_sets, seed)
    spare = len(examples) - len(kept)
    if not spare or n > spare:
        raise ConfigError(
            f"task.held_out_dev {n}: {len(examples)} training examples can spare {spare}, because each class keeps "
            f"one: {'lower it, or ' if spare else ''}add a dev split"
        )
    n = n or min(-(-len(examples) // _DEFAULT_FRACTION), spare)
    indices = stratification.held_out(label_sets, n, kept, seed)
    rest = [example for i, example in enumerate(examples) if i not in indices]
    return rest, [example for i, example in enumerate(examples) if i in indices]


def train_and_dev(train: Sequence[Example], config: TaskConfig) -> tuple[list[Example], list[Example]]:
    """Return (train, dev) for a language without a dev split; the ids of held-out examples name the split dev.

    Raises:
      UserError: see `held_out`.
    """
    rest, dev = held_out(train, config.held_out_dev, config.held_out_seed)
    old, new = f"{config.name}/train/", f"{config.name}/dev/"
    return rest, [dataclasses.replace(example, id=new + example.id.removeprefix(old)) for example in dev]


def _check_labelled(examples: Sequence[Example]) -> None:
    if any(example.classes is None for example in examples):
        raise ValueError("an example without a label among the labelled ones")


def _has_label_sets(examples: Sequence[Example]) -> bool:
    return any(example.label_set is not None for example in examples)


def _shuffled(items: Sequence[T], seed: int, stream: int) -> list[T]:
    return [items[i] for i in np.random.default_rng([seed, stream]).permutation(len(items))]
