"""Samples of labelled, unlabelled, and held-out examples. Each is a function of the examples and a seed.

Those of multi-label tasks are drawn in `stratification`. Several source languages share one sample, see `source_sizes`.
No example is repeated to make a language larger.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from xtransfer.config import TaskConfig
from xtransfer.data import examples as columns
from xtransfer.data import stratification
from xtransfer.data.task import UNLABELLED, Example, Pairs, Task
from xtransfer.errors import ConfigError

_HELD_OUT = 1 << 20  # the first random stream of held-out samples, above the streams of labelled ones
_DEFAULT_FRACTION = 10  # by default one example in this many is held out


def labelled_subset(
    examples: Sequence[Example], n: int, seed: int, names: Sequence[str] = (), where: str = ""
) -> Sequence[Example]:
    """Draw n labelled examples with equal numbers for all classes, to within one; see `stratification` for label sets.

    For one seed, samples are nested: a smaller one is the beginning of a larger one.

    Args:
      examples: labelled examples with distinct ids.
      n: the size of the sample; 0 takes all examples in their order.
      seed: the seed of the sample.
      names: the class names, for the error.
      where: what follows the size in the error, such as " in de".

    Raises:
      UserError: a class has too few examples.
      ValueError: an example has no label.
    """
    _check_labelled(examples)
    if n == 0:
        return examples
    if columns.has_label_sets(examples):
        if n > len(examples):
            raise ConfigError(f"task.labelled {n}{where} is more than available: {len(examples)}; 0 takes all")
        drawn = stratification.balanced([x.classes or () for x in examples], n, seed)
        return columns.select(examples, np.array(drawn, np.int64))
    by_class = _rows_by_class(examples, range(len(names)))
    turns = _shuffled(sorted(by_class), seed, 0)
    draws = {label: _shuffled(by_class[label], seed, 1 + label) for label in turns}
    available = {label: len(draw) for label, draw in draws.items()}
    if any(available[label] <= (n - 1 - turn) // len(turns) for turn, label in enumerate(turns)) or not turns:
        have = ", ".join(f"{names[label] if names else label} {available[label]}" for label in sorted(available))
        raise ConfigError(
            f"task.labelled {n}{where}, balanced over classes, is more than available: {have or 'nothing'}"
        )
    rows = [draws[turns[i % len(turns)]][i // len(turns)] for i in range(n)]
    return columns.select(examples, np.array(rows, np.int64))


def unlabelled_examples(task: Task, kind: str, limit: int, seed: int, labelled: Sequence[Example]) -> Sequence[Example]:
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
    examples = _unlabelled_pool(task, kind, labelled)
    if limit > len(examples):
        raise ConfigError(f"task.unlabelled {limit} is more than available: {len(examples)}; 0 takes all")
    return columns.without_labels(_drawn(examples, limit, seed))


def _unlabelled_pool(task: Task, kind: str, labelled: Sequence[Example]) -> Sequence[Example]:
    """Return the examples that unlabelled ones are drawn from, see `unlabelled_examples`."""
    if kind not in ("none", "split", "file", "train_rest"):
        raise ValueError(f"unlabelled kind {kind!r}")
    if kind == "none":
        return []
    everything = task.load("train" if kind == "train_rest" else UNLABELLED, task.source_language)
    if set(columns.data_sets(labelled)).isdisjoint(columns.data_sets(everything)):  # needs no ids in memory
        return everything
    labelled_ids = set(columns.ids_of(labelled))
    is_free = np.fromiter((id_ not in labelled_ids for id_ in columns.ids_of(everything)), bool, len(everything))
    return columns.select(everything, np.flatnonzero(is_free))


def labelled_in_sources(
    train: Mapping[str, Sequence[Example]], config: TaskConfig, names: Sequence[str] = ()
) -> dict[str, Sequence[Example]]:
    """Draw labelled examples from several source languages, by language.

    The sizes are those of `source_sizes`. With `task.labelled`, the sample of each language is balanced over classes,
    see `labelled_subset`. Without it, the classes stay about as frequent as in the data.

    Args:
      train: labelled examples by source language.
      config: the task's settings.
      names: the class names, for errors.

    Raises:
      UserError: a language or one of its classes has too few examples, or its share of the sample is empty.
    """
    sizes = source_sizes({language: len(examples) for language, examples in train.items()}, config, "labelled")
    for language, size in sizes.items():
        if not size:
            raise ConfigError(
                f"task.labelled {config.labelled} leaves no example in {language}: raise it, or the share of {language}"
            )
    seed = config.labelled_seed
    return {
        language: labelled_subset(train[language], size, seed, names, f" in {language}")
        if config.labelled
        else _sample(train[language], size, seed)
        for language, size in sizes.items()
    }


def unlabelled_in_sources(
    task: Task, kind: str, config: TaskConfig, labelled: Mapping[str, Sequence[Example]]
) -> dict[str, Sequence[Example]]:
    """Draw unlabelled examples from several source languages, by language, in sizes by `source_sizes`.

    Args:
      task: the source of the examples.
      kind: see `unlabelled_examples`.
      config: the task's settings.
      labelled: the examples to leave out, by source language.

    Raises:
      UserError: a language has too few examples, or there is no such split.
    """
    pools = {
        language: _unlabelled_pool(dataclasses.replace(task, source_language=language), kind, examples)
        for language, examples in labelled.items()
    }
    if kind == "none":
        return pools
    sizes = source_sizes({language: len(pool) for language, pool in pools.items()}, config, "unlabelled")
    return {
        language: columns.without_labels(_sample(pools[language], size, config.labelled_seed))
        for language, size in sizes.items()
    }


def source_sizes(available: Mapping[str, int], config: TaskConfig, key: str) -> dict[str, int]:
    """Return the number of examples to draw from each of several source languages.

    `task.labelled` or `task.unlabelled` is the total, which `split_total` splits by `task.source_shares`. Without
    shares, a language with n examples has the weight n ** (1 / task.sampling_temperature), as in Conneau et al.,
    "Unsupervised Cross-lingual Representation Learning at Scale" (ACL 2020). A total of 0 stands for all examples; with
    shares or a temperature, for the largest sample with these proportions.

    Args:
      available: the number of examples by source language, in the order of the shares.
      config: the task's settings.
      key: "labelled" or "unlabelled".

    Raises:
      UserError: a language has fewer examples than its part of the total.
    """
    total = config.labelled if key == "labelled" else config.unlabelled
    if not total and config.keeps_proportions:
        return dict(available)
    counts = tuple(available.values())
    weights = config.source_shares or temperature_weights(counts, config.sampling_temperature)
    empty = [language for language, count in available.items() if not count]
    if empty and (config.source_shares or len(empty) == len(available)):
        is_rest = key == "unlabelled" and config.unlabelled_from == "train_rest"
        remedy = "lower task.labelled, which takes all of its train" if is_rest else "add some"
        raise ConfigError(f"task.{key} {total}: there is no such text in {empty[0]}: {remedy}, or leave {empty[0]} out")
    largest = _largest_total(counts, weights)
    sizes = dict(zip(available, split_total(total or largest, weights), strict=True))
    for language, size in sizes.items():
        if size > available[language]:
            raise ConfigError(
                f"task.{key} {total}: the share of {language} is {size} examples, more than available: "
                f"{available[language]}; 0 takes {largest} in all"
            )
    return sizes


def temperature_weights(sizes: Sequence[int], temperature: float) -> tuple[float, ...]:
    """Return size ** (1 / temperature) for each of some sizes, up to a common factor."""
    largest = max(sizes, default=0)
    if temperature == 1 or not largest:
        return tuple(float(size) for size in sizes)
    return tuple((size / largest) ** (1 / temperature) for size in sizes)


def split_total(total: int, weights: Sequence[float]) -> tuple[int, ...]:
    """Split a total into whole numbers in proportion to weights, by the method of Webster (Sainte-Laguë).

    A larger total makes no part smaller, so that samples of different totals are nested. The method of the largest
    remainder does not have this property.

    Args:
      total: 0 or more.
      weights: finite numbers, 0 or more. If all are 0, so are all parts.
    """
    whole = math.fsum(weights)
    if not whole:
        return (0,) * len(weights)
    # The parts of a somewhat smaller total, so that only a few examples are left to assign one by one.
    start = max(0, total - len(weights))
    parts = [math.floor(weight / whole * start + 0.5) for weight in weights]
    for _ in range(total - sum(parts)):
        parts[max(range(len(parts)), key=lambda i: weights[i] / (2 * parts[i] + 1))] += 1
    return tuple(parts)


def _largest_total(available: Sequence[int], weights: Sequence[float]) -> int:
    """Return the largest total of which no language's exact share is more than available; some weight is above 0."""
    whole = math.fsum(weights)
    exact = min(count * whole / weight for count, weight in zip(available, weights, strict=True) if weight)
    total = math.floor(exact * (1 + 1e-12))  # a whole number may have come out slightly smaller
    while any(part > count for part, count in zip(split_total(total, weights), available, strict=True)):
        total -= 1
    return total


