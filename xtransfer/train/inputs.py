"""A model of an experiment without its weights: how it reads text, and how its batches are laid out."""

import itertools
import operator
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import BatchPlan, Dataset, make_plan
from xtransfer.data.task import Example
from xtransfer.data.tokens.cache import TokenCache
from xtransfer.data.tokens.tokenizer import Tokens, concatenate, load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_pairs, check_tokenizer
from xtransfer.runtime import terminal

_MANY_STEPS = 500  # from here on it pays to compile for more sizes of batches, which have less padding
_MANY = 20_000  # examples whose tokenising takes long enough to be shown


class ModelInputs:
    """A checkpoint's config and tokenizer with the settings of one role ("teacher" or "student").

    What cannot work (a checkpoint, its config or tokenizer, a length) is a `UserError` here; no weights are read.

    Args:
      role: what the settings belong to.
      settings: of the model.
      shards: that the rows of a batch are divided among.
      token_cache: where tokens are kept; None keeps nothing.
    """

    def __init__(self, role: str, settings: ModelConfig, *, shards: int, token_cache: Path | None):
        self.role, self.settings, self._shards = role, settings, shards
        self.directory = checkpoint_of(role, settings)
        self.architecture = hf_config.read_config(self.directory)
        self.tokenizer = load_tokenizer(self.directory)
        check_tokenizer(self.directory, self.tokenizer)
        check_length(role, settings, self.architecture)
        self.cache = TokenCache(token_cache, self.tokenizer, settings.max_length)

    @property
    def training_plan(self) -> BatchPlan:
        """How the batches of a training are laid out; every part of an accumulated gradient has as many rows."""
        plan = self._plan(self.settings.batch_size, parts=self.settings.accumulation or 1)
        return plan if self.settings.steps >= _MANY_STEPS else replace(plan, fitted_sizes=1)

    def evaluation_plan(self, rows: int) -> BatchPlan:
        """How batches of `rows` rows are laid out whose examples are each read once."""
        return self._plan(rows)

    def tokens(self, examples: Sequence[Example], drawn_from: Sequence[Sequence[Example]] = ()) -> Tokens:
        """The tokens of examples, tokenised or from the cache.

        Args:
          examples: a whole split, or what is drawn from `drawn_from`.
          drawn_from: whole splits. It is they that are tokenised and kept, so that another draw finds its tokens; those
            of the examples, told by their ids, are copied into memory.
        """
        if not drawn_from:
            return self._whole(examples)
        place = {each.id: (number, i) for number, split in enumerate(drawn_from) for i, each in enumerate(split)}
        places = [place[example.id] for example in examples]
        splits = {number: self._whole(drawn_from[number]) for number in sorted({number for number, _ in places})}
        runs = itertools.groupby(places, operator.itemgetter(0))
        return concatenate([splits[number].take(np.array([i for _, i in run], np.int64)) for number, run in runs])

    def dataset(
        self, examples: Sequence[Example], num_classes: int, drawn_from: Sequence[Sequence[Example]] = ()
    ) -> Dataset:
        """The examples with their tokens, which are as of `tokens`; without a teacher's logits."""
        labels = np.array([example.label for example in examples], np.int32)
        ids = tuple(example.id for example in examples)
        return Dataset(self.tokens(examples, drawn_from), labels, None, ids, num_classes)

    def _whole(self, examples: Sequence[Example]) -> Tokens:
        texts, pairs = sides(examples)
        if pairs is not None:
            check_pairs(self.directory, self.tokenizer)
        title, many = f"tokens for the {self.role}", len(examples) >= _MANY
        with terminal.progress_bar(title, len(examples), unit="examples") if many else nullcontext() as ticker:
            return self.cache.tokens(texts, pairs, on_batch=ticker.advance if ticker else None)

    def _plan(self, batch_size: int, parts: int = 1) -> BatchPlan:
        return plan_of(self.settings, self.architecture, batch_size, self._shards * parts)


def checkpoint_of(role: str, settings: ModelConfig, *, only_config: bool = False) -> Path:
    """The directory of a role's checkpoint; with `only_config` nothing but its config.json need be there."""
    if not settings.checkpoint:
        raise UserError(f"config key {role}.checkpoint is empty: name a checkpoint, a directory or a hub id")
    return hf_checkpoint.resolve(settings.checkpoint, only_config=only_config)


def check_length(role: str, settings: ModelConfig, architecture: EncoderConfig) -> None:
    """Refuses examples with more tokens than the encoder has positions."""
    positions = architecture.max_positions - architecture.position_offset
    if settings.max_length > positions:
        raise UserError(
            f"{role}.max_length is {settings.max_length}, but {settings.checkpoint} has {positions} positions"
        )


def plan_of(settings: ModelConfig, architecture: EncoderConfig, batch_size: int, multiple_of: int) -> BatchPlan:
    """How a model's batches are laid out, which its tokenizer has no say in; sizes as in `BatchPlan`."""
    return make_plan(
        batch_size,
        settings.row_length or settings.max_length,
        pad_id=architecture.pad_id,
        position_offset=architecture.position_offset,
        multiple_of=multiple_of,
        packed=settings.packed,
    )


def sides(examples: Sequence[Example]) -> tuple[list[str], list[str] | None]:
    """Texts and second texts, as they are given to the tokenizer."""
    pairs = [example.text_pair or "" for example in examples] if any(x.text_pair for x in examples) else None
    return [example.text for example in examples], pairs
