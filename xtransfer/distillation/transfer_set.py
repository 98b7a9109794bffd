"""The transfer set: the labelled and unlabelled text of the source languages that a student learns from.

Objectives with data "target" learn from unlabelled text in target languages instead, and those with data "parallel"
from translations, with the teacher's logits for the originals, as in Xu and Yang, "Cross-lingual Distillation for Text
Classification" (ACL 2017). Each is read for them alone.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from weakref import WeakKeyDictionary

from xtransfer.config import ExperimentConfig
from xtransfer.data import parallel
from xtransfer.data.examples import StoredExamples, by_language, classes_of, ids_of, in_languages, join, select
from xtransfer.data.sampling import (
    labelled_in_sources,
    labelled_subset,
    sampled_pairs,
    target_examples,
    unlabelled_examples,
    unlabelled_in_sources,
)
from xtransfer.data.task import UNLABELLED, Example, Pairs, Task, load_if_present
from xtransfer.distillation import teachers
from xtransfer.distillation.objectives import Objective, configured_objectives
from xtransfer.errors import ConfigError, DataError, MissingSplitError
from xtransfer.runtime import terminal

_FINGERPRINTS: WeakKeyDictionary[StoredExamples, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class TransferSet:
    """The text that teachers and students learn from, in the source languages and in those of further teachers.

    Attributes:
      labelled: L, with labels; empty if there are none and nobody needs them.
      unlabelled: U, without labels.
      dev: the splits of the task's source languages that checkpoints are selected on; empty if there are none.
      drawn_from: the whole splits that L and U were drawn from.
      further_dev: the dev splits of languages that only teachers read, if they have one, which select their teachers.
      target: text in target languages by language, without labels; empty unless an objective reads it.
      parallel: texts with their translations, by the language of these; empty unless an objective reads them.
    """

    labelled: Sequence[Example]
    unlabelled: Sequence[Example]
    dev: Sequence[Example]
    drawn_from: tuple[Sequence[Example], ...]
    further_dev: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    target: Mapping[str, Sequence[Example]] = field(default_factory=dict)
    parallel: Mapping[str, Pairs] = field(default_factory=dict)

    @cached_property
    def everything(self) -> Sequence[Example]:
        """L ∪ U."""
        return join(self.labelled, self.unlabelled)

    def of(self, objective: Objective) -> Sequence[Example]:
        """Return the text that an objective learns from."""
        if objective.data == "target":
            return join(*(self.target[name] for name in objective.languages or self.target))
        if objective.data == "parallel":
            translations = [self.parallel[name].translations for name in objective.languages or self.parallel]
            # Without languages, the student knows the source language too, and learns to agree on both sides.
            return join(*translations, *(() if objective.languages else self._originals(objective)))
        return self.everything if objective.data == "all" else self.labelled

    def for_teacher(self, objective: Objective) -> Sequence[Example]:
        """Return the text that an objective's teacher labels: for translations, the originals."""
        if objective.data == "parallel":
            return join(*self._originals(objective))
        return self.of(objective) if objective.data == "target" else self.everything

    def ids_for_teacher(self, objective: Objective) -> Sequence[str]:
        """Return for each text in `of` the id of the one in `for_teacher` whose logits it takes."""
        if objective.data == "parallel":
            ids = list(ids_of(self.for_teacher(objective)))
            return ids if objective.languages else ids * 2
        return ids_of(self.of(objective))

    def for_monolingual_teacher(self, objectives: Iterable[Objective]) -> Sequence[Example]:
        """Return the text that the monolingual teacher labels for objectives: L ∪ U and originals, each once."""
        taught = [one for one in objectives if one.data == "parallel" and one.teacher == "monolingual"]
        languages = {name for objective in taught for name in objective.languages or self.parallel}
        return join(self.everything, *(self.parallel[name].originals for name in self.parallel if name in languages))

    def _originals(self, objective: Objective) -> list[Sequence[Example]]:
        return [self.parallel[name].originals for name in objective.languages or self.parallel]

    def dev_in(self, languages: Collection[str]) -> dict[str, Sequence[Example]]:
        """Return the dev splits that score a teacher of these languages, by language; without examples there are none.

        A language that only teachers read has no score of its own: all splits of its teacher count as one.
        """
        everything = join(self.dev, *self.further_dev.values())
        splits = by_language(select(everything, in_languages(everything, languages)))
        is_one = any(language in self.further_dev for language in splits)
        return {" and ".join(splits): join(*splits.values())} if is_one else splits


