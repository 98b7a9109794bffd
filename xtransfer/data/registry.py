"""The table of tasks.

A new task is a factory `TaskConfig -> Task` and a line in `TASKS`. A published corpus is a `Corpus` in a file of its
own in `corpora/`, and a line in `CORPORA`.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence

from xtransfer.config import TaskConfig
from xtransfer.data import parallel, user_files
from xtransfer.data.corpora import loader, massive, paws_x, sib200, webis_cls, xnli
from xtransfer.data.corpora.minireviews import task as minireviews
from xtransfer.data.task import Example, Task, TextSource, check_languages
from xtransfer.errors import ConfigError, nearest

CORPORA = (*xnli.CORPORA, *webis_cls.CORPORA, *paws_x.CORPORA, *sib200.CORPORA, *massive.CORPORA)

TASKS: dict[str, Callable[[TaskConfig], Task]] = {
    "minireviews": minireviews.task,
    "files": user_files.task,
    **{corpus.name: functools.partial(loader.task, corpus) for corpus in CORPORA},
}


# Tasks whose text can be read without their labelled splits.
TEXTS: dict[str, Callable[[TaskConfig], TextSource]] = {"files": user_files.text_source}


def load_text_source(config: TaskConfig) -> TextSource:
    """Return a task's text to pretrain on. The labelled splits need not exist if the task can do without them.

    Raises:
      UserError: as `load_task`.
    """
    if config.name in TEXTS:
        return TEXTS[config.name](config)
    task = load_task(config)
    return TextSource(task.pretraining, task.parallel)


def load_task(config: TaskConfig, further_sources: Sequence[str] = ()) -> Task:
    """Return the task that a config names.

    Args:
      config: the task's settings.
      further_sources: other source languages, for teachers of several languages. The task then loads their splits too,
        and its fingerprint covers them, as it does those of the config's own source languages.

    Raises:
      UserError: there is no such task, the config does not suit it, or a language's name cannot be part of a path; or a
        further source language is a target, or has other labels.
    """
    if config.name not in TASKS:
        raise ConfigError(f"task.name {config.name!r} is not one of {', '.join(TASKS)}{nearest(config.name, TASKS)}")
    if config.multi_label and config.name != "files":
        raise ConfigError(
            f"task.multi_label is True, but every text of {config.name!r} has exactly one label: only 'files' can have "
            "several"
        )
    task = TASKS[config.name](config)
    check_languages((task.source_language, *task.target_languages), f"the languages of task {config.name!r}")
    if config.unlabelled_from == "file":
        task = user_files.with_unlabelled_file(task, config)
    if config.target_text_from == "file":
        task = user_files.with_target_text_file(task, config)
    further = tuple(dict.fromkeys((*config.sources[1:], *further_sources)))
    if further and config.unlabelled_from == "file":
        user_files.check_language_column(config)
    if further:
        task = _with_further_sources(task, config, further)
    return parallel.with_file(task, config, (task.source_language, *further)) if config.parallel_file else task


def _with_further_sources(task: Task, config: TaskConfig, languages: Sequence[str]) -> Task:
    """Return the task with the text of further source languages, each of which is the source of a task of its own."""
    for language in languages:
        if language in task.target_languages:
            raise ConfigError(
                f"task.target_languages is empty, which makes {language!r} a target, and a teacher reads its text: "
                "list the languages that are zero-shot targets"
            )
    labels = config.labels or (task.labels if config.name == "files" else ())
    # Only the file of target text may have this column, and the further tasks do not read that file.
    has_column = config.unlabelled_from == "file" or "{language}" not in config.path
    settings = dataclasses.replace(
        config,
        source_languages=(),
        source_shares=(),
        sampling_temperature=1.0,
        target_languages=(task.source_language,),
        labels=labels,
        language_column=config.language_column if has_column else "",
        target_text_from="split",
        target_text_file="",
        parallel_file="",
    )
    others = {language: load_task(dataclasses.replace(settings, source_language=language)) for language in languages}

    def load(split: str, language: str) -> Sequence[Example]:
        return others.get(language, task).load(split, language)

    def fingerprint() -> str:
        facts = json.dumps([task.fingerprint(), *([name, other.fingerprint()] for name, other in others.items())])
        return hashlib.sha256(facts.encode()).hexdigest()

    return dataclasses.replace(task, load=load, fingerprint=fingerprint, other_sources=config.sources[1:])


def shares_items(config: TaskConfig) -> bool:
    """Return whether the languages of a task have the same test items, in translation, under the same ids.

    In your own files they do if a column names the ids.
    """
    if config.name == "files":
        return bool(config.id_column)
    return any(corpus.is_parallel for corpus in CORPORA if corpus.name == config.name)
