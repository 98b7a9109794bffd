"""Binary: writes a trained model as a Hugging Face directory, with its model card.

    python -m xtransfer.export --workdir DIR --objective NAME --seed N --output DIR

NAME is an objective, or "teacher". The output appears whole or not at all.
"""

import argparse
from pathlib import Path

from xtransfer.errors import UserError
from xtransfer.evaluation.results import read_rows
from xtransfer.export.model_card import model_card
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs.classifier import load_run
from xtransfer.runs.find import SELECTIONS, SelectedRun, find_run
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh

CARD = "README.md"


def main(argv: list[str]) -> None:
    """Parses the flags, writes the directory."""
    parser = argparse.ArgumentParser(prog="xtransfer.export", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="of a run of xtransfer.main")
    parser.add_argument("--objective", required=True, metavar="NAME", help='of the student, or "teacher"')
    parser.add_argument("--seed", type=int, metavar="N", help="of the student; there is one teacher")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="to be made")
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="source_dev",
        help="how the checkpoint is chosen (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"{args.output}: exists already: give a new directory")
    export(find_run(Workdir(args.workdir), args.objective, args.seed, args.selection), args.output)


def export(chosen: SelectedRun, output: Path) -> None:
    """Writes a checkpoint as config.json, model.safetensors (float32), tokenizer files and README.md, the card.

    Raises:
      UserError: `output` exists with something in it or cannot be written, or the checkpoint cannot be read.
    """
    results = chosen.workdir.results
    card = model_card(chosen, read_rows(results) if results.exists() else [])
    trained = load_run(chosen, make_mesh())
    if trained.pooling != "cls":
        terminal.log(
            f"warning: this classifier pools by {trained.pooling}, which transformers cannot: it would load {output} "
            "without an error and compute other logits; read it with python -m xtransfer.predict only"
        )
    trained.tokenizer.model_max_length = trained.max_length  # so that others cut texts where the training did
    with terminal.deferred_stop(said=""):  # a SIGTERM leaves no half of it in a hidden directory
        hf_checkpoint.save(
            output,
            trained.architecture,
            trained.params,
            tokenizer=trained.tokenizer,
            labels=trained.labels,
            pooling=trained.pooling,
            notes={CARD: card},
        )
    terminal.log(f"{output}: {chosen.objective} seed {chosen.seed}, step {chosen.step:,} ({chosen.selection}), written")


if __name__ == "__main__":
    terminal.run(main, interrupted="the output is there whole or not at all")
