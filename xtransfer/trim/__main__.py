"""Trim a model's vocabulary to the pieces that given text needs.

    python -m xtransfer.trim --model DIR --text FILE… --output DIR

DIR is a finished run (WORKDIR/students/<objective>/seed-<n> or WORKDIR/teacher), a Hugging Face directory, a hub id, or
an embedded checkpoint. The texts are .txt files with one text per line, or .tsv, .csv, .jsonl, or .parquet files with a
`text` column. Special and added tokens stay, and so do the single characters (or bytes) of the text. The output is a
Hugging Face directory that splits the text into the same pieces and computes the same logits.
"""

import argparse
import dataclasses
import json

from xtransfer import storage
from xtransfer.data.tokens.chunks import CHARACTER_LIMIT
from xtransfer.errors import ConfigError
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.runs.find import SELECTIONS
from xtransfer.runtime import terminal
from xtransfer.trim.text import Agreement
from xtransfer.trim.trimming import Report, open_source, trim
from xtransfer.trim.vocabulary import Limits


def main(argv: list[str]) -> None:
    """Parse the flags, trim, and print the sizes."""
    args = _parser().parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ConfigError(f"{args.output} already exists; choose a new directory")
    if args.json is not None and args.json.exists():
        raise ConfigError(f"{args.json} already exists; choose another file for --json")
    for path in (args.output, args.json):
        if path is not None:
            storage.check_creatable(path)
    limits = Limits(args.min_count, args.keep_pieces)
    source = open_source(args.model, args.selection)
    report = trim(source, args.text, args.text_column, limits, args.check, args.output)
    show(report)
    for flag, agreement in (("--text", report.text), ("--check", report.check)):
        if agreement is not None and agreement.clipped:
            terminal.log(
                f"warning: {agreement.clipped:,} of {agreement.texts:,} texts of {flag} were read only up to "
                f"{CHARACTER_LIMIT:,} characters; give each text a line of its own"
            )
    if args.json is not None:
        storage.write_atomically(args.json, json.dumps(dataclasses.asdict(report), ensure_ascii=False) + "\n")
    terminal.log(f"{args.output}: wrote the trimmed model")


def _parser() -> argparse.ArgumentParser:
    parser = terminal.parser("trim", __doc__)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a finished run, a Hugging Face directory, or a hub id"
    )
    parser.add_argument(
        "--text",
        required=True,
        nargs="+",
        type=terminal.path_argument,
        metavar="FILE",
        help="the texts: .txt with one per line, .tsv, .csv, .jsonl, or .parquet",
    )
    parser.add_argument(
        "--output", required=True, type=terminal.path_argument, metavar="DIR", help="the directory to create"
    )
    parser.add_argument(
        "--text-column", default="text", metavar="NAME", help="the column with the texts (default: %(default)s)"
    )
    parser.add_argument(
        "--min-count",
        default=1,
        type=_positive,
        metavar="N",
        help="keep pieces that occur at least N times (default: %(default)s)",
    )
    parser.add_argument(
        "--keep-pieces",
        type=_positive,
        metavar="N",
        help="keep the N most frequent pieces of the text (default: all), beside special tokens and characters",
    )
    parser.add_argument(
        "--check", type=terminal.path_argument, metavar="FILE", help="other texts to compare both tokenizers on"
    )
    parser.add_argument(
        "--selection", choices=SELECTIONS, default="source_dev", help="how to select a run's checkpoint"
    )
    parser.add_argument("--json", type=terminal.path_argument, metavar="FILE", help="also write the report as JSON")
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of at most nine digits")
    return int(text)


def tables(report: Report) -> tuple[Table, ...]:
    """Return the report's tables: the sizes, and how both tokenizers split the texts."""
    before, after = dataclasses.asdict(report.before), dataclasses.asdict(report.after)
    names = {"pieces": "pieces", "parameters": "parameters", "weights": "weights, MB", "tokenizer": "tokenizer, MB"}
    sizes = tuple(
        (name, _number(key, before[key]), _number(key, after[key]), f"{after[key] / before[key]:.1%}")
        for key, name in names.items()
    )
    agreements = {"text": report.text} | ({} if report.check is None else {"check": report.check})
    return (
        Table(("size", "before", "after", "share"), sizes),
        Table(
            ("texts", "number", "same pieces", "tokens before", "after", "unknown before", "after"),
            tuple((name, *_cells(agreement)) for name, agreement in agreements.items()),
        ),
    )


def _number(key: str, value: int) -> str:
    return f"{value / 1e6:,.2f}" if key in ("weights", "tokenizer") else f"{value:,}"


def _cells(agreement: Agreement) -> tuple[str, ...]:
    unknown = (f"{count / max(1, total):.2%}" for count, total in zip(agreement.unknown, agreement.tokens, strict=True))
    return (
        f"{agreement.texts:,}",
        f"{agreement.same / agreement.texts:.1%}",
        *(f"{total:,}" for total in agreement.tokens),
        *unknown,
    )


def show(report: Report) -> None:
    """Print the tables on a terminal, or as Markdown elsewhere."""
    for table in tables(report):
        if terminal.console.is_terminal:
            table_writer.show(table, terminal.console)
        else:
            print("\n".join([*table_writer.markdown(table), ""]))


if __name__ == "__main__":
    terminal.run(main, interrupted="the output is complete or does not exist")
