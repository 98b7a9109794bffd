"""A small made-up corpus in two archives."""

from collections.abc import Iterator
from pathlib import Path

from tests.helpers import archive_writers
from xtransfer.config import TaskConfig
from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Skipped, Sources
from xtransfer.data.formats import lines

FIRST = Download("https://example.org/one.zip", "one.zip", "0" * 64, 1)
SECOND = Download("https://example.org/two.tar.gz", "two.tar.gz")
BIG = {"member_limit": 1 << 20, "total_limit": 1 << 20}


def rows(sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
    source = sources.path(SECOND.filename if split == "unlabelled" else FIRST.filename)
    with archives.open_member(source, f"{language}/{split}.tsv", **BIG) as (name, stream):
        for line, values in lines.rows(stream, name, ".tsv"):
            where = f"{name}:{line}"
            if values["label"] == "-":
                yield Skipped(where, "label '-'")
            else:
                yield CorpusRow(str(line), values["text"], None, values["label"] or None, where)


CORPUS = Corpus(
    name="ours/small",
    version="1.0.0",
    labels=("good", "bad"),
    source_language="en",
    languages=("en", "de", "fr"),
    splits=lambda language: ("train", "test", "unlabelled") if language == "en" else ("test",),
    downloads=lambda language: (FIRST, SECOND) if language == "en" else (FIRST,),
    members=lambda language: tuple(f"{language}/{split}.tsv" for split in ("train", "test", "unlabelled")),
    rows=rows,
    homepage="https://example.org",
    citation="Nobody, 2026",
    licence="none",
)
ONE = {
    "top/en/train.tsv": "text\tlabel\n" + "".join(f"text {i}\t{('good', 'bad')[i % 2]}\n" for i in range(40)),
    "top/en/test.tsv": "text\tlabel\n\u304a\u3044\u3057\u3044\tgood\nno\t-\n bad \tbad\nno\t-\n",
    "top/de/test.tsv": "text\tlabel\ngut\tgood\n",
    "top/fr/test.tsv": "text\tlabel\nbon\tgood\n",
}
TWO = {"en/unlabelled.tsv": "text\tlabel\nwho knows\t\nnot me\tbad\n"}


def write_user_data(tmp_path: Path) -> TaskConfig:
    """Write both archives to tmp_path/data and return the config of the task."""
    folder = tmp_path / "data"
    folder.mkdir()
    archive_writers.write_zip(folder / FIRST.filename, ONE)
    archive_writers.write_tar_gz(folder / SECOND.filename, TWO)
    return TaskConfig(name=CORPUS.name, data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
