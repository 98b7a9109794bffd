"""All settings, with their defaults and bounds, and the only code that reads a config file.

A config file is Python: `get_config(arg)` returns a locked `ConfigDict` that starts from `default(ExperimentConfig)`,
and flags override it (`--config.student.learning_rate=3e-5`). `load` turns the result into frozen dataclasses, checked
key by key. Everything else in the package takes its settings from those.

A field `Mapping[str, X]` (see `mapping`) has an entry for each name that a config file or a flag uses, as in
`objective.monox_kd.temperature`. Entries are checked like any other group, and one that sets nothing is left out. The
entries of `teachers` are different: only the config file names them, and they take from `teacher` what they do not set.
`students` are like them, and take from `student`.
"""

import dataclasses
import functools
import math
import os
import re
import runpy
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_dict, config_flags

from xtransfer.errors import ConfigError, MachineError, UserError, nearest, one_line, refuse_url

_MULTI_LABEL_METRICS = ("micro_f1", "macro_f1", "subset_accuracy")  # the default metrics of a multi-label task

MAX_SEED = 2**32 - 1
MAX_STEPS = 2**31 - 1
DEFAULT_STEPS = 1000  # counts as not given beside `epochs`
DEFAULT_SOURCE = "en"  # counts as not given beside `source_languages`
SCHEDULES = ("constant", "linear", "cosine", "inverse_sqrt")  # see `train/schedules.py`
_LARGEST_DECAY = 0.999999  # of a running mean; with 1 it would never move
_SMALLEST_EPS = 1e-12  # a parameter without a gradient has 0 / eps

_LENGTH = ("steps", "epochs")  # of a model's training; whoever sets one of them has no use for another's other one
_OF_TRAINING = ("epochs", "patience", "average_last", "ema_decay", "reinit_layers", "lora.rank")
"""Settings of a model that only its training uses, and that are 0 if they are not used."""

_OBJECTIVES = ("vanilla", "monox_kd", "monox_pl", "self_training")
_ENTRY_NAME = re.compile(r"\w[\w-]{0,59}")  # the name of an objective becomes a directory


def headline_metric(*, multi_label: bool) -> str:
    """Return the metric that a kind of task is reported by, unless the user names another one."""
    return "micro_f1" if multi_label else "accuracy"


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    choices: Sequence[str] = (),
    distinct: bool = False,
    is_path: bool = False,
) -> Any:
    """Return a dataclass field with a default and the bounds (inclusive) or the choices of its value.

    For a tuple, the bounds apply to each item; `distinct` requires at least one item, and each only once. A path may
    not be the address of object storage.
    """
    bounds = {
        "at_least": at_least,
        "at_most": at_most,
        "choices": tuple(choices),
        "distinct": distinct,
        "is_path": is_path,
    }
    return field(default=default, metadata=bounds)


def mapping(names: Sequence[str] = (), *, inherits: str = "", shared: type | None = None) -> Any:
    """Return a dataclass field of named entries.

    Args:
      names: the names for which a config starts with blank entries.
      inherits: another field, from which an entry takes what it does not set. Only the config file gives entries then,
        because a misspelt name in a flag would be another one.
      shared: the dataclass of the keys that are inherited.
    """
    keys = () if shared is None else tuple(item.name for item in dataclasses.fields(shared))
    return field(default_factory=dict, hash=False, metadata={"names": tuple(names), "inherits": inherits, "keys": keys})


