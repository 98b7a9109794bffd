"""A published corpus as a declaration: where it is downloaded, which languages and splits it has, how rows are read."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xtransfer.errors import UserError


@dataclass(frozen=True)
class Download:
    """One file of a corpus at its publisher.

    Attributes:
      url: where it is.
      filename: what it is called on disk, a relative path; the file a user brings has the same name.
      sha256: hex digest of its bytes; "" where the publisher's is not known.
      size: bytes, or 0 where it is not known.
    """

    url: str
    filename: str
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True)
class CorpusRow:
    """One example as the corpus has it.

    Attributes:
      id: unique within its language and split.
      text: the text, or the first of a pair.
      text_pair: the second text, or None.
      label: name of the class, one of the corpus's labels; None where there is none.
      where: "member:line" (or "member:item"), which errors about the row name.
    """

    id: str
    text: str
    text_pair: str | None
    label: str | None
    where: str = ""


@dataclass(frozen=True)
class Skipped:
    """A row that the corpus is known to have and that is no example; counted, and reported by its reason.

    Attributes:
      where: "member:line" (or "member:item").
      reason: why it is left out, the same words for all rows of a kind: "label '-'".
    """

    where: str
    reason: str


@dataclass(frozen=True)
class Sources:
    """The files of a corpus on this machine.

    Attributes:
      paths: for each `Download.filename` an archive (zip, tar, tar.gz), or the folder where its contents are. Read
        either by `archives.open_members`.
    """

    paths: Mapping[str, Path]

    def path(self, filename: str) -> Path:
        """The archive or folder that holds the contents of a download.

        Raises:
          UserError: the user's data have no such file.
        """
        if filename not in self.paths:
            raise UserError(
                f"{filename} is missing; set task.data_dir to a folder with {filename} or its contents in it"
            )
        return self.paths[filename]


@dataclass(frozen=True)
class Corpus:
    """A corpus of the registry.

    Attributes:
      name: as in the registry: "xnli", "webis_cls/books", "massive/intent".
      version: three numbers of what `rows` makes of the files: raise it when that changes.
      labels: names of the classes in canonical order.
      source_language: the language that has labelled training text.
      languages: tags of all languages, the source language among them.
      splits: language -> those of train, dev, test and unlabelled that it has; a language with train and without dev
        gets a dev split that is held out of train.
      downloads: language -> the files that its splits are read from.
      members: language -> the ends of the names of all files that its splits may be read from, as "de/test.tsv": what
        else lies in the user's folder changes nothing.
      rows: (sources, language, split) -> its rows in the order of the files, as a stream: never the whole file in
        memory. Raises UserError for what is malformed, with "member:line".
      homepage: where it is described.
      citation: the paper, in one line.
      licence: as the publisher states it.
      has_pairs: whether every row has a second text.
      notes: what helps where the files cannot be downloaded; "" = nothing.
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
    notes: str = ""
