"""Describe an experiment's data and its tokens, without training anything or reading weights."""

import dataclasses
import functools
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from xtransfer.config import ExperimentConfig, MeshConfig, cache_dir
from xtransfer.data.batches import measures
from xtransfer.data.batches.measures import Filling, Lengths
from xtransfer.data.examples import (
    are_labelled,
    by_language,
    in_languages,
    join,
    languages_of,
    select,
    sides,
    text_digests,
)
from xtransfer.data.registry import load_task
from xtransfer.data.task import SPLITS, Example, Task
from xtransfer.data.tokens.samples import AnyTokens
from xtransfer.data.tokens.samples import select as select_tokens
from xtransfer.describe.opinions import Opinion, opinions
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import Objective, check_classes, configured_objectives, effective_settings
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import MissingSplitError, UserError
from xtransfer.runs import teachers
from xtransfer.runs.draws import draws_of
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime.sharding import mesh_sizes
from xtransfer.train.inputs import ModelInputs

TRAINING_SETS = {"labelled": "L", "all": "L ∪ U"}  # how the description names each `Objective.data`
_NUM_EXAMPLES = 3  # shown for each of the source language and one target language
_MAX_TOKENS, _MAX_CHARACTERS = 64, 400  # shown per example
_INVISIBLE = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: controls, surrogates, line and paragraph separators


@dataclass(frozen=True)
class SetSize:
    """The number of examples in a set.

    Attributes:
      language: the language of the examples.
      name: "L", "U", or a split.
      examples: the number of examples.
      labels: the number of examples with each label, in the task's order.
      without_label: the number of examples without a label. An empty set of labels does not count here.
    """

    language: str
    name: str
    examples: int
    labels: tuple[int, ...]
    without_label: int


@dataclass(frozen=True)
class LabelSets:
    """The sets of labels of a set of examples in a multi-label task.

    Attributes:
      language: the language of the examples.
      name: "L", or a split.
      cardinality: the mean number of labels per example.
      most: the largest number of labels.
      empty: the number of examples with an empty set.
      different: the number of different sets.
    """

    language: str
    name: str
    cardinality: float
    most: int
    empty: int
    different: int


@dataclass(frozen=True)
class MeasuredSet:
    """The lengths of a set of examples, in tokens of one role's tokenizer.

    Attributes:
      role: "teacher" or "student".
      language: the language of the examples.
      name: "L", "U", or a split.
      lengths: the lengths.
    """

    role: str
    language: str
    name: str
    lengths: Lengths


@dataclass(frozen=True)
class PackedTraining:
    """The training batches of one role.

    Attributes:
      role: "teacher" or "student".
      name: the training set, "L" or "L ∪ U".
      examples: the number of examples in the set.
      epochs: the number of passes over the set.
      batch_size: examples per batch.
      row_length: tokens per row.
      filling: how full the first batches are.
    """

    role: str
    name: str
    examples: int
    epochs: float
    batch_size: int
    row_length: int
    filling: Filling


@dataclass(frozen=True)
class ShownExample:
    """An example to show.

    Attributes:
      id: the example's id.
      label: the name of its label or labels, or "none".
      text: the text, shortened.
      text_pair: the second text, shortened, or None.
      tokens: the tokens as text, shortened, by role.
    """

    id: str
    label: str
    text: str
    text_pair: str | None
    tokens: dict[str, str]


