"""Inference over a file: rows in, logits out, one window at a time."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from xtransfer.data.batches.batches import Batch, BatchPlan, batches_by_length, make_plans
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.formats import tables
from xtransfer.data.formats.tables import Text, TextTable
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import UserError
from xtransfer.models import inference
from xtransfer.runs.classifier import TrainedClassifier
from xtransfer.runtime.sharding import data_shards

_BATCH_TEXT = 128  # tokens of the texts that a batch size counts
_WINDOW_ROWS = 4096  # rows that are tokenized and packed together
_WINDOW_CHARACTERS = 1 << 24  # a window ends early once its texts are this long together
_PREFETCHED_BATCHES = 4


@dataclass(eq=False)
class Window:
    """Consecutive rows that are tokenized, packed, and written together. Their texts are not kept.

    Attributes:
      lines: the line numbers of the n rows in the file.
      ids: the ids of the n rows.
      truncated: the number of rows whose text was truncated.
      logits: [n, K] float32, NaN until they are computed.
      missing: the number of rows without logits so far.
    """

    lines: list[int]
    ids: list[Any]
    truncated: int
    logits: np.ndarray
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        """Count every row as missing."""
        self.missing = len(self.lines)


def predict(
    classifier: TrainedClassifier,
    mesh: jax.sharding.Mesh,
    source: TextTable,
    max_length: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Generator[Window, None, None]:
    """Yield the rows of a file in order, in windows with their logits. Rows without text are skipped.

    A thread reads, tokenizes, and packs a few batches ahead of the device. At most a few windows of 4096 rows are in
    memory at a time.

    Args:
      classifier: the classifier, with its parameters on `mesh`.
      mesh: the device mesh.
      source: the input file.
      max_length: the most tokens per text.
      batch_size: the number of 128-token texts per batch; None chooses one for the device.
      on_batch: called with the number of rows after each batch.

    Raises:
      UserError: `read_texts` fails, the tokenizer fails on a text, or logits are not finite. All name the line.
    """
    plans = _plans(classifier, mesh, max_length, batch_size)
    classes = len(classifier.labels)

    def batches() -> Iterator[tuple[tuple[Window, np.ndarray], Batch]]:
        for rows in _windows(row for row in tables.read_texts(source) if not row.empty):
            tokens = _tokens(classifier, source, rows, max_length)
            window = Window(
                lines=[row.line for row in rows],
                ids=[row.id for row in rows],
                truncated=int(np.count_nonzero(tokens.truncated)),
                logits=np.full((len(rows), classes), np.nan, np.float32),
            )
            for indices, batch in batches_by_length(tokens, classes, plans):
                yield (window, indices), batch

    step = inference.make_eval_step(classifier.graphdef, mesh)
    with closing(prefetch(batches(), _PREFETCHED_BATCHES)) as prefetched:
        for (window, indices), logits in inference.forward(step, classifier.params, mesh, prefetched):
            window.logits[indices] = logits
            window.missing -= len(indices)
            on_batch(len(indices))
            if not window.missing:
                not_finite = np.flatnonzero(~np.isfinite(window.logits).all(axis=1))
                if len(not_finite):
                    line = window.lines[not_finite[0]]
                    raise UserError(f"{source.path}:{line}: the logits are not finite: {classifier.source} is damaged")
                yield window


def _plans(
    classifier: TrainedClassifier, mesh: jax.sharding.Mesh, max_length: int, batch_size: int | None
) -> tuple[BatchPlan, ...]:
    """Return batch layouts for a few text lengths, with rows that fill the device."""
    shards = data_shards(mesh)
    return make_plans(
        batch_size or inference.default_rows(mesh, _BATCH_TEXT),
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


def _tokens(classifier: TrainedClassifier, source: TextTable, rows: Sequence[Text], max_length: int) -> Tokens:
    """Tokenize a window of rows. If the tokenizer fails, name the line of the first text that it fails on."""

    def encode(rows: Sequence[Text]) -> Tokens:
        pairs = [row.text_pair or "" for row in rows] if source.columns.pair else None
        return tokenize(classifier.tokenizer, [row.text for row in rows], pairs, max_length)

    try:
        return encode(rows)
    except UserError:
        for row in rows:
            try:
                encode([row])
            except UserError as error:
                raise UserError(f"{source.path}:{row.line}: {error}") from error
        raise
