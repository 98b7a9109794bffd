"""What an experiment learns from and is evaluated on, without training anything or reading weights."""

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

LEARNT = {"labelled": "L", "all": "L ∪ U"}  # the sets that objectives learn from, by `Objective.data`
_EXAMPLES = 3
_TOKENS, _CHARACTERS = 64, 400  # of an example that is shown
_HIDDEN = ("Cc", "Cs", "Zl", "Zp")


@dataclass(frozen=True)
class Count:
    """A set of examples ("L", "U" or a split): how many, of each label in the task's order, and without one."""

    language: str
    name: str
    examples: int
    labels: tuple[int, ...]
    without_label: int


@dataclass(frozen=True)
class Measured:
    """What the tokenizer of a role ("teacher" or "student") makes of a set of examples."""

    role: str
    language: str
    name: str
    lengths: Lengths


@dataclass(frozen=True)
class Packing:
    """The training batches of a role on a set ("L" or "L ∪ U"); `epochs` is how often it is gone through."""

    role: str
    name: str
    examples: int
    epochs: float
    batch_size: int
    row_length: int
    filling: Filling


@dataclass(frozen=True)
class Shown:
    """An example for the eye: the name of its label, and its tokens by role."""

    id: str
    label: str
    text: str
    text_pair: str | None
    tokens: dict[str, str]


@dataclass(frozen=True)
class Description:
    """All that there is to see.

    Attributes:
      models: role -> checkpoint and length.
      counts: of L and U, which are drawn from the source language's splits, and of every split that there is.
      missing: why there are no more, a line for each reason.
      repeated: of "L ∪ U" how many texts occur in it before; of the source's splits how many texts occur in it.
      devices: that the rows of a batch are divided among.
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
    counts: tuple[Count, ...]
    missing: tuple[str, ...]
    repeated: dict[str, int]
    measured: tuple[Measured, ...]
    packing: tuple[Packing, ...]
    examples: tuple[Shown, ...]

    def count(self, name: str, language: str = "") -> Count:
        """The count of L, U or a split that is there, by default of the source language."""
        wanted = (language or self.source_language, name)
        return next(each for each in self.counts if (each.language, each.name) == wanted)


def describe(experiment: ExperimentConfig, batches: int) -> Description:
    """Looks at an experiment's data with its tokenizers; of each training set up to `batches` batches are made.

    Raises:
      UserError: what would stop the experiment before its training, but for the weights.
    """
    task = load_task(experiment.task)
    load, cached, source = task.load, functools.cache(task.load), task.source_language
    task = dataclasses.replace(task, load=lambda split, name: (cached if name == source else load)(split, name))
    devices = _shards(experiment.mesh)
    kept = cache_dir(experiment.task) / "tokens"
    teacher = ModelInputs("teacher", experiment.teacher, shards=devices, token_cache=kept)
    student = ModelInputs("student", experiment.student, shards=devices, token_cache=kept)
    material = transfer_set.gather(experiment, task)
    kinds = sorted({OBJECTIVES[name].data for name in experiment.objectives}, reverse=True)
    learnt = (
        _learnt(teacher, material, ["labelled"], experiment.teacher_seed, batches),
        _learnt(student, material, kinds, experiment.seeds[0], batches),
    )
    counts, looked_at, missing = _splits(task, experiment.evaluation_splits)
    measured = [each for part, _ in learnt for each in part]
    for (_, split), examples in looked_at.items():
        measured += [_measure(reader, split, examples, reader.tokens(examples)) for reader in (teacher, student)]
    texts = {(example.text, example.text_pair) for example in material.everything}
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
        counts=(_count(task, source, "L", material.labelled), _count(task, source, "U", material.unlabelled), *counts),
        missing=missing,
        repeated={"L ∪ U": len(material.everything) - len(texts)}
        | {
            split: sum((example.text, example.text_pair) in texts for example in examples)
            for (language, split), examples in looked_at.items()
            if language == source
        },
        measured=tuple(sorted(measured, key=lambda each: each.role == "student")),
        packing=tuple(each for _, part in learnt for each in part),
        examples=(*_shown(task, material.labelled, (teacher, student)), *_shown(task, of_target, (student,))),
    )


def _shards(mesh: MeshConfig) -> int:
    """Parts that a batch is split into on the mesh of the settings, which need not be one of the devices here."""
    data, fsdp, _ = mesh_sizes(dataclasses.astuple(mesh), jax.device_count())
    return data * fsdp


def _learnt(
    reader: ModelInputs, material: TransferSet, kinds: Sequence[str], seed: int, batches: int
) -> tuple[list[Measured], list[Packing]]:
    """L and U measured, and the batches of what the model is trained on."""
    tokens, n = reader.tokens(material.everything, material.drawn_from), len(material.labelled)
    sets = {"labelled": tokens.take(np.arange(n)), "all": tokens}
    measured = [_measure(reader, "L", material.labelled, sets["labelled"])]
    if material.unlabelled:
        measured.append(_measure(reader, "U", material.unlabelled, tokens.take(np.arange(n, len(tokens)))))
    return measured, [_packing(reader, LEARNT[kind], sets[kind], seed, batches) for kind in kinds]


def _measure(reader: ModelInputs, name: str, examples: Sequence[Example], tokens: Tokens) -> Measured:
    """The lengths of examples of one language, of which these are the tokens."""
    return Measured(reader.role, examples[0].language, name, measures.measure(reader.cache, *sides(examples), tokens))


def _packing(reader: ModelInputs, name: str, tokens: Tokens, seed: int, batches: int) -> Packing:
    """The first batches of a training on these tokens."""
    steps, plan = reader.settings.steps, reader.training_plan
    found = measures.filling(tokens, plan, seed, min(batches, steps))
    epochs = steps * plan.batch_size / len(tokens)
    return Packing(reader.role, name, len(tokens), epochs, plan.batch_size, plan.row_length, found)


def _splits(
    task: Task, evaluated: Sequence[str]
) -> tuple[list[Count], dict[tuple[str, str], list[Example]], tuple[str, ...]]:
    """Counts of all splits; the source's dev and what is evaluated, source first; why other splits are not there."""
    counts: list[Count] = []
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


