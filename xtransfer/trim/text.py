"""The texts that decide what to keep: reading them, and counting what they use of a vocabulary."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer.data import blank
from xtransfer.data.formats import lines, tables
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.chunks import CHARACTER_LIMIT
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import DataError, MachineError, UserError, user_error
from xtransfer.trim.vocabulary import Usage, dead_end

_PLAIN = ".txt"
ENDINGS = (_PLAIN, *tables.ENDINGS)
_CHUNK = 1000  # texts that are tokenized together
_WHOLE = 1 << 24  # tokens, beyond any text: every piece of a text counts, also behind the model's last position


@dataclass(frozen=True)
class Line:
    """A text, its place as file:line, and whether only its first characters are here."""

    place: str
    text: str
    clipped: bool = False


@dataclass(frozen=True)
class Agreement:
    """How two tokenizers split the same texts.

    Attributes:
      texts: the number of texts.
      same: the number of texts with the same pieces.
      tokens: the number of tokens before and after, without special ones.
      unknown: the number of unknown tokens before and after.
      first: the place of the first text with other pieces, or "".
      clipped: the number of texts of which only the first `CHARACTER_LIMIT` characters were read.
    """

    texts: int
    same: int
    tokens: tuple[int, int]
    unknown: tuple[int, int]
    first: str
    clipped: int = 0


def read(paths: Iterable[Path], column: str) -> Iterator[Line]:
    """Yield the texts of files one by one; texts that are empty are left out.

    `predict` reads at most `CHARACTER_LIMIT` characters of a text, and so does this.

    Args:
      paths: .txt with one text per line, or .tsv, .csv, .jsonl, or .parquet.
      column: the column with the texts in the other formats. A column `text_pair` is read too.

    Raises:
      UserError: a file is missing, malformed, or without text; the message names the file, or file:line.
    """
    for path in paths:
        if path.suffix.lower() not in ENDINGS:
            raise DataError(f"{path}: the ending {path.suffix!r} is not one of {', '.join(ENDINGS)}")
        any_text = False
        for line in _plain(path) if path.suffix.lower() == _PLAIN else _table(path, column):
            if not blank.is_empty(line.text):
                any_text = True
                yield line
        if not any_text:
            raise DataError(f"{path}: no rows with text")


def _plain(path: Path) -> Iterator[Line]:
    try:
        with path.open("rb") as file:
            for number, text in lines.lines(file, str(path)):
                yield _line(f"{path}:{number}", text.rstrip("\r\n"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from None


def _table(path: Path, column: str) -> Iterator[Line]:
    for row in tables.read_texts(tables.inspect(path, column, None, "", skip_empty=True)):
        yield _line(f"{path}:{row.line}", row.text)
        yield _line(f"{path}:{row.line}", row.text_pair or "")


def _line(place: str, text: str) -> Line:
    whole = tokenization.without_margins(text, CHARACTER_LIMIT)
    return Line(place, whole[:CHARACTER_LIMIT], len(whole) > CHARACTER_LIMIT)


def count(tokenizer: Any, model: Mapping[str, Any], texts: Iterable[Line]) -> Usage:
    """Return what texts use of a tokenizer's vocabulary.

    Args:
      tokenizer: a fast tokenizer.
      model: the part `model` of its state.
      texts: from `read`.

    Raises:
      UserError: the tokenizer fails on a text, which is named by file:line.
    """
    counts = np.zeros(max(tokenizer.get_vocab().values()) + 1, np.int64)
    characters: set[str] = set()
    prefixes: set[str] = set()
    for chunk, tokens in _tokenized(tokenizer, texts):
        counts += np.bincount(tokens.input_ids, minlength=len(counts))
        for i, line in enumerate(chunk):
            text_words = words(tokenizer, line.text)
            characters.update(*text_words)
            if model["type"] == "WordPiece" and _unknown(tokenizer) in tokens.item(i)[0]:
                prefixes.update(*(dead_end(model, word) for word in text_words))
    return Usage(counts, frozenset(characters), frozenset(prefixes))


def words(tokenizer: Any, text: str) -> list[str]:
    """Return the words of a text as the tokenizer's model sees them, normalized."""
    normalizer, pre_tokenizer = tokenizer.backend_tokenizer.normalizer, tokenizer.backend_tokenizer.pre_tokenizer
    normalized = text if normalizer is None else normalizer.normalize_str(text)
    return [normalized] if pre_tokenizer is None else [word for word, _ in pre_tokenizer.pre_tokenize_str(normalized)]


def compare(before: Any, after: Any, kept: Sequence[int], texts: Iterable[Line]) -> Agreement:
    """Compare how two tokenizers split texts.

    Args:
      before: the original tokenizer.
      after: the trimmed tokenizer.
      kept: [n], the original id of every new id.
      texts: from `read`.

    Raises:
      UserError: see `count`.
    """
    original = np.asarray(kept, np.int64)
    number = same = clipped = 0
    lengths, unknown, first = [0, 0], [0, 0], ""
    special = before.num_special_tokens_to_add()
    first_copy, second_copy = itertools.tee(texts)
    pairs = zip(_tokenized(before, first_copy), _tokenized(after, second_copy), strict=True)
    for (chunk, old), (_, new) in pairs:
        for side, (tokenizer, tokens) in enumerate(((before, old), (after, new))):
            lengths[side] += len(tokens.input_ids) - special * len(chunk)
            unknown[side] += int((tokens.input_ids == _unknown(tokenizer)).sum())
        for i, line in enumerate(chunk):
            if np.array_equal(old.item(i)[0], original[new.item(i)[0]]):
                same += 1
            elif not first:
                first = line.place
        number += len(chunk)
        clipped += sum(line.clipped for line in chunk)
    return Agreement(number, same, (lengths[0], lengths[1]), (unknown[0], unknown[1]), first, clipped)


def _unknown(tokenizer: Any) -> int:
    return -1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id


def _tokenized(tokenizer: Any, texts: Iterable[Line]) -> Iterator[tuple[list[Line], Tokens]]:
    remaining = iter(texts)
    while chunk := list(itertools.islice(remaining, _CHUNK)):
        yield chunk, _tokenize(tokenizer, chunk)


def _tokenize(tokenizer: Any, chunk: Sequence[Line]) -> Tokens:
    try:
        return tokenize(tokenizer, [line.text for line in chunk], None, _WHOLE)
    except UserError as error:
        if len(chunk) == 1:
            raise user_error(error.exit_status, f"{chunk[0].place}: {tokenization.without_index(error)}") from error
    for line in chunk:
        _tokenize(tokenizer, [line])
    raise AssertionError("a chunk fails, but none of its texts does")