@dataclass(frozen=True)
class Description:
    """Everything that `describe` shows.

    Attributes:
      task: the task's name.
      synthetic: whether the text was generated.
      source_language: the language with labels, of several the main one.
      target_languages: the languages for zero-shot evaluation.
      labels: the names of the labels.
      evaluation_splits: the splits to evaluate on.
      unlabelled_from: where U comes from, as in the config.
      models: the checkpoint and its maximum length, as text, by role.
      objectives: the effective settings of the teacher's objective and of every student's, as text, by name.
      devices: the number of devices that share the rows of a batch.
      counts: the sizes of L and U (drawn from the source language's splits), and of every split that exists.
      missing: why other splits are missing, one line per reason.
      repeated: for "L ∪ U", the number of repeated texts; for each source split, the number of its texts in L ∪ U. The
        names of splits end with their language if there are several source languages.
      measured: the lengths of each set, teacher first.
      packing: the training batches of each role, teacher first.
      examples: a few examples from L, or from U if L is empty, then a few in the first target language.
      label_sets: in a multi-label task, the sets of labels in L and in every labelled split.
      further_sources: the further languages of the transfer set.
      other_sources: the task's source languages after the main one.
      proportions: the proportions of several source languages in the transfer set, in words.
      opinions: what the teachers say about L and U, if their logits are stored or in a file.
      in_target_text: for each split in a target language with text in T or P, the number of its texts that are in
        them. The names of splits end with their language.
    """

    task: str
    synthetic: bool
    source_language: str
    target_languages: tuple[str, ...]
    labels: tuple[str, ...]
    evaluation_splits: tuple[str, ...]
    unlabelled_from: str
    models: dict[str, str]
    objectives: dict[str, str]
    devices: int
    counts: tuple[SetSize, ...]
    missing: tuple[str, ...]
    repeated: dict[str, int]
    measured: tuple[MeasuredSet, ...]
    packing: tuple[PackedTraining, ...]
    examples: tuple[ShownExample, ...]
    label_sets: tuple[LabelSets, ...] = ()
    further_sources: tuple[str, ...] = ()
    opinions: tuple[Opinion, ...] = ()
    other_sources: tuple[str, ...] = ()
    proportions: str = ""
    in_target_text: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def source_languages(self) -> tuple[str, ...]:
        """The task's source languages, the main one first."""
        return (self.source_language, *self.other_sources)

    def count(self, name: str, language: str = "") -> SetSize:
        """Return the size of L, U, or a split, which has none if it does not exist. The default is the source."""
        language = language or self.source_language
        nothing = SetSize(language, name, 0, (0,) * len(self.labels), 0)
        return next((size for size in self.counts if (size.language, size.name) == (language, name)), nothing)


