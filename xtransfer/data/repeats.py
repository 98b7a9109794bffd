"""Find texts that occur twice among more than memory holds as strings: eight bytes each."""

from array import array
from collections.abc import Iterable

import numpy as np


class Repeats:
    """A set of hashes to which texts are added one by one."""

    def __init__(self) -> None:
        self._hashes = array("q")

    def add(self, text: str) -> None:
        """Add a text."""
        self._hashes.append(hash(text))

    def suspects(self) -> "Suspects":
        """Return the texts that may have been added twice: all that were, and seldom another one of equal hash."""
        values, counts = np.unique(np.frombuffer(self._hashes, np.int64), return_counts=True)
        return Suspects(frozenset(values[counts > 1].tolist()))


class Suspects:
    """Texts that may occur twice, told apart by reading all texts again.

    Args:
      hashes: the hashes that occur twice.
    """

    def __init__(self, hashes: frozenset[int]) -> None:
        self._hashes = hashes

    def __bool__(self) -> bool:
        """Return whether there are any."""
        return bool(self._hashes)

    def __contains__(self, text: str) -> bool:
        """Return whether a text is one of them."""
        return hash(text) in self._hashes


def first_repeated(texts: Iterable[str]) -> str | None:
    """Return the first text that equals an earlier one, or None; `texts` can be read twice."""
    repeats = Repeats()
    for text in texts:
        repeats.add(text)
    suspects, seen = repeats.suspects(), set()
    if suspects:
        for text in texts:
            if text in suspects:
                if text in seen:
                    return text
                seen.add(text)
    return None
