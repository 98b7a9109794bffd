"""XNLI: natural language inference in 15 languages, with parallel dev and test sets; train is MultiNLI.

Conneau et al., "XNLI: Evaluating Cross-lingual Sentence Representations", EMNLP 2018. Williams, Nangia, and Bowman, "A
Broad-Coverage Challenge Corpus for Sentence Understanding through Inference", NAACL 2018.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Skipped, Sources
from xtransfer.data.formats import lines, tables
from xtransfer.errors import DataError

LANGUAGES = ("ar", "bg", "de", "el", "en", "es", "fr", "hi", "ru", "sw", "th", "tr", "ur", "vi", "zh")
LABELS = ("entailment", "neutral", "contradiction")
XNLI = Download(
    url="https://dl.fbaipublicfiles.com/XNLI/XNLI-1.0.zip",
    filename="XNLI-1.0.zip",
    sha256="4ba1d5e1afdb7161f0f23c66dc787802ccfa8a25a3ddd3b165a35e50df346ab1",
    size=17865352,
)
MULTINLI = Download(
    url="https://cims.nyu.edu/~sbowman/multinli/multinli_1.0.zip",
    filename="multinli_1.0.zip",
    sha256="049f507b9e36b1fcb756cfd5aeb3b7a0cfcb84bf023793652987f7e7e0957822",
    size=226850426,
)

_UNDECIDED = "-"
_MEMBER_LIMIT = 2 << 30
_TOTAL_LIMIT = 8 << 30
# The first name that exists is read.
_MEMBERS = {
    "train": ("multinli_1.0_train.jsonl", "multinli_1.0_train.txt"),
    "dev": ("xnli.dev.tsv", "xnli.dev.jsonl"),
    "test": ("xnli.test.tsv", "xnli.test.jsonl"),
}
_LABEL1 = 10  # tabs before the first annotator's label in MultiNLI's .txt, the last column that every row fills


def parse_xnli(stream: BinaryIO, member: str, language: str) -> Iterator[CorpusRow | Skipped]:
    """Yield the pairs of one language from a file with all languages. A pair has the same id in every language.

    Args:
      stream: UTF-8.
      member: the name of the file, for errors; ".jsonl" is JSON lines, ".tsv" and ".txt" have tabs and no quoting.
      language: one of `LANGUAGES`.

    Raises:
      UserError: member:line; a row that cannot be read, or an unknown language.
    """
    for line, values in _records(stream, member):
        where = f"{member}:{line}"
        row_language = tables.string_of(values, "language", where)
        if row_language == language:
            yield _row(values, str(tables.value_of(values, "pairID", where)), where)
        elif row_language not in LANGUAGES:
            raise DataError(f"{where}: language {row_language!r} is not one of {', '.join(LANGUAGES)}")


def parse_multinli(stream: BinaryIO, member: str) -> Iterator[CorpusRow | Skipped]:
    """Yield the English pairs of MultiNLI. Ids are the row numbers from 0, counting skipped rows too.

    See `parse_xnli` for arguments and errors.
    """
    for number, (line, values) in enumerate(_records(stream, member)):
        yield _row(values, str(number), f"{member}:{line}")


def _row(values: dict[str, Any], number: str, where: str) -> CorpusRow | Skipped:
    label = tables.string_of(values, "gold_label", where)
    if label == _UNDECIDED:
        return Skipped(where, f"label {_UNDECIDED!r}, because the annotators disagree")
    return CorpusRow(
        id=number,
        text=tables.text_of(values, "sentence1", where),
        text_pair=tables.text_of(values, "sentence2", where),
        label=label,
        where=where,
    )


def _records(stream: BinaryIO, member: str) -> Iterator[lines.Row]:
    if member.endswith(".txt"):
        return lines.READERS[".tsv"](_filled(lines.lines(stream, member)), Path(member))
    return lines.rows(stream, member, Path(member).suffix)


def _filled(rows: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Add the empty cells of further annotators, which some copies lack at the end of a line."""
    tabs = 0
    for number, line in rows:
        line_tabs = line.count("\t")
        tabs = tabs or line_tabs
        if _LABEL1 <= line_tabs < tabs:
            line = line.rstrip("\r\n") + "\t" * (tabs - line_tabs)
        yield number, line


def _rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
    source = sources.path((MULTINLI if split == "train" else XNLI).filename)
    member = _member(source, _MEMBERS[split])
    with archives.open_member(source, member, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT) as (name, stream):
        yield from parse_multinli(stream, name) if split == "train" else parse_xnli(stream, name, language)


def _member(source: Path, endings: Sequence[str]) -> str:
    """Return the name of the first of these files that a source has."""
    members = archives.open_members(
        source,
        lambda name: name.rpartition("/")[2] in endings,
        member_limit=_MEMBER_LIMIT,
        total_limit=_TOTAL_LIMIT,
    )
    names = [name for name, _ in members]
    for ending in endings:
        matches = [name for name in names if name.rpartition("/")[2] == ending]
        if len(matches) > 1:
            raise DataError(f"{source}: it has {matches[0]} and {matches[1]}; leave only one of them in it")
        if matches:
            return matches[0]
    raise DataError(
        f"{source}: it has no {' or '.join(endings)}; download it again, or set task.data_dir to its folder"
    )


CORPORA = (
    Corpus(
        name="xnli",
        version="1.0.0",
        labels=LABELS,
        source_language="en",
        languages=LANGUAGES,
        splits=lambda language: ("train", "dev", "test") if language == "en" else ("dev", "test"),
        downloads=lambda language: (MULTINLI, XNLI) if language == "en" else (XNLI,),
        members=lambda language: tuple(name for names in _MEMBERS.values() for name in names),
        rows=_rows,
        homepage="https://cims.nyu.edu/~sbowman/xnli/",
        citation="Conneau et al., XNLI: Evaluating Cross-lingual Sentence Representations, EMNLP 2018; of train: "
        "Williams, Nangia and Bowman, A Broad-Coverage Challenge Corpus for Sentence Understanding through Inference, "
        "NAACL 2018",
        licence="CC BY-NC 4.0; train: MultiNLI's own terms",
        has_pairs=True,
        is_parallel=True,
    ),
)