@dataclass(frozen=True)
class TaskConfig:
    """The task: what to classify, in which languages, and how much text the models learn from."""

    name: str = "minireviews"
    # Your own copy of the data. For a published corpus: its archive, the folder with its archives, or the folder with
    # their contents; "" downloads it from its publisher.
    data_dir: str = setting("", is_path=True)
    cache_dir: str = setting("", is_path=True)  # the directory of prepared datasets; "" is ~/.cache/xtransfer
    source_language: str = DEFAULT_SOURCE
    # Several source languages, the main one first; () = source_language alone
    source_languages: tuple[str, ...] = ()
    # Their shares in the labelled and in the unlabelled text, in their order, such as (3, 1); () = by temperature.
    # Without a number of examples (`labelled`, `unlabelled`), the sample is the largest one with these shares.
    source_shares: tuple[float, ...] = ()
    # In place of shares: a language with n examples has a share in proportion to n ** (1 / temperature). 1 keeps the
    # languages' own proportions, and larger values are more even.
    sampling_temperature: float = setting(1.0, at_least=1)
    target_languages: tuple[str, ...] = ()  # () = every other language of the task
    # Labelled source examples, balanced over classes; 0 = all. Of several source languages: in total.
    labelled: int = setting(0, at_least=0)
    labelled_seed: int = setting(0, at_least=0, at_most=MAX_SEED)
    # Further samples to repeat the experiment on, see ExperimentConfig.teacher_seeds; () = the one of labelled_seed
    labelled_seeds: tuple[int, ...] = setting((), at_least=0, at_most=MAX_SEED)
    unlabelled_from: str = setting("split", choices=("none", "split", "train_rest", "file"))
    unlabelled: int = setting(0, at_least=0)  # unlabelled source examples, counted like labelled ones; 0 = all
    unlabelled_file: str = setting("", is_path=True)  # for unlabelled_from = "file"; columns as below
    # Unlabelled text in target languages, which only objectives with data = "target" read. "train" is the train split
    # without its labels.
    target_text_from: str = setting("split", choices=("split", "train", "file"))
    target_text: int = setting(0, at_least=0)  # examples of each target language; 0 = all
    target_text_file: str = setting("", is_path=True)  # for target_text_from = "file"; columns as below
    # Translations, which only objectives with data = "parallel" read (`data/parallel.py`); "" = those that the task has
    parallel_file: str = setting("", is_path=True)
    parallel: int = setting(0, at_least=0)  # pairs of each target language; 0 = all
    held_out_dev: int = setting(0, at_least=0)  # dev examples to hold out of train, if needed; 0 = a tenth
    held_out_seed: int = setting(0, at_least=0, at_most=MAX_SEED)
    empty_text: str = setting("error", choices=("error", "skip"))
    # Only the task `files` reads the rest, except that an unlabelled_file has these columns too.
    path: str = "{language}/{split}.tsv"  # below data_dir; the ending (.tsv, .csv, .jsonl, .parquet) is the format
    language_column: str = ""  # "" = one file per language; otherwise one file holds all, without {language}
    delimiter: str = setting("", choices=("", "comma", "semicolon", "tab", "bar"))  # "" = tab in .tsv, comma in .csv
    labels: tuple[str, ...] = ()  # in canonical order; () = the labels in the source language's train, sorted
    # Names of labels and languages that differ only in blanks at their ends, Unicode form, or case are one name;
    # otherwise they are an error.
    merge_names: bool = False
    text_column: str = "text"
    pair_column: str = ""  # "" = single texts, not pairs
    label_column: str = "label"
    multi_label: bool = False  # a text has any number of labels, also none, and not exactly one
    # What separates the labels of a text in .tsv and .csv, and in strings elsewhere; "" = lists, in .jsonl and .parquet
    label_separator: str = setting("", choices=("", "comma", "semicolon", "bar", "space"))
    id_column: str = ""  # "" = the row's number

    @property
    def sources(self) -> tuple[str, ...]:
        """The source languages, the main one first."""
        return self.source_languages or (self.source_language,)

    @property
    def keeps_proportions(self) -> bool:
        """Whether the source languages keep the proportions that they have in the data."""
        return not self.source_shares and self.sampling_temperature == 1

    @property
    def samples_labelled(self) -> bool:
        """Whether the labelled text is a sample, which depends on labelled_seed."""
        return bool(self.labelled) or not self.keeps_proportions

    @property
    def has_samples(self) -> bool:
        """Whether another labelled_seed draws other examples."""
        samples_unlabelled = bool(self.unlabelled) and self.unlabelled_from != "none"
        return self.samples_labelled or samples_unlabelled or bool(self.target_text or self.parallel)

    @property
    def proportions(self) -> str:
        """The proportions of several source languages, in words."""
        if self.source_shares:
            return f"in the proportions {' : '.join(f'{share:g}' for share in self.source_shares)}"
        power = "" if self.keeps_proportions else f" to the power of 1/{self.sampling_temperature:g}"
        return f"in proportion to their sizes{power}"

    def adapted(self) -> "TaskConfig":
        """Return the settings with the first of several source languages as source_language.

        A single one in source_languages is the same as source_language. The default of that key counts as not given.
        """
        if not self.source_languages or self.source_language not in (DEFAULT_SOURCE, self.source_languages[0]):
            return self
        several = self.source_languages if len(self.source_languages) > 1 else ()
        return dataclasses.replace(self, source_language=self.source_languages[0], source_languages=several)

    def check(self, prefix: str = "") -> None:
        """Refuse settings that contradict each other."""
        self._check_sources(prefix)
        if (self.unlabelled_from == "file") != bool(self.unlabelled_file):
            raise ConfigError(
                f"config key {prefix}unlabelled_file is {self.unlabelled_file!r} and {prefix}unlabelled_from is "
                f"{self.unlabelled_from!r}: name a file if, and only if, that is 'file'"
            )
        if (self.target_text_from == "file") != bool(self.target_text_file):
            raise ConfigError(
                f"config key {prefix}target_text_file is {self.target_text_file!r} and {prefix}target_text_from is "
                f"{self.target_text_from!r}: name a file if, and only if, that is 'file'"
            )
        if self.label_separator and not self.multi_label:
            raise ConfigError(
                f"config key {prefix}label_separator is {self.label_separator!r}, but a text has one label unless "
                f"{prefix}multi_label is True: set that, or leave this empty"
            )

    def _check_sources(self, prefix: str) -> None:
        """Refuse source languages and shares that contradict each other."""
        languages, shares = self.source_languages, self.source_shares
        key = f"config key {prefix}source_languages is {languages!r}"
        if languages and languages[0] != self.source_language:
            raise ConfigError(
                f"{key}, and {prefix}source_language is {self.source_language!r}: name the main source language first, "
                f"or leave out {prefix}source_language"
            )
        if len(set(languages)) < len(languages):
            raise ConfigError(f"{key}: name each language once")
        both = [language for language in languages if language in self.target_languages]
        if both:
            raise ConfigError(
                f"{key}, and {prefix}target_languages has {both[0]!r} too: a language with training text is no "
                "zero-shot target, so leave it out of one of them"
            )
        if len(languages) < 2 and not self.keeps_proportions:
            name, value = ("source_shares", shares) if shares else ("sampling_temperature", self.sampling_temperature)
            raise ConfigError(
                f"config key {prefix}{name} is {value!r}, but there is only one source language: leave it out, or "
                f"name several in {prefix}source_languages"
            )
        if shares and len(shares) != len(languages):
            raise ConfigError(
                f"config key {prefix}source_shares is {shares!r}: give {len(languages)} shares, one for each of "
                f"{prefix}source_languages {', '.join(languages)}"
            )
        if any(share <= 0 for share in shares):
            raise ConfigError(f"config key {prefix}source_shares is {shares!r}: each share must be above 0")
        if sum(shares) == math.inf:
            raise ConfigError(f"config key {prefix}source_shares is {shares!r}: their sum is too large for a float")
        if shares and self.sampling_temperature != 1:
            raise ConfigError(
                f"config keys {prefix}source_shares and {prefix}sampling_temperature are {shares!r} and "
                f"{self.sampling_temperature:g}: both say how to split the text over languages, so leave one of them "
                "out"
            )


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which are trained in place of the encoder (`train/lora.py`)."""

    rank: int = setting(0, at_least=0)  # 0 = off
    alpha: float = setting(16.0, at_least=1e-3)  # the adapters' output is multiplied by alpha / rank
    # Regular expressions of the paths of the kernels that get an adapter. The default is as in the paper.
    targets: tuple[str, ...] = (r"\.attention\.(query|value)\.kernel$",)

    def check(self, prefix: str = "") -> None:
        """Refuse settings that contradict each other."""
        check_patterns(f"{prefix}targets", self.targets)
        if self.rank and not self.targets:
            raise ConfigError(f"config key {prefix}targets is (): name the kernels that get an adapter")
        if not self.rank and self != LoraConfig():
            raise ConfigError(f"config key {prefix}rank is 0, which turns LoRA off: give a rank, such as 8")


@dataclass(frozen=True)
class ModelConfig:
    """One encoder and how it is fine-tuned."""

    checkpoint: str = setting("", is_path=True)  # embedded name, directory, or hub id with an optional @revision
    max_length: int = setting(128, at_least=4)  # tokens, with special ones
    pooling: str = setting("cls", choices=("cls", "mean", "late"))
    frozen: tuple[str, ...] = ()  # regular expressions of parameter paths that keep their pretrained values
    compute_dtype: str = setting("float32", choices=("float32", "bfloat16"))  # parameters stay float32
    learning_rate: float = setting(2e-5, at_least=0)
    batch_size: int = setting(32, at_least=1)  # examples, over all devices
    steps: int = setting(DEFAULT_STEPS, at_least=0, at_most=MAX_STEPS)
    epochs: float = setting(0.0, at_least=0)  # passes over the training text, in place of steps; 0 = use steps
    warmup_fraction: float = setting(0.1, at_least=0, at_most=1)
    schedule: str = setting("linear", choices=SCHEDULES)  # of the learning rate after warm-up
    reinit_layers: int = setting(0, at_least=0)  # last layers that start from random numbers, not the checkpoint's
    layer_decay: float = setting(1.0, at_least=1e-3, at_most=1)  # of the rate, per layer from the head down; 1 = off
    weight_decay: float = setting(0.01, at_least=0)
    adam_b1: float = setting(0.9, at_least=0, at_most=_LARGEST_DECAY)
    adam_b2: float = setting(0.999, at_least=0, at_most=_LARGEST_DECAY)
    adam_eps: float = setting(1e-8, at_least=_SMALLEST_EPS)
    clip_norm: float = setting(1.0, at_least=0)  # largest norm of the gradient; 0 = off
    row_length: int = setting(0, at_least=0)  # tokens of a packed row; 0 = max_length
    packed: bool = True
    evaluations: int = setting(5, at_least=1)  # evenly spaced checkpoints, each scored on the source dev split
    patience: int = setting(0, at_least=0)  # evaluations without a better score after which training stops; 0 = off
    average_last: int = setting(0, at_least=0)  # checkpoints at the end whose parameters are averaged; 0 = off
    # Decay per step of a moving average of the weights, which is scored and kept in their place, such as 0.99; 0 = off
    ema_decay: float = setting(0.0, at_least=0, at_most=_LARGEST_DECAY)
    lora: LoraConfig = LoraConfig()
    accumulation: int = setting(0, at_least=0)  # microbatches per batch; 0 = automatic
    remat: bool = False  # compute each layer again in the backward pass, which saves memory

    def check(self, prefix: str = "") -> None:
        """Refuse settings that contradict each other."""
        if 0 < self.row_length < self.max_length:
            raise ConfigError(
                f"config key {prefix}row_length is {self.row_length}: a row must hold an example of {prefix}max_length "
                f"{self.max_length} tokens"
            )
        if self.accumulation > self.batch_size:
            raise ConfigError(
                f"config key {prefix}accumulation is {self.accumulation}: a batch of {prefix}batch_size "
                f"{self.batch_size} examples has at most as many microbatches"
            )
        if self.learns and not (self.steps or self.epochs):
            raise ConfigError(f"config key {prefix}steps is 0: give a number of steps, or {prefix}epochs")
        if self.epochs and self.steps not in (0, DEFAULT_STEPS):
            raise ConfigError(
                f"config keys {prefix}steps and {prefix}epochs are {self.steps} and {self.epochs:g}: both say how long "
                "to train, so set one of them to 0"
            )
        checkpoints = self.evaluations if self.epochs else min(self.evaluations, self.steps)
        if self.average_last > checkpoints:
            raise ConfigError(
                f"config key {prefix}average_last is {self.average_last}: there are only {checkpoints} checkpoints "
                f"({prefix}evaluations) to average"
            )
        check_patterns(f"{prefix}frozen", self.frozen)
        if self.lora.rank and self.reinit_layers:
            raise ConfigError(
                f"config keys {prefix}lora.rank and {prefix}reinit_layers: with LoRA the encoder is frozen, and its "
                "reinitialised layers would stay random: leave one of them out"
            )

    @property
    def learns(self) -> bool:
        """Whether an experiment trains this model."""
        return True

    @property
    def known_steps(self) -> int | None:
        """The number of training steps, or None if it follows from the number of examples."""
        return None if self.epochs else self.steps

    def resolved(self, examples: int, prefix: str = "") -> "ModelConfig":
        """Return these settings with `steps` in place of `epochs`: the fewest batches that hold all passes.

        Args:
          examples: the number of training examples.
          prefix: the dotted prefix of these keys, for errors.

        Raises:
          UserError: too many steps, or too few for `average_last`.
        """
        if not self.epochs:
            return self
        steps = math.ceil(Fraction(repr(self.epochs)) * examples / self.batch_size)
        if steps > MAX_STEPS:
            raise ConfigError(f"config key {prefix}epochs is {self.epochs:g}: that is more than {MAX_STEPS:,} steps")
        settings = dataclasses.replace(self, steps=steps, epochs=0.0)
        settings.check(prefix)
        return settings


def check_patterns(key: str, patterns: Sequence[str]) -> None:
    """Refuse texts that are no regular expressions."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"config key {key}: {pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True)
