"""Binary: text in, labels and probabilities out.

    python -m xtransfer.predict --model DIR --input FILE --output FILE

DIR is a run of a workdir (WORKDIR/students/<objective>/seed-<n> or WORKDIR/teacher) or a Hugging Face classifier. The
input is .tsv, .csv, .jsonl or .parquet with a column `text`, and with `text_pair` and `id` where there are such
columns. The output has a JSON line per row, in the input's order: {"id", "label", "probabilities": {name: p}}.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from xtransfer.data.batches import batches as pipeline
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.formats import tables
from xtransfer.data.formats.tables import Source, Text
from xtransfer.data.tokens.tokenizer import Tokens, tokenize
from xtransfer.errors import UserError
from xtransfer.models import inference
from xtransfer.runs.classifier import SELECTIONS, Trained, open_trained
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import data_shards, make_mesh

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


def main(argv: list[str]) -> None:
    """Parses the flags and predicts. The output file appears whole, or not at all."""
    args = _parser().parse_args(argv)
    interrupted = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        # Raised inside a callback of the garbage collector an exception is lost: it waits for the next check, unless
        # Ctrl-C comes again.
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a background job's Ctrl-C stays ignored
        signal.signal(signal.SIGINT, interrupt)
    try:
        with terminal.deferred_stop(said="") as stopping:

            def check() -> None:
                if interrupted.is_set():
                    raise KeyboardInterrupt
                if stopping():
                    print(f"stopped: {args.output} is not written", file=sys.stderr, flush=True)
                    sys.exit(terminal.EXIT_PREEMPTED)

            _run(args, check)
    except KeyboardInterrupt:
        print(f"interrupted: {args.output} is not written", file=sys.stderr, flush=True)
        sys.exit(terminal.EXIT_INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="xtransfer.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a run of a workdir, or a classifier")
    parser.add_argument("--input", required=True, type=Path, metavar="FILE", help=".tsv, .csv, .jsonl or .parquet")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON lines, in the input's order")
    parser.add_argument("--overwrite", action="store_true", help="replace the output if it exists")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    parser.add_argument("--pair-column", metavar="NAME", help="default: text_pair if there is one; '' for none")
    parser.add_argument("--id-column", metavar="NAME", help="default: id if there is one; '' for the rows' numbers")
    parser.add_argument("--empty-text", choices=("error", "skip"), default="error", help="rows without text")
    parser.add_argument("--max-length", type=_positive, metavar="N", help="tokens of a text; default: the model's")
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="texts of 128 tokens that are computed at once"
    )
    parser.add_argument("--selection", choices=SELECTIONS, default="source_dev", help="which checkpoint of a run")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of at most nine digits")
    return int(text)


def _run(args: argparse.Namespace, check: Callable[[], None]) -> None:
    """`check()` is called now and then, and raises when the work shall stop."""
    source = tables.look_at(
        args.input, args.text_column, args.pair_column, args.id_column, skip_empty=args.empty_text == "skip"
    )
    with closing(Output(args.output, source.path, overwrite=args.overwrite)) as output:
        # Read once before anything is computed: a fault in the last row shows now, not after hours.
        kept = skipped = written = clipped = 0
        for row in tables.read_texts(source):
            kept, skipped = kept + (not row.empty), skipped + row.empty
            check()
        if not kept:
            raise UserError(f"{source.path}: no rows with text")
        mesh = make_mesh()
        trained = open_trained(args.model, mesh, selection=args.selection)
        max_length = _max_length(trained, args.max_length, pairs=bool(source.columns.pair))
        started = time.monotonic()
        with terminal.ticking("predict", kept, unit="rows") as ticker:

            def on_batch(rows: int) -> None:
                ticker.advance(rows)
                check()

            with closing(predict(trained, mesh, source, max_length, args.batch_size, on_batch)) as windows:
                for window in windows:
                    output.write(_lines(window, trained.labels))
                    written += len(window.places)
                    clipped += window.clipped
        if written != kept:
            raise UserError(f"{source.path}: had {kept} rows, then {written}: it was changed while it was read")
        output.commit()
    rate = written / (time.monotonic() - started)
    notes = [f"rows without text, skipped: {skipped:,}"] * bool(skipped)
    notes += [f"warning: very long texts, clipped: {clipped:,}"] * bool(clipped)
    terminal.log(" · ".join([f"{args.output}: {written:,} rows, {rate:,.0f} a second", *notes]))


def _max_length(trained: Trained, wanted: int | None, *, pairs: bool) -> int:
    positions = trained.architecture.max_positions - trained.architecture.position_offset
    if wanted is not None and wanted > positions:
        raise UserError(f"--max-length {wanted} is more than the {positions} positions of {trained.directory}")
    length = trained.max_length if wanted is None else wanted
    tokenize(trained.tokenizer, ["a"], ["a"] if pairs else None, length)  # refuses one without room for text
    return length


def predict(
    trained: Trained,
    mesh: jax.sharding.Mesh,
    source: Source,
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
    trained: Trained, mesh: jax.sharding.Mesh, max_length: int, batch_size: int | None
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


def _tokens(trained: Trained, source: Source, rows: Sequence[Text], max_length: int) -> Tokens:
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


def _lines(window: Window, labels: Sequence[str]) -> Iterator[str]:
    logits = window.logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    for (_, id_), row in zip(window.places, odds / odds.sum(axis=1, keepdims=True), strict=True):
        probabilities = {name: float(f"{p:.6g}") for name, p in zip(labels, row.tolist(), strict=True)}
        found = {"id": id_, "label": labels[int(row.argmax())], "probabilities": probabilities}
        yield json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n"


class Output:
    """A file that takes its name when it is whole: `write`, then `commit`; closed without it, nothing is left.

    Raises:
      UserError: the path exists already, is the input, is being written by another process, or cannot be written.
    """

    def __init__(self, path: Path, source: Path, *, overwrite: bool):
        self._path = path
        if path.exists():
            if not path.is_file():
                raise UserError(f"{path}: not a file; give another --output")
            if os.path.samefile(path, source):
                raise UserError(f"{path}: is the input; give another --output")
            if not overwrite:
                raise UserError(f"{path}: exists already; give another --output, or --overwrite")
        self._target = Path(os.path.realpath(path))  # a link stays a link
        # One fixed name, so that what a killed process left behind is overwritten and does not pile up.
        self._temporary = self._target.with_name(f".{self._target.name}.tmp")
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # Not what a link in a shared directory leads to, and no pipe to wait for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            self._file = os.fdopen(os.open(self._temporary, flags, 0o666), "a", encoding="utf-8", newline="\n")
        except OSError as error:
            raise self._refusal(error) from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat())
        except (BlockingIOError, FileNotFoundError):
            mine = False
        except OSError as error:
            self._file.close()
            raise self._refusal(error) from error
        if not mine:
            self._file.close()
            raise UserError(f"{path}: another process is writing it; wait, or give another --output")
        self._file.truncate(0)

    def write(self, lines: Iterator[str]) -> None:
        """Adds lines; a full disk is a UserError."""
        try:
            self._file.writelines(lines)
            self._file.flush()
        except OSError as error:
            raise self._refusal(error) from error

    def commit(self) -> None:
        """Gives the file its name; it is on the disk when this returns."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            os.replace(self._temporary, self._target)
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Removes what has not been committed."""
        if not self._file.closed:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._file.fileno()), self._temporary.stat()):
                    self._temporary.unlink()
            with contextlib.suppress(OSError):  # what a full disk did not take is written again by closing
                self._file.close()

    def _refusal(self, error: OSError) -> UserError:
        return UserError(f"{self._path} cannot be written: {error.strerror or error}")


if __name__ == "__main__":
    terminal.run(main)
