"""The task `minireviews`: the embedded synthetic reviews, written below the cache directory on first use."""

from typing import Any

from xtransfer.config import TaskConfig, cache_dir
from xtransfer.data.corpora.minireviews import generator, prepared
from xtransfer.data.task import UNLABELLED, Example, Task, check_request, example_id, target_languages


def task(config: TaskConfig) -> Task:
    """Return the task of a config.

    Raises:
      UserError: an unknown language.
    """

    def load(split: str, language: str) -> list[Example]:
        check_request(split, language, config, targets)
        return [
            Example(
                id=example_id(config.name, split, language, row["id"]),
                text=row["text"],
                text_pair=None,
                label=-1 if split == UNLABELLED else int(row["label"]),
                language=language,
            )
            for row in rows_of(language, split)
        ]

    def pretraining(language: str) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for row in rows_of(f"{language}-pretraining", "pretraining"):
            groups.setdefault(f"{language}/{row['domain']}", []).append(row["text"])
        return groups

    def parallel(first: str, second: str) -> list[tuple[str, str]]:
        if f"{second}-{first}" in generator.PAIRS:
            return [(translation, text) for text, translation in parallel(second, first)]
        return [(row["text"], row["text_pair"]) for row in rows_of(f"{first}-{second}", "parallel")]

    def rows_of(name: str, split: str) -> list[dict[str, Any]]:
        prepared.prepare(name, cache_dir(config))
        return prepared.read(name, split, cache_dir(config))

    targets = target_languages(config, generator.LANGUAGES)
    return Task(
        name=config.name,
        labels=tuple(generator.LABELS),
        source_language=config.source_language,
        target_languages=targets,
        load=load,
        fingerprint=lambda: generator.FINGERPRINT,
        synthetic=True,
        pretraining=pretraining,
        parallel=parallel,
    )