def target_examples(examples: Sequence[Example], limit: int, seed: int, language: str) -> Sequence[Example]:
    """Return examples in a target language without their labels, in their order.

    Args:
      examples: the whole split.
      limit: the number of examples; 0 takes all. For one seed, a smaller sample is a subset of a larger one.
      seed: the seed of the sample.
      language: the language, for the error.

    Raises:
      UserError: there are fewer than `limit`, or none.
    """
    if not examples:
        raise ConfigError(
            f"task.target_text_from: there is no such text in {language}: add some, or leave {language} out of "
            "task.target_languages and objective.NAME.languages"
        )
    if limit > len(examples):
        raise ConfigError(
            f"task.target_text {limit} is more than available in {language}: {len(examples)}; 0 takes all"
        )
    return columns.without_labels(_drawn(examples, limit, seed))


def sampled_pairs(pairs: Pairs, limit: int, seed: int, language: str) -> Pairs:
    """Return translations into a language with their originals, in their order; see `target_examples`.

    Raises:
      UserError: there are fewer than `limit`.
    """
    count = len(pairs.originals)
    if limit > count:
        raise ConfigError(f"task.parallel {limit} is more than available in {language}: {count}; 0 takes all")
    # Both samples have the same rows.
    return Pairs(_drawn(pairs.originals, limit, seed), _drawn(pairs.translations, limit, seed))


