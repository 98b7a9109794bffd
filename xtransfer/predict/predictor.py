"""Runs a classifier over a file: rows in, logits out, a window at a time."""

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

_WINDOW_ROWS = 4096  # tokenised and packed together
_WINDOW_CHARACTERS = 1 << 24
_AHEAD = 4  # batches that are ready before the device wants them
# Rows of 128 tokens: per core of a processor, where more is slower (buffers of over 32 MB are given back to the system
# after every batch, and their pages cleared again), and per accelerator.
_ROWS_PER_CORE = 2
_ROWS_PER_ACCELERATOR = 256


@dataclass(eq=False)
class Window:
    """Rows that are tokenised, packed and written together.

    Attributes:
      places: line and id of n rows, whose texts are let go.
      clipped: rows with texts that were too long even for the tokenizer.
      logits: [n, K] float32, NaN until they come.
      missing: rows whose logits have not come yet.
    """

    places: list[tuple[int, Any]]
    clipped: int
    logits: np.ndarray
    missing: int = field(init=False)

    def __post_init__(self) -> None:
        """None of the logits are there."""
        self.missing = len(self.places)


def predict(
    trained: TrainedClassifier,
    mesh: jax.sharding.Mesh,
    source: TextTable,
    max_length: int,
    batch_size: int | None = None,
    on_batch: Callable[[int], None] = lambda rows: None,
) -> Generator[Window, None, None]:
    """The rows of a file in windows, in order, with their logits; rows without text are left out.

    Reading, tokenising and packing run in a thread, a few batches ahead of the device. It holds a few windows of
    4096 rows at a time.

    Args:
      trained: the model, on `mesh`.
      mesh: its devices.
      source: what to read.
      max_length: tokens of an example at most.
      batch_size: texts of 128 tokens that are computed at once; None for what suits the device.
      on_batch: hears of the rows of each batch that is computed.

    Raises:
      UserError: as `read_texts`; a text that the tokenizer fails on, or whose logits are not finite, by file:line.
    """
    plans = _plans(trained, mesh, max_length, batch_size)
    classes = len(trained.labels)

    def batches() -> Iterator[tuple[tuple[Window, np.ndarray], pipeline.Batch]]:
        for rows in _windows(row for row in tables.read_texts(source) if not row.empty):
            tokens = _tokens(trained, source, rows, max_length)
            places = [(row.line, row.id) for row in rows]
            window = Window(places, tokens.clipped, np.full((len(rows), classes), np.nan, np.float32))
            for indices, batch in pipeline.batches_by_length(tokens, classes, plans):
                yield (window, indices), batch

    step = inference.make_eval_step(trained.graphdef, mesh)
    with closing(prefetch(batches(), _AHEAD)) as ahead:
        for (window, indices), logits in inference.forward(step, trained.params, mesh, ahead):
            window.logits[indices] = logits
            window.missing -= len(indices)
            on_batch(len(indices))
            if not window.missing:
                bad = np.flatnonzero(~np.isfinite(window.logits).all(axis=1))
                if len(bad):
                    line = window.places[bad[0]][0]
                    raise UserError(f"{source.path}:{line}: the logits are not finite: {trained.source} is damaged")
                yield window


def _plans(
    trained: TrainedClassifier, mesh: jax.sharding.Mesh, max_length: int, batch_size: int | None
) -> tuple[pipeline.BatchPlan, ...]:
    shards = data_shards(mesh)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    suitable = _ROWS_PER_CORE * (os.cpu_count() or 1) if on_cpu else _ROWS_PER_ACCELERATOR * shards
    return pipeline.make_plans(
        batch_size or suitable,
        max_length,
        pad_id=trained.architecture.pad_id,
        position_offset=trained.architecture.position_offset,
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


def _tokens(trained: TrainedClassifier, source: TextTable, rows: Sequence[Text], max_length: int) -> Tokens:
    def of(rows: Sequence[Text]) -> Tokens:
        pairs = [row.text_pair or "" for row in rows] if source.columns.pair else None
        return tokenize(trained.tokenizer, [row.text for row in rows], pairs, max_length)

    try:
        return of(rows)
    except UserError:
        for row in rows:  # which one it was
            try:
                of([row])
            except UserError as error:
                raise UserError(f"{source.path}:{row.line}: {error}") from error
        raise
