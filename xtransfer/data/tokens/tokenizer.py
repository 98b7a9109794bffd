"""Text to token ids: loading a tokenizer, clipping, and tokenizing in bulk."""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from xtransfer.data import blank
from xtransfer.data.tokens import vocabularies
from xtransfer.data.tokens.pages import MappedPages
from xtransfer.errors import CheckpointError, ConfigError, UserError, one_line

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
Texts = tuple[str, ...]  # the text of an example, or the two of a pair

# A call of the tokenizer takes this many examples or characters, whichever is less. That is work for every core, and
# the memory depends neither on the number of examples nor on their length.
_CHUNK = 1000
_CHUNK_CHARACTERS = 1 << 20
_CHARACTERS_PER_TOKEN = 20  # far above any language's mean, yet a 20 MB line costs nothing
_TAKEN = 1 << 16  # examples that `Tokens.take` copies at once: token positions take more memory than token ids
_MAX_TYPE_ID = 255  # token types are kept as bytes


@dataclass(frozen=True, eq=False)
class Tokens:
    """The token ids of n examples, end to end.

    Attributes:
      input_ids: [total] int32, with special tokens.
      token_type_ids: [total], uint8 from `tokenize`.
      offsets: [n + 1] int64; example i is input_ids[offsets[i]:offsets[i + 1]].
      truncated: [n] bool, whether an example is longer than its tokens.
      pages: the pages of `input_ids` and `token_type_ids` if they are memory maps.
    """

    input_ids: np.ndarray
    token_type_ids: np.ndarray
    offsets: np.ndarray
    truncated: np.ndarray
    pages: MappedPages | None = None

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in each example, [n] int64."""
        return np.diff(self.offsets)

    def lengths_of(self, indices: np.ndarray) -> np.ndarray:
        """Return the number of tokens in the examples `indices` [m], [m] int64."""
        return self.offsets[indices + 1] - self.offsets[indices]

    def item(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (input_ids, token_type_ids) of example i, each [length]."""
        span = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return self.input_ids[span], self.token_type_ids[span]

    def take(self, indices: np.ndarray) -> "Tokens":
        """Return the examples `indices` [m] in that order, in memory."""
        starts, lengths = self.offsets[indices], self.lengths_of(indices)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        input_ids = np.empty(offsets[-1], self.input_ids.dtype)
        token_type_ids = np.empty(offsets[-1], self.token_type_ids.dtype)
        for first in range(0, len(starts), _TAKEN):
            chunk = slice(first, first + _TAKEN)
            target = slice(int(offsets[first]), int(offsets[:-1][chunk][-1] + lengths[chunk][-1]))
            shift = np.repeat(starts[chunk] - offsets[:-1][chunk], lengths[chunk])
            source = np.arange(target.start, target.stop) + shift
            input_ids[target], token_type_ids[target] = self.input_ids[source], self.token_type_ids[source]
            if self.pages is not None:
                self.pages.read(len(starts[chunk]))
        return Tokens(input_ids, token_type_ids, offsets, self.truncated[indices])


