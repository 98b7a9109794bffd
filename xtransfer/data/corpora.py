"""Text for pretraining: a task's unlabelled text per language, and its translation pairs."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations

from xtransfer import config as settings
from xtransfer.config import TaskConfig
from xtransfer.data.builders import minireviews
from xtransfer.data.tasks import get_task

# A sentence ends with its mark and whatever closes it; Japanese puts no space behind.
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])[\"'»”」)]*\s*")


def texts(task: TaskConfig, languages: Sequence[str]) -> dict[str, list[str]]:
    """Texts of each group "language/domain" (or just "language") to pretrain on; never of dev or test."""
    grouped: dict[str, list[str]] = {}
    for language in languages:
        if task.name == "minireviews":
            for row in _prepared(task, f"{language}-pretraining", "pretraining"):
                grouped.setdefault(f"{language}/{row['domain']}", []).append(row["text"])
        else:
            grouped[language] = [example.text for example in get_task(task).load("unlabelled", language)]
    return grouped


def pairs(task: TaskConfig, languages: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Translations of each pair "a-b" of `languages`; none where the task has no parallel text."""
    if task.name != "minireviews":
        return {}
    found: Mapping[str, list[dict]] = {
        f"{a}-{b}": _prepared(task, f"{a}-{b}", "parallel") for a, b in combinations(languages, 2)
    }
    return {name: [(row["text"], row["text_pair"]) for row in rows] for name, rows in found.items()}


def _prepared(task: TaskConfig, name: str, split: str) -> list[dict]:
    directory = settings.cache_dir(task)
    minireviews.prepare(name, directory)
    return minireviews.read(name, split, directory)


def halves(text: str) -> tuple[str, str]:
    """A text cut at the sentence end nearest its middle; at the middle word where it is one sentence."""
    ends = [match.end() for match in _SENTENCE_END.finditer(text) if 0 < match.end() < len(text)]
    if ends:
        cut = min(ends, key=lambda end: abs(end - len(text) / 2))
    else:
        cut = text.find(" ", len(text) // 2)
        cut = len(text) // 2 if cut < 0 else cut
    return text[:cut].strip(), text[cut:].strip()
