"""Samples of examples with sets of labels, in which no class gets lost. All of them are functions of a seed.

An empty set of labels counts as a class of its own here. Held-out samples follow the iterative stratification of
Sechidis, Tsoumakas, and Vlahavas, "On the stratification of multi-label data", ECML PKDD 2011: the rarest class first,
because it has the least choice.
"""

from collections.abc import Sequence

import numpy as np

_NONE = -1  # the class of an empty set
_BALANCED, _COVER, _HELD_OUT = 1 << 21, 1 << 22, 1 << 23  # random streams, apart from those of `sampling`

LabelSets = Sequence[tuple[int, ...]]


def balanced(label_sets: LabelSets, n: int, seed: int) -> list[int]:
    """Draw n examples whose classes are as frequent as each other, as far as the examples allow.

    Each turn draws an example of the class that has been drawn least often and has examples left. Ties go by an order
    that the seed shuffles, with the empty set last. So as many examples as there are classes cover all of them. For one
    seed, samples are nested: a smaller one is the beginning of a larger one.

    Args:
      label_sets: the labels of each example.
      n: the size of the sample, at most the number of examples.
      seed: the seed of the sample.

    Returns:
      The indices of the examples, in the order of the turns.
    """
    by_class, order = _by_class(label_sets, seed, _BALANCED)
    drawn_of_class = dict.fromkeys(order, 0)
    is_drawn = np.zeros(len(label_sets), bool)
    positions = dict.fromkeys(order, 0)
    result: list[int] = []
    open_classes = list(order)
    while len(result) < n:
        label = min(open_classes, key=drawn_of_class.__getitem__)  # the first of equals
        members = by_class[label]
        while positions[label] < len(members) and is_drawn[members[positions[label]]]:
            positions[label] += 1
        if positions[label] == len(members):
            open_classes.remove(label)
            continue
        index = members[positions[label]]
        is_drawn[index] = True
        result.append(index)
        for name in _classes(label_sets[index]):
            drawn_of_class[name] += 1
    return result


def cover(label_sets: LabelSets, seed: int) -> set[int]:
    """Return the indices of a few examples that have every class: one for each class, the rarest first, if it lacks."""
    by_class, order = _by_class(label_sets, seed, _COVER)
    covered: set[int] = set()
    result: set[int] = set()
    for label in sorted(order, key=lambda name: len(by_class[name])):
        if label not in covered and label != _NONE:
            index = by_class[label][0]
            result.add(index)
            covered.update(label_sets[index])
    return result


def held_out(label_sets: LabelSets, n: int, kept: set[int], seed: int) -> set[int]:
    """Hold out n examples with about the same share of every class.

    Args:
      label_sets: the labels of each example.
      n: the number of examples to hold out, at most the number of examples that are not kept.
      kept: the indices of examples that are not held out, see `cover`.
      seed: the seed of the sample.

    Returns:
      The indices of the examples.
    """
    by_class, order = _by_class(label_sets, seed, _HELD_OUT)
    share = n / len(label_sets)
    # What each side still needs of a class: the held-out sample and the rest.
    needs = [{label: len(members) * part for label, members in by_class.items()} for part in (share, 1 - share)]
    room = [n, len(label_sets) - n]
    is_open = np.ones(len(label_sets), bool)
    open_of_class = {label: len(members) for label, members in by_class.items()}
    sides: tuple[set[int], set[int]] = (set(), set())

    def place(index: int, side: int) -> None:
        sides[side].add(index)
        room[side] -= 1
        is_open[index] = False
        for name in _classes(label_sets[index]):
            needs[side][name] -= 1
            open_of_class[name] -= 1

    for index in sorted(kept):
        place(index, 1)
    while any(open_of_class.values()):
        label = min((name for name in order if open_of_class[name]), key=open_of_class.__getitem__)
        for index in by_class[label]:
            if is_open[index]:
                place(
                    index,
                    max((side for side in (0, 1) if room[side]), key=lambda side: (needs[side][label], room[side])),
                )
    return sides[0]


def _classes(labels: tuple[int, ...]) -> tuple[int, ...]:
    return labels or (_NONE,)


def _by_class(label_sets: LabelSets, seed: int, stream: int) -> tuple[dict[int, list[int]], list[int]]:
    """Return the indices of each class's examples in a random order, and the classes in one, the empty set last."""
    members: dict[int, list[int]] = {}
    for index, labels in enumerate(label_sets):
        for label in _classes(labels):
            members.setdefault(label, []).append(index)
    shuffled = {
        label: [indices[i] for i in np.random.default_rng([seed, stream, label + 1]).permutation(len(indices))]
        for label, indices in members.items()
    }
    labels_in_order = sorted(members)
    order = [labels_in_order[i] for i in np.random.default_rng([seed, stream]).permutation(len(members))]
    return shuffled, sorted(order, key=lambda label: label == _NONE)
