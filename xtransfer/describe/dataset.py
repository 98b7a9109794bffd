"""The data of an experiment and its tokens, without training anything or reading weights."""

import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from xtransfer.config import ExperimentConfig, MeshConfig, cache_dir
from xtransfer.data.batches import measures
from xtransfer.data.batches.measures import Filling, Lengths
from xtransfer.data.registry import load_task
from xtransfer.data.task import SPLITS, Example, Task
from xtransfer.data.tokens.tokenizer import Tokens
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import MissingSplitError, UserError
from xtransfer.runtime.sharding import mesh_sizes
from xtransfer.train.inputs import ModelInputs, sides

TRAINING_SETS = {"labelled": "L", "all": "L ∪ U"}  # the training sets of objectives, by `Objective.data`
_EXAMPLES = 3
_TOKENS, _CHARACTERS = 64, 400  # to show of an example
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class SetSize:
    """The size of a set of examples ("L", "U", or a split): in all, by label in the task's order, and without label."""

    language: str
    name: str
    examples: int
    labels: tuple[int, ...]
    without_label: int


@dataclass(frozen=True)
class MeasuredSet:
    """The lengths of a set of examples under the tokenizer of a role ("teacher" or "student")."""

    role: str
    language: str
    name: str
    lengths: Lengths


@dataclass(frozen=True)
class PackedTraining:
    """The training batches of a role on a set ("L" or "L ∪ U")."""

    role: str
    name: str
    examples: int
    epochs: float
    batch_size: int
    row_length: int
    filling: Filling


@dataclass(frozen=True)
class ShownExample:
    """An example to show: the name of its label, and its tokens by role."""

    id: str
    label: str
    text: str
    text_pair: str | None
    tokens: dict[str, str]


@dataclass(frozen=True)
class Description:
    """Everything that `describe` shows.

    Attributes:
      models: checkpoint and length by role.
      counts: of L and U, which are drawn from the source language's splits, and of every existing split.
      missing: why other splits are missing, one line per reason.
      repeated: for "L ∪ U", the number of repeated texts; for each source split, the number of its texts in L ∪ U.
      devices: the number of devices that share the rows of a batch.
    """

    task: str
    synthetic: bool
    source_language: str
    target_languages: tuple[str, ...]
    labels: tuple[str, ...]
    evaluation_splits: tuple[str, ...]
    unlabelled_from: str
    models: dict[str, str]
    devices: int
    counts: tuple[SetSize, ...]
    missing: tuple[str, ...]
    repeated: dict[str, int]
    measured: tuple[MeasuredSet, ...]
    packing: tuple[PackedTraining, ...]
    examples: tuple[ShownExample, ...]

    def count(self, name: str, language: str = "") -> SetSize:
        """Return the count of L, U, or an existing split, by default in the source language."""
        wanted = (language or self.source_language, name)
        return next(each for each in self.counts if (each.language, each.name) == wanted)


def describe(experiment: ExperimentConfig, batches: int) -> Description:
    """Look at an experiment's data with its tokenizers.

    Args:
      experiment: the config.
      batches: the number of batches to make from each training set.

    Raises:
      UserError: anything that would stop the experiment before training, except for the weights.
    """
    task = load_task(experiment.task)
    load, cached, source = task.load, functools.cache(task.load), task.source_language
    task = dataclasses.replace(task, load=lambda split, name: (cached if name == source else load)(split, name))
    devices = _shards(experiment.mesh)
    kept = cache_dir(experiment.task) / "tokens"
    teacher = ModelInputs("teacher", experiment.teacher, shards=devices, token_cache=kept)
    student = ModelInputs("student", experiment.student, shards=devices, token_cache=kept)
    transfer = transfer_set.gather(experiment, task)
    kinds = sorted({OBJECTIVES[name].data for name in experiment.objectives}, reverse=True)
    training = (
        _training_sets(teacher, transfer, ["labelled"], experiment.teacher_seed, batches),
        _training_sets(student, transfer, kinds, experiment.seeds[0], batches),
    )
    counts, looked_at, missing = _splits(task, experiment.evaluation_splits)
    measured = [each for part, _ in training for each in part]
    for (_, split), examples in looked_at.items():
        measured += [_measure(inputs, split, examples, inputs.tokens(examples)) for inputs in (teacher, student)]
    texts = {(example.text, example.text_pair) for example in transfer.everything}
    of_target = next((examples for (language, _), examples in looked_at.items() if language != source), [])
    return Description(
        task=task.name,
        synthetic=task.synthetic,
        source_language=source,
        target_languages=task.target_languages,
        labels=task.labels,
        evaluation_splits=experiment.evaluation_splits,
        unlabelled_from=experiment.task.unlabelled_from,
        models={
            each.role: f"{each.settings.checkpoint}, up to {each.cache.max_length} tokens"
            for each in (teacher, student)
        },
        devices=devices,
        counts=(_count(task, source, "L", transfer.labelled), _count(task, source, "U", transfer.unlabelled), *counts),
        missing=missing,
        repeated={"L ∪ U": len(transfer.everything) - len(texts)}
        | {
            split: sum((example.text, example.text_pair) in texts for example in examples)
            for (language, split), examples in looked_at.items()
            if language == source
        },
        measured=tuple(sorted(measured, key=lambda each: each.role == "student")),
        packing=tuple(each for _, part in training for each in part),
        examples=(*_shown(task, transfer.labelled, (teacher, student)), *_shown(task, of_target, (student,))),
    )


