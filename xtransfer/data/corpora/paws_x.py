"""PAWS-X: pairs of sentences that are paraphrases or only look alike, in 7 languages; train is English.

Yang, Zhang, Tar, and Baldridge, "PAWS-X: A Cross-lingual Adversarial Dataset for Paraphrase Identification",
EMNLP 2019. Train has 49,401 English pairs; dev and test have up to 2,000 in each language.
"""

from collections.abc import Iterator
from typing import BinaryIO

from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Skipped, Sources
from xtransfer.data.formats import lines, tables
from xtransfer.errors import DataError

LANGUAGES = ("en", "de", "es", "fr", "ja", "ko", "zh")
LABELS = ("different", "paraphrase")  # 0 and 1 in the files
ARCHIVE = Download(
    url="https://storage.googleapis.com/paws/pawsx/x-final.tar.gz",
    filename="x-final.tar.gz",
    sha256="4146db499101d66e68ae4c8ed3cf9dadecd625f44b7d8cf3d4a0fe93afc4fd9f",
    size=30282057,
)
FILES = {"train": "train.tsv", "dev": "dev_2k.tsv", "test": "test_2k.tsv"}

_NAMES = {str(index): name for index, name in enumerate(LABELS)}
_PLACEHOLDER = "NS"  # stands for a sentence that was not translated
_UNTRANSLATED = "not translated (NS)"
_MEMBER_LIMIT = 256 << 20
_TOTAL_LIMIT = 1 << 30


def parse(stream: BinaryIO, name: str) -> Iterator[CorpusRow | Skipped]:
    """Yield the pairs of a file, in which a quote is an ordinary character.

    Args:
      stream: UTF-8, with the columns id, sentence1, sentence2, and label.
      name: the name of the file, for errors.

    Raises:
      UserError: a malformed row; the message starts with `name`:line.
    """
    for line, values in lines.rows(stream, name, ".tsv"):
        where = f"{name}:{line}"
        number, label = (tables.string_of(values, key, where) for key in ("id", "label"))
        first, second = (tables.text_of(values, key, where) for key in ("sentence1", "sentence2"))
        if _PLACEHOLDER in (first.strip(), second.strip()):
            yield Skipped(where, _UNTRANSLATED)
        elif label not in _NAMES:
            raise DataError(f"{where}: label {label!r} is not 0 or 1; download the file again")
        else:
            yield CorpusRow(id=number, text=first, text_pair=second, label=_NAMES[label], where=where)


def _splits(language: str) -> tuple[str, ...]:
    # The other languages' train files are machine translations, which zero-shot transfer does not use.
    return ("train", "dev", "test") if language == "en" else ("dev", "test")


def _rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
    source = sources.path(ARCHIVE.filename)
    ending = f"{language}/{FILES[split]}"
    with archives.open_member(source, ending, member_limit=_MEMBER_LIMIT, total_limit=_TOTAL_LIMIT) as (name, stream):
        yield from parse(stream, name)


CORPORA = (
    Corpus(
        name="paws_x",
        version="1.0.0",
        labels=LABELS,
        source_language="en",
        languages=LANGUAGES,
        splits=_splits,
        downloads=lambda language: (ARCHIVE,),
        members=lambda language: tuple(f"{language}/{FILES[split]}" for split in _splits(language)),
        rows=_rows,
        homepage="https://github.com/google-research-datasets/paws/tree/master/pawsx",
        citation="Yang et al., PAWS-X, EMNLP 2019, arXiv 1908.11828",
        licence="free for any purpose; acknowledgement of Google LLC as the source is appreciated",
        has_pairs=True,
        is_parallel=True,
    ),
)
