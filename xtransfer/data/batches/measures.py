"""Measures of tokenized text: lengths, truncation, tokens per word, and how full packed batches are."""

import functools
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from xtransfer.data.batches.batches import BatchPlan, Dataset, Numbers, TrainBatches
from xtransfer.data.tokens.cache import TokenCache
from xtransfer.data.tokens.samples import AnyTokens, pieces
from xtransfer.data.tokens.tokenizer import sides_of, tokenize_batches

PERCENTILES = (50, 90, 99, 100)
LONGEST = 1 << 16  # tokens after which a text is measured no further

# Thai, Lao, Tibetan, Burmese, Khmer, kana, Han: scripts without spaces between words.
_UNSPACED = re.compile(
    "[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)


@dataclass(frozen=True)
class Lengths:
    """The lengths of n texts, or pairs of texts, under a tokenizer.

    Attributes:
      examples: n.
      percentiles: tokens per example before truncation, with special ones, at `PERCENTILES`; each is the length of an
        example.
      truncated: the number of examples that are cut.
      tokens: the number of tokens before truncation, without special ones.
      units: the number of words, or of characters without spaces; see `unit`.
      unit: "character" if at least half of the characters are in scripts without spaces between words, else "word".
      unknown: the share of unknown tokens after truncation, without special ones.
    """

    examples: int
    percentiles: tuple[int, ...]
    truncated: int
    tokens: int
    units: int
    unit: str
    unknown: float

    @property
    def fertility(self) -> float:
        """Tokens per word, or per character; 0 without either."""
        return self.tokens / self.units if self.units else 0.0


@dataclass(frozen=True)
class Filling:
    """The fill of some training batches.

    Attributes:
      rows: (rows of a batch, number of such batches), fewest rows first.
      real: the share of real tokens in these batches.
      unpacked: the same share with one example per row.
    """

    rows: tuple[tuple[int, int], ...]
    real: float
    unpacked: float


def filling(tokens: AnyTokens, plan: BatchPlan, seed: int, batches: int) -> Filling:
    """Assemble the first `batches` training batches of these examples, and measure them.

    Raises:
      ValueError: there are no examples or no batches; see also `TrainBatches`.
    """
    if batches < 1:
        raise ValueError(f"{batches} batches to measure")
    n = len(tokens)
    train = TrainBatches(Dataset(tokens, np.full(n, -1, np.int32), None, Numbers(n), 1), plan, seed)
    rows, real = Counter[int](), 0
    for i in range(batches):
        segments = train(i)["segment_ids"]  # [R, S]
        rows[len(segments)] += 1
        real += int((segments > 0).sum())
    return Filling(
        rows=tuple(sorted(rows.items())),
        real=real / (sum(size * count for size, count in rows.items()) * plan.row_length),
        unpacked=float(tokens.lengths.mean()) / plan.row_length,
    )


def measure(cache: TokenCache, texts: Sequence[str], pairs: Sequence[str] | None, tokens: AnyTokens) -> Lengths:
    """Measure texts, or pairs of texts, whose tokens from `cache` are `tokens`.

    Only examples that were truncated are tokenized again, up to 65,536 tokens.

    Raises:
      ValueError: there are no texts.
    """
    if not len(texts):
        raise ValueError("no texts to measure")
    sides, lengths = sides_of(texts, pairs), tokens.lengths
    long = np.flatnonzero(tokens.truncated)
    whole = [[side[int(i)] for i in long] for side in sides]
    parts = tokenize_batches(cache.tokenizer, whole[0], whole[1] if len(whole) > 1 else None, LONGEST)
    lengths[long] = np.concatenate([np.zeros(0, np.int64), *(part.lengths for part in parts)])
    special = cache.tokenizer.num_special_tokens_to_add(pair=pairs is not None) * len(texts)
    unknown = cache.tokenizer.unk_token_id
    units, unit = count_units(text for side in sides for text in side)
    counts = [(len(part.input_ids), (part.input_ids == unknown).sum()) for part in pieces(tokens)]
    total, total_unknown = (int(sum(column)) for column in zip(*counts, strict=True))
    return Lengths(
        examples=len(texts),
        percentiles=tuple(int(x) for x in np.percentile(lengths, PERCENTILES, method="inverted_cdf")),
        truncated=len(long),
        tokens=int(lengths.sum()) - special,
        units=units,
        unit=unit,
        unknown=float(total_unknown if unknown is not None else 0) / max(1, total - special),
    )


def count_units(texts: Iterable[str]) -> tuple[int, str]:
    """Count words, or characters if the script does not separate words: (count, "word" or "character").

    Words are counted almost by the word boundaries of Unicode's UAX 29: runs of letters, marks, and digits, joined by
    the characters that occur inside a word ("don't") or a number ("1,000.5").
    """
    words = characters = unspaced = 0
    pattern = _word()
    for text in texts:
        words += sum(1 for _ in pattern.finditer(text))
        characters += sum(map(len, text.split()))
        unspaced += sum(1 for _ in _UNSPACED.finditer(text))
    return (characters, "character") if unspaced and 2 * unspaced >= characters else (words, "word")


@functools.cache
def _word() -> re.Pattern[str]:
    # \w has no combining marks, with which Indic scripts write their vowels, and no joiners between letters.
    marks = "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c).startswith("M"))
    run = rf"[\w{marks}\u200c\u200d]+"
    between = r"(?<=[^\W\d_])['’.](?=[^\W\d_])|(?<=\d)[.,;'’،٫٬](?=\d)"
    return re.compile(rf"{run}(?:(?:{between}){run})*")