def describe(experiment: ExperimentConfig, batches: int, workdir: Workdir | None = None) -> Description:
    """Describe an experiment's data, as its tokenizers read it.

    Args:
      experiment: the config.
      batches: the number of batches to pack from each training set.
      workdir: the workdir whose stored logits to describe, if any.

    Raises:
      UserError: the experiment would fail before training, for any reason but its weights.
    """
    experiment = teachers.with_classes(experiment)
    objectives = configured_objectives(experiment)
    task = _with_cached_source(load_task(experiment.task, experiment.further_sources))
    check_classes(experiment, task.labels, multi_label=task.multi_label)
    devices = _shards(experiment.mesh)
    token_cache = cache_dir(experiment.task) / "tokens"
    readers: list[ModelInputs] = []  # the teachers that read text
    for member, settings in experiment.members.items():
        if not settings.is_file:
            place = teachers.description_directory(settings)
            readers.append(ModelInputs(member, settings, shards=devices, token_cache=token_cache, directory=place))
    students = {
        role: ModelInputs(role, settings, shards=devices, token_cache=token_cache)
        for role, settings in experiment.encoders.items()
    }
    student = students["student"]
    first = draws_of(experiment)[0]
    experiment = first.apply(experiment)
    transfer = transfer_set.gather(experiment, task)
    kinds = sorted({objective.data for objective in objectives} & TRAINING_SETS.keys(), reverse=True)
    sets = []
    for reader in readers:
        reads = _read_by(experiment, reader.role, transfer)
        learns = experiment.members[reader.role].learns
        seed = teachers.seed(experiment, reader.role)
        sets.append(_training_sets(reader, reads, ["labelled"] if learns else [], seed, batches))
    sets.append(_training_sets(student, transfer, kinds, experiment.seeds[0], batches))
    for objective in objectives:
        if objective.reads_target_text:
            reader = students[experiment.encoder_of(objective.name)]
            sets.append(_target_sets(reader, transfer, objective, experiment.seeds[0], batches))
    counts, evaluated, missing = _splits(task, experiment.evaluation_splits, _needed(transfer))
    measured = list(dict.fromkeys(one for measured_sets, _ in sets for one in measured_sets))
    for (_, split), examples in evaluated.items():
        measured += [_measure(inputs, split, examples, inputs.tokens(examples)) for inputs in (*readers, student)]
    training_texts = text_digests(transfer.everything)
    repeated = {"L ∪ U": len(training_texts) - len(np.unique(training_texts))}
    for (language, split), examples in evaluated.items():
        if language in task.source_languages:
            name = f"{split} {language}" if task.other_sources else split
            repeated[name] = int(np.isin(text_digests(examples), training_texts).sum())
    in_target_text = {}
    for language in dict.fromkeys((*transfer.target, *transfer.parallel)):
        translations = (transfer.parallel[language].translations,) if language in transfer.parallel else ()
        target_texts = text_digests(join(transfer.target.get(language, ()), *translations))
        for (other, split), examples in evaluated.items():
            if other == language:
                in_target_text[f"{split} {language}"] = int(np.isin(text_digests(examples), target_texts).sum())
    roles = [inputs.role for inputs in (*readers, *students.values())]
    target_examples = next(
        (examples for (language, _), examples in evaluated.items() if language not in task.source_languages), []
    )
    return Description(
        task=task.name,
        synthetic=task.synthetic,
        source_language=task.source_language,
        further_sources=experiment.further_sources,
        other_sources=task.other_sources,
        proportions=experiment.task.proportions if task.other_sources else "",
        target_languages=task.target_languages,
        labels=task.labels,
        evaluation_splits=experiment.evaluation_splits,
        unlabelled_from=experiment.task.unlabelled_from,
        models={
            inputs.role: f"{inputs.settings.checkpoint}, up to {inputs.cache.max_length} tokens"
            for inputs in (*readers, *students.values())
        },
        objectives=effective_settings(experiment),
        devices=devices,
        opinions=tuple(opinions(experiment, task, transfer, workdir and workdir.at(first.name))),
        counts=(*_transfer_counts(experiment, task, transfer), *counts),
        missing=missing,
        repeated=repeated,
        measured=tuple(sorted(measured, key=lambda entry: roles.index(entry.role))),
        packing=tuple(one for _, packed in sets for one in packed),
        examples=(
            *_examples_to_show(task, transfer.labelled or transfer.unlabelled, (*readers, student)),
            *_examples_to_show(task, target_examples, (student,)),
        ),
        label_sets=_label_sets(transfer.labelled, evaluated) if task.multi_label else (),
        in_target_text=in_target_text,
    )


def _label_sets(
    labelled: Sequence[Example], evaluated: Mapping[tuple[str, str], Sequence[Example]]
) -> tuple[LabelSets, ...]:
    """Describe the label sets of L and of the evaluated splits."""
    sets = {**{(language, "L"): examples for language, examples in by_language(labelled).items()}, **evaluated}
    result = []
    for (language, name), examples in sets.items():
        classes = [example.classes or () for example in examples]
        sizes = [len(labels) for labels in classes]
        result.append(LabelSets(language, name, sum(sizes) / len(sizes), max(sizes), sizes.count(0), len(set(classes))))
    return tuple(result)


def _read_by(experiment: ExperimentConfig, member: str, transfer: TransferSet) -> TransferSet:
    """Return the part of a transfer set in the languages that a teacher reads."""
    labelled, unlabelled = (
        teachers.read_by(experiment, member, examples) for examples in (transfer.labelled, transfer.unlabelled)
    )
    return dataclasses.replace(transfer, labelled=labelled, unlabelled=unlabelled)


def _transfer_counts(experiment: ExperimentConfig, task: Task, transfer: TransferSet) -> list[SetSize]:
    """Return the sizes of L and U in each source language, and of T and P, the text of each target language."""
    targets = [_count(task, language, "T", examples) for language, examples in transfer.target.items()]
    for language, pairs in transfer.parallel.items():
        targets.append(_count(task, language, "P", pairs.translations))
    return targets + [
        _count(task, language, name, select(examples, in_languages(examples, (language,))))
        for language in (task.source_language, *experiment.further_sources)
        for name, examples in (("L", transfer.labelled), ("U", transfer.unlabelled))
    ]