class TeacherConfig(ModelConfig):
    """The monolingual teacher: an encoder to fine-tune, a classifier that is trained already, or a file of logits.

    Without steps and epochs it is ready-made: its checkpoint is a trained classifier, or the directory of a finished
    run, and teaches as it is.
    """

    # Logits, probabilities, or labels by example id, in place of a checkpoint (`distillation/logits_file.py`)
    logits_file: str = setting("", is_path=True)
    languages: tuple[str, ...] = ()  # the source languages that it reads and knows; () = those of the task
    weight: float = setting(1.0, at_least=0)  # its share in the mean of several teachers

    @property
    def is_file(self) -> bool:
        """Whether a file stands in for the teacher."""
        return bool(self.logits_file)

    @property
    def is_ready_made(self) -> bool:
        """Whether the checkpoint teaches as it is."""
        return self.steps == 0 and self.epochs == 0 and not self.is_file

    @property
    def learns(self) -> bool:
        """Whether this experiment trains the teacher, which takes labels."""
        return not (self.is_ready_made or self.is_file)

    def check(self, prefix: str = "") -> None:
        """Refuse settings that contradict each other."""
        super().check(prefix)
        for key in _OF_TRAINING if not self.learns else ():
            value = lookup(self, key)
            if value:
                raise ConfigError(
                    f"config key {prefix}{key} is {value:g}, but this teacher is not trained here: set it to 0"
                )
        if not self.weight:
            raise ConfigError(f"config key {prefix}weight is 0: leave this teacher out instead")
        if len(set(self.languages)) < len(self.languages):
            raise ConfigError(f"config key {prefix}languages is {self.languages!r}: name each language once")


@dataclass(frozen=True)
class FurtherTeacherConfig(TeacherConfig):
    """A further teacher, of several. A config file gives what differs from `teacher`."""

    # 0 = the draw's teacher_seed; another number stands for a seed of its own, which is drawn from both
    seed: int = setting(0, at_least=0, at_most=MAX_SEED)


@dataclass(frozen=True)
class TransferConfig:
    """The students' losses (`xtransfer.distillation.objectives`), for every objective that does not set its own.

    An objective takes what its loss has a use for: no temperature without teacher logits, and no label smoothing
    without labels.
    """

    temperature: float = setting(1.0, at_least=1e-3)
    temperature_on: str = setting("teacher", choices=("teacher", "both"))
    scale_by_t2: bool = False
    threshold: float = setting(0.0, at_least=0, at_most=1)  # pseudo-labels below this confidence do not count
    confidence_weighted: bool = False  # multiply the loss of a pseudo-label by the teacher's confidence
    # Factors of an example's loss by the class of its label: ("balanced",) for the inverse frequencies in the labelled
    # text, or "NAME=FACTOR" for some classes, and 1 for the others; () = 1 for all
    class_weights: tuple[str, ...] = ()
    label_smoothing: float = setting(0.0, at_least=0)  # probability, below 1, to spread evenly over all classes
    focal_gamma: float = setting(0.0, at_least=0)  # the exponent of focal loss; 0 = plain cross-entropy
    # In a multi-label task, give pseudo-labels by thresholds that are fitted to the teacher on source dev, not by 0.5.
    fitted_thresholds: bool = False
    # What is averaged over several teachers (`distillation/teachers.py`)
    teacher_mean: str = setting("probabilities", choices=("probabilities", "logits"))