def gather(config: ExperimentConfig, task: Task) -> TransferSet:
    """Read the splits of the source languages, and of those of further teachers, and draw L and U from them.

    The sizes are totals over the task's source languages (see `sampling.source_sizes`). If it has only one, they hold
    for each language of the teachers. A teacher that is not trained here does without train and dev, unless an
    objective needs labels.

    Args:
      config: the config of one draw.
      task: the task, with the config's further source languages (see `load_task`).

    Raises:
      UserError: a split is missing or malformed, too small for L or U, or L has no example of a class; or a setting
        needs a split that is missing.
    """
    languages = (task.source_language, *config.further_sources)
    needs_unlabelled = any(objective.data == "all" for objective in configured_objectives(config))
    kind = config.task.unlabelled_from if needs_unlabelled else "none"
    draw = _drawn_together if config.task.source_languages else _drawn_each
    train = {language: _required(config, task, "train", language) for language in languages}
    labelled_by_language, unlabelled_by_language = draw(config, task, kind, train)
    drawn_from: list[Sequence[Example]] = []
    for language in languages:
        if train[language]:
            drawn_from.append(train[language])
        if unlabelled_by_language[language] and kind != "train_rest":
            drawn_from.append(task.load(UNLABELLED, language))
    labelled = join(*(labelled_by_language[language] for language in languages))
    unlabelled = join(*(unlabelled_by_language[language] for language in languages))
    _check_sizes(config, task, labelled, unlabelled)
    dev = _dev(config, task)
    further = [language for language in config.further_sources if language not in task.source_languages]
    further_dev = {language: _required(config, task, "dev", language) for language in further}
    target = _target_text(config, task)
    drawn_from += [_target_split(config, task, language) for language in target]
    pairs_by_language = _translations(config, task)
    for pairs in pairs_by_language.values():
        drawn_from += [pairs.originals, pairs.translations]
    return TransferSet(labelled, unlabelled, dev, tuple(drawn_from), further_dev, target, pairs_by_language)


_ByLanguage = dict[str, Sequence[Example]]


def _drawn_each(
    config: ExperimentConfig, task: Task, kind: str, train: Mapping[str, Sequence[Example]]
) -> tuple[_ByLanguage, _ByLanguage]:
    """Draw L and U by language, in the configured sizes for each language."""
    settings = config.task
    labelled: _ByLanguage = {}
    unlabelled: _ByLanguage = {}
    for language, examples in train.items():
        chosen = labelled_subset(examples, settings.labelled, settings.labelled_seed, task.labels) if examples else []
        if examples:
            _check_classes(chosen, task.labels, settings.labelled)
        there = replace(task, source_language=language)
        labelled[language] = chosen
        unlabelled[language] = unlabelled_examples(there, kind, settings.unlabelled, settings.labelled_seed, chosen)
    return labelled, unlabelled


def _drawn_together(
    config: ExperimentConfig, task: Task, kind: str, train: Mapping[str, Sequence[Example]]
) -> tuple[_ByLanguage, _ByLanguage]:
    """Draw L and U by language, in the configured sizes for all languages together."""
    settings = config.task
    _refuse_some_without("labelled", "train", train)
    labelled: _ByLanguage = {language: [] for language in train}
    if all(train.values()):
        labelled = labelled_in_sources(train, settings, task.labels)
        for language, examples in labelled.items():
            _check_classes(examples, task.labels, settings.labelled, f" in {language}")
    return labelled, unlabelled_in_sources(task, kind, settings, labelled)


def _dev(config: ExperimentConfig, task: Task) -> Sequence[Example]:
    """Return the dev splits of the task's source languages."""
    splits = {language: _required(config, task, "dev", language) for language in task.source_languages}
    _refuse_some_without("dev", "dev", splits)
    if not any(splits.values()):
        teachers.refuse_without_dev(config, " and ".join(splits))
    return join(*splits.values())


def _refuse_some_without(kind: str, split: str, examples: Mapping[str, Sequence[Example]]) -> None:
    """Refuse source languages of which some have a split and others do not."""
    missing = [language for language, there in examples.items() if not there]
    if missing and len(missing) < len(examples):
        raise DataError(
            f"no {kind} text in {missing[0]} (no {split} split), and other languages of task.source_languages have "
            f"some: add it, or leave {missing[0]} out"
        )


def _target_text(config: ExperimentConfig, task: Task) -> dict[str, Sequence[Example]]:
    """Return the text of the target languages that the experiment's objectives read, by language."""
    settings = config.task
    return {
        language: target_examples(
            _target_split(config, task, language), settings.target_text, settings.labelled_seed, language
        )
        for language in _languages_read(config, task, "target")
    }


def _translations(config: ExperimentConfig, task: Task) -> dict[str, Pairs]:
    """Return the translations that the experiment's objectives read, by language."""
    settings = config.task
    return {
        language: sampled_pairs(parallel.pairs(task, language), settings.parallel, settings.labelled_seed, language)
        for language in _languages_read(config, task, "parallel")
    }


