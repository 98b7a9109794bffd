"""Load text for pretraining: a task's unlabelled text by language, and its translation pairs."""

import re
from collections.abc import Sequence
from itertools import combinations

from xtransfer.config import TaskConfig
from xtransfer.data.registry import load_text_source

# A sentence ends with its punctuation and any closing quotes or brackets. Japanese has no space after them.
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'»”」)]*\s*")


def texts(task: TaskConfig, languages: Sequence[str]) -> dict[str, list[str]]:
    """Return texts by group ("language/domain" or "language"), never from dev or test."""
    pretraining = load_text_source(task).pretraining
    return {group: members for language in languages for group, members in pretraining(language).items()}


def pairs(task: TaskConfig, languages: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return the translations between each pair of languages "a-b", and leave out pairs that have none."""
    parallel = load_text_source(task).parallel
    translations = {f"{a}-{b}": parallel(a, b) for a, b in combinations(languages, 2)}
    return {name: rows for name, rows in translations.items() if rows}


def halves(text: str) -> tuple[str, str]:
    """Split a text at the sentence end nearest to its middle, or at the middle word if it is one sentence."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if 0 < match.end() < len(text)]
    if ends:
        middle = min(ends, key=lambda end: abs(end - len(text) / 2))
    else:
        middle = text.find(" ", len(text) // 2)
        if middle < 0:
            middle = len(text) // 2
    return text[:middle].strip(), text[middle:].strip()
