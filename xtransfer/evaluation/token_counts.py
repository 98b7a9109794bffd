"""How the student's tokenizer reads each language's test text, in `tokens.jsonl`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from xtransfer import storage
from xtransfer.data.batches import measures
from xtransfer.data.example import Example
from xtransfer.data.examples import sides
from xtransfer.data.tokens.samples import AnyTokens
from xtransfer.runs.workdir import Workdir
from xtransfer.train.inputs import ModelInputs


@dataclass(frozen=True)
class TokenCounts:
    """The tokens of one split in one language under the student's tokenizer; a row of `tokens.jsonl`.

    Attributes:
      split: the split.
      language: the language.
      examples: the number of examples.
      truncated: the number of examples that are longer than the model reads.
      tokens: the number of tokens before truncation, without special ones.
      units: the number of words, or of characters; see `unit`.
      unit: "word", or "character" for a script without spaces between words.
      unknown: the share of unknown tokens, without special ones.
    """

    split: str
    language: str
    examples: int
    truncated: int
    tokens: int
    units: int
    unit: str
    unknown: float

    @property
    def fertility(self) -> float:
        """Tokens per word, or per character; 0 without either."""
        return self.tokens / self.units if self.units else 0.0


def record(workdir: Workdir, split: str, inputs: ModelInputs, examples: Sequence[Example], tokens: AnyTokens) -> None:
    """Add the counts of a split in the language of its examples to `tokens.jsonl`, unless they are there.

    Args:
      workdir: the experiment.
      split: the split's name.
      inputs: the student's tokenizer.
      examples: the examples, in one language.
      tokens: the tokens of the examples.
    """
    language = examples[0].language
    if any((counts.split, counts.language) == (split, language) for counts in read_token_counts(workdir)):
        return
    lengths = measures.measure(inputs.cache, *sides(examples), tokens)
    counts = TokenCounts(
        split=split,
        language=language,
        examples=lengths.examples,
        truncated=lengths.truncated,
        tokens=lengths.tokens,
        units=lengths.units,
        unit=lengths.unit,
        unknown=lengths.unknown,
    )
    storage.append_jsonl(workdir.tokens, asdict(counts))


def read_token_counts(workdir: Workdir) -> list[TokenCounts]:
    """Return the recorded counts; lines that a killed process left incomplete are skipped."""
    if not workdir.tokens.is_file():
        return []
    return [counts for line in workdir.tokens.read_bytes().split(b"\n") if (counts := _parsed(line)) is not None]


def _parsed(line: bytes) -> TokenCounts | None:
    try:
        row: Any = storage.read_json(line.decode("utf-8"))
    except ValueError:
        return None
    match row:
        case {
            "split": str(),
            "language": str(),
            "examples": int(),
            "truncated": int(),
            "tokens": int(),
            "units": int(),
            "unit": "word" | "character",
            "unknown": int() | float(),
        } if len(row) == len(TokenCounts.__dataclass_fields__):
            return TokenCounts(**row)
    return None