def concatenate(parts: Sequence[Tokens]) -> Tokens:
    """Return the examples of all parts, in memory; a single part is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    return Tokens(
        input_ids=np.concatenate([np.zeros(0, np.int32), *(part.input_ids for part in parts)]),
        token_type_ids=np.concatenate([np.zeros(0, np.uint8), *(part.token_type_ids for part in parts)]),
        offsets=np.cumsum(np.concatenate([np.zeros(1, np.int64), *(part.lengths for part in parts)])),
        truncated=np.concatenate([np.zeros(0, bool), *(part.truncated for part in parts)]),
    )


def load_tokenizer(directory: str | Path) -> "PreTrainedTokenizerFast":
    """Return the fast tokenizer of a checkpoint directory. Runs no code from it, and downloads nothing.

    tokenizer.json is used if there is one. Other vocabularies (a SentencePiece model, vocab.txt, or vocab.json with
    merges.txt) are converted, and give the ids of transformers 4 (see `vocabularies`).

    Raises:
      UserError: there are no tokenizer files, they are broken, or the tokenizer has no fast form.
    """
    directory = Path(directory)
    files = vocabularies.vocabulary_files(directory)
    if not files:
        raise CheckpointError(f"{directory}: no tokenizer files (tokenizer.json or a vocabulary) in this directory")
    import transformers
    from transformers import PreTrainedTokenizerFast

    name = vocabularies.class_name(directory, files)
    options: dict[str, Any] = {"trust_remote_code": False, "use_fast": True} if name == "AutoTokenizer" else {}
    try:
        tokenizer = getattr(transformers, name).from_pretrained(
            str(directory),
            local_files_only=True,
            **options,
            **vocabularies.conversion_options(directory, files),
        )
    except UserError:
        raise
    except BaseException as error:  # a bad regex in tokenizer.json is a PanicException, which is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        vocabularies.refuse_damaged(directory, files)
        remedy = vocabularies.remedy(files)
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded: {one_line(error)}{remedy}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise CheckpointError(
            f"{directory}: {type(tokenizer).__name__} is not a fast tokenizer; add its tokenizer.json"
        )
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # transformers accepts a missing vocabulary file
        vocabularies.refuse_damaged(directory, files)
        raise CheckpointError(
            f"{directory}: the tokenizer has no words beside its special tokens{vocabularies.remedy(files)}"
        )
    vocabularies.correct_pipeline(tokenizer, files)
    vocabularies.refuse_growth(tokenizer, directory)
    vocabularies.check_max_length(tokenizer, directory)
    vocabularies.warn_of_lowercasing(tokenizer, directory)
    return tokenizer


def tokenizer_fingerprint(tokenizer: "PreTrainedTokenizerFast") -> str:
    """Return the sha256 of everything that decides token ids and types; `tokenize` and max_length do not change it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    state["sides"] = [tokenizer.truncation_side, tokenizer.split_special_tokens, has_types(tokenizer)]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def tokenize(
    tokenizer: "PreTrainedTokenizerFast",
    texts: Sequence[str],
    pairs: Sequence[str] | None,
    max_length: int,
    *,
    on_batch: Callable[[int], None] | None = None,
) -> Tokens:
    """Return all of `tokenize_batches` as one, in memory; call `on_batch` with the size of each batch."""
    batches = []
    for batch in tokenize_batches(tokenizer, texts, pairs, max_length):
        batches.append(batch)
        if on_batch is not None:
            on_batch(len(batch))
    return concatenate(batches)


