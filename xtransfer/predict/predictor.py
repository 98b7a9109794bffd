"""Running a classifier over a file: rows in, logits out, one window at a time."""

import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from xtransfer.data.batches import batches as pipeline
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.formats import tables
from xtransfer.data.formats.tables import Text, TextTable
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import UserError
from xtransfer.models import inference
from xtransfer.runs.classifier import TrainedClassifier
from xtransfer.runtime.sharding import data_shards

_WINDOW_ROWS = 4096  # rows that are tokenized and packed together
_WINDOW_CHARACTERS = 1 << 24
_AHEAD = 4  # batches to prepare before the device needs them
# Rows of 128 tokens per CPU core and per accelerator. More per core is slower: buffers of over 32 MB are returned to
# the system after every batch, and their pages cleared again.
_ROWS_PER_CORE = 2
_ROWS_PER_ACCELERATOR = 256


@dataclass(eq=False)
class Window:
    """Rows that are tokenized, packed, and written together.

    Attributes:
      places: the line and the id of n rows, whose texts are not kept.
      clipped: the number of rows with texts that are too long even for the tokenizer.
      logits: [n, K] float32, NaN until they are computed.
      missing: the number of rows without logits so far.
    """

    places: list[tuple[int, Any]]
    clipped: int
    logits: np.ndarray
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        """Count every row as missing."""
        self.missing = len(self.places)


def predict(
    classifier: TrainedClassifier,
    mesh: jax.sharding.Mesh,
    source: TextTable,
    max_length: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Generator[Window, None, None]:
    """Yield the rows of a file in windows, in order, with their logits; rows without text are left out.

    Reading, tokenizing, and packing run in a thread, a few batches ahead of the device. It holds a few windows of 4096
    rows at a time.

    Args:
      classifier: the classifier, on `mesh`.
      mesh: the device mesh.
      source: the file.
      max_length: the most tokens of an example.
      batch_size: texts of 128 tokens to compute at once; None suits the device.
      on_batch: called with the number of rows in each computed batch.

    Raises:
      UserError: see `read_texts`; or, by file and line, a text on which the tokenizer fails, or logits that are not
        finite.
    """
    plans = _plans(classifier, mesh, max_length, batch_size)
    classes = len(classifier.labels)

    def batches() -> Iterator[tuple[tuple[Window, np.ndarray], pipeline.Batch]]:
        for rows in _windows(row for row in tables.read_texts(source) if not row.empty):
            tokens = _tokens(classifier, source, rows, max_length)
            places = [(row.line, row.id) for row in rows]
            window = Window(places, tokens.clipped, np.full((len(rows), classes), np.nan, np.float32))
            for indices, batch in pipeline.batches_by_length(tokens, classes, plans):
                yield (window, indices), batch

    step = inference.make_eval_step(classifier.graphdef, mesh)
    with closing(prefetch(batches(), _AHEAD)) as ahead:
        for (window, indices), logits in inference.forward(step, classifier.params, mesh, ahead):
            window.logits[indices] = logits
            window.missing -= len(indices)
            on_batch(len(indices))
            if not window.missing:
                bad = np.flatnonzero(~np.isfinite(window.logits).all(axis=1))
                if len(bad):
                    line = window.places[bad[0]][0]
                    raise UserError(f"{source.path}:{line}: the logits are not finite: {classifier.source} is damaged")
                yield window


def _plans(
    classifier: TrainedClassifier, mesh: jax.sharding.Mesh, max_length: int, batch_size: int | None
) -> tuple[pipeline.BatchPlan, ...]:
    shards = data_shards(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    suitable = _ROWS_PER_CORE * (os.cpu_count() or 1) if on_cpu else _ROWS_PER_ACCELERATOR * shards
    return pipeline.make_plans(
        batch_size or suitable,
        max_length,
        pad_id=classifier.architecture.pad_id,
        position_offset=classifier.architecture.position_offset,
        multiple_of=shards,
    )


def _windows(rows: Iterator[Text]) -> Iterator[list[Text]]:
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
    def encode(rows: Sequence[Text]) -> Tokens:
        pairs = [row.text_pair or "" for row in rows] if source.columns.pair else None
        return tokenize(classifier.tokenizer, [row.text for row in rows], pairs, max_length)

    try:
        return encode(rows)
    except UserError:
        for row in rows:  # find the one
            try:
                encode([row])
            except UserError as error:
                raise UserError(f"{source.path}:{row.line}: {error}") from error
        raise