def _languages_read(config: ExperimentConfig, task: Task, data: str) -> list[str]:
    """Return the target languages whose text the experiment's objectives with this `data` read."""
    readers = [objective for objective in configured_objectives(config) if objective.data == data]
    needed: set[str] = set()
    for objective in readers:
        for language in objective.languages:
            if language not in task.target_languages:
                raise ConfigError(
                    f"config key objective.{objective.name}.languages has {language!r}, which is none of the target "
                    f"languages: choose from {', '.join(task.target_languages)}"
                )
        needed.update(objective.languages or task.target_languages)
    return [language for language in task.target_languages if language in needed]


def _target_split(config: ExperimentConfig, task: Task, language: str) -> Sequence[Example]:
    """Return the split that the text of a target language is drawn from.

    Raises:
      UserError: there is no such split, or it is malformed.
    """
    kind = config.task.target_text_from
    split = "train" if kind == "train" else UNLABELLED
    examples = load_if_present(task, split, language)
    if examples is None:
        other = "split" if kind == "train" else "train"
        raise MissingSplitError(
            split,
            language,
            f"config key task.target_text_from is {kind!r}, but there is no {split} split in {language}: add it, set "
            f"task.target_text_from to {other!r} or 'file', or leave {language} out of the languages of the objectives "
            "with data 'target'",
        )
    return examples


def fingerprint(examples: Sequence[Example]) -> str:
    """Return the sha256 over the ids and the texts of examples, in order; those of stored examples are read once."""
    if not isinstance(examples, StoredExamples):
        return _fingerprint(examples)
    if examples not in _FINGERPRINTS:
        _FINGERPRINTS[examples] = _fingerprint(examples)
    return _FINGERPRINTS[examples]


def _fingerprint(examples: Iterable[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.text, example.text_pair]).encode())
    return digest.hexdigest()


def rows(samples: Sequence[TransferSet], objectives: Sequence[Objective] = ()) -> Iterator[dict[str, str]]:
    """Yield the text that the monolingual teacher of objectives labels, as the rows of a file to fill in.

    Args:
      samples: the transfer sets, which may share examples. Each example is a row once.
      objectives: the experiment's objectives.
    """
    seen: set[str] = set()
    for sample in samples:
        for example in sample.for_monolingual_teacher(objectives):
            if example.id in seen:
                continue
            if len(samples) > 1:  # one sample has each example once
                seen.add(example.id)
            yield {"id": example.id, "language": example.language, "text": example.text} | (
                {} if example.text_pair is None else {"text_pair": example.text_pair}
            )


def _required(config: ExperimentConfig, task: Task, split: str, language: str) -> Sequence[Example]:
    """Return a labelled split, or nothing if it does not exist, and no teacher in that language is trained here."""
    readers = [teacher for member, teacher in config.members.items() if language in config.languages_of(member)]
    if any(teacher.learns for teacher in readers):
        return task.load(split, language)
    return load_if_present(task, split, language) or []


def _check_sizes(
    config: ExperimentConfig, task: Task, labelled: Sequence[Example], unlabelled: Sequence[Example]
) -> None:
    """Refuse objectives that need labelled text if there is none, and an empty transfer set."""
    objectives, source = configured_objectives(config), " and ".join(task.source_languages)
    names = teachers.need_labels(objectives)
    if names and not labelled:
        verb = "needs" if len(names) == 1 else "need"
        raise ConfigError(
            f"config key objectives: {' and '.join(names)} {verb} labelled {source} text, and there is none (no train "
            "split): leave them out, or add it"
        )
    if not labelled:
        teachers.refuse_balanced_without_labels(config, source)
    if not labelled and not unlabelled and not all(objective.reads_target_text for objective in objectives):
        raise DataError(
            f"no text to learn from in {source}: there is no labelled text, and task.unlabelled_from is "
            f"{config.task.unlabelled_from!r}: add some unlabelled text"
        )
    if any(objective.data == "all" for objective in objectives) and not unlabelled:
        terminal.log(
            "warning: no unlabelled text: lower task.labelled (train_rest takes the rest of train), or add some"
        )


def _check_classes(labelled: Sequence[Example], labels: Sequence[str], requested: int, where: str = "") -> None:
    """Refuse a class that no model would learn."""
    used = classes_of(labelled)
    missing = [repr(name) for label, name in enumerate(labels) if label not in used]
    if missing:
        if where:  # only a part of the sample is in this language
            remedy = (
                f"raise it, or the share{where}" if requested else f"add some to its train, or raise the share{where}"
            )
        else:
            remedy = f"raise it to {len(labels)} or more" if requested else "add some to train"
        raise ConfigError(
            f"task.labelled {requested} leaves no example of {', '.join(missing)} to train on{where}: {remedy}"
        )
