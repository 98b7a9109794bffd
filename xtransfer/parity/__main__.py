"""Compare an encoder with the same model in transformers, layer by layer.

    python -m xtransfer.parity --model DIR [--reference FILE] [--record FILE] [--json FILE]

If PyTorch is installed, PyTorch and `transformers` compute the reference. Otherwise it is read from FILE or from
DIR/reference.safetensors, which --record wrote on another machine. The exit status is 1 if the two differ.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from xtransfer import storage
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.parity import activations
from xtransfer.parity.activations import Difference
from xtransfer.parity.comparison import Report, check
from xtransfer.report import table as tables
from xtransfer.report.table import Table
from xtransfer.runtime import terminal


def main(argv: list[str]) -> None:
    """Parse the flags, compute both sides, and print the report."""
    parser = argparse.ArgumentParser(prog="python -m xtransfer.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="directory, hub id, or embedded checkpoint")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="a recorded reference; default: live PyTorch")
    parser.add_argument("--record", type=Path, metavar="FILE", help="record the live reference, for other machines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report for programs")
    args = parser.parse_args(argv)
    if args.json is not None and args.json.exists():
        raise UserError(f"{args.json} already exists; choose another file for --json")
    report = check(hf_checkpoint.resolve(args.model), args.reference, args.record)
    show(report)
    if args.json is not None:
        storage.write_atomically(args.json, as_json(report))
    if not report.ok:
        sys.exit(terminal.EXIT_USER_ERROR)


HEADER = ("activation", "shape", "max diff", "mean diff", "largest ref", "allowed", "agrees")


def cells(rows: Sequence[Difference]) -> list[tuple[str, ...]]:
    """Return the rows as text, in the columns of HEADER."""
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
    """Print the report: a table on a terminal, Markdown elsewhere."""
    title = f"Parity of {report.model} with the reference {report.source}"
    rule = f"allowed: {activations.TOLERANCE:g} × max(1, largest |reference|), over the tokens that are not padding"
    notes = (*report.notes, rule)
    table = Table(HEADER, tuple(cells(report.rows)), title=title)
    if not terminal.console.is_terminal:
        grid = tables.markdown(table)
        print("\n".join([f"# {title}", "", *grid, "", *(f"- {note}" for note in notes), "", f"**{report.verdict}**"]))
        return
    tables.show(table, terminal.console, highlight={i for i, row in enumerate(report.rows) if not row.ok})
    for note in notes:
        terminal.log(note)
    terminal.console.print(report.verdict, markup=False, style="bold green" if report.ok else "bold red")


def as_json(report: Report) -> str:
    """Return the report as one JSON object."""
    found = {
        "model": str(report.model),
        "reference": report.source,
        "notes": list(report.notes),
        "tolerance": activations.TOLERANCE,
        "activations": activations.records(report.rows),
        "ok": report.ok,
        "verdict": report.verdict,
    }
    return json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


if __name__ == "__main__":
    terminal.run(main, interrupted="start it again")
