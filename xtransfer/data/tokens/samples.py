"""Samples of tokenized text that copy no tokens, so that they may be larger than memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.tokens.tokenizer import Tokens, concatenate

_PIECE = 1 << 16  # examples of a sample that are in memory at once


@dataclass(frozen=True, eq=False)
class SampledTokens:
    """The token ids of n examples from several sources. Only `take` copies any.

    Attributes:
      sources: the tokens to draw from, such as memory maps.
      source: [n], the number of each example's source.
      rows: [n] int64, the number of each example in its source.
    """

    sources: tuple[Tokens, ...]
    source: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each example, [n] int64."""
        return self.lengths_of(np.arange(len(self)))

    @property
    def truncated(self) -> np.ndarray:
        """Whether each example is longer than its tokens, [n] bool."""
        result = np.zeros(len(self), bool)
        for number, tokens in enumerate(self.sources):
            inside = self.source == number
            result[inside] = tokens.truncated[self.rows[inside]]
        return result

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of tokens in the examples `indices` [m], [m] int64."""
        result = np.zeros(len(indices), np.int64)
        for number, tokens in enumerate(self.sources):
            inside = self.source[indices] == number
            result[inside] = tokens.lengths_of(self.rows[indices[inside]])
        return result

    def item(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, token_type_ids) of example i, each [length]."""
        return self.sources[self.source[i]].item(int(self.rows[i]))

    def take(self, indices: np.ndarray) -> Tokens:
        """Return the examples `indices` [m] in that order, in memory."""
        sources = self.source[indices]
        used = np.unique(sources)
        if len(used) == 1:
            return self.sources[used[0]].take(self.rows[indices])
        parts, order = [], []
        for number in used:
            inside = np.flatnonzero(sources == number)
            parts.append(self.sources[number].take(self.rows[indices[inside]]))
            order.append(inside)
        places = np.concatenate([np.zeros(0, np.int64), *order])
        return concatenate(parts).take(np.argsort(places, kind="stable"))


AnyTokens = Tokens | SampledTokens


def sample(sources: Sequence[Tokens], source: np.ndarray, rows: np.ndarray) -> AnyTokens:
    """Return n examples, each a row [n] of the source with its number [n]; a whole source is returned as it is."""
    if len(sources) == 1 and len(rows) == len(sources[0]) and np.array_equal(rows, np.arange(len(rows))):
        return sources[0]
    kind = np.uint8 if len(sources) <= np.iinfo(np.uint8).max else np.int64
    return SampledTokens(tuple(sources), source.astype(kind), rows)


def select(tokens: AnyTokens, indices: np.ndarray) -> AnyTokens:
    """Return the examples `indices` [m] in that order, without a copy of their tokens."""
    if isinstance(tokens, Tokens):
        return sample([tokens], np.zeros(len(indices), np.int64), indices)
    return SampledTokens(tokens.sources, tokens.source[indices], tokens.rows[indices])


def pieces(tokens: AnyTokens) -> Iterator[Tokens]:
    """Yield all examples in order, some ten thousand of them in memory at a time."""
    for start in range(0, len(tokens), _PIECE):
        yield tokens.take(np.arange(start, min(start + _PIECE, len(tokens))))
