"""Sequences of examples that may be larger than memory, and what the engine asks of any sequence of examples.

A small set is a list of `Example`. A large one is a `StoredExamples`: rows of files in `text_cache`, of which a few
thousand are in memory at a time. The functions here take both, and give the same answers for both.
"""

import bisect
import functools
import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa

from xtransfer.data.example import Example, data_set

# Rows of a file that are read together: few enough to read for a single row. With another number, raise
# `text_cache.FORMAT`, because files are written in batches of it.
BATCH = 2048

Rows = range | np.ndarray

_DIGEST = 16  # bytes: two different texts of a trillion have the same one with a probability below 1e-14
_CHUNK = 8 * BATCH  # rows in memory while a column is read from its start to its end


class TextFile:
    """The examples of one split in one language, in an Arrow file with `BATCH` rows in every batch but the last.

    Columns: `number` (the rest of an id after the prefix: text, or int64), `text`, `pair` (text or null), `label`
    (int32), and `label_set` (a list of int32, or null). The file is read and never mapped, so that its pages do not
    count as memory of the process.

    Args:
      path: the file. Two objects are equal if their paths are.
      prefix: the start of every id, "task/split/language/".
      language: the language of every example.
    """

    def __init__(self, path: Path, prefix: str, language: str) -> None:
        self.path, self.prefix, self.language = path, prefix, language
        self._reader = pa.ipc.open_file(pa.OSFile(str(path)))
        batches = self._reader.num_record_batches
        last = self._reader.get_batch(batches - 1).num_rows if batches else 0
        self._length = max(0, batches - 1) * BATCH + last
        self._recent: tuple[int, pa.RecordBatch] | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._length

    def __eq__(self, other: object) -> bool:
        """Compare paths."""
        return isinstance(other, TextFile) and other.path == self.path

    def __hash__(self) -> int:
        """Return the hash of the path."""
        return hash(self.path)

    def column(self, name: str, rows: Rows) -> list[Any]:
        """Return the values of a column in some rows, in the order of the rows."""
        if isinstance(rows, range) and rows.step == 1:
            values: list[Any] = []
            for number in range(rows.start // BATCH, -(-rows.stop // BATCH)) if len(rows) else ():
                first = max(rows.start - number * BATCH, 0)
                last = min(rows.stop - number * BATCH, BATCH)
                values += self._batch(number).column(name).slice(first, last - first).to_pylist()
            return values
        wanted = np.asarray(rows, np.int64)
        values = [None] * len(wanted)
        order = np.argsort(wanted, kind="stable")
        batches = wanted[order] // BATCH
        for start, stop in _runs(batches):
            number, places = int(batches[start]), order[start:stop]
            part = self._batch(number).column(name).take(pa.array(wanted[places] - number * BATCH))
            for place, value in zip(places.tolist(), part.to_pylist(), strict=True):
                values[place] = value
        return values

    def labels(self) -> np.ndarray:
        """Return all labels, int32 [n]."""
        labels = np.zeros(len(self), np.int32)
        for start in range(0, len(self), BATCH):
            # A copy, because a column of a batch keeps all of it in memory, with the texts.
            labels[start : start + BATCH] = self._reader.get_batch(start // BATCH).column("label")
        return labels

    def _batch(self, number: int) -> pa.RecordBatch:
        recent = self._recent  # read and written once, because another thread may replace it
        if recent is None or recent[0] != number:
            recent = number, self._reader.get_batch(number)
            self._recent = recent
        return recent[1]


SCHEMA = {
    "text": pa.large_string(),  # a batch of long texts may have over 2 GiB, which is the limit of pa.string()
    "pair": pa.large_string(),
    "label": pa.int32(),
    "label_set": pa.list_(pa.int32()),
}
"""The types of a file's columns, without `number`."""


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a file, or of a list in memory.

    Attributes:
      source: the file or the list.
      rows: the rows, in order.
      has_labels: whether the labels count. Otherwise the examples are unlabelled, whatever the source says.
      prefix: the start of the ids of a file's rows.
    """

    source: TextFile | Sequence[Example]
    rows: Rows
    has_labels: bool = True
    prefix: str = ""

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    def examples(self, start: int, stop: int) -> list[Example]:
        """Return the examples start … stop − 1."""
        if not isinstance(self.source, TextFile):
            found = [self.source[int(row)] for row in self.rows[start:stop]]
            return found if self.has_labels else [_without_label(example) for example in found]
        columns = [self._read(name, start, stop) for name in ("number", "text", "pair")]
        if self.has_labels:
            columns += [self._read(name, start, stop) for name in ("label", "label_set")]
        else:
            columns += [[-1] * len(columns[0]), [None] * len(columns[0])]
        language, prefix = self.source.language, self.prefix
        return [
            Example(f"{prefix}{number}", text, pair, label, language, None if names is None else tuple(names))
            for number, text, pair, label, names in zip(*columns, strict=True)
        ]

    def ids(self, start: int, stop: int) -> list[str]:
        """Return the ids of the examples start … stop − 1."""
        if isinstance(self.source, TextFile):
            return [f"{self.prefix}{number}" for number in self._read("number", start, stop)]
        return [self.source[int(row)].id for row in self.rows[start:stop]]

    def texts(self, start: int, stop: int) -> list[str]:
        """Return the texts of the examples start … stop − 1."""
        if isinstance(self.source, TextFile):
            return self._read("text", start, stop)
        return [self.source[int(row)].text for row in self.rows[start:stop]]

    def pairs(self, start: int, stop: int) -> list[str]:
        """Return the second texts of the examples start … stop − 1, "" without one."""
        if isinstance(self.source, TextFile):
            return [pair or "" for pair in self._read("pair", start, stop)]
        return [self.source[int(row)].text_pair or "" for row in self.rows[start:stop]]

    def labels(self) -> np.ndarray:
        """Return the labels, int32 [n]."""
        if not self.has_labels:
            return np.full(len(self.rows), -1, np.int32)
        if isinstance(self.source, TextFile):
            return self.source.labels()[np.asarray(self.rows, np.int64)]
        return np.array([self.source[int(row)].label for row in self.rows], np.int32)

    def languages(self) -> list[str]:
        """Return the languages of the examples, each once, in order."""
        if isinstance(self.source, TextFile):
            return [self.source.language] if len(self.rows) else []
        return list(dict.fromkeys(self.source[int(row)].language for row in self.rows))

    def in_languages(self, languages: Collection[str]) -> np.ndarray:
        """Return whether each example is in one of the languages, bool [n]."""
        if isinstance(self.source, TextFile):
            return np.full(len(self.rows), self.source.language in languages)
        return np.array([self.source[int(row)].language in languages for row in self.rows], bool)

    def _read(self, name: str, start: int, stop: int) -> list[Any]:
        assert isinstance(self.source, TextFile)
        return self.source.column(name, self.rows[start:stop])


class StoredExamples(Sequence[Example]):
    """Examples on disk, with some in memory among them; immutable.

    Reading it from its start to its end takes a bounded amount of memory. An index reads one example, and a slice gives
    another such sequence.

    Args:
      parts: the parts in order; empty ones are dropped.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(part for part in parts if len(part))
        self._starts = [0, *itertools.accumulate(map(len, self.parts))]

    def __len__(self) -> int:
        """Return the number of examples."""
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredExamples": ...

    def __getitem__(self, index: int | slice) -> "Example | StoredExamples":
        """Return one example, or the examples of a slice."""
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        start = range(len(self))[index]
        return next(iter(self.read(Part.examples, start, start + 1)))

    def __iter__(self) -> Iterator[Example]:
        """Yield the examples, a few thousand of which are in memory at a time."""
        return self.stream(Part.examples)

    def take(self, rows: np.ndarray) -> "StoredExamples":
        """Return the examples `rows` [m] in that order."""
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        parts = []
        for start, stop in _runs(numbers):
            number = int(numbers[start])
            part, inside = self.parts[number], rows[start:stop] - self._starts[number]
            parts.append(replace(part, rows=_rows_of(part.rows, inside)))
        return StoredExamples(parts)

    def read(self, column: Callable[[Part, int, int], list[Any]], start: int, stop: int) -> list[Any]:
        """Return a column, a method of `Part`, of the examples start … stop − 1."""
        values: list[Any] = []
        first = bisect.bisect_right(self._starts, start) - 1
        for part, before in zip(self.parts[first:], self._starts[first:], strict=False):
            if before >= stop:
                break
            values += column(part, max(start - before, 0), min(stop - before, len(part)))
        return values

    def stream(self, column: Callable[[Part, int, int], list[Any]]) -> Iterator[Any]:
        """Yield a column of all examples."""
        for start in range(0, len(self), _CHUNK):
            yield from self.read(column, start, min(start + _CHUNK, len(self)))


class Column(Sequence[str]):
    """A column of stored examples, read from the disk on request.

    Args:
      examples: the examples.
      read: the method of `Part` that reads the column.
    """

    def __init__(self, examples: StoredExamples, read: Callable[[Part, int, int], list[str]]) -> None:
        self._examples, self._read = examples, read
        self._recent: tuple[int, list[str]] = (0, [])

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        """Return one value, or the values of a slice without a step."""
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a column has no slices of step {step}")
            return self._examples.read(self._read, start, max(start, stop))
        row = range(len(self))[index]
        start, values = self._recent
        if not start <= row < start + len(values):  # neighbours are often next
            start = row // BATCH * BATCH
            values = self._examples.read(self._read, start, min(start + BATCH, len(self)))
            self._recent = start, values
        return values[row - start]

    def __iter__(self) -> Iterator[str]:
        """Yield the values, a few thousand of which are in memory at a time."""
        return self._examples.stream(self._read)


def join(*sets: Sequence[Example]) -> Sequence[Example]:
    """Return the examples of all sets in order: a list, unless one of them is stored."""
    if not any(isinstance(examples, StoredExamples) for examples in sets):
        return [example for examples in sets for example in examples]
    parts: list[Part] = []
    for examples in sets:
        parts += examples.parts if isinstance(examples, StoredExamples) else [Part(examples, range(len(examples)))]
    return StoredExamples(parts)


def select(examples: Sequence[Example], rows: np.ndarray) -> Sequence[Example]:
    """Return the examples `rows` [m] in that order; all of them in their order are the sequence itself."""
    if not isinstance(examples, StoredExamples):
        return [examples[row] for row in rows.tolist()]
    if len(rows) == len(examples) and np.array_equal(rows, np.arange(len(rows))):
        return examples
    return examples.take(rows)


def without_labels(examples: Sequence[Example]) -> Sequence[Example]:
    """Return the examples with label −1, and without a set of labels."""
    if isinstance(examples, StoredExamples):
        return StoredExamples([replace(part, has_labels=False) for part in examples.parts])
    return [_without_label(example) for example in examples]


def with_prefix(examples: Sequence[Example], old: str, new: str) -> Sequence[Example]:
    """Return the examples with another start of their ids."""
    if isinstance(examples, StoredExamples) and all(isinstance(part.source, TextFile) for part in examples.parts):
        return StoredExamples([replace(part, prefix=new + part.prefix.removeprefix(old)) for part in examples.parts])
    return [replace(example, id=new + example.id.removeprefix(old)) for example in examples]


def in_languages(examples: Sequence[Example], languages: Collection[str]) -> np.ndarray:
    """Return the rows of the examples in some languages, int64 [m]."""
    if isinstance(examples, StoredExamples):
        masks = [part.in_languages(languages) for part in examples.parts]
        return np.flatnonzero(np.concatenate([np.zeros(0, bool), *masks]))
    return np.array([row for row, example in enumerate(examples) if example.language in languages], np.int64)


def languages_of(examples: Sequence[Example]) -> list[str]:
    """Return the languages of examples, each once, in order."""
    if isinstance(examples, StoredExamples):
        return list(dict.fromkeys(language for part in examples.parts for language in part.languages()))
    return list(dict.fromkeys(example.language for example in examples))


def by_language(examples: Sequence[Example]) -> dict[str, Sequence[Example]]:
    """Return examples by language. Languages and examples keep their order."""
    return {language: select(examples, in_languages(examples, (language,))) for language in languages_of(examples)}


def data_sets(examples: Sequence[Example]) -> list[str]:
    """Return the task/split/language of examples, each once, in order."""
    if not isinstance(examples, StoredExamples):
        return list(dict.fromkeys(map(data_set, examples)))
    names: list[str] = []
    for part in examples.parts:
        names += [part.prefix.removesuffix("/")] if isinstance(part.source, TextFile) else data_sets(part.source)
    return list(dict.fromkeys(names))


def ids_of(examples: Sequence[Example]) -> Sequence[str]:
    """Return the ids of examples."""
    if isinstance(examples, StoredExamples):
        return Column(examples, Part.ids)
    return tuple(example.id for example in examples)


def labels_of(examples: Sequence[Example]) -> np.ndarray:
    """Return the labels of examples in a task with one label per text, int32 [n], −1 without one."""
    if isinstance(examples, StoredExamples):
        return np.concatenate([np.zeros(0, np.int32), *(part.labels() for part in examples.parts)])
    return np.array([example.label for example in examples], np.int32)


def gold(examples: Sequence[Example], num_classes: int, *, multi_label: bool) -> np.ndarray:
    """Return labels as an array, with −1 for an example without any.

    Returns:
      int32 [n], the index of each label; in a multi-label task [n, K], 1 for each class that an example has and else 0.
    """
    if not multi_label:
        return labels_of(examples)
    result = np.zeros((len(examples), num_classes), np.int32)
    for row, example in enumerate(examples):
        if example.label_set is None:
            result[row] = -1
        else:
            result[row, list(example.label_set)] = 1
    return result


def has_label_sets(examples: Sequence[Example]) -> bool:
    """Return whether any example has a set of labels: in a file, all have, or none."""
    if not isinstance(examples, StoredExamples):
        return any(example.label_set is not None for example in examples)
    return any(part.has_labels and part.examples(0, 1)[0].label_set is not None for part in examples.parts)


def are_labelled(examples: Sequence[Example]) -> np.ndarray:
    """Return whether each example has a label or a set of labels, bool [n]."""
    if not isinstance(examples, StoredExamples) or has_label_sets(examples):
        return np.fromiter((example.classes is not None for example in examples), bool, len(examples))
    return labels_of(examples) >= 0


def classes_of(examples: Sequence[Example]) -> set[int]:
    """Return the classes that any example has."""
    if not isinstance(examples, StoredExamples) or has_label_sets(examples):
        return {label for example in examples for label in example.classes or ()}
    return set(np.unique(labels_of(examples)).tolist()) - {-1}


def sides(examples: Sequence[Example]) -> tuple[Sequence[str], Sequence[str] | None]:
    """Return the texts and, if the examples are pairs, the second texts, as the tokenizer takes them."""
    if isinstance(examples, StoredExamples):
        has_pairs = bool(len(examples)) and any(_has_pairs(part) for part in examples.parts)
        return Column(examples, Part.texts), Column(examples, Part.pairs) if has_pairs else None
    pairs = [example.text_pair or "" for example in examples] if any(x.text_pair for x in examples) else None
    return [example.text for example in examples], pairs


def text_digests(examples: Sequence[Example]) -> np.ndarray:
    """Return a digest of each example's text or texts, [n] of 16 bytes, which differs if a text differs."""
    texts, pairs = sides(examples)
    result = np.empty(len(examples), f"S{_DIGEST}")
    for row, both in enumerate(zip(texts, pairs or itertools.repeat(None), strict=False)):
        content = f"{len(both[0])} {both[0]}{'' if both[1] is None else both[1]}"
        result[row] = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=_DIGEST).digest()
    return result


def places(examples: Sequence[Example], splits: Sequence[Sequence[Example]]) -> tuple[np.ndarray, np.ndarray]:
    """Return where examples stand in the whole splits that they were drawn from.

    Args:
      examples: n examples.
      splits: the splits. Rows of a file are found by their number, and examples in memory by their id.

    Returns:
      The number of each example's split, int64 [n], and its row there, int64 [n].

    Raises:
      KeyError: an example is in none of them.
    """
    parts = examples.parts if isinstance(examples, StoredExamples) else (Part(examples, range(len(examples))),)
    place_by_id = functools.cache(lambda: _place_by_id(splits))
    numbers, rows = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for part in parts:
        if isinstance(part.source, TextFile):
            number, inside = _rows_in_splits(part, splits)
            numbers.append(np.full(len(part), number, np.int64))
            rows.append(inside)
        else:
            found = [place_by_id()[id_] for id_ in part.ids(0, len(part))]
            numbers.append(np.array([number for number, _ in found], np.int64))
            rows.append(np.array([row for _, row in found], np.int64))
    return np.concatenate(numbers), np.concatenate(rows)


def _rows_in_splits(part: Part, splits: Sequence[Sequence[Example]]) -> tuple[int, np.ndarray]:
    """Return the split that a file's rows are in, and their rows there."""
    wanted = np.asarray(part.rows, np.int64)
    for number, split in enumerate(splits):
        for other in split.parts if isinstance(split, StoredExamples) else ():
            if other.source == part.source:  # a split is one part, whose rows ascend
                if isinstance(other.rows, range):
                    inside = wanted - other.rows.start
                    if ((inside >= 0) & (inside < len(other.rows))).all():
                        return number, inside
                    continue
                known = other.rows
                rows = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
                if np.array_equal(known[rows], wanted):
                    return number, rows
    raise KeyError(f"{part.prefix}: its rows are in no split")


def _place_by_id(splits: Sequence[Sequence[Example]]) -> dict[str, tuple[int, int]]:
    return {
        example.id: (number, row)
        for number, split in enumerate(splits)
        if not isinstance(split, StoredExamples)
        for row, example in enumerate(split)
    }


def _runs(numbers: np.ndarray) -> Iterator[tuple[int, int]]:
    """Return the (start, stop) of each run of equal numbers, none of them below 0."""
    return itertools.pairwise(np.flatnonzero(np.diff(numbers, prepend=-1, append=-1)).tolist())


def _rows_of(rows: Rows, inside: np.ndarray) -> Rows:
    """Return rows[inside], as a range if it is one."""
    if isinstance(rows, np.ndarray):
        return rows[inside]
    found = rows.start + inside
    is_run = len(found) and rows.step == 1 and found[-1] - found[0] == len(found) - 1 and (np.diff(found) == 1).all()
    return range(int(found[0]), int(found[-1]) + 1) if is_run else found


def _has_pairs(part: Part) -> bool:
    """Return whether any example has a second text: all of a file's have, or none."""
    if isinstance(part.source, TextFile):
        return part.source.column("pair", range(1))[0] is not None
    return any(part.pairs(0, len(part)))


def _without_label(example: Example) -> Example:
    return replace(example, label=-1, label_set=None)
