"""Binary: is our encoder the same function as the original? A report layer by layer, and the verdict.

    python -m xtransfer.parity --model DIR [--reference FILE] [--record FILE] [--json FILE]

The reference is computed by PyTorch and `transformers` where PyTorch is installed; elsewhere it is read from
FILE or DIR/reference.safetensors, which --record wrote on a machine that has it. Exit status 1 where they differ.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xtransfer import storage
from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_pairs, check_tokenizer
from xtransfer.parity import activations, reference
from xtransfer.parity.activations import Difference
from xtransfer.parity.reference import Reference
from xtransfer.report import table as tables
from xtransfer.report.table import Table
from xtransfer.runtime import terminal

PAIR = ("Is the shop open on Sunday?", "It opens at ten and closes when the last guest has gone.")
SENTENCES = (
    "Yes.",
    "The soup was cold, but nobody at our table dared to say so.",
    "Der Zug nach Köln fährt heute leider zwanzig Minuten später ab.",
    "¿Quién dejó la ventana abierta anoche?",
    "L'été dernier, nous avons traversé les Pyrénées à pied.",
    "Мы купили хлеб, сыр и два килограмма яблок.",
    "这家餐馆的面条又便宜又好吃。",
    "駅の前で三時に会いましょう。",
    "كان الطريق إلى القرية طويلاً وجميلاً.",
    "बारिश के बाद आसमान साफ़ हो गया।",
    "Room 12/B: €49.90 (incl. Wi-Fi) – well, almost… 🙂",
    "She wrote the first letter in spring, when the river was high; the second came in June and spoke of the harvest, "
    "of a neighbour's wedding, and of a dog that had followed her home; in the third, which we still keep in the "
    "drawer beside the stove, she asks whether the apple trees have been cut, who looks after the bees, and why none "
    "of us has ever answered. It is not that we did not want to. My father began an answer every winter, on the good "
    "paper, by the good lamp, and every winter he put it away again because the news had grown old before the page "
    "was full, and so the three letters lie there, and the bees, I can say it now, are well.",
)


@dataclass(frozen=True)
class Report:
    """The rows, what they are of, and the verdict."""

    model: Path
    source: str
    notes: tuple[str, ...]
    rows: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        """Whether every row is within what is allowed."""
        return all(row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        """One sentence: the same function, or the first and the worst difference."""
        if self.ok:
            return f"The same function: all {len(self.rows)} activations agree with the reference."
        wrong = [row for row in self.rows if not row.ok]
        first = wrong[0]
        place = ", ".join(map(str, first.worst))
        return (
            f"NOT the same function: {len(wrong)} of {len(self.rows)} activations differ too much, first {first.name} "
            f"(by {first.maximum:.2e} at [{place}], {first.allowed:.2e} is allowed)."
        )


def main(argv: list[str]) -> None:
    """Parses the flags, computes both sides, prints the report."""
    parser = argparse.ArgumentParser(prog="xtransfer.parity", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, metavar="DIR", help="directory, hub id, or embedded checkpoint")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="recorded by --record; default: live PyTorch")
    parser.add_argument("--record", type=Path, metavar="FILE", help="writes the live reference, for other machines")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the report for programs")
    args = parser.parse_args(argv)
    if args.json is not None and args.json.exists():
        raise UserError(f"{args.json}: exists already: give another file to --json")
    report = check(hf_checkpoint.resolve(args.model), args.reference, args.record)
    show(report)
    if args.json is not None:
        storage.write_atomically(args.json, as_json(report))
    if not report.ok:
        sys.exit(terminal.EXIT_USER_ERROR)


def check(directory: Path, recorded: Path | None = None, record: Path | None = None) -> Report:
    """Compares a checkpoint's activations with those of the recorded reference, or of a live one, which `record` keeps.

    Raises:
      UserError: the checkpoint cannot be read; there is no reference, or it is of other weights.
    """
    config = hf_config.read_config(directory)
    notes = [f"{config.family}, {config.num_layers} layers of {config.hidden_size}"]
    if hf_config.read_pooling(directory) != "cls":
        notes.append(
            "the classifier pools by the mean; pooled and logits are those of the first token, as transformers has it"
        )
    found, source = _reference(directory, recorded, record, notes)
    if record is not None:
        reference.save(record, found)
    tokens = int(found.inputs["attention_mask"].sum())
    notes.append(f"{len(found.inputs['input_ids'])} examples, {tokens} tokens")
    ours = activations.activations(directory, found.inputs)
    try:
        rows = activations.compare(ours, found.activations)
    except ValueError as error:
        raise UserError(f"{directory}: not the architecture of the reference: {error}") from error
    if rows[-1].name != "logits":
        notes.append("no trained classification head in the weights: no logits to compare")
    return Report(directory, source, tuple(notes), rows)


def _reference(directory: Path, recorded: Path | None, record: Path | None, notes: list[str]) -> tuple[Reference, str]:
    """(the reference, what it is); `notes` hears of the inputs of a live one."""
    if recorded is not None and record is not None:
        raise UserError("--record keeps a live reference: leave out --reference")
    if recorded is None and reference.available():
        if record is not None and record.exists() and not reference.is_reference(record):
            raise UserError(f"{record}: exists and is no reference: give another file to --record")
        inputs, what = _inputs(directory)
        notes.append(what)
        found = reference.compute(directory, inputs)
        return found, f"computed live by {found.made_with}"
    if record is not None:
        raise UserError("--record needs PyTorch, which is not installed: run it where it is, or install torch")
    if recorded is None and not (directory / reference.FILE).is_file():
        raise UserError(
            f"{directory}: nothing to compare with: install torch, or on a machine that has it write a reference with "
            f"--record, and give it to --reference or put it at {directory / reference.FILE}"
        )
    file = recorded or directory / reference.FILE
    found = reference.load(file, directory)
    return found, f"{file}, recorded by {found.made_with}"


def _inputs(directory: Path) -> tuple[dict[str, np.ndarray], str]:
    """Sentences and a pair through the checkpoint's own tokenizer, random ids where it has none that fits."""
    config = hf_config.read_config(directory)
    try:
        tokenizer = load_tokenizer(directory)
        check_tokenizer(directory, tokenizer)
        parts = [tokenize(tokenizer, SENTENCES, None, activations.limit(config))]
    except UserError as error:
        return activations.random_inputs(config), f"inputs are random token ids ({error})"
    what = "and a pair, by its own tokenizer"
    try:
        check_pairs(directory, tokenizer)
        parts.append(tokenize(tokenizer, PAIR[:1], PAIR[1:], activations.limit(config)))
    except UserError as error:
        what = f"by its own tokenizer, and no pair ({error})"
    examples = [part.item(i) for part in parts for i in range(len(part))]
    return activations.pad(examples, config), f"inputs are sentences in several languages {what}"


HEADER = ("activation", "shape", "max diff", "mean diff", "largest ref", "allowed", "agrees")


def cells(rows: Sequence[Difference]) -> list[tuple[str, ...]]:
    """The rows as text, in the columns of HEADER."""
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
    """Prints the report: a table on a terminal, Markdown elsewhere."""
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
    """The report as one JSON object."""
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