def inherited(key: str) -> Any:
    """Return a field with the bounds of a key of `TransferConfig`. Its default, None, takes the value of that key."""
    fields = {item.name: item for item in dataclasses.fields(TransferConfig)}
    return field(default=None, metadata=fields[key].metadata)


@dataclass(frozen=True)
class ObjectiveConfig:
    """The settings of one objective, or an objective of your own (`xtransfer.distillation.objectives`).

    None takes the value from the objective's base or, for the keys of `TransferConfig`, from there.
    """

    # Only for an objective of your own: the one that it starts from, and what it reads
    base: str | None = None
    # "all" = the unlabelled text as well; "target" = unlabelled text in target languages, and nothing else;
    # "parallel" = translations, with the teacher's logits for the originals
    data: str | None = setting(None, choices=("labelled", "all", "target", "parallel"))
    teacher: str | None = None  # whose logits it reads: "none", "monolingual", or the name of another objective
    # Only with data = "target" or "parallel": the languages whose text it learns from, and the only ones that it is
    # scored in. () = all target languages, and scored in the source language too; with "parallel", it also learns from
    # the originals.
    languages: tuple[str, ...] | None = None
    student: str | None = None  # the encoder that it trains, a name of `students`; "" = `student`
    pseudo_labels: bool | None = None  # whether the teacher's prediction stands in for a missing label
    # The two terms of the loss
    hard_weight: float | None = setting(None, at_least=0)
    soft_weight: float | None = setting(None, at_least=0)
    temperature: float | None = inherited("temperature")
    temperature_on: str | None = inherited("temperature_on")
    scale_by_t2: bool | None = inherited("scale_by_t2")
    threshold: float | None = inherited("threshold")
    confidence_weighted: bool | None = inherited("confidence_weighted")
    class_weights: tuple[str, ...] | None = inherited("class_weights")
    label_smoothing: float | None = inherited("label_smoothing")
    focal_gamma: float | None = inherited("focal_gamma")


