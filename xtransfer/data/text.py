"""Text to token ids: loading a tokenizer, clipping and tokenising in bulk."""

import hashlib
import itertools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from xtransfer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_log = logging.getLogger(__name__)

_CHUNK = 1000  # texts per call of the tokenizer: bounds its memory
_CHARACTERS_PER_TOKEN = 20  # far above any language's mean, yet a 20 MB line costs nothing
_VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model", "*.tiktoken")


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids of n examples, end to end.

    Attributes:
      input_ids: [total] int32, special tokens included.
      token_type_ids: [total] int32.
      offsets: [n + 1] int64; example i is input_ids[offsets[i]:offsets[i + 1]].
      clipped: examples of which characters were cut off before the tokenizer saw them.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    clipped: int = 0

    def __len__(self) -> int:
        """Number of examples."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each example."""
        return np.diff(self.offsets)

    def item(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(input_ids, token_type_ids) of example i, each [length] int32."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.input_ids[span], self.token_type_ids[span]


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerFast":
    """The fast tokenizer of a checkpoint directory; runs no code from it and downloads nothing.

    Raises:
      UserError: there are no tokenizer files, they are broken, or the tokenizer has no fast form.
    """
    directory = Path(directory)
    if not any(any(directory.glob(pattern)) for pattern in _VOCABULARY_FILES):
        raise UserError(f"{directory}: no tokenizer files (tokenizer.json or a vocabulary) in this directory")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=False, local_files_only=True, use_fast=True
        )
    except BaseException as error:  # a bad regex in tokenizer.json is a PanicException, which is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise UserError(f"{directory}: the tokenizer cannot be loaded: {_one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(f"{directory}: {type(tokenizer).__name__} is not a fast tokenizer; add its tokenizer.json")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # a missing vocabulary file is not an error to transformers
        raise UserError(f"{directory}: the tokenizer has no words beside its special tokens; add its tokenizer.json")
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """sha256 of all that decides a tokenizer's ids; the same before and after `tokenize`, for any max_length."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    state["sides"] = [tokenizer.truncation_side, tokenizer.split_special_tokens]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenize(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Tokens:
    """Tokenises texts, or pairs of texts, with special tokens, truncated to max_length and without padding.

    A text longer than 20 characters per token of max_length is clipped first and counted: a tokenizer reads all of a
    text before it truncates. Of a pair the longer side is truncated first.

    Args:
      tokenizer: from `load_tokenizer`.
      texts: n texts.
      pairs: n second texts, or None.
      max_length: tokens of an example at most, special tokens included.

    Raises:
      UserError: max_length leaves no room for text, or the tokenizer fails on an example (named by its index).
      ValueError: texts and pairs differ in number.
    """
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(pairs)} second texts")
    special = tokenizer.num_special_tokens_to_add(pair=pairs is not None)
    if max_length <= special:
        raise UserError(f"max_length {max_length} leaves no room for text beside {special} special tokens; raise it")
    limit = max_length * _CHARACTERS_PER_TOKEN
    sides = [texts] if pairs is None else [texts, pairs]
    clipped = sum(any(len(side[i]) > limit for side in sides) for i in range(len(texts)))
    input_ids, type_ids, lengths = [], [], [np.zeros(1, np.int64)]
    for start in range(0, len(texts), _CHUNK):
        chunk = [[text[:limit] for text in side[start : start + _CHUNK]] for side in sides]
        ids, types = _encode(tokenizer, chunk, max_length, start)
        lengths.append(np.asarray([len(example) for example in ids], np.int64))
        input_ids.append(np.fromiter(itertools.chain.from_iterable(ids), np.int32))
        type_ids.append(np.fromiter(itertools.chain.from_iterable(types), np.int32))
    if clipped:
        _log.warning(
            "%d of %d examples had texts of over %d characters, which were clipped", clipped, len(texts), limit
        )
    empty = np.zeros(0, np.int32)
    return Tokens(
        input_ids=np.concatenate([empty, *input_ids]),
        token_type_ids=np.concatenate([empty, *type_ids]),
        offsets=np.cumsum(np.concatenate(lengths)),
        clipped=clipped,
    )


def _encode(
    tokenizer: "PreTrainedTokenizerFast", sides: list[list[str]], max_length: int, start: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and type ids of a chunk of texts (and second texts); looks for the guilty example when the chunk fails."""
    try:
        encoded = tokenizer(
            *sides,
            truncation="longest_first",
            max_length=max_length,
            return_token_type_ids=True,
            return_attention_mask=False,
        )
        ids, types = encoded["input_ids"], encoded["token_type_ids"]
        if not all(ids):
            raise ValueError("no tokens come of it")
        return ids, types
    except BaseException as error:  # PanicException of the tokenizer is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if len(sides[0]) == 1:
            text = " + ".join(repr(side[0][:40]) for side in sides)
            raise UserError(f"example {start}: the tokenizer fails on {text}: {_one_line(error)}") from error
    parts = [
        _encode(tokenizer, [[text] for text in example], max_length, start + i)
        for i, example in enumerate(zip(*sides, strict=True))
    ]
    return [ids for part, _ in parts for ids in part], [types for _, part in parts for types in part]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