def _shards(mesh: MeshConfig) -> int:
    """Return how many devices share a batch on the config's mesh, which need not fit the devices here."""
    data, fsdp, _ = mesh_sizes(dataclasses.astuple(mesh), jax.device_count())
    return data * fsdp


def _training_sets(
    inputs: ModelInputs, transfer: TransferSet, kinds: Sequence[str], seed: int, batches: int
) -> tuple[list[MeasuredSet], list[PackedTraining]]:
    """Measure L and U, and make batches of the training sets."""
    tokens, n = inputs.tokens(transfer.everything, transfer.drawn_from), len(transfer.labelled)
    sets = {"labelled": tokens.take(np.arange(n)), "all": tokens}
    measured = [_measure(inputs, "L", transfer.labelled, sets["labelled"])]
    if transfer.unlabelled:
        measured.append(_measure(inputs, "U", transfer.unlabelled, tokens.take(np.arange(n, len(tokens)))))
    return measured, [_packing(inputs, TRAINING_SETS[kind], sets[kind], seed, batches) for kind in kinds]


def _measure(inputs: ModelInputs, name: str, examples: Sequence[Example], tokens: Tokens) -> MeasuredSet:
    """Measure the lengths of examples in one language, given their tokens."""
    return MeasuredSet(
        inputs.role, examples[0].language, name, measures.measure(inputs.cache, *sides(examples), tokens)
    )


def _packing(inputs: ModelInputs, name: str, tokens: Tokens, seed: int, batches: int) -> PackedTraining:
    """Make the first training batches from these tokens."""
    steps, plan = inputs.settings.steps, inputs.training_plan
    found = measures.filling(tokens, plan, seed, min(batches, steps))
    epochs = steps * plan.batch_size / len(tokens)
    return PackedTraining(inputs.role, name, len(tokens), epochs, plan.batch_size, plan.row_length, found)


def _splits(
    task: Task, evaluated: Sequence[str]
) -> tuple[list[SetSize], dict[tuple[str, str], list[Example]], tuple[str, ...]]:
    """Count all splits; return source dev and the evaluated splits, source first; say why others are missing."""
    counts: list[SetSize] = []
    looked_at: dict[tuple[str, str], list[Example]] = {}
    missing: dict[tuple[str, str], tuple[str, list[str]]] = {}  # (split, kind of reason) -> (first message, languages)
    for language in (task.source_language, *task.target_languages):
        needed = {*evaluated, *(("train", "dev") if language == task.source_language else ())}
        for split in SPLITS:
            try:
                examples = task.load(split, language)
            except UserError as error:
                if split in needed:
                    raise
                # One line for all languages without the split, and one for each whose file cannot be read.
                kind = "missing" if isinstance(error, MissingSplitError) else str(error)
                missing.setdefault((split, kind), (str(error), []))[1].append(language)
                continue
            counts.append(_count(task, language, split, examples))
            if split in needed - {"train"} and examples:
                looked_at[language, split] = examples
    everywhere = 1 + len(task.target_languages)
    lines = (
        f"{split} of {'any language' if len(found) == everywhere else ', '.join(found)}: {error}"
        for (split, _), (error, found) in missing.items()
    )
    return counts, looked_at, tuple(lines)


def _count(task: Task, language: str, name: str, examples: Sequence[Example]) -> SetSize:
    found = Counter(example.label for example in examples)
    return SetSize(language, name, len(examples), tuple(found[i] for i in range(len(task.labels))), found[-1])


def _shown(task: Task, examples: Sequence[Example], models: Sequence[ModelInputs]) -> list[ShownExample]:
    """Return the first example of each of the first labels, and further examples if there are too few labels."""
    first = {example.label: example for example in reversed(examples)}.values()
    ids = {example.id for example in first}
    chosen = [*(e for e in examples if e.id in ids), *(e for e in examples if e.id not in ids)][:_EXAMPLES]
    found = []
    for example in chosen:
        tokens = {}
        for inputs in models:
            ids_ = inputs.tokens([example]).input_ids
            pieces = inputs.tokenizer.convert_ids_to_tokens(ids_[:_TOKENS].tolist())
            tokens[inputs.role] = " ".join(pieces) + _more(len(ids_) - _TOKENS, "tokens")
        label = task.labels[example.label] if example.label >= 0 else "none"
        found.append(
            ShownExample(example.id, label, _cut(example.text), example.text_pair and _cut(example.text_pair), tokens)
        )
    return found


def _more(count: int, unit: str) -> str:
    return f" … and {count:,} {unit} more" if count > 0 else ""


def _cut(text: str) -> str:
    """Return the beginning of a text on one line, with its control characters made visible."""
    shown = "".join("⏎" if c == "\n" else "�" if unicodedata.category(c) in _HIDDEN else c for c in text[:_CHARACTERS])
    return shown + _more(len(text) - _CHARACTERS, "characters")