@dataclass(frozen=True)
class CalibrationConfig:
    """What is fitted to the selected checkpoints on the source dev split (`xtransfer.evaluation.recalibration`)."""

    temperature: bool = False  # what to divide the logits by, for the lowest log loss
    # Where to decide: between two classes for the highest macro-F1, in a multi-label task for the F1 of each class.
    threshold: bool = False


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh: batches are split over data × fsdp, parameters over fsdp × tensor (`runtime/sharding.py`)."""

    data: int = setting(0, at_least=0)  # 0 = all remaining devices
    fsdp: int = setting(1, at_least=1)
    tensor: int = setting(1, at_least=1)


@dataclass(frozen=True)
class ExperimentConfig:
    """One experiment: a teacher, its logits, and a student for every objective and seed."""

    task: TaskConfig = TaskConfig()
    teacher: TeacherConfig = TeacherConfig()
    # Further teachers, by name
    teachers: Mapping[str, FurtherTeacherConfig] = mapping(inherits="teacher", shared=ModelConfig)
    student: ModelConfig = ModelConfig()
    # Further encoders by name, for objectives of your own that train another one (`objective.NAME.student`)
    students: Mapping[str, ModelConfig] = mapping(inherits="student", shared=ModelConfig)
    transfer: TransferConfig = TransferConfig()
    # By name: an objective that differs from `transfer`, one of your own, or "teacher" for the teacher's fine-tuning
    objective: Mapping[str, ObjectiveConfig] = mapping(names=(*_OBJECTIVES, "teacher"))
    objectives: tuple[str, ...] = setting(_OBJECTIVES, distinct=True)
    seeds: tuple[int, ...] = setting((0, 1), at_least=0, at_most=MAX_SEED, distinct=True)
    teacher_seed: int = setting(0, at_least=0, at_most=MAX_SEED)
    # Draws: each has a sample, a teacher that is trained on it, and students. The two tuples are paired, item by item,
    # and () repeats the single value (see `runs/draws.py`).
    teacher_seeds: tuple[int, ...] = setting((), at_least=0, at_most=MAX_SEED)
    # Scores checkpoints on the source dev split; one of `evaluation/metrics.py`. See `adapted` for multi-label tasks.
    selection_metric: str = "accuracy"
    # Score every student's checkpoint on the target languages' dev splits too, and keep the best ones, for the protocol
    # target_dev, which is not zero-shot.
    oracle: bool = False
    calibration: CalibrationConfig = CalibrationConfig()
    metrics: tuple[str, ...] = setting(("accuracy", "macro_f1"), distinct=True)  # what `evaluate` scores, of the same
    evaluation_splits: tuple[str, ...] = setting(("test",), choices=("dev", "test"), distinct=True)
    evaluation_batch_size: int = setting(0, at_least=0)  # rows; 0 = chosen for the devices
    mesh: MeshConfig = MeshConfig()
    platform: str = setting("", choices=("", "cpu", "gpu", "tpu"))  # refuse to run on another platform; "" = any

    @property
    def headline_metric(self) -> str:
        """The metric that other commands report by default."""
        return headline_metric(multi_label=self.task.multi_label)

    def adapted(self) -> "ExperimentConfig":
        """Return the config with the defaults of its kind of task: a multi-label task has no accuracy."""
        defaults = ExperimentConfig()
        if not self.task.multi_label:
            return self
        metrics = _MULTI_LABEL_METRICS if self.metrics == defaults.metrics else self.metrics
        is_default = self.selection_metric == defaults.selection_metric
        selection_metric = self.headline_metric if is_default else self.selection_metric
        return dataclasses.replace(self, metrics=metrics, selection_metric=selection_metric)

    def check(self, prefix: str = "") -> None:
        """Refuse settings that contradict each other."""
        if self.headline_metric not in self.metrics:
            raise ConfigError(
                f"config key {prefix}metrics is {self.metrics!r}: add {self.headline_metric!r}, which other commands "
                "report"
            )
        if self.transfer.fitted_thresholds and not self.task.multi_label:
            raise ConfigError(
                f"config key {prefix}transfer.fitted_thresholds is True, but only a multi-label task has a threshold "
                f"for each class: set {prefix}task.multi_label, or leave this out"
            )
        if self.transfer.fitted_thresholds and (self.teachers or self.teacher.is_file):
            raise ConfigError(
                f"config key {prefix}transfer.fitted_thresholds is True, but thresholds are fitted to a single teacher "
                "that is a model: set it to False"
            )
        samples, teachers = self.task.labelled_seeds, self.teacher_seeds
        if samples and teachers and len(samples) != len(teachers):
            raise ConfigError(
                f"config keys {prefix}task.labelled_seeds and {prefix}teacher_seeds have {len(samples)} and "
                f"{len(teachers)} items: they are paired, so give as many of one as of the other, or leave one empty"
            )
        self._check_teachers(prefix)
        self._check_students(prefix)
        if self.objective.get("teacher", ObjectiveConfig()) != ObjectiveConfig() and not self.trains_teachers:
            raise ConfigError(
                f"config key {prefix}objective.teacher has settings, but no teacher is trained here: leave them out"
            )
        if teachers and not self.trains_teachers:
            raise ConfigError(
                f"config key {prefix}teacher_seeds is {teachers!r}, but the teacher is not trained here, so every draw "
                f"would have the same: leave it empty, or draw samples with {prefix}task.labelled_seeds"
            )
        pairs = list(zip(samples or (self.task.labelled_seed,) * len(teachers), teachers or samples, strict=True))
        if len(set(pairs)) < len(pairs):
            raise ConfigError(
                f"config keys {prefix}task.labelled_seeds {samples!r} and {prefix}teacher_seeds {teachers!r} name a "
                "pair of sample and teacher twice: give each once"
            )
        if samples and not self.task.has_samples and not teachers:
            raise ConfigError(
                f"config key {prefix}task.labelled_seeds is {samples!r}, but with task.labelled 0 every sample holds "
                f"all examples: lower task.labelled, or give {prefix}teacher_seeds"
            )
        if 1 < len(set(samples)) < len(samples):
            raise ConfigError(
                f"config key {prefix}task.labelled_seeds {samples!r} repeats some samples beside others, so the draws "
                "are not independent: give each sample once, or one sample for all teachers"
            )
        if len(set(samples)) > 1 and not self.task.samples_labelled and len(set(teachers)) < len(samples):
            raise ConfigError(
                f"config key {prefix}teacher_seeds is {teachers!r}, but with task.labelled 0 all samples have the same "
                "labelled text, so teachers with the same seed are one teacher: give each draw another seed"
            )

    @property
    def members(self) -> dict[str, TeacherConfig]:
        """The monolingual teachers by config key: "teacher", and "teachers.NAME" for each further one."""
        return {"teacher": self.teacher, **{f"teachers.{name}": teacher for name, teacher in self.teachers.items()}}

    @property
    def encoders(self) -> dict[str, ModelConfig]:
        """The students' encoders by config key: "student", and "students.NAME" for each further one."""
        return {"student": self.student, **{f"students.{name}": encoder for name, encoder in self.students.items()}}

    def encoder_of(self, objective: str) -> str:
        """Return the config key of the encoder that an objective trains."""
        name = self.objective[objective].student if objective in self.objective else ""
        return f"students.{name}" if name else "student"

    @property
    def trains_teachers(self) -> bool:
        """Whether the experiment trains a teacher."""
        return any(member.learns for member in self.members.values())

    def languages_of(self, member: str) -> tuple[str, ...]:
        """Return the source languages that a member reads."""
        return self.members[member].languages or self.task.sources

    @property
    def further_sources(self) -> tuple[str, ...]:
        """The languages of the task's and of the teachers' text apart from `task.source_language`, each once."""
        taught = (language for member in self.members for language in self.languages_of(member))
        languages = dict.fromkeys((*self.task.sources, *taught))
        return tuple(language for language in languages if language != self.task.source_language)

    def _check_students(self, prefix: str) -> None:
        """Refuse encoders that no objective trains, and objectives whose encoder does not exist."""
        _check_folders(f"{prefix}students", "student", self.students)
        used = {settings.student for settings in self.objective.values() if settings.student}
        for name, settings in self.objective.items():
            if settings.student and settings.student not in self.students:
                shown = ", ".join(self.students) or "none"
                raise ConfigError(
                    f"config key {prefix}objective.{name}.student is {settings.student!r}: students has no such entry "
                    f"(its entries: {shown})"
                )
            if settings.languages and name in self.objectives:
                self._check_without_dev(f"{prefix}objective.{name}.languages", name, prefix)
        for name in self.students:
            if name not in used:
                raise ConfigError(
                    f"config key {prefix}students.{name}: no objective trains it: name it in objective.NAME.student, "
                    "or leave it out"
                )

    def _check_without_dev(self, key: str, objective: str, prefix: str) -> None:
        """Refuse what is selected or fitted on source dev, for an objective that does not know the source language."""
        role = self.encoder_of(objective)
        needs = {
            f"{role}.patience": self.encoders[role].patience > 0,
            "calibration.temperature": self.calibration.temperature,
            "calibration.threshold": self.calibration.threshold,
            "transfer.fitted_thresholds": self.transfer.fitted_thresholds,
        }
        for other, is_set in needs.items():
            if is_set:
                raise ConfigError(
                    f"config key {prefix}{other} uses the source language's dev split, and {key} leaves that language "
                    f"out: leave {other} at its default, or give no languages"
                )

    def _check_teachers(self, prefix: str) -> None:
        """Refuse teachers that contradict each other or the task."""
        task, members = self.task, self.members
        _check_folders(f"{prefix}teachers", "teacher", self.teachers)
        source_key = "task.source_languages" if task.source_languages else "task.source_language"
        for language in task.sources:
            if not any(language in self.languages_of(member) for member in members):
                raise ConfigError(
                    f"config key {prefix}teacher.languages is {self.teacher.languages!r}: no teacher reads "
                    f"{source_key} {language!r}: add it to one"
                )
        for member in members if task.source_languages else ():
            others = [language for language in self.languages_of(member) if language not in task.source_languages]
            if others:
                raise ConfigError(
                    f"config key {prefix}{member}.languages has {others[0]!r}, which is none of task.source_languages "
                    f"{', '.join(task.source_languages)}: add it there, or leave it out"
                )
        for member in members:
            taught = [language for language in self.languages_of(member) if language in task.target_languages]
            if taught:
                raise ConfigError(
                    f"config key {prefix}{member}.languages has {taught[0]!r}, which task.target_languages has too: a "
                    "target is zero-shot only if no text in it is used, so leave it out of one of them"
                )
        if self.further_sources and task.unlabelled_from == "file" and not task.language_column:
            count = len(self.further_sources) + 1
            reason = (
                f"there are {count} source languages" if task.source_languages else f"teachers read {count} languages"
            )
            raise ConfigError(
                f"config key {prefix}task.unlabelled_file: {reason}, so name the file's column of the language in "
                "task.language_column"
            )
        if self.teachers:
            kinds = [FurtherTeacherConfig(**{**vars(one), "weight": 1.0}) for one in members.values()]
            names = list(members)
            for number, kind in enumerate(kinds):
                if kind in kinds[:number]:
                    raise ConfigError(
                        f"config keys {prefix}{names[kinds.index(kind)]} and {prefix}{names[number]} are the same "
                        "teacher: leave one out, or give it another seed"
                    )
            return
        if self.teacher.weight != 1:
            raise ConfigError(
                f"config key {prefix}teacher.weight is {self.teacher.weight:g}, but there is only one teacher: leave "
                "it at 1, or add others to teachers"
            )
        if self.transfer.teacher_mean != "probabilities":
            raise ConfigError(
                f"config key {prefix}transfer.teacher_mean is {self.transfer.teacher_mean!r}, but there is only one "
                "teacher: leave it at 'probabilities', or add others to teachers"
            )


