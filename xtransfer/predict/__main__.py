"""Label text with a trained classifier.

    python -m xtransfer.predict --model DIR --input FILE --output FILE

DIR is a finished run (WORKDIR/students/<objective>/seed-<n> or WORKDIR/teacher) or a Hugging Face classifier. The input
is a .tsv, .csv, .jsonl, or .parquet file with a `text` column, and optionally `text_pair` and `id` columns. The output
has one JSON line per row, in the order of the input: {"id", "label", "probabilities": {name: p}}. A multi-label model
has "labels" in place of "label": all names with a probability above 0.5, perhaps none. A text with more
tokens than the model reads at once is truncated, or with `--long mean` read whole, in chunks. `--calibrated` and
`--threshold` apply what was fitted to a run on source dev: a temperature to probabilities, and a threshold to labels.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import numpy as np

from xtransfer.data.formats import tables
from xtransfer.data.formats.lines import DELIMITERS, Delimiter
from xtransfer.data.tokens.chunks import CHARACTER_LIMIT
from xtransfer.data.tokens.tokenizer import tokenize
from xtransfer.errors import ConfigError, DataError, Exit
from xtransfer.evaluation import calibration, multi_label
from xtransfer.evaluation.recalibration import UNCHANGED, Recalibration, fitted_to
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf.tokenizer import check_pairs
from xtransfer.predict.output import Output
from xtransfer.predict.predictor import LONG, Window, predict
from xtransfer.runs.classifier import TrainedClassifier, open_classifier, selected_run
from xtransfer.runs.find import SELECTIONS
from xtransfer.runtime import compilation_cache, terminal
from xtransfer.runtime.sharding import make_mesh


def main(argv: list[str]) -> None:
    """Parse the flags and label the input. The output file appears complete or not at all."""
    args = _parser().parse_args(argv)
    with terminal.deferred_stop(message="") as should_stop:

        def check() -> None:
            if should_stop():
                status = terminal.stop_status()
                reason = "interrupted" if status == Exit.INTERRUPTED else "stopped"
                print(f"{reason}: {args.output} was not written", file=sys.stderr, flush=True)
                sys.exit(status)

        _run(args, check)


def _parser() -> argparse.ArgumentParser:
    parser = terminal.parser("predict", __doc__)
    parser.add_argument(
        "--model",
        required=True,
        type=terminal.path_argument,
        metavar="DIR",
        help="a finished run or a Hugging Face classifier",
    )
    parser.add_argument(
        "--input",
        required=True,
        type=terminal.path_argument,
        metavar="FILE",
        help="the texts: .tsv, .csv, .jsonl, or .parquet",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=terminal.path_argument,
        metavar="FILE",
        help="the predictions: one JSON line per text",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="the column with the texts (default: text)"
    )
    parser.add_argument(
        "--pair-column",
        metavar="NAME",
        help="the column with the second texts (default: text_pair if it exists; '' for none)",
    )
    parser.add_argument(
        "--id-column", metavar="NAME", help="the column with the ids (default: id if it exists; '' for row numbers)"
    )
    parser.add_argument(
        "--delimiter",
        choices=DELIMITERS,
        default="",
        help="what separates the columns (default: a tab in .tsv, a comma in .csv)",
    )
    parser.add_argument(
        "--empty-text", choices=("error", "skip"), default="error", help="what to do with rows without text"
    )
    parser.add_argument(
        "--max-length",
        type=_positive,
        metavar="N",
        help="the most tokens of a text that the model reads at once (default: the classifier's own)",
    )
    parser.add_argument(
        "--long",
        choices=LONG,
        default="truncate",
        help="truncate texts of more tokens, or take the mean of the logits of overlapping chunks (default: truncate)",
    )
    parser.add_argument(
        "--batch-size", type=_positive, metavar="N", help="the number of 128-token texts per batch (default: automatic)"
    )
    parser.add_argument(
        "--selection", choices=SELECTIONS, default="source_dev", help="how to select a run's checkpoint"
    )
    parser.add_argument("--calibrated", action="store_true", help="divide the logits by the run's temperature")
    parser.add_argument("--threshold", action="store_true", help="decide by the run's thresholds")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of at most nine digits")
    return int(text)


def _run(args: argparse.Namespace, check: Callable[[], None]) -> None:
    """Label the input. Call `check` after every row read and every batch; it raises when the work must stop."""
    if args.delimiter and args.input.suffix.lower() not in (".tsv", ".csv"):
        raise ConfigError(f"--delimiter is {args.delimiter}, but --input {args.input} is neither .tsv nor .csv")
    source = tables.inspect(
        args.input,
        args.text_column,
        args.pair_column,
        args.id_column,
        skip_empty=args.empty_text == "skip",
        delimiter=Delimiter(args.delimiter, advice="pass --delimiter {}"),
    )
    with closing(Output(args.output, source.path, overwrite=args.overwrite)) as output:
        # Read the file once first, so that a bad last row fails now and not after hours.
        with_text = skipped = written = truncated = in_chunks = 0
        for row in tables.read_texts(source):
            if row.empty:
                skipped += 1
            else:
                with_text += 1
            check()
        if not with_text:
            raise DataError(f"{source.path}: no rows with text")
        applied = _recalibration(args)
        compilation_cache.enable_default()
        mesh = make_mesh()
        classifier = open_classifier(args.model, mesh, selection=args.selection)
        max_length = _max_length(classifier, args.max_length, pairs=bool(source.columns.pair))
        started = time.monotonic()
        with terminal.progress_bar("predict", with_text, unit="rows") as progress:

            def on_batch(rows: int) -> None:
                if rows:  # not for the later chunks of a text
                    progress.advance(rows)
                check()

            predictions = predict(classifier, mesh, source, max_length, args.batch_size, on_batch, long=args.long)
            with closing(predictions) as windows:
                for window in windows:
                    output.write(_lines(window, classifier, applied))
                    written += len(window.lines)
                    truncated += int(np.count_nonzero(window.truncated))
                    in_chunks += int(np.count_nonzero(window.chunks > 1))
        if written != with_text:
            raise DataError(
                f"{source.path} changed while it was read: it had {with_text} rows with text, then {written}"
            )
        output.commit()
    rate = written / (time.monotonic() - started)
    notes = [f"{args.output}: {written:,} rows, {rate:,.0f} rows/s"]
    if skipped:
        notes.append(f"skipped rows without text: {skipped:,}")
    if in_chunks:
        notes.append(f"longer than {max_length} tokens and read in chunks: {in_chunks:,} of {written:,}")
    terminal.log(" · ".join(notes))
    if truncated and args.long == "mean":
        terminal.log(f"warning: {truncated:,} of {written:,} texts were read only up to {CHARACTER_LIMIT:,} characters")
    elif truncated:
        terminal.log(
            f"warning: {truncated:,} of {written:,} texts are longer than {max_length} tokens and were truncated; "
            "--long mean reads them whole"
        )


def _recalibration(args: argparse.Namespace) -> Recalibration:
    """Return what the flags apply of what was fitted to the model."""
    if not args.calibrated and not args.threshold:
        return UNCHANGED
    run = selected_run(hf_checkpoint.resolve(str(args.model)), args.selection)
    if run is None:
        raise ConfigError(
            f"{args.model}: a Hugging Face classifier, and only a run has a temperature and a threshold: leave out "
            "--calibrated and --threshold, or name a run's directory"
        )
    return fitted_to(run, temperature=args.calibrated, threshold=args.threshold)


def _max_length(classifier: TrainedClassifier, requested: int | None, *, pairs: bool) -> int:
    """Return the most tokens per text: the requested number, if the model has the positions, or the classifier's."""
    positions = classifier.architecture.max_positions - classifier.architecture.position_offset
    if requested is not None and requested > positions:
        raise ConfigError(f"--max-length {requested} is more than the {positions} positions of {classifier.directory}")
    length = classifier.max_length if requested is None else requested
    if pairs:
        check_pairs(classifier.directory, classifier.tokenizer)
    tokenize(classifier.tokenizer, ["a"], ["a"] if pairs else None, length)  # raises if special tokens fill the length
    return length


def _lines(window: Window, classifier: TrainedClassifier, applied: Recalibration) -> Iterator[str]:
    """Yield a window's predictions, one JSON line per row."""
    labels = classifier.labels
    logits, shifted = applied.scaled(window.logits), applied.shifted(window.logits)
    answers: list[tuple[str, Any]]
    if classifier.multi_label:
        shares = calibration.sigmoid(logits)
        answers = [("labels", [labels[k] for k in np.flatnonzero(row)]) for row in multi_label.predictions(shifted)]
    else:
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))  # [n, K]
        shares = odds / odds.sum(axis=1, keepdims=True)
        answers = [("label", labels[k]) for k in shifted.argmax(axis=1).tolist()]
    for row_id, (key, answer), row in zip(window.ids, answers, shares, strict=True):
        probabilities = {name: float(f"{p:.6g}") for name, p in zip(labels, row.tolist(), strict=True)}
        prediction = {"id": row_id, key: answer, "probabilities": probabilities}
        yield json.dumps(prediction, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    terminal.run(main, interrupted="the output is complete or does not exist")
