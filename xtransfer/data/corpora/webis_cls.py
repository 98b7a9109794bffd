"""Webis-CLS-10: Amazon reviews of books, DVDs, and music, negative or positive, in 4 languages.

Prettenhofer and Stein, "Cross-Language Text Classification using Structural Correspondence Learning", ACL 2010.
The languages are English, German, French, and Japanese. A file is `<items>` of `<item>`s. The number and the order of
an item's children differ between languages.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import BinaryIO
from xml.etree import ElementTree
from xml.parsers import expat

from xtransfer.data import blank
from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Download, Skipped, Sources
from xtransfer.errors import DataError

DOMAINS = ("books", "dvd", "music")
LABELS = ("negative", "positive")
FOLDERS = {"en": "en", "de": "de", "fr": "fr", "ja": "jp"}
FILES = {"train": "train.review", "test": "test.review", "unlabelled": "unlabeled.review"}
DOWNLOAD = Download(
    url="https://zenodo.org/record/3251672/files/cls-acl10-unprocessed.tar.gz",
    filename="cls-acl10-unprocessed.tar.gz",
)

_MEMBER_LIMIT = 4 << 30
_TOTAL_LIMIT = 16 << 30
_CHUNK = 1 << 20
_ITEM_LIMIT = 32 << 20  # bytes
_TAG_LIMIT = 1000  # an item has about twenty

_MARK = re.compile(rb"<item(?=[\s>])|</items?>")
_MARK_LENGTH = len(b"</items>")
_PROLOGUE = re.compile(rb"(?:\xef\xbb\xbf)?(?:<\?xml\s[^>]*\?>)?\s*<items>\s*")
_ENCODING = re.compile(rb"<\?xml\s[^>]*encoding\s*=\s*[\"']([^\"']*)[\"']")
_RATING = re.compile(r"[1-4](?:\.[0-9]+)?|5(?:\.0+)?")

# Beyond both of these numbers of malformed items, the file is damaged.
_FEW = 20
_FEW_SHARE = 0.05


def parse(stream: BinaryIO, member: str, *, labelled: bool, chunk: int = _CHUNK) -> Iterator[CorpusRow | Skipped]:
    """Yield the reviews of one file, with a few megabytes of it in memory.

    The text is the content of `<text>` without white space at its ends. Some texts have HTML entities, which stay. A
    `<rating>` above 3 is positive, and below 3 negative. An item is skipped if it is not well-formed, if one of the two
    is missing, empty, or repeated, or if its rating is 3. Ids count the items of the file from 0, with skipped ones.

    Args:
      stream: UTF-8.
      member: the name of the file, for errors.
      labelled: whether to read ratings; otherwise no row has a label.
      chunk: bytes to read at a time.

    Raises:
      UserError: member:line; the file is not one of reviews, is truncated, has another encoding, a document type
        declaration (which could define entities), or too many malformed items.
    """
    items = malformed = 0
    for line, piece in _pieces(stream, member, chunk):
        where = f"{member}:{line}"
        try:
            text, label = _review(piece, labelled=labelled)
        except _MalformedError as fault:
            malformed += 1
            yield Skipped(where, f"malformed item: {fault}")
        else:
            yield CorpusRow(id=str(items), text=text, text_pair=None, label=label, where=where)
        items += 1
    if malformed > max(_FEW, _FEW_SHARE * items):
        raise DataError(f"{member}: {malformed} of {items} items are malformed; download the file again")


class _MalformedError(ValueError):
    """A fault of an item, in the same words for all items of a kind."""


def _review(piece: bytes, *, labelled: bool) -> tuple[str, str | None]:
    if not piece.startswith(b"<item"):  # this also keeps declarations away from the XML parser
        raise _MalformedError("text outside of <item>")
    if piece.count(b"<") > _TAG_LIMIT:
        raise _MalformedError("too many tags")
    try:
        item = ElementTree.fromstring(piece)
    except ElementTree.ParseError as error:
        raise _MalformedError(expat.ErrorString(error.code)) from None
    text = _child(item, "text")
    if not labelled:
        return text, None
    rating = _child(item, "rating")
    if not _RATING.fullmatch(rating):
        raise _MalformedError("<rating> is not a number from 1 to 5")
    if float(rating) == 3:
        raise _MalformedError("<rating> is 3, neither negative nor positive")
    return text, "positive" if float(rating) > 3 else "negative"


def _child(item: ElementTree.Element, tag: str) -> str:
    children = item.findall(tag)
    if len(children) != 1:
        raise _MalformedError(f"more than one <{tag}>" if children else f"no <{tag}>")
    if len(children[0]):
        raise _MalformedError(f"tags in <{tag}>")
    text = (children[0].text or "").strip()
    if blank.is_empty(text):
        raise _MalformedError(f"empty <{tag}>")
    return text


class _Window:
    """The part of a stream that has been read and not yet taken."""

    def __init__(self, stream: BinaryIO, member: str, chunk: int) -> None:
        self.line = 1  # of data[start]
        self._stream, self._member, self._chunk = stream, member, chunk
        self._data, self._start = b"", 0

    def next_mark(self, offset: int = 0) -> tuple[bytes, int, int] | None:
        """Return the next tag of an item at least `offset` bytes ahead, and how far ahead it starts and ends."""
        seen = self._start + offset
        while not (mark := _MARK.search(self._data, seen)):
            # A tag may be cut at the end of what has been read.
            unread = max(len(self._data) - _MARK_LENGTH, seen) - self._start
            if not self._read():
                return None
            seen = unread
        return mark[0], mark.start() - self._start, mark.end() - self._start

    def take(self, size: int) -> bytes:
        """Move on by a number of bytes, and return them."""
        taken = self._data[self._start : self._start + size]
        self.line += taken.count(b"\n")
        self._start += len(taken)
        return taken

    def rest(self) -> Iterator[bytes]:
        """Yield everything that is left, in pieces."""
        yield self.take(len(self._data))
        while self._read():
            yield self.take(len(self._data))

    def _read(self) -> bool:
        rest = self._data[self._start :]
        if len(rest) > _ITEM_LIMIT:
            raise DataError(f"{self._member}:{self.line}: an item of more than {_ITEM_LIMIT >> 20} MiB")
        more = self._stream.read(self._chunk)
        self._data, self._start = rest + more, 0
        return bool(more)


def _pieces(stream: BinaryIO, member: str, chunk: int) -> Iterator[tuple[int, bytes]]:
    """Yield items from "<item" to "</item>", and anything between them except white space, with their lines.

    The stream is cut by its tags, so that XML that is not well-formed spoils only its own item.
    """
    window = _Window(stream, member, chunk)
    mark = window.next_mark()
    if mark is None:
        raise DataError(f"{member}: it has no <item>; expected <items> of reviews")
    _check_prologue(window.take(mark[1]), member)
    mark = window.next_mark()
    while mark is not None:
        tag, start, end = mark
        piece = window.take(end if tag == b"</item>" else start).lstrip()
        if piece:
            yield window.line - piece.count(b"\n"), piece
        if tag == b"</items>":
            line = window.line
            window.take(len(tag))
            if any(part.strip() for part in window.rest()):
                raise DataError(f"{member}:{line}: there is text after </items>")
            return
        mark = window.next_mark(len(tag) if tag == b"<item" else 0)
    raise DataError(f"{member}:{window.line}: truncated: </items> is missing; download the file again")


def _check_prologue(prologue: bytes, member: str) -> None:
    encoding = _ENCODING.search(prologue)
    if b"<!DOCTYPE" in prologue:
        raise DataError(f"{member}: a document type declaration is not allowed, because it may define entities")
    if encoding and encoding[1].lower() not in (b"utf-8", b"utf8", b"us-ascii"):
        raise DataError(f"{member}: its encoding is {encoding[1].decode('latin-1')!r}, expected 'utf-8'")
    if not _PROLOGUE.fullmatch(prologue):
        raise DataError(f"{member}: expected <items> before the first <item>")


def _rows(domain: str, sources: Sources, language: str, split: str) -> Iterator[CorpusRow | Skipped]:
    ending = f"{FOLDERS[language]}/{domain}/{FILES[split]}"
    with archives.open_member(
        sources.path(DOWNLOAD.filename),
        ending,
        member_limit=_MEMBER_LIMIT,
        total_limit=_TOTAL_LIMIT,
        below=1,  # "de/books/trans/en/books/test.review" is a translation
    ) as (name, stream):
        yield from parse(stream, name, labelled=split != "unlabelled")


def _corpus(domain: str) -> Corpus:
    return Corpus(
        name=f"webis_cls/{domain}",
        version="1.0.0",
        labels=LABELS,
        source_language="en",
        languages=tuple(FOLDERS),
        splits=lambda language: tuple(FILES),
        downloads=lambda language: (DOWNLOAD,),
        members=lambda language: tuple(f"{FOLDERS[language]}/{domain}/{name}" for name in FILES.values()),
        rows=partial(_rows, domain),
        homepage="https://zenodo.org/record/3251672",
        citation="Prettenhofer and Stein, Cross-Language Text Classification using Structural Correspondence Learning, "
        "ACL 2010",
        licence="CC BY 4.0",
        notes="Zenodo may require you to request access first.",
    )


CORPORA = tuple(_corpus(domain) for domain in DOMAINS)