def _check_folders(key: str, kind: str, names: Iterable[str]) -> None:
    """Refuse names of teachers or students that cannot be the name of a folder everywhere."""
    for name in names:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", name):
            raise ConfigError(
                f"config key {key}: a {kind}'s name becomes the name of a folder, so {name!r} must consist of small "
                "letters, digits, '-', and '_', and start with a letter"
            )


@dataclass(frozen=True)
class PretrainConfig:
    """Masked language modelling (and translation pairs) on the task's own text."""

    task: TaskConfig = TaskConfig()
    languages: tuple[str, ...] = setting(("en",), distinct=True)
    # "" = from scratch; otherwise a checkpoint to continue from, whose tokenizer and architecture replace those below
    start_from: str = setting("", is_path=True)
    vocab_size: int = setting(6000, at_least=100)
    hidden_size: int = setting(128, at_least=1)
    num_layers: int = setting(3, at_least=1)
    num_heads: int = setting(4, at_least=1)
    intermediate_size: int = setting(512, at_least=1)
    max_positions: int = setting(128, at_least=8)
    dropout: float = setting(0.1, at_least=0, at_most=0.9)  # written into the checkpoint, for fine-tuning
    pretraining_dropout: float = setting(0.0, at_least=0, at_most=0.9)
    row_length: int = setting(64, at_least=8)  # tokens per row
    rows: int = setting(32, at_least=1)  # rows per batch
    masks: int = setting(10, at_least=1)  # masked tokens per row
    pair_fraction: float = setting(0.5, at_least=0, at_most=1)  # share of draws that are translation pairs
    # shares of texts and of translation pairs whose halves become two examples that must find each other
    split_texts: float = setting(0.0, at_least=0, at_most=1)
    split_pairs: float = setting(0.0, at_least=0, at_most=1)
    partner_weight: float = setting(1.0, at_least=0)  # weight of finding the other half; masked tokens have 1
    learning_rate: float = setting(1e-3, at_least=0)
    warmup_fraction: float = setting(0.05, at_least=0, at_most=1)
    schedule: str = setting("cosine", choices=SCHEDULES)
    weight_decay: float = setting(0.01, at_least=0)
    adam_b1: float = setting(0.9, at_least=0, at_most=_LARGEST_DECAY)
    adam_b2: float = setting(0.98, at_least=0, at_most=_LARGEST_DECAY)
    adam_eps: float = setting(1e-8, at_least=_SMALLEST_EPS)
    clip_norm: float = setting(1.0, at_least=0)
    steps: int = setting(9000, at_least=1, at_most=MAX_STEPS)
    seed: int = setting(0, at_least=0, at_most=MAX_SEED)

    def check(self, prefix: str = "") -> None:
        """Refuse settings that contradict each other."""
        if self.hidden_size % self.num_heads:
            raise ConfigError(
                f"config key num_heads is {self.num_heads}: it must divide hidden_size {self.hidden_size}"
            )
        if self.rows == 1 and (self.split_texts or self.split_pairs):
            raise ConfigError("config key rows is 1: split texts and pairs need at least 2, one for each half")
        if self.masks > self.row_length:
            raise ConfigError(f"config key masks is {self.masks}: a row has only {self.row_length} tokens (row_length)")
        if self.row_length > self.max_positions and not self.start_from:
            raise ConfigError(f"config key row_length is {self.row_length}: max_positions is only {self.max_positions}")


@dataclass(frozen=True)
class BenchmarkConfig:
    """The settings of an experiment that `benchmark` measures, under the same keys."""

    student: ModelConfig = ModelConfig(checkpoint="mini-bert-multilingual")
    evaluation_batch_size: int = setting(0, at_least=0)  # rows; 0 = chosen for the devices
    mesh: MeshConfig = MeshConfig()
    platform: str = setting("", choices=("", "cpu", "gpu", "tpu"))  # refuse to run on another platform; "" = any


# Settings that may differ between two starts in one workdir: the stages and draws, the locations of the data and the
# checkpoints (whose fingerprints may not), what is scored and calibrated, the rows to predict at a time, the devices,
# and the number of microbatches.
CHANGEABLE = (
    "objectives",
    "seeds",
    "teacher_seeds",
    "task.labelled_seeds",
    "task.cache_dir",
    "task.data_dir",
    "metrics",
    "calibration.temperature",
    "calibration.threshold",
    "evaluation_batch_size",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "platform",
    "teacher.checkpoint",
    "teacher.logits_file",
    "student.checkpoint",
    "teacher.accumulation",
    "teacher.remat",
    "student.accumulation",
    "student.remat",
)


def default(schema: type = ExperimentConfig) -> ConfigDict:
    """Return the defaults of `schema` as a locked `ConfigDict`, for a config file to start from.

    Only mappings take new names. They have blank entries for the usual ones.
    """
    config = ConfigDict(dataclasses.asdict(schema())).lock()
    for key, entry_schema in mappings(schema).items():
        config[key].unlock()
        for name in _metadata(schema, key)["names"]:
            config[key][name] = _blank_entry(entry_schema, ConfigDict()).lock()
    return config


def load(source: str, overrides: Sequence[str] = (), schema: type = ExperimentConfig) -> Any:
    """Read `FILE[:arg]` and `--config.key=value` overrides into a checked instance of `schema`.

    If a key is given twice, the last value counts.
    """
    path, arg = split_source(source)
    last_by_key = _last_by_key(overrides, schema)
    return _overridden(_run(source, path, arg), last_by_key, schema)


def override_defaults(overrides: Sequence[str], schema: type) -> Any:
    """Return a checked instance of `schema`: its defaults with `--config.key=value` overrides; see `load`."""
    return _overridden(default(schema), _last_by_key(overrides, schema), schema)


def _last_by_key(overrides: Sequence[str], schema: type) -> dict[str, str]:
    """Return the last override of each key; a UserError names a flag or a key that does not exist."""
    last_by_key: dict[str, str] = {}
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            raise ConfigError(f"unknown flag {override}: overrides are written --config.KEY=VALUE")
        key = override[len("--config.") :].partition("=")[0]
        _check_key(schema, key)
        last_by_key[key] = override  # config_flags would concatenate tuples
    _refuse_two_lengths(last_by_key)
    return last_by_key


def _overridden(config: ConfigDict, last_by_key: Mapping[str, str], schema: type) -> Any:
    values = flags.FlagValues()
    argv = ["", *last_by_key.values()]
    config = _with_entries(config, schema, last_by_key)
    holder = config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except flags.Error as error:
        raise ConfigError(f"{error}") from error
    return parse(holder.value, schema)