def tokenize_batches(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Iterator[Tokens]:
    """Tokenize texts, or pairs of texts, with special tokens, truncated to max_length and without padding.

    The examples come in order, up to 1000 at a time, and all cores tokenize. A tokenizer reads a whole text before it
    truncates, so a text of more than 20 characters per token of max_length loses the blanks at its ends, and then what
    is over that limit. In a pair the longer side is truncated first.

    Token types are zeros if the tokenizer's `model_input_names` lack them: the model was trained without token types,
    and `transformers` gives it none.

    Args:
      tokenizer: from `load_tokenizer`; its truncation and padding are changed.
      texts: n texts.
      pairs: n second texts, or None.
      max_length: the most tokens of an example, with special ones.

    Raises:
      UserError: max_length leaves no room for text, or the tokenizer fails on an example (named by its index).
      ValueError: texts and pairs differ in number.
    """
    check_room(tokenizer, max_length, pairs=pairs is not None)
    return _batches(tokenizer, sides_of(texts, pairs), max_length)


def sides_of(texts: Sequence[str], pairs: Sequence[str] | None) -> list[Sequence[str]]:
    """Return the texts and, for pairs, the second texts; raise a ValueError if they differ in number."""
    if pairs is not None and len(pairs) != len(texts):
        raise ValueError(f"{len(texts)} texts but {len(pairs)} second texts")
    return [texts] if pairs is None else [texts, pairs]


def check_room(tokenizer: "PreTrainedTokenizerFast", max_length: int, *, pairs: bool) -> int:
    """Return the number of tokens of text in an example of max_length tokens; UserError if there is room for none."""
    special = tokenizer.num_special_tokens_to_add(pair=pairs)
    if max_length <= special:
        raise ConfigError(f"max_length {max_length} leaves no room for text beside {special} special tokens; raise it")
    return max_length - special


def character_limit(max_length: int) -> int:
    """Return the number of characters after which a text is clipped for examples of at most max_length tokens."""
    return max_length * _CHARACTERS_PER_TOKEN


def without_margins(text: str, limit: int) -> str:
    """Return the text, without the blanks at its ends if it has more than `limit` characters."""
    return text if len(text) <= limit else blank.strip(text)


def has_types(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Return whether the model takes the token types of its tokenizer."""
    return "token_type_ids" in tokenizer.model_input_names


def _batches(tokenizer: "PreTrainedTokenizerFast", sides: list[Sequence[str]], max_length: int) -> Iterator[Tokens]:
    backend, limit = tokenizer.backend_tokenizer, character_limit(max_length)

    def encode(examples: list[Texts]) -> list[tuple[list[int], list[int], bool]]:
        return [_checked(encoding, max_length) for encoding in encode_batch(backend, examples)]

    for start, stop in call_spans(sides, limit):
        # Set each time, because callers may use the tokenizer in between and change it.
        backend.no_padding()
        backend.enable_truncation(max_length, strategy="longest_first", direction=tokenizer.truncation_side)
        backend.encode_special_tokens = tokenizer.split_special_tokens
        examples = [
            tuple(without_margins(text, limit) for text in example)
            for example in zip(*(side[start:stop] for side in sides), strict=True)
        ]
        ids, types, overflows = zip(
            *encode_each(encode, [tuple(text[:limit] for text in example) for example in examples], start), strict=True
        )
        input_ids = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
        if has_types(tokenizer):
            type_ids = np.fromiter(itertools.chain.from_iterable(types), np.uint8)
        else:
            type_ids = np.zeros(len(input_ids), np.uint8)
        clipped = [any(len(text) > limit for text in example) for example in examples]
        yield Tokens(
            input_ids=input_ids,
            token_type_ids=type_ids,
            offsets=np.cumsum([0, *map(len, ids)], dtype=np.int64),
            truncated=np.array(overflows, bool) | np.array(clipped, bool),
        )


def _checked(encoding: "tokenizers.Encoding", max_length: int) -> tuple[list[int], list[int], bool]:
    """Return the ids and type ids of an encoding, and whether it was truncated."""
    ids, types = encoding.ids, encoding.type_ids
    if not ids:
        raise ValueError("it gives no tokens")
    if max(types) > _MAX_TYPE_ID:
        raise ValueError(f"its token type ids go beyond {_MAX_TYPE_ID}")
    return ids, types, len(ids) >= max_length and bool(encoding.overflowing)  # copied, so do not ask in vain


def call_spans(sides: list[Sequence[str]], limit: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the examples that go to the tokenizer together; it sees `limit` characters of a text."""
    start, characters, total = 0, 0, len(sides[0])
    for i, example in enumerate(zip(*sides, strict=True)):
        characters += sum(min(len(text), limit) for text in example)
        if i + 1 - start == _CHUNK or characters >= _CHUNK_CHARACTERS or i + 1 == total:
            yield start, i + 1
            start, characters = i + 1, 0


def encode_batch(
    backend: "tokenizers.Tokenizer", examples: Sequence[Texts], *, special_tokens: bool = True
) -> "list[tokenizers.Encoding]":
    """Return the encodings of texts, or of pairs of texts, straight from the Rust code.

    It gives the same ids as the tokenizer's own call in two thirds of the time.
    """
    inputs = [example if len(example) > 1 else example[0] for example in examples]
    return backend.encode_batch_fast(inputs, add_special_tokens=special_tokens)


def encode_each(encode: Callable[[list[Texts]], list[T]], examples: list[Texts], start: int) -> list[T]:
    """Return `encode(examples)`, one result per example; if it fails, name the example that it fails on.

    Args:
      encode: a call of the tokenizer.
      examples: the texts of each example.
      start: the index of the first example, for errors.
    """
    try:
        return encode(examples)
    except BaseException as error:  # the tokenizer's PanicException is not an Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        if len(examples) == 1:
            text = " + ".join(repr(text[:40]) for text in examples[0])
            raise CheckpointError(f"example {start}: the tokenizer fails on {text}: {one_line(error)}") from error
    return [result for i, example in enumerate(examples, start) for result in encode_each(encode, [example], i)]


def without_index(error: UserError) -> str:
    """Return the message about the only example of a call without its index, for callers who name its line."""
    return str(error).removeprefix("example 0: ")
