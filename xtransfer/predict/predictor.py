"""Inference over a file: rows in, logits out, one window at a time."""

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from xtransfer.data.batches.batches import Batch, BatchPlan, batches_by_length, make_plans
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.formats import tables
from xtransfer.data.formats.tables import Text, TextTable
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.chunks import tokenize_chunks
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import CheckpointError, UserError, user_error
from xtransfer.models import inference
from xtransfer.runs.classifier import TrainedClassifier
from xtransfer.runtime.sharding import data_shards

BATCH_TEXT = 128  # tokens of the texts that a batch size counts
_WINDOW_ROWS = 4096  # rows that are tokenized and packed together
_WINDOW_CHARACTERS = 1 << 24  # a window ends early once its texts are this long together
_PREFETCHED_BATCHES = 4

LONG = ("truncate", "mean")  # what to do with texts that are longer than max_length

Encode = Callable[[Sequence[Text]], Iterator[tuple[Tokens, np.ndarray]]]  # rows -> chunks, and the row of each chunk


@dataclass(eq=False)
class Window:
    """Consecutive rows that are tokenized, packed, and written together. Their texts are not kept.

    Attributes:
      lines: the line numbers of the n rows in the file.
      ids: the ids of the n rows.
      truncated: [n] bool, whether the end of a text was not read.
      sums: [n, K] float64, the sum of the logits of a row's chunks so far.
      chunks: [n] int64, the number of chunks in it.
    """

    lines: list[int]
    ids: list[Any]
    truncated: np.ndarray
    sums: np.ndarray
    chunks: np.ndarray

    @property
    def logits(self) -> np.ndarray:
        """The mean logits of each row's chunks, [n, K] float64."""
        return self.sums / self.chunks[:, None]

    def add(self, rows: np.ndarray, logits: np.ndarray) -> int:
        """Add the logits [b, K] of chunks of these rows [b], and return the number of rows that had none before."""
        before = np.count_nonzero(self.chunks)
        np.add.at(self.sums, rows, logits)
        np.add.at(self.chunks, rows, 1)
        return int(np.count_nonzero(self.chunks) - before)


def predict(
    classifier: TrainedClassifier,
    mesh: jax.sharding.Mesh,
    source: TextTable,
    max_length: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
    *,
    long: str = "truncate",
    step: inference.EvalStep | None = None,
) -> Generator[Window, None, None]:
    """Yield the rows of a file in order, in windows with their logits. Rows without text are skipped.

    A thread reads, tokenizes, and packs a few batches ahead of the device. At most a few windows of 4096 rows are in
    memory at a time, and of their chunks at most a few groups of 4096.

    Args:
      classifier: the classifier, with its parameters on `mesh`.
      mesh: the device mesh.
      source: the input file.
      max_length: the most tokens per text.
      batch_size: the number of 128-token texts per batch; None chooses one for the device.
      on_batch: called after each batch with the number of rows whose first chunk was in it.
      long: one of `LONG`: truncate texts that are longer than max_length, or average the logits of their chunks; see
        `tokenize_chunks`.
      step: the compiled forward pass, for callers who predict several files; None compiles one.

    Raises:
      UserError: `read_texts` fails, the tokenizer fails on a text, a pair cannot be divided into chunks, or logits are
        not finite. All name the line.
    """
    plans = _plans(classifier, mesh, max_length, batch_size)
    classes = len(classifier.labels)
    encode = _encoder(classifier, max_length, pairs=bool(source.columns.pair), long=long)

    def batches() -> Iterator[tuple[tuple[Window, np.ndarray], Batch]]:
        for texts in _windows(row for row in tables.read_texts(source) if not row.empty):
            window = Window(
                lines=[text.line for text in texts],
                ids=[text.id for text in texts],
                truncated=np.zeros(len(texts), bool),
                sums=np.zeros((len(texts), classes)),
                chunks=np.zeros(len(texts), np.int64),
            )
            for tokens, rows in _encoded(encode, source, texts):
                window.truncated[rows[tokens.truncated]] = True
                for indices, batch in batches_by_length(tokens, classes, plans):
                    yield (window, rows[indices]), batch

    if step is None:
        step = inference.make_eval_step(classifier.graphdef, mesh)
    with closing(prefetch(batches(), _PREFETCHED_BATCHES)) as prefetched:
        results = inference.forward(step, classifier.params, mesh, prefetched)
        for window, chunks in itertools.groupby(results, lambda result: result[0][0]):
            for (_, rows), logits in chunks:
                on_batch(window.add(rows, logits))
            not_finite = np.flatnonzero(~np.isfinite(window.logits).all(axis=1))
            if len(not_finite):
                line = window.lines[not_finite[0]]
                raise CheckpointError(
                    f"{source.path}:{line}: the logits are not finite: {classifier.source} is damaged"
                )
            yield window


def _plans(
    classifier: TrainedClassifier, mesh: jax.sharding.Mesh, max_length: int, batch_size: int | None
) -> tuple[BatchPlan, ...]:
    """Return batch layouts for a few text lengths, with rows that fill the device."""
    shards = data_shards(mesh)
    return make_plans(
        batch_size or inference.default_rows(mesh, BATCH_TEXT),
        max_length,
        pad_id=classifier.architecture.pad_id,
        position_offset=classifier.architecture.position_offset,
        multiple_of=shards,
    )


def _windows(rows: Iterator[Text]) -> Iterator[list[Text]]:
    """Group rows into windows, bounded in rows and in characters."""
    window: list[Text] = []
    characters = 0
    for row in rows:
        window.append(row)
        characters += len(row.text) + len(row.text_pair or "")
        if len(window) == _WINDOW_ROWS or characters >= _WINDOW_CHARACTERS:
            yield window
            window, characters = [], 0
    if window:
        yield window


def _encoder(classifier: TrainedClassifier, max_length: int, *, pairs: bool, long: str) -> Encode:
    """Return the function that tokenizes rows and, if `long` is "mean", divides long ones into chunks."""

    def encode(rows: Sequence[Text]) -> Iterator[tuple[Tokens, np.ndarray]]:
        texts = [row.text for row in rows]
        seconds = [row.text_pair or "" for row in rows] if pairs else None
        if long == "mean":
            yield from tokenize_chunks(classifier.tokenizer, texts, seconds, max_length)
        else:
            yield tokenize(classifier.tokenizer, texts, seconds, max_length), np.arange(len(rows))

    return encode


def _encoded(encode: Encode, source: TextTable, rows: Sequence[Text]) -> Iterator[tuple[Tokens, np.ndarray]]:
    """Tokenize a window of rows. If the tokenizer fails, name the line of the first text that it fails on."""
    try:
        yield from encode(rows)
    except UserError:
        for row in rows:
            try:
                for _ in encode([row]):
                    pass
            except UserError as error:
                raise user_error(
                    error.exit_status, f"{source.path}:{row.line}: {tokenization.without_index(error)}"
                ) from error
        raise