def _refuse_two_lengths(flag_by_key: Mapping[str, str]) -> None:
    """Refuse flags that give both steps and epochs, of which `ModelConfig.check` cannot see default values."""
    for key, flag in flag_by_key.items():
        other = flag_by_key.get(f"{key.removesuffix('epochs')}steps") if key.endswith(".epochs") else None
        if other is not None and not {"0", "0.0"} & {text.partition("=")[2] for text in (flag, other)}:
            raise ConfigError(f"{flag} and {other}: both say how long to train, so leave one of them out")


def _run(source: str, path: str, arg: str) -> ConfigDict:
    """Return the result of a config file's `get_config`."""
    try:
        functions = runpy.run_path(path)
        config = functions["get_config"](*[arg] if arg else []) if "get_config" in functions else None
    except (Exception, SystemExit) as error:  # the file is the user's program, so any exception is about the file
        raise ConfigError(f"{source}: {type(error).__name__}: {one_line(error)}") from error
    if "get_config" not in functions:
        raise ConfigError(f"{path} has no function get_config; pass a config such as configs/quickstart.py")
    if not isinstance(config, ConfigDict):
        raise ConfigError(f"{source}: get_config returned {config!r}, not a ConfigDict")
    return config


def _with_entries(config: ConfigDict, schema: type, keys: Iterable[str]) -> ConfigDict:
    """Return the config with an entry in its mappings for each name in `keys`, and with every key in each such entry.

    Flags can only set keys that exist, and read values by the types of these.

    Raises:
      UserError: a flag names an entry that only the config file could give.
    """
    for key, entry_schema in mappings(schema).items():
        flag_by_name = {path.split(".")[1]: path for path in keys if path.startswith(f"{key}.")}
        if not flag_by_name:
            continue
        names = list(flag_by_name)
        base = _metadata(schema, key)["inherits"]
        if base:
            given = config[key] if key in config and isinstance(config[key], ConfigDict) else ()
            for name in names:
                if name not in given:
                    shown = ", ".join(given) or "none"
                    raise ConfigError(
                        f"config key {flag_by_name[name]}: the config file has no such {base} (its {key}: {shown})"
                    )
        with config.unlocked():
            if key not in config:
                config[key] = ConfigDict()
            if isinstance(config[key], ConfigDict):  # otherwise `parse` refuses it
                with config[key].unlocked():
                    for name in names:
                        config[key][name] = _blank_entry(entry_schema, config[key].get(name, ConfigDict()))
    return config


def _blank_entry(schema: type, values: Any) -> Any:
    """Return an entry of a mapping with a typed blank for each key without a value."""
    if not isinstance(values, ConfigDict):
        return values  # `parse` refuses it
    entry: dict[str, Any] = dict(values.items())
    for key, kind in _type_hints(schema).items():
        kind = _without_none(kind)
        if dataclasses.is_dataclass(kind):
            entry[key] = _blank_entry(typing.cast(type, kind), values.get(key, ConfigDict()))
        elif key not in values or values[key] is None:
            entry[key] = config_dict.placeholder(typing.get_origin(kind) or kind)
        elif kind is float and type(values[key]) is int:
            entry[key] = float(values[key])
    return ConfigDict(entry)


def split_source(source: str) -> tuple[str, str]:
    """Return the path and the argument of `FILE[:arg]`; a UserError if there is no such file.

    Folders may have colons in their names: the longest path that is a file counts.
    """
    parts = source.split(":")
    for count in range(len(parts), 0, -1):
        path = ":".join(parts[:count])
        if Path(path).is_file():
            return path, ":".join(parts[count:])
    raise ConfigError(f"{source}: no such config file; --config takes FILE or FILE:arg")


def parse(config: ConfigDict | dict[str, Any], schema: type = ExperimentConfig, prefix: str = "") -> Any:
    """Check every key, type, and bound of `config` against `schema`; a UserError names the key."""
    values = config.to_dict() if isinstance(config, ConfigDict) else dict(config)
    values = _with_inherited(values, schema)
    hints = _type_hints(schema)
    fields = {item.name: item for item in dataclasses.fields(schema)}
    checked = {}
    for key, value in values.items():
        _check_key(schema, key, prefix)
        entry_schema = _entry_schema(hints[key])
        if entry_schema or dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(f"config key {prefix}{key} has keys below it, so it cannot be {value!r}")
            if entry_schema:
                inherits = bool(_metadata(schema, key)["inherits"])
                checked[key] = _parse_entries(value, entry_schema, f"{prefix}{key}.", keep_blank=inherits)
            else:
                checked[key] = parse(value, typing.cast(type, hints[key]), f"{prefix}{key}.")
        else:
            checked[key] = _checked_value(prefix + key, value, hints[key], fields[key].metadata)
    instance = schema(**checked)
    if hasattr(instance, "adapted"):
        instance = instance.adapted()
    if hasattr(instance, "check"):
        instance.check(prefix)
    return instance


def _parse_entries(values: Mapping[str, Any], schema: type, prefix: str, *, keep_blank: bool) -> dict[str, Any]:
    """Return the checked entries of a mapping in the order of their names, without those that set nothing."""
    entries = {}
    for name in sorted(values, key=str):
        _check_entry_name(name, prefix)
        if not isinstance(values[name], dict):
            raise ConfigError(f"config key {prefix}{name} has keys below it, so it cannot be {values[name]!r}")
        entry = parse(values[name], schema, f"{prefix}{name}.")
        if keep_blank or entry != schema():
            entries[name] = entry
    return entries


def _with_inherited(values: dict[str, Any], schema: type) -> dict[str, Any]:
    """Return the values of a schema in which the entries of mappings have what they inherit; see `mapping`.

    Values of other kinds than the schema's stay as they are, for `parse` to refuse.
    """
    for key in mappings(schema).keys() & values.keys():
        metadata = _metadata(schema, key)
        base = values.get(metadata["inherits"], {})
        if metadata["inherits"] and isinstance(values[key], dict) and isinstance(base, dict):
            shared = {name: base[name] for name in metadata["keys"] if name in base}
            values = {**values, key: {name: _inheriting(entry, shared) for name, entry in values[key].items()}}
    return values


def _inheriting(entry: Any, shared: Mapping[str, Any]) -> Any:
    """Return the values of an entry with shared ones in place of those that it does not set.

    The length of training is one setting with two keys. What only training uses is not taken by a teacher that has
    none, so that its entry need not set it to 0.
    """
    if not isinstance(entry, dict):
        return entry
    entry = _without_blanks(entry)
    left_out = set(_LENGTH) if any(key in entry for key in _LENGTH) else set()
    result = {**{key: value for key, value in shared.items() if key not in left_out}, **entry}
    if result.get("logits_file") or not (result.get("steps", DEFAULT_STEPS) or result.get("epochs")):
        unused = {key.partition(".")[0] for key in _OF_TRAINING} - entry.keys()
        return {key: value for key, value in result.items() if key not in unused}
    nested = {key for key in entry if isinstance(entry[key], dict) and isinstance(shared.get(key), dict)}
    return {**result, **{key: {**shared[key], **entry[key]} for key in nested}}


