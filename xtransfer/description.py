"""What an experiment learns from and is evaluated on, without training anything or reading weights."""

import dataclasses
import functools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from xtransfer import cli
from xtransfer.config import ExperimentConfig, ModelConfig, cache_dir
from xtransfer.data import measures
from xtransfer.data.examples import SPLITS, Example, Task
from xtransfer.data.measures import Filling, Lengths
from xtransfer.data.pipeline import BatchPlan, make_plan
from xtransfer.data.tasks import get_task
from xtransfer.data.text import Tokens, load_tokenizer
from xtransfer.data.token_cache import TokenCache
from xtransfer.errors import UserError
from xtransfer.experiment import Material, gather
from xtransfer.models import hf
from xtransfer.sharding import data_shards, make_mesh
from xtransfer.transfer.objectives import OBJECTIVES

LEARNT = {"labelled": "L", "all": "L ∪ U"}  # the sets that objectives learn from, by `Objective.data`
_MANY = 20_000  # examples whose tokenising takes long enough to be shown
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


@dataclass(frozen=True)
class Reader:
    """A model of the experiment without its weights."""

    role: str
    settings: ModelConfig
    cache: TokenCache
    plan: BatchPlan

    def tokens(self, examples: Sequence[Example]) -> Tokens:
        """The tokens of examples, kept where the experiment will look for them."""
        title, many = f"tokens for the {self.role}", len(examples) >= _MANY
        with cli.ticking(title, len(examples), unit="examples") if many else nullcontext() as ticker:
            return self.cache.tokens(*_sides(examples), on_batch=ticker.advance if ticker else None)

    def measure(self, name: str, examples: Sequence[Example], tokens: Tokens) -> Measured:
        """The lengths of examples of one language, of which these are the tokens."""
        found = measures.measure(self.cache, *_sides(examples), tokens)
        return Measured(self.role, examples[0].language, name, found)

    def packing(self, name: str, tokens: Tokens, seed: int, batches: int) -> Packing:
        """The first batches of a training on these tokens."""
        steps, size = self.settings.steps, self.plan.batch_size
        found = measures.filling(tokens, self.plan, seed, min(batches, steps))
        return Packing(self.role, name, len(tokens), steps * size / len(tokens), size, self.plan.row_length, found)


def describe(experiment: ExperimentConfig, batches: int) -> Description:
    """Looks at an experiment's data with its tokenizers; of each training set up to `batches` batches are made.

    Raises:
      UserError: what would stop the experiment before its training, but for the weights.
    """
    task = get_task(experiment.task)
    load, cached, source = task.load, functools.cache(task.load), task.source_language
    task = dataclasses.replace(task, load=lambda split, name: (cached if name == source else load)(split, name))
    devices = data_shards(make_mesh())
    teacher, student = (_reader(role, experiment, devices) for role in ("teacher", "student"))
    material = gather(experiment, task)
    kinds = sorted({OBJECTIVES[name].data for name in experiment.objectives}, reverse=True)
    learnt = (
        _learnt(teacher, material, ["labelled"], experiment.teacher_seed, batches),
        _learnt(student, material, kinds, experiment.seeds[0], batches),
    )
    counts, looked_at, missing = _splits(task, experiment.evaluation_splits)
    measured = [each for part, _ in learnt for each in part]
    for (language, split), examples in looked_at.items():
        readers = (teacher, student) if language == source else (student,)
        measured += [reader.measure(split, examples, reader.tokens(examples)) for reader in readers]
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


def _sides(examples: Sequence[Example]) -> tuple[list[str], list[str] | None]:
    """Texts and second texts, as the training gives them to the tokenizer."""
    pairs = [example.text_pair or "" for example in examples] if any(x.text_pair for x in examples) else None
    return [example.text for example in examples], pairs


def _reader(role: str, experiment: ExperimentConfig, devices: int) -> Reader:
    settings: ModelConfig = getattr(experiment, role)
    if not settings.checkpoint:
        raise UserError(f"config key {role}.checkpoint is empty: name a checkpoint, a directory or a hub id")
    directory = hf.resolve(settings.checkpoint)
    architecture, tokenizer = hf.read_config(directory), load_tokenizer(directory)
    hf.check_tokenizer(directory, tokenizer)
    positions = architecture.max_positions - architecture.position_offset
    if settings.max_length > positions:
        raise UserError(f"{role}.max_length is {settings.max_length}, but {directory} has {positions} positions")
    plan = make_plan(
        settings.batch_size,
        settings.row_length or settings.max_length,
        pad_id=architecture.pad_id,
        position_offset=architecture.position_offset,
        multiple_of=devices,
        packed=settings.packed,
    )
    cache = TokenCache(cache_dir(experiment.task) / "tokens", tokenizer, settings.max_length)
    return Reader(role, settings, cache, plan)


def _learnt(
    reader: Reader, material: Material, kinds: Sequence[str], seed: int, batches: int
) -> tuple[list[Measured], list[Packing]]:
    """L and U measured, and the batches of what the model is trained on."""
    tokens, n = reader.tokens(material.everything), len(material.labelled)
    labelled = _span(tokens, 0, n)
    measured = [reader.measure("L", material.labelled, labelled)]
    if material.unlabelled:
        measured.append(reader.measure("U", material.unlabelled, _span(tokens, n, len(tokens))))
    sets = {"labelled": labelled, "all": tokens}
    return measured, [reader.packing(LEARNT[kind], sets[kind], seed, batches) for kind in kinds]


def _span(tokens: Tokens, start: int, stop: int) -> Tokens:
    offsets = tokens.offsets[start : stop + 1]
    span = slice(int(offsets[0]), int(offsets[-1]))
    return Tokens(tokens.input_ids[span], tokens.token_type_ids[span], offsets - offsets[0])


def _splits(
    task: Task, evaluated: Sequence[str]
) -> tuple[list[Count], dict[tuple[str, str], list[Example]], tuple[str, ...]]:
    """Counts of all splits; the source's dev and what is evaluated, source first; why other splits are not there."""
    counts: list[Count] = []
    looked_at: dict[tuple[str, str], list[Example]] = {}
    missing: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for language in (task.source_language, *task.target_languages):
        needed = {*evaluated, *(("train", "dev") if language == task.source_language else ())}
        for split in SPLITS:
            try:
                examples = task.load(split, language)
            except UserError as error:
                if split in needed:
                    raise
                # One line for all languages of which it is true.
                reason = re.sub(rf"\b{re.escape(language)}\b", "…", str(error))
                missing.setdefault((split, reason), (str(error), []))[1].append(language)
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


def _shown(task: Task, examples: Sequence[Example], readers: Sequence[Reader]) -> list[Shown]:
    """The first example of each of the first labels; more of those where there are too few labels."""
    first = {example.label: example for example in reversed(examples)}.values()
    ids = {example.id for example in first}
    chosen = [*(e for e in examples if e.id in ids), *(e for e in examples if e.id not in ids)][:_EXAMPLES]
    found = []
    for example in chosen:
        tokens = {}
        for reader in readers:
            ids_ = reader.tokens([example]).input_ids
            pieces = reader.cache.tokenizer.convert_ids_to_tokens(ids_[:_TOKENS].tolist())
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
