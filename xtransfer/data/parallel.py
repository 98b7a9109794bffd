"""Translations: texts in source languages, each with its translation into a target language.

They come from the user's file, which has a row for each pair:

    {"text": "a fine film", "translation": "ein feiner Film", "language": "de"}

The language is the translation's. In a task on pairs of texts, `text_pair` and `translation_pair` are the second texts.
If there are several source languages, `text_language` says which one the original is in. Without a file, the pairs are
those that a task has of its own.
"""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path

from xtransfer import storage
from xtransfer.config import TaskConfig
from xtransfer.data import names, user_files
from xtransfer.data.formats import tables
from xtransfer.data.formats.lines import Delimiter
from xtransfer.data.formats.tables import Columns, Record
from xtransfer.data.task import Example, Pairs, Task, example_id, is_on_pairs
from xtransfer.errors import DataError

_SPLIT = "parallel"  # in the place of a split in the ids
_LANGUAGE, _TEXT_LANGUAGE = "language", "text_language"

_log = logging.getLogger(__name__)


def pairs(task: Task, language: str) -> Pairs:
    """Return all texts that have a translation into a target language, always in the same order.

    Raises:
      UserError: the file is malformed, or there are no such texts.
    """
    if task.translations is not None:
        return task.translations(language)
    originals, translations = [], []
    for source in task.source_languages:
        for number, (text, translation) in enumerate(task.parallel(source, language)):
            originals.append(_example(task, source, f"{source}-{language}-{number}", text))
            translations.append(_example(task, language, f"{source}-{language}-{number}", translation))
    if not originals:
        raise DataError(
            f"task {task.name!r} has no translations from {' or '.join(task.source_languages)} into {language!r}: "
            "name a file of them in task.parallel_file"
        )
    return Pairs(originals, translations)


def with_file(task: Task, config: TaskConfig, sources: Sequence[str]) -> Task:
    """Return the task with the translations in `config.parallel_file`, which its fingerprint then covers.

    Args:
      task: the task.
      config: its settings.
      sources: the languages that an original may be in. If there is only one, the file does not name it.

    Raises:
      UserError: the file is missing. On reading: it is malformed, lacks a column, or has a language that is no source
        or target; or it has no row in the requested language.
    """
    path = user_files.text_file(config, "parallel_file")

    @functools.cache
    def by_language() -> dict[str, Pairs]:
        return _read(task, config, path, sources)

    def translations(language: str) -> Pairs:
        if language not in by_language():
            raise DataError(
                f"{path}: no row with text whose column {_LANGUAGE!r} is {language!r}: add some, or leave "
                f"{language} out of task.target_languages or objective.NAME.languages"
            )
        return by_language()[language]

    def fingerprint() -> str:
        reading = [config.empty_text, config.delimiter, config.merge_names]
        facts = json.dumps([task.fingerprint(), _SPLIT, storage.sha256(path), reading])
        return hashlib.sha256(facts.encode()).hexdigest()

    return dataclasses.replace(task, translations=translations, fingerprint=fingerprint)


def _read(task: Task, config: TaskConfig, path: Path, sources: Sequence[str]) -> dict[str, Pairs]:
    """Read the pairs of a file by the language of the translation."""
    pair_columns = ("text_pair", "translation_pair") if is_on_pairs(task, task.source_language) else ("", "")
    text_language = _TEXT_LANGUAGE if len(sources) > 1 else ""
    originals, _ = _records(config, path, Columns("text", pair_columns[0], language=text_language))
    records, skipped = _records(config, path, Columns("translation", pair_columns[1], language=_LANGUAGE))
    original_by_id = {record.id: record for record in originals}  # the number of the row, from 0
    result: dict[str, tuple[list[Example], list[Example]]] = {}
    for record in records:
        where = f"{path}:{record.line}"
        language = _known(record.language, task.target_languages, "target", _LANGUAGE, config, where)
        original = original_by_id.get(record.id)
        if original is None:  # without text, and skipped
            skipped += 1
            continue
        source = sources[0]
        if text_language:
            source = _known(original.language, sources, "source", _TEXT_LANGUAGE, config, where)
        texts, translations = result.setdefault(language, ([], []))
        texts.append(_example(task, source, record.id, original.text, original.text_pair))
        translations.append(_example(task, language, record.id, record.text, record.text_pair))
    if skipped:
        _log.warning("%s: %d pairs with an empty text were skipped", path, skipped)
    return {language: Pairs(*texts) for language, texts in result.items()}


def _records(config: TaskConfig, path: Path, columns: Columns) -> tuple[list[Record], int]:
    return tables.read_records(path, columns, empty_text=config.empty_text, delimiter=Delimiter(config.delimiter))


def _known(name: str, languages: Sequence[str], kind: str, column: str, config: TaskConfig, where: str) -> str:
    """Return the language that a row names, as the task spells it; refuse any other one."""
    spelling = {names.normal(language): language for language in languages} if config.merge_names else {}
    language = spelling.get(names.normal(name), name)
    if language not in languages:
        raise DataError(
            f"{where}: column {column!r} is {name!r}, which is no {kind} language ({', '.join(languages)}): correct "
            f"it, or leave this row out{names.similar(name, languages)}"
        )
    return language


def _example(task: Task, language: str, number: str, text: str, text_pair: str | None = None) -> Example:
    return Example(example_id(task.name, _SPLIT, language, number), text, text_pair, -1, language)
