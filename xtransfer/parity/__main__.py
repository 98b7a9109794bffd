"""Compare an encoder with the same model in transformers, layer by layer.

    python -m xtransfer.parity --model DIR [--reference FILE] [--record FILE] [--json FILE]

If PyTorch is installed, it computes the reference with `transformers`. Otherwise the reference is read from FILE or
from DIR/reference.safetensors, which --record wrote on another machine. The exit status is 1 if the two models differ.
"""

import json
import sys
from collections.abc import Sequence

from xtransfer import storage
from xtransfer.errors import ConfigError, Exit
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.parity import activations
from xtransfer.parity.activations import Difference
from xtransfer.parity.comparison import Report, check
from xtransfer.report import table as table_writer
from xtransfer.report.table import Table
from xtransfer.runtime import compilation_cache, terminal


def main(argv: list[str]) -> None:
    """Parse the flags, compare the two models, and print the report."""
    parser = terminal.parser("parity", __doc__)
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a directory, a hub id, or an embedded checkpoint"
    )
    parser.add_argument(
        "--reference", type=terminal.path_argument, metavar="FILE", help="a recorded reference (default: run PyTorch)"
    )
    parser.add_argument(
        "--record", type=terminal.path_argument, metavar="FILE", help="save the reference, for machines without PyTorch"
    )
    parser.add_argument("--json", type=terminal.path_argument, metavar="FILE", help="also write the report as JSON")
    args = parser.parse_args(argv)
    if args.json is not None and args.json.exists():
        raise ConfigError(f"{args.json} already exists; choose another file for --json")
    compilation_cache.enable_default()
    report = check(hf_checkpoint.resolve(args.model), args.reference, args.record)
    show(report)
    if args.json is not None:
        storage.write_atomically(args.json, as_json(report))
    if not report.ok:
        sys.exit(Exit.DEFECT)


HEADER = ("activation", "shape", "max diff", "mean diff", "largest ref", "allowed", "agrees")


def cells(rows: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Return the table's cells, in the columns of HEADER."""
    return [
        (
            row.name,
            " × ".join(map(str, row.shape)),
            f"{row.maximum:.2e}",
            f"{row.mean:.2e}",
            f"{row.largest:.4g}",
            f"{row.allowed:.2e}",
            "yes" if row.ok else "NO",
        )
        for row in rows
    ]


def show(report: Report) -> None:
    """Print a report: a table on a terminal, Markdown elsewhere."""
    title = f"Parity of {report.model} with the reference {report.source}"
    rule = f"allowed difference: {activations.TOLERANCE:g} × max(1, largest |reference|), over all tokens but padding"
    notes = (*report.notes, rule)
    table = Table(HEADER, tuple(cells(report.rows)), title=title)
    if not terminal.console.is_terminal:
        grid = table_writer.markdown(table)
        print("\n".join([f"# {title}", "", *grid, "", *(f"- {note}" for note in notes), "", f"**{report.verdict}**"]))
        return
    table_writer.show(table, terminal.console, highlight={i for i, row in enumerate(report.rows) if not row.ok})
    for note in notes:
        terminal.log(note)
    terminal.console.print(report.verdict, markup=False, style="bold green" if report.ok else "bold red")


def as_json(report: Report) -> str:
    """Return a report as one JSON object."""
    record = {
        "model": str(report.model),
        "reference": report.source,
        "notes": list(report.notes),
        "tolerance": activations.TOLERANCE,
        "activations": activations.records(report.rows),
        "ok": report.ok,
        "verdict": report.verdict,
    }
    return json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    terminal.run(main, interrupted="run the command again")
