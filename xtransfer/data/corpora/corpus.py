"""A published corpus as a declaration: where to download it, its languages and splits, and how to read its rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtransfer.errors import DataError


@dataclass(frozen=True)
class Download:
    """One file of a corpus at its publisher.

    Attributes:
      url: the address.
      filename: its name on disk, a relative path; a user's own copy has the same name.
      sha256: the hex digest of its bytes; "" if the publisher's is unknown.
      size: bytes, or 0 if unknown.
    """

    url: str
    filename: str
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True)
class CorpusRow:
    """One example of a corpus.

    Attributes:
      id: unique within its language and split.
      text: the text, or the first one of a pair.
      text_pair: the second text, or None.
      label: the name of the class, one of the corpus's labels; None without a label.
      where: "member:line" (or "member:item"), for errors about the row.
    """

    id: str
    text: str
    text_pair: str | None
    label: str | None
    where: str = ""


@dataclass(frozen=True)
class Skipped:
    """A row that the corpus is known to have but that is not an example. It is counted and reported by its reason.

    Attributes:
      where: "member:line" (or "member:item").
      reason: why it is left out, in the same words for all rows of a kind, such as "label '-'".
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Sources:
    """The files of a corpus on this machine.

    Attributes:
      paths: for each `Download.filename`, an archive (zip, tar, tar.gz) or the folder with its contents. Read either
        one with `archives.open_members`.
    """

    paths: Mapping[str, Path]

    def path(self, filename: str) -> Path:
        """Return the archive or folder with the contents of a download.

        Raises:
          UserError: the user's data have no such file.
        """
        if filename not in self.paths:
            raise DataError(f"{filename} is missing; set task.data_dir to a folder with {filename} or its contents")
        return self.paths[filename]


@dataclass(frozen=True)
class Corpus:
    """A published corpus.

    Attributes:
      name: a key of the registry: "xnli", "webis_cls/books", "massive/intent".
      version: three numbers; raise it if `rows` yields other rows for the same files.
      labels: the class names, in canonical order.
      source_language: the language with labelled training text.
      languages: the tags of all languages, including the source language.
      splits: returns the splits of a language, among train, dev, test, and unlabelled. A language with train but
        without dev gets a dev split that is held out of train.
      downloads: returns the files that a language's splits are read from.
      members: returns the ends of the names of all files that a language's splits may be read from, such as
        "de/test.tsv"; other files in the user's folder change nothing.
      rows: yields the rows of (sources, language, split) in the order of the files, as a stream that never holds a
        whole file. Raises a UserError with "member:line" for malformed input.
      homepage: the page that describes it.
      citation: the paper, on one line.
      licence: as the publisher states it.
      has_pairs: whether every row has a second text.
      is_parallel: whether an id in dev or test names the same item, in translation, in every language.
      elsewhere: languages that only another release of the corpus has, and its name.
      notes: help for when the files cannot be downloaded; "" for none.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    source_language: str
    languages: tuple[str, ...]
    splits: Callable[[str], tuple[str, ...]]
    downloads: Callable[[str], tuple[Download, ...]]
    members: Callable[[str], tuple[str, ...]]
    rows: Callable[[Sources, str, str], Iterator[CorpusRow | Skipped]]
    homepage: str
    citation: str
    licence: str
    has_pairs: bool = False
    is_parallel: bool = False
    elsewhere: tuple[tuple[str, str], ...] = ()
    notes: str = ""