def transfer_rows(experiment: ExperimentConfig) -> Iterator[dict[str, str]]:
    """Yield the text of all draws' transfer sets with its ids, for somebody else to label (`teacher.logits_file`).

    Raises:
      UserError: see `transfer_set.gather`.
    """
    experiment = teachers.with_classes(experiment)
    task = _with_cached_source(load_task(experiment.task, experiment.further_sources))
    samples = [transfer_set.gather(draw.apply(experiment), task) for draw in draws_of(experiment)]
    return transfer_set.rows(samples, configured_objectives(experiment))


def _with_cached_source(task: Task) -> Task:
    """Return the task with its source splits kept in memory, because several functions here read them."""
    load_cached = functools.cache(task.load)

    def load(split: str, language: str) -> Sequence[Example]:
        if language in task.source_languages:
            return load_cached(split, language)
        return task.load(split, language)

    return dataclasses.replace(task, load=load)


def _shards(mesh: MeshConfig) -> int:
    """Return the number of devices that share a batch on the config's mesh, which need not match this machine's."""
    data, fsdp, _ = mesh_sizes(dataclasses.astuple(mesh), jax.device_count())
    return data * fsdp


def _training_sets(
    inputs: ModelInputs, transfer: TransferSet, kinds: Sequence[str], seed: int, batches: int
) -> tuple[list[MeasuredSet], list[PackedTraining]]:
    """Measure L and U, and pack batches from the training sets `kinds`."""
    if not transfer.everything:
        return [], []
    tokens, n = inputs.tokens(transfer.everything, transfer.drawn_from), len(transfer.labelled)
    sets = {"labelled": select_tokens(tokens, np.arange(n)), "all": tokens}
    measured = []
    for language in languages_of(transfer.everything):
        for name, examples, first in (("L", transfer.labelled, 0), ("U", transfer.unlabelled, n)):
            rows = in_languages(examples, (language,))
            if len(rows):
                part = select(examples, rows)
                measured.append(_measure(inputs, name, part, select_tokens(tokens, first + rows)))
    return measured, [_packing(inputs, TRAINING_SETS[kind], sets[kind], seed, batches) for kind in kinds]


def _target_sets(
    inputs: ModelInputs, transfer: TransferSet, objective: Objective, seed: int, batches: int
) -> tuple[list[MeasuredSet], list[PackedTraining]]:
    """Measure the target text that an objective learns from, and pack batches from it.

    Translations are in P, also with their originals.
    """
    examples, name = transfer.of(objective), "P" if objective.data == "parallel" else "T"
    tokens = inputs.tokens(examples, transfer.drawn_from)
    measured = []
    for language in languages_of(examples):
        rows = in_languages(examples, (language,))
        measured.append(_measure(inputs, name, select(examples, rows), select_tokens(tokens, rows)))
    return measured, [_packing(inputs, f"{name} of {objective.name}", tokens, seed, batches)]


def _measure(inputs: ModelInputs, name: str, examples: Sequence[Example], tokens: AnyTokens) -> MeasuredSet:
    """Measure the lengths of examples in one language."""
    return MeasuredSet(
        inputs.role, examples[0].language, name, measures.measure(inputs.cache, *sides(examples), tokens)
    )


def _packing(inputs: ModelInputs, name: str, tokens: AnyTokens, seed: int, batches: int) -> PackedTraining:
    """Pack the first training batches from these tokens, and measure how full they are."""
    steps, plan = inputs.settings.resolved(len(tokens)).steps, inputs.training_plan(len(tokens))
    filling = measures.filling(tokens, plan, seed, min(batches, steps))
    epochs = steps * plan.batch_size / len(tokens)
    return PackedTraining(inputs.role, name, len(tokens), epochs, plan.batch_size, plan.row_length, filling)


def _needed(transfer: TransferSet) -> set[str]:
    """Return the splits that the source languages must have: train and dev, unless the transfer set does without."""
    return {name for name, examples in (("train", transfer.labelled), ("dev", transfer.dev)) if examples}