def held_out(examples: Sequence[Example], n: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
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
    if columns.has_label_sets(examples):
        return _held_out_of_sets(examples, n, seed)
    by_class = _rows_by_class(examples)
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
    draws = [_shuffled(by_class[label], seed, _HELD_OUT + 1 + label)[: shares[label]] for label in labels]
    return _divided(examples, np.concatenate([np.zeros(0, np.int64), *draws]))


def _held_out_of_sets(examples: Sequence[Example], n: int, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
    label_sets = [example.classes or () for example in examples]
    kept = stratification.cover(label_sets, seed)
    spare = len(examples) - len(kept)
    if not spare or n > spare:
        raise ConfigError(
            f"task.held_out_dev {n}: {len(examples)} training examples can spare {spare}, because each class keeps "
            f"one: {'lower it, or ' if spare else ''}add a dev split"
        )
    n = n or min(-(-len(examples) // _DEFAULT_FRACTION), spare)
    return _divided(examples, np.array(sorted(stratification.held_out(label_sets, n, kept, seed)), np.int64))


def train_and_dev(train: Sequence[Example], config: TaskConfig) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return (train, dev) for a language without a dev split; the ids of held-out examples name the split dev.

    Raises:
      UserError: see `held_out`.
    """
    rest, dev = held_out(train, config.held_out_dev, config.held_out_seed)
    old, new = f"{config.name}/train/", f"{config.name}/dev/"
    return rest, columns.with_prefix(dev, old, new)


def _check_labelled(examples: Sequence[Example]) -> None:
    if not columns.are_labelled(examples).all():
        raise ValueError("an example without a label among the labelled ones")


def _rows_by_class(examples: Sequence[Example], classes: Iterable[int] = ()) -> dict[int, np.ndarray]:
    """Return the rows of each class, int64, also of `classes` without an example."""
    labels = columns.labels_of(examples)
    return {label: np.flatnonzero(labels == label) for label in sorted({*classes, *np.unique(labels).tolist()})}


def _divided(examples: Sequence[Example], rows: np.ndarray) -> tuple[Sequence[Example], Sequence[Example]]:
    """Return the examples without these rows, and those of these rows, both in the given order."""
    is_inside = np.zeros(len(examples), bool)
    is_inside[rows] = True
    return columns.select(examples, np.flatnonzero(~is_inside)), columns.select(examples, np.flatnonzero(is_inside))


def _drawn(examples: Sequence[Example], limit: int, seed: int) -> Sequence[Example]:
    """Return a random sample of `limit` examples in their order; 0 takes all."""
    return _sample(examples, limit, seed) if limit else examples


def _sample(examples: Sequence[Example], n: int, seed: int) -> Sequence[Example]:
    """Draw n examples, in their order. For one seed, a smaller sample is a subset of a larger one."""
    return columns.select(examples, np.sort(np.random.default_rng([seed, 0]).permutation(len(examples))[:n]))


def _shuffled(items: Any, seed: int, stream: int) -> Any:
    """Return a list or an array in a random order."""
    order = np.random.default_rng([seed, stream]).permutation(len(items))
    return items[order] if isinstance(items, np.ndarray) else [items[i] for i in order]
