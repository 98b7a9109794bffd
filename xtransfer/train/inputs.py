"""A model of an experiment without its weights: its tokenization, and the layout of its batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import BatchPlan, Dataset, make_plan
from xtransfer.data.example import Example
from xtransfer.data.examples import gold, ids_of, places, sides
from xtransfer.data.tokens.cache import TokenCache
from xtransfer.data.tokens.samples import AnyTokens, sample
from xtransfer.data.tokens.tokenizer import Tokens, load_tokenizer, tokenize
from xtransfer.errors import ConfigError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_pairs, check_tokenizer
from xtransfer.runtime import terminal

_MANY_STEPS = 500  # from here on, compiling for more batch sizes pays off, since they need less padding
_SAMPLE = 64  # examples whose lengths stand for all of them in an estimate
_MANY_EXAMPLES = 20_000  # tokenizing this many takes long enough for a progress bar


@dataclass(frozen=True)
class SavedEncoder:
    """The config and tokenizer of a base checkpoint.

    Attributes:
      directory: a Hugging Face directory, perhaps without weights.
      fingerprint: the fingerprint of all of the checkpoint's files.
    """

    directory: Path
    fingerprint: str


class ModelInputs:
    """A checkpoint's config and tokenizer with the settings of one role; no weights are read.

    Args:
      role: "teacher" or "student".
      settings: the role's settings.
      shards: the number of devices that share the rows of a batch.
      token_cache: the directory of the token cache; None keeps nothing.
      directory: where the config and the tokenizer are; None means the checkpoint's own directory.

    Raises:
      UserError: a checkpoint, config, tokenizer, or length that cannot work.
    """

    def __init__(
        self, role: str, settings: ModelConfig, *, shards: int, token_cache: Path | None, directory: Path | None = None
    ):
        self.role, self.settings, self._shards = role, settings, shards
        self.directory = directory or checkpoint_of(role, settings)
        self.architecture = hf_config.read_config(self.directory)
        self.tokenizer = load_tokenizer(self.directory)
        check_tokenizer(self.directory, self.tokenizer, settings.pooling)
        check_length(role, settings, self.architecture)
        self.cache = TokenCache(token_cache, self.tokenizer, settings.max_length)

    def training_plan(self, examples: int) -> BatchPlan:
        """Return the layout of training batches from a number of examples. All microbatches have equally many rows."""
        plan = self._plan(self.settings.batch_size, microbatches=self.settings.accumulation or 1)
        return plan if self.settings.resolved(examples).steps >= _MANY_STEPS else replace(plan, fitted_sizes=1)

    def evaluation_plan(self, rows: int) -> BatchPlan:
        """Return the layout of batches of `rows` rows that hold each example once."""
        return self._plan(rows)

    def tokens(self, examples: Sequence[Example], drawn_from: Sequence[Sequence[Example]] = ()) -> AnyTokens:
        """Return the tokens of examples, from the tokenizer or the cache.

        Args:
          examples: a whole split, or a sample of `drawn_from`.
          drawn_from: whole splits. They are tokenized and cached as a whole, so that another sample finds its
            tokens there. None are copied.
        """
        if not drawn_from:
            return self._tokenize(examples)
        numbers, rows = places(examples, drawn_from)
        used = np.unique(numbers).tolist()
        return sample([self._tokenize(drawn_from[number]) for number in used], np.searchsorted(used, numbers), rows)

    def mean_tokens(self, examples: Sequence[Example]) -> float:
        """Return the mean number of tokens per example, of the first few examples."""
        texts, pairs = sides(examples[:_SAMPLE])
        return float(tokenize(self.tokenizer, texts, pairs, self.cache.max_length).lengths.mean())

    def dataset(
        self,
        examples: Sequence[Example],
        num_classes: int,
        drawn_from: Sequence[Sequence[Example]] = (),
        *,
        multi_label: bool = False,
    ) -> Dataset:
        """Return a dataset of the examples, tokenized by `tokens` and without teacher logits."""
        labels = gold(examples, num_classes, multi_label=multi_label)
        return Dataset(self.tokens(examples, drawn_from), labels, None, ids_of(examples), num_classes)

    def _tokenize(self, examples: Sequence[Example]) -> Tokens:
        texts, pairs = sides(examples)
        if pairs is not None:
            check_pairs(self.directory, self.tokenizer)
        if len(examples) < _MANY_EXAMPLES:
            return self.cache.tokens(texts, pairs)
        with terminal.progress_bar(f"tokenizing for the {self.role}", len(examples), unit="examples") as progress:
            return self.cache.tokens(texts, pairs, on_batch=progress.advance)

    def _plan(self, batch_size: int, microbatches: int = 1) -> BatchPlan:
        return plan_of(self.settings, self.architecture, batch_size, self._shards * microbatches)


def checkpoint_of(role: str, settings: ModelConfig, *, only_config: bool = False) -> Path:
    """Return the directory of a role's checkpoint; with `only_config`, only its config.json needs to exist."""
    if not settings.checkpoint:
        raise ConfigError(f"config key {role}.checkpoint is empty: name a checkpoint, a directory, or a hub id")
    return hf_checkpoint.resolve(settings.checkpoint, only_config=only_config)


def check_length(role: str, settings: ModelConfig, architecture: EncoderConfig) -> None:
    """Refuse a maximum length beyond the encoder's positions."""
    positions = architecture.max_positions - architecture.position_offset
    if settings.max_length > positions:
        raise ConfigError(
            f"{role}.max_length is {settings.max_length}, but {settings.checkpoint} has {positions} positions"
        )


def plan_of(settings: ModelConfig, architecture: EncoderConfig, batch_size: int, multiple_of: int) -> BatchPlan:
    """Return the layout of a model's batches, which does not depend on its tokenizer; see `BatchPlan` for the sizes."""
    return make_plan(
        batch_size,
        settings.row_length or settings.max_length,
        pad_id=architecture.pad_id,
        position_offset=architecture.position_offset,
        multiple_of=multiple_of,
        packed=settings.packed,
    )