def _splits(
    task: Task, evaluation_splits: Sequence[str], source_splits: set[str]
) -> tuple[list[SetSize], dict[tuple[str, str], Sequence[Example]], tuple[str, ...]]:
    """Load all splits, of which every language must have `evaluation_splits` and a source also `source_splits`.

    Returns:
      The sizes of the splits that exist, source languages first.
      The examples of source dev and of the evaluation splits, by language and split, source languages first.
      Why other splits are missing, one line per reason.
    """
    counts: list[SetSize] = []
    evaluated: dict[tuple[str, str], Sequence[Example]] = {}
    missing: dict[tuple[str, str], tuple[str, list[str]]] = {}  # (split, kind of reason) -> (first message, languages)
    for language in task.languages:
        needed = set(evaluation_splits)
        if language in task.source_languages:
            needed |= source_splits
        for split in SPLITS:
            try:
                examples = task.load(split, language)
            except UserError as error:
                if split in needed:
                    raise
                # Languages without the split share a line. A file that cannot be read gets its own.
                kind = "missing" if isinstance(error, MissingSplitError) else str(error)
                missing.setdefault((split, kind), (str(error), []))[1].append(language)
                continue
            counts.append(_count(task, language, split, examples))
            if split in needed - {"train"} and examples:
                evaluated[language, split] = examples
    lines = []
    for (split, _), (message, languages) in missing.items():
        in_all = len(languages) == len(task.languages)
        lines.append(f"{split} split in {'any language' if in_all else ', '.join(languages)}: {message}")
    return counts, evaluated, tuple(lines)


def _count(task: Task, language: str, name: str, examples: Sequence[Example]) -> SetSize:
    """Return the size of a set of examples."""
    gold = task.gold(examples)  # [n], or [n, K] in a multi-label task
    if task.multi_label:
        labels = tuple((gold == 1).sum(axis=0).tolist())
    else:
        labels = tuple(np.bincount(gold[gold >= 0], minlength=len(task.labels)).tolist())
    without_label = int((~are_labelled(examples)).sum())
    return SetSize(language, name, len(examples), labels, without_label)


def _examples_to_show(task: Task, examples: Sequence[Example], models: Sequence[ModelInputs]) -> list[ShownExample]:
    """Return a few examples with different labels, and then further examples if there are too few labels."""
    most = _NUM_EXAMPLES if task.multi_label else min(_NUM_EXAMPLES, len(task.labels))
    shown = []
    for example in _with_different_labels(examples, most):
        tokens = {}
        for inputs in models:
            ids = inputs.tokens([example]).take(np.zeros(1, np.int64)).input_ids
            pieces = inputs.tokenizer.convert_ids_to_tokens(ids[:_MAX_TOKENS].tolist())
            tokens[inputs.role] = " ".join(pieces) + _omitted(len(ids) - _MAX_TOKENS, "tokens")
        label = ", ".join(task.labels[index] for index in example.classes or ()) or "none"
        pair = _shorten(example.text_pair) if example.text_pair else example.text_pair
        shown.append(ShownExample(example.id, label, _shorten(example.text), pair, tokens))
    return shown


def _with_different_labels(examples: Sequence[Example], most: int) -> list[Example]:
    """Return the first examples of up to `most` labels, and then the first others, a few in all."""
    first_by_label: dict[tuple[int, ...] | None, int] = {}
    if are_labelled(examples).any():
        for row, example in enumerate(examples):
            first_by_label.setdefault(example.classes, row)
            if len(first_by_label) == most:
                break
    first = list(first_by_label.values())
    others = [row for row in range(min(len(examples), 2 * _NUM_EXAMPLES)) if row not in first]
    return [examples[row] for row in [*first, *others][:_NUM_EXAMPLES]]


def _omitted(count: int, unit: str) -> str:
    """Return a note on the tokens or characters that are not shown."""
    return f" … and {count:,} more {unit}" if count > 0 else ""


def _shorten(text: str) -> str:
    """Return the beginning of a text on one line, with its control characters made visible."""
    return "".join(map(_visible, text[:_MAX_CHARACTERS])) + _omitted(len(text) - _MAX_CHARACTERS, "characters")


def _visible(character: str) -> str:
    if character == "\n":
        return "⏎"
    return "�" if unicodedata.category(character) in _INVISIBLE else character
