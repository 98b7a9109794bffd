"""Label text with a trained classifier.

    python -m xtransfer.predict --model DIR --input FILE --output FILE

DIR is a run of a workdir (WORKDIR/students/<objective>/seed-<n> or WORKDIR/teacher) or a Hugging Face classifier. The
input is .tsv, .csv, .jsonl, or .parquet with a column `text`, and optionally `text_pair` and `id`. The output has one
JSON line per row, in the input's order: {"id", "label", "probabilities": {name: p}}.
"""

import argparse
import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer.data.formats import tables
from xtransfer.data.tokens.tokenizer import tokenize
from xtransfer.errors import UserError
from xtransfer.models.hf.tokenizer import check_pairs
from xtransfer.predict.output import Output
from xtransfer.predict.predictor import Window, predict
from xtransfer.runs.classifier import TrainedClassifier, open_classifier
from xtransfer.runs.find import SELECTIONS
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh


def main(argv: list[str]) -> None:
    """Parse the flags, and predict. The output file appears complete or not at all."""
    args = _parser().parse_args(argv)
    interrupted = threading.Event()

    def interrupt(number: int, frame: Any) -> None:
        # An exception raised inside a callback of the garbage collector is lost, so wait for the next check, unless
        # Ctrl-C comes again.
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # a background job keeps ignoring Ctrl-C
        signal.signal(signal.SIGINT, interrupt)
    try:
        with terminal.deferred_stop(message="") as stopping:

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
    parser = argparse.ArgumentParser(prog="python -m xtransfer.predict", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, type=Path, metavar="DIR", help="a run of a workdir, or a classifier")
    parser.add_argument("--input", required=True, type=Path, metavar="FILE", help=".tsv, .csv, .jsonl, or .parquet")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="JSON lines, in the input's order")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="default: text")
    parser.add_argument("--pair-column", metavar="NAME", help="default: text_pair if it exists; '' for none")
    parser.add_argument("--id-column", metavar="NAME", help="default: id if it exists; '' for row numbers")
    parser.add_argument("--empty-text", choices=("error", "skip"), default="error", help="what to do without text")
    parser.add_argument("--max-length", type=_positive, metavar="N", help="tokens per text; default: the model's")
    parser.add_argument("--batch-size", type=_positive, metavar="N", help="texts of 128 tokens to compute at once")
    parser.add_argument(
        "--selection", choices=SELECTIONS, default="source_dev", help="the protocol that selects a run's checkpoint"
    )
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of at most nine digits")
    return int(text)


def _run(args: argparse.Namespace, check: Callable[[], None]) -> None:
    """Predict; `check` is called now and then, and raises when the work must stop."""
    source = tables.inspect(
        args.input, args.text_column, args.pair_column, args.id_column, skip_empty=args.empty_text == "skip"
    )
    with closing(Output(args.output, source.path, overwrite=args.overwrite)) as output:
        # Read the file once first, so that a bad last row fails now and not after hours.
        kept = skipped = written = clipped = 0
        for row in tables.read_texts(source):
            kept, skipped = kept + (not row.empty), skipped + row.empty
            check()
        if not kept:
            raise UserError(f"{source.path}: no rows with text")
        mesh = make_mesh()
        classifier = open_classifier(args.model, mesh, selection=args.selection)
        max_length = _max_length(classifier, args.max_length, pairs=bool(source.columns.pair))
        started = time.monotonic()
        with terminal.progress_bar("predict", kept, unit="rows") as ticker:

            def on_batch(rows: int) -> None:
                ticker.advance(rows)
                check()

            with closing(predict(classifier, mesh, source, max_length, args.batch_size, on_batch)) as windows:
                for window in windows:
                    output.write(_lines(window, classifier.labels))
                    written += len(window.places)
                    clipped += window.clipped
        if written != kept:
            raise UserError(f"{source.path}: had {kept} rows, then {written}: it changed while it was read")
        output.commit()
    rate = written / (time.monotonic() - started)
    notes = [f"{args.output}: {written:,} rows, {rate:,.0f} rows/s"]
    if skipped:
        notes.append(f"rows without text, skipped: {skipped:,}")
    if clipped:
        notes.append(f"warning: very long texts, clipped: {clipped:,}")
    terminal.log(" · ".join(notes))


def _max_length(classifier: TrainedClassifier, wanted: int | None, *, pairs: bool) -> int:
    positions = classifier.architecture.max_positions - classifier.architecture.position_offset
    if wanted is not None and wanted > positions:
        raise UserError(f"--max-length {wanted} is more than the {positions} positions of {classifier.directory}")
    length = classifier.max_length if wanted is None else wanted
    if pairs:
        check_pairs(classifier.directory, classifier.tokenizer)
    tokenize(classifier.tokenizer, ["a"], ["a"] if pairs else None, length)  # refuses a length without room for text
    return length


def _lines(window: Window, labels: Sequence[str]) -> Iterator[str]:
    logits = window.logits.astype(np.float64)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    for (_, id_), row in zip(window.places, odds / odds.sum(axis=1, keepdims=True), strict=True):
        probabilities = {name: float(f"{p:.6g}") for name, p in zip(labels, row.tolist(), strict=True)}
        found = {"id": id_, "label": labels[int(row.argmax())], "probabilities": probabilities}
        yield json.dumps(found, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    terminal.run(main)
