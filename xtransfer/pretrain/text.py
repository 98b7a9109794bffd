"""Text for pretraining: a task's unlabelled text by language, and its translation pairs."""

import re
from collections.abc import Sequence
from itertools import combinations

from xtransfer.config import TaskConfig
from xtransfer.data.registry import load_task

# A sentence ends with its mark and whatever closes it. Japanese has no space after it.
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'»”」)]*\s*")


def texts(task: TaskConfig, languages: Sequence[str]) -> dict[str, list[str]]:
    """Return texts to pretrain on by group, "language/domain" or just "language"; never from dev or test."""
    pretraining = load_task(task).pretraining
    return {group: found for language in languages for group, found in pretraining(language).items()}


def pairs(task: TaskConfig, languages: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return translations for each pair "a-b" of `languages`; none if the task has no parallel text."""
    parallel = load_task(task).parallel
    found = {f"{a}-{b}": parallel(a, b) for a, b in combinations(languages, 2)}
    return {name: rows for name, rows in found.items() if rows}


def halves(text: str) -> tuple[str, str]:
    """Cut a text at the sentence end nearest its middle, or at the middle word if it is one sentence."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if 0 < match.end() < len(text)]
    if ends:
        cut = min(ends, key=lambda end: abs(end - len(text) / 2))
    else:
        cut = text.find(" ", len(text) // 2)
        cut = len(text) // 2 if cut < 0 else cut
    return text[:cut].strip(), text[cut:].strip()
