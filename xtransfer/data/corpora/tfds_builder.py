"""The TFDS builder of all corpora, which writes the rows of a `Corpus` in one language. It needs no TensorFlow."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from xtransfer.data import blank
from xtransfer.data.corpora import archives
from xtransfer.data.corpora.corpus import Corpus, CorpusRow, Skipped, Sources
from xtransfer.data.corpora.tfds_prepare import quiet
from xtransfer.data.task import UNLABELLED, label_index
from xtransfer.errors import DataError, UserError
from xtransfer.runtime import terminal

_EMPTY = "without text"
_CHUNK = 4096  # rows to read at a time
_LOG_EVERY_SECONDS = 15.0
_NO_SOURCES = Sources({})


class XtransferCorpus(tfds.core.GeneratorBasedBuilder):
    """A language of a corpus, with the corpus's splits, and rows in the order of its files.

    A row has `id`, `text`, `text_pair` ("" without one), and `label` (an index, −1 without a label). For each split,
    the metadata hold the sha256 over its rows and, by reason, the number of rows that were left out and the location
    of the first one.
    """

    # TFDS looks for download checksums beside the code. There are none, and the search needs another package.
    code_path = None
    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        corpus: Corpus,
        language: str,
        data_dir: Path,
        *,
        sources: Sources = _NO_SOURCES,
        empty_text: str = "error",
        log_line: Callable[[str], None] = terminal.log,
    ):
        """Open a language; `sources`, `empty_text` ("error" or "skip"), and `log_line` are only needed to write data.

        `log_line` is called with progress lines now and then, because standard output is silenced meanwhile.
        """
        self._corpus, self._language, self._sources, self._empty_text = corpus, language, sources, empty_text
        self._log_line = log_line
        self._metadata = tfds.core.MetadataDict()
        config = tfds.core.BuilderConfig(name=language, description=f"{corpus.name} in {language}")
        with quiet():
            super().__init__(config=config, file_format="array_record", data_dir=str(data_dir))

    def _info(self) -> tfds.core.DatasetInfo:
        text = {key: tfds.features.Text() for key in ("id", "text", "text_pair")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self._corpus.name}, version {self._corpus.version}",
            features=tfds.features.FeaturesDict({**text, "label": np.int64}),
            disable_shuffling=True,
            homepage=self._corpus.homepage,
            citation=self._corpus.citation,
            license=self._corpus.licence,
            metadata=self._metadata,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in self._corpus.splits(self._language)}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        digest, skipped, first = hashlib.sha256(), Counter[str](), dict[str, str]()
        count, started = 0, time.monotonic()
        last_logged = started
        for row in checked_rows(self._corpus, self._sources, self._language, split, self._empty_text):
            now = time.monotonic()
            if now - last_logged >= _LOG_EVERY_SECONDS:
                last_logged, rate = now, count / (now - started)
                self._log_line(f"{self._corpus.name}/{self._language}: {split}: {count:,} rows · {rate:,.0f} rows/s")
            if isinstance(row, Skipped):
                skipped[row.reason] += 1
                first.setdefault(row.reason, row.where)
                continue
            label = -1 if row.label is None else self._corpus.labels.index(row.label)
            digest.update(json.dumps([row.id, row.text, row.text_pair, row.label]).encode())
            yield count, {"id": row.id, "text": row.text, "text_pair": row.text_pair or "", "label": label}
            count += 1
        if not count:
            raise DataError(f"{self._corpus.name}: no rows of {split} in {self._language}")
        self._metadata[split] = {
            "digest": digest.hexdigest(),
            "skipped": [[reason, skipped[reason], first[reason]] for reason in skipped],
        }


def read(builder: XtransferCorpus, split: str) -> Iterator[tuple[str, str, str, int]]:
    """Yield (id, text, text_pair, label) for the rows of a prepared split, in order.

    The records are read in chunks and parsed here. One by one, and by TFDS, it takes thirty times as long.
    """
    records = builder.as_data_source(split=split).data_source
    for start in range(0, len(records), _CHUNK):
        for record in records.__getitems__(range(start, min(start + _CHUNK, len(records)))):
            row = tf_example_pb2.Example.FromString(record).features.feature
            number, text, pair = (row[key].bytes_list.value[0].decode() for key in ("id", "text", "text_pair"))
            yield number, text, pair, row["label"].int64_list.value[0]


def checked_rows(
    corpus: Corpus, sources: Sources, language: str, split: str, empty_text: str
) -> Iterator[CorpusRow | Skipped]:
    """Yield the rows of a corpus, each with an id of its own, text, and one of its labels (none if unlabelled).

    Raises:
      UserError: a row breaks one of these rules (the message gives its location), or the archive is damaged.
    """
    rows = corpus.rows(sources, language, split)
    try:
        yield from _checked(rows, corpus, language, split, empty_text)
    except UserError:
        _read_to_the_end(rows)
        raise


def _read_to_the_end(rows: Iterator[CorpusRow | Skipped]) -> None:
    """Reach the archive's checksums; other faults in the rows no longer matter."""
    try:
        for _ in rows:
            pass
    except archives.DamagedError as error:
        raise error from None
    except UserError:
        pass


def _checked(
    rows: Iterator[CorpusRow | Skipped], corpus: Corpus, language: str, split: str, empty_text: str
) -> Iterator[CorpusRow | Skipped]:
    ids: set[str] = set()
    for row in rows:
        if isinstance(row, Skipped):
            yield row
            continue
        if row.id in ids:
            raise DataError(f"{row.where}: id {row.id!r} occurs twice in {split} of {language}")
        ids.add(row.id)
        if row.id.splitlines() != [row.id]:
            raise DataError(f"{row.where}: id {row.id!r} is not one line of text; remove the line separators")
        if (row.text_pair is not None) != corpus.has_pairs:
            raise ValueError(f"{corpus.name}: {row.where}: has_pairs is {corpus.has_pairs}, the row says otherwise")
        texts = [row.text] if row.text_pair is None else [row.text, row.text_pair]
        for text in (row.id, *texts):
            _check_encodable(text, row.where)
        if any(map(blank.is_empty, texts)):
            if empty_text != "skip":
                raise DataError(f"{row.where}: a text is empty; fill it in, or set task.empty_text to 'skip'")
            yield Skipped(row.where, _EMPTY)
        elif split == UNLABELLED:
            yield CorpusRow(row.id, row.text, row.text_pair, None, row.where)
        elif row.label is None:
            raise DataError(f"{row.where}: the row has no label")
        else:
            label_index(row.label, corpus.labels, row.where)
            yield row


def _check_encodable(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: half of a surrogate pair (\\ud800..\\udfff) in {text[:40]!a}") from None
