"""Texts of any length as overlapping chunks that fit into the model.

Chunks are cut from the token ids of the whole text. The `stride` of a tokenizer does the same for single texts, but
with pairs it cuts both texts and yields all combinations of their parts.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.tokenizer import Texts, Tokens
from xtransfer.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A tokenizer takes about 100 bytes of memory per token of a text, so the text cannot be of any length.
CHARACTER_LIMIT = 1 << 20

_GROUP = 4096  # chunks that are in memory and packed together
_OVERLAP = 4  # neighbouring chunks share one part in so many

Sides = tuple[np.ndarray, ...]  # the token ids of a text, or of the two of a pair, without special tokens


def tokenize_chunks(
    tokenizer: "PreTrainedTokenizerFast", texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> Iterator[tuple[Tokens, np.ndarray]]:
    """Tokenize texts, or pairs of texts, into chunks that together have every token.

    An example that fits into max_length is a single chunk, with the tokens that `tokenize` gives. Otherwise its text
    becomes chunks of max_length tokens, with special tokens around each one. See `chunk_starts` for where they start.
    In a pair, the longer text (the first, if they are equal) is divided, and the shorter one is in every chunk.

    As in `tokenize`, a text of more than 20 characters per token of max_length loses the blanks at its ends. What is
    then over 1,048,576 characters is not read.

    Args:
      tokenizer: from `load_tokenizer`, with special tokens; its truncation and padding are changed.
      texts: n texts.
      pairs: n second texts, or None.
      max_length: the most tokens of a chunk, with special ones.

    Yields:
      (tokens, examples) for up to 4096 chunks at a time: the chunks' tokens, with `truncated` for a text over the
      limit, and the index of each chunk's example, [m] int64. The chunks are in the order of the examples, and in an
      example in the order of the text.

    Raises:
      UserError: max_length leaves no room for text, the shorter text of a pair fills max_length, or the tokenizer
        fails on an example. The last two name the example by its index.
      ValueError: texts and pairs differ in number.
    """
    room = tokenization.check_room(tokenizer, max_length, pairs=pairs is not None)
    sides = tokenization.sides_of(texts, pairs)
    layout = _layout(tokenizer, len(sides))
    chunks = _chunks(tokenizer, sides, max_length, room)
    while group := list(itertools.islice(chunks, _GROUP)):
        rows = [layout.row(chunk.sides) for chunk in group]
        type_ids = np.concatenate([types for _, types in rows])
        tokens = Tokens(
            input_ids=np.concatenate([ids for ids, _ in rows]).astype(np.int32),
            token_type_ids=(type_ids if tokenization.has_types(tokenizer) else np.zeros_like(type_ids)),
            offsets=np.cumsum([0, *(len(ids) for ids, _ in rows)], dtype=np.int64),
            truncated=np.array([chunk.clipped for chunk in group], bool),
        )
        yield tokens, np.array([chunk.example for chunk in group], np.int64)


def chunk_starts(length: int, size: int) -> range:
    """Return the first tokens of the chunks of a text, each of `size` tokens and the last one perhaps of fewer.

    Each chunk starts with the last quarter of the one before, rounded down, and with at least one token of it. Only
    chunks of one token share none.
    """
    step = max(1, size - max(1, size // _OVERLAP))
    return range(0, max(0, length - size) + step, step)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """A part of an example: the example's index, the ids of its text or texts, and whether its text was clipped."""

    example: int
    sides: Sides
    clipped: bool


@dataclass(frozen=True, eq=False)
class _Layout:
    """The places of texts and special tokens in an example.

    Attributes:
      pieces: in order, (side, ids, types). The side is the number of a text, or None for special tokens with these ids
        and types; a text has ids of its own, and the first of the types.
    """

    pieces: tuple[tuple[int | None, np.ndarray, np.ndarray], ...]

    def row(self, sides: Sides) -> tuple[np.ndarray, np.ndarray]:
        """Return the token ids and types of an example with these texts, [length] each."""
        ids = [ids if side is None else sides[side] for side, ids, _ in self.pieces]
        types = [
            types if side is None else np.full(len(sides[side]), types[0], np.uint8) for side, _, types in self.pieces
        ]
        return np.concatenate(ids), np.concatenate(types)


def _layout(tokenizer: "PreTrainedTokenizerFast", sides: int) -> _Layout:
    """Return the layout of examples with one or two texts, as the tokenizer shows it on a letter."""
    _reset(tokenizer)
    (probe,) = tokenization.encode_each(
        lambda examples: tokenization.encode_batch(tokenizer.backend_tokenizer, examples), [("a",) * sides], 0
    )
    tokens = zip(probe.sequence_ids, probe.ids, probe.type_ids, strict=True)
    pieces = []
    for side, members in itertools.groupby(tokens, lambda token: token[0]):
        _, ids, types = zip(*members, strict=True)
        pieces.append((side, np.array(ids, np.int32), np.array(types, np.uint8)))
    if [side for side, _, _ in pieces if side is not None] != list(range(sides)):
        raise CheckpointError(
            "the tokenizer gives no token for the letter a, so it cannot divide texts; pass --long truncate"
        )
    return _Layout(tuple(pieces))


def _chunks(
    tokenizer: "PreTrainedTokenizerFast", sides: list[Sequence[str]], max_length: int, room: int
) -> Iterator[_Chunk]:
    """Yield the chunks of all examples; one call of the tokenizer is in memory at a time."""
    margins = tokenization.character_limit(max_length)

    def encode(examples: list[Texts]) -> list[Sides]:
        single = [(text,) for example in examples for text in example]
        encodings = iter(tokenization.encode_batch(tokenizer.backend_tokenizer, single, special_tokens=False))
        return [tuple(np.array(next(encodings).ids, np.int32) for _ in example) for example in examples]

    for start, stop in tokenization.call_spans(sides, CHARACTER_LIMIT):
        _reset(tokenizer)
        whole = [
            tuple(tokenization.without_margins(text, margins) for text in example)
            for example in zip(*(side[start:stop] for side in sides), strict=True)
        ]
        read = [tuple(text[:CHARACTER_LIMIT] for text in example) for example in whole]
        for i, ids in enumerate(tokenization.encode_each(encode, read, start)):
            clipped = whole[i] != read[i]
            for part in _divide(ids, room, start + i, max_length):
                yield _Chunk(start + i, part, clipped)


def _divide(sides: Sides, room: int, example: int, max_length: int) -> Iterator[Sides]:
    """Yield the texts of each chunk of an example; `room` is what they may have together."""
    lengths = [len(side) for side in sides]
    divided = int(np.argmax(lengths))
    size = room - (sum(lengths) - lengths[divided])
    if size < 1:
        raise DataError(
            f"example {example}: even the shorter text of the pair has {min(lengths)} tokens, which leave no room for "
            f"the other one in {max_length}; raise --max-length, or pass --long truncate"
        )
    for first in chunk_starts(lengths[divided], size):
        yield (*sides[:divided], sides[divided][first : first + size], *sides[divided + 1 :])


def _reset(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Switch off truncation and padding, each time, because callers may use the tokenizer in between and change it."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.encode_special_tokens = tokenizer.split_special_tokens