def _count(task: Task, language: str, name: str, examples: Sequence[Example]) -> Count:
    found = Counter(example.label for example in examples)
    return Count(language, name, len(examples), tuple(found[i] for i in range(len(task.labels))), found[-1])


def _shown(task: Task, examples: Sequence[Example], readers: Sequence[ModelInputs]) -> list[Shown]:
    """The first example of each of the first labels; more of those where there are too few labels."""
    first = {example.label: example for example in reversed(examples)}.values()
    ids = {example.id for example in first}
    chosen = [*(e for e in examples if e.id in ids), *(e for e in examples if e.id not in ids)][:_EXAMPLES]
    found = []
    for example in chosen:
        tokens = {}
        for reader in readers:
            ids_ = reader.tokens([example]).input_ids
            pieces = reader.tokenizer.convert_ids_to_tokens(ids_[:_TOKENS].tolist())
            tokens[reader.role] = " ".join(pieces) + _more(len(ids_) - _TOKENS, "tokens")
        label = task.labels[example.label] if example.label >= 0 else "none"
        found.append(
            Shown(example.id, label, _cut(example.text), example.text_pair and _cut(example.text_pair), tokens)
        )
    return found


def _more(count: int, what: str) -> str:
    return f" … and {count:,} {what} more" if count > 0 else ""


def _cut(text: str) -> str:
    """The beginning of a text on one line, its control characters shown as such."""
    shown = "".join("⏎" if c == "\n" else "�" if unicodedata.category(c) in _HIDDEN else c for c in text[:_CHARACTERS])
    return shown + _more(len(text) - _CHARACTERS, "characters")