def _without_blanks(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values without those that are None, and without groups of nothing else."""
    values = {key: _without_blanks(value) if isinstance(value, dict) else value for key, value in entry.items()}
    return {key: value for key, value in values.items() if value is not None and value != {}}


@functools.cache  # reading a config asks for them hundreds of times, and a report reads dozens of configs
def _type_hints(schema: type) -> Mapping[str, Any]:
    """Return the types of a schema's fields, by key."""
    return types.MappingProxyType(typing.get_type_hints(schema))


def _metadata(schema: type, key: str) -> Mapping[str, Any]:
    """Return the metadata of a schema's field."""
    return next(item.metadata for item in dataclasses.fields(schema) if item.name == key)


def _check_entry_name(name: Any, prefix: str) -> None:
    if not isinstance(name, str) or not _ENTRY_NAME.fullmatch(name):
        raise ConfigError(f"config key {prefix}{name}: {name!r} cannot be a name here; use letters, digits, _, and -")


def mappings(schema: type) -> dict[str, type]:
    """Return the schemas of the entries of a schema's mappings, by key."""
    schemas = {key: _entry_schema(kind) for key, kind in _type_hints(schema).items()}
    return {key: entry for key, entry in schemas.items() if entry is not None}


def _entry_schema(kind: Any) -> type | None:
    """Return the schema of a mapping's entries, or None if the field is no mapping."""
    return typing.get_args(kind)[1] if typing.get_origin(kind) is Mapping else None


def _without_none(kind: Any) -> Any:
    """Return `float` for `float | None`, and any other type as it is."""
    return typing.get_args(kind)[0] if isinstance(kind, types.UnionType) else kind


def _check_key(schema: Any, key: str, prefix: str = "") -> None:
    """Follow a dotted key through nested schemas; the error for an unknown key names the nearest one."""
    name, _, rest = key.partition(".")
    entry_schema = _entry_schema(schema)
    if entry_schema:
        _check_entry_name(name, prefix)
        if not rest:
            raise ConfigError(f"config key {prefix}{name} has keys below it: set one of them")
        _check_key(entry_schema, rest, f"{prefix}{name}.")
        return
    hints = _type_hints(typing.cast(type, schema)) if dataclasses.is_dataclass(schema) else {}
    if name not in hints:
        hint = nearest(name, hints) or f"; the keys are {', '.join(hints) or 'none below it'}"
        raise ConfigError(f"unknown config key {prefix}{name}{hint}")
    if rest:
        _check_key(hints[name], rest, f"{prefix}{name}.")


def _checked_value(key: str, value: Any, kind: Any, bounds: types.MappingProxyType) -> Any:
    if isinstance(kind, types.UnionType):
        if value is None:
            return None
        kind = _without_none(kind)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"config key {key} takes a tuple, not {value!r}")
        item_kind = typing.get_args(kind)[0]
        items = tuple(_checked_value(f"{key}[{i}]", item, item_kind, bounds) for i, item in enumerate(value))
        if bounds.get("distinct") and (not items or len(set(items)) < len(items)):
            raise ConfigError(f"config key {key} is {items!r}: expected at least one, and each only once")
        return items
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"config key {key} takes {kind.__name__}, not {value!r}")
    if kind is str:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:  # half surrogates, which stand for the other bytes
            raise ConfigError(
                f"config key {key} is {value!r}, which is not UTF-8: rename that file or folder"
            ) from None
    if bounds.get("is_path"):
        try:
            refuse_url(value)
        except UserError as error:
            raise ConfigError(f"config key {key}: {error}") from None
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"config key {key} is {value!r}: it must be a finite number")
    if bounds.get("choices") and value not in bounds["choices"]:
        raise ConfigError(f"config key {key} is {value!r}: choose one of {', '.join(bounds['choices'])}")
    low, high = bounds.get("at_least"), bounds.get("at_most")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        raise ConfigError(
            f"config key {key} is {value!r}: it must be between {low} and {'infinity' if high is None else high}"
        )
    return value


def lookup(config: Any, key: str) -> Any:
    """Return the value of a dotted key in a config."""
    for name in key.split("."):
        config = config[name] if isinstance(config, Mapping) else getattr(config, name)
    return config


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return lines `key: old → new` for every setting that differs, except those in `CHANGEABLE`.

    The definition of another objective of your own, or of another encoder for students, is no difference, because
    nothing was trained with it.
    """
    lines: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if prefix == "students." and key not in old:
            continue
        is_entry = prefix in ("students.", "teachers.") and isinstance(after or before, Mapping)
        if is_entry and (before is None or after is None):
            lines.append(f"{prefix}{key}: {'added' if before is None else 'left out'}")
            continue
        if isinstance(after, Mapping) and key not in old:  # recorded before this group of settings existed
            if prefix == "objective." and after["base"] is not None:
                continue
            before = {}
        if isinstance(before, Mapping) and key not in new:
            after = {}
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{prefix}{key}.")
        elif before != after and not is_changeable(prefix + key):
            lines.append(f"{prefix}{key}: {before!r} → {after!r}")
    return lines


def is_changeable(key: str) -> bool:
    """Return whether a setting may differ between two starts in one workdir: those of all teachers are like one's."""
    return re.sub(r"^(teacher|student)s\.[^.]+\.", r"\1.", key) in CHANGEABLE


def cache_dir(task: TaskConfig) -> Path:
    """Return the directory of prepared datasets.

    Raises:
      UserError: the default is below the home directory, and there is none; or see `refuse_pattern`.
    """
    if task.cache_dir:
        return refuse_pattern(user_path(task.cache_dir), "task.cache_dir")
    try:
        return refuse_pattern(Path.home() / ".cache" / "xtransfer", "task.cache_dir")
    except RuntimeError:  # as in a container whose user has no entry in /etc/passwd
        raise MachineError("no home directory for downloads: set HOME or --config.task.cache_dir=DIR") from None


def refuse_pattern(path: Path, key: str) -> Path:
    """Return a path below which Orbax or TFDS works, or refuse one that they would read as a pattern of names.

    They look for their own files with patterns that start with the whole path, and would find none.

    Args:
      path: absolute, or below the current directory.
      key: the flag or config key that names it.

    Raises:
      UserError: there is a pattern's character in the path.
    """
    characters = [character for character in "[*?" if character in str(path.absolute())]
    if characters:
        raise ConfigError(
            f"{path.absolute()}: files below a path with {' and '.join(characters)} in it would not be found again: "
            f"choose another {key}, or a link to it"
        )
    return path


def user_path(text: str) -> Path:
    """Expand `~` in a path that a user wrote; `~name` of an unknown user stays as it is.

    Raises:
      UserError: the address of object storage, see `refuse_url`.
    """
    refuse_url(text)
    return Path(os.path.expanduser(text))
