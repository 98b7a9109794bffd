"""Write a trained classifier as a Hugging Face directory, with its model card.

    python -m xtransfer.export --workdir DIR --objective NAME --seed N --output DIR

NAME is an objective, or "teacher". The output appears complete or not at all.
"""

from pathlib import Path

from xtransfer.errors import ConfigError
from xtransfer.evaluation.results import read_rows
from xtransfer.export.model_card import model_card
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs.classifier import load_run, warn_of_pooling
from xtransfer.runs.find import SELECTIONS, SelectedRun, find_run
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh

CARD = "README.md"


def main(argv: list[str]) -> None:
    """Parse the flags, and export."""
    parser = terminal.parser("export", __doc__)
    parser.add_argument(
        "--workdir", required=True, type=terminal.path_argument, metavar="DIR", help="the workdir of xtransfer.main"
    )
    parser.add_argument("--objective", required=True, metavar="NAME", help='the student\'s objective, or "teacher"')
    parser.add_argument("--seed", type=int, metavar="N", help="the student's seed; there is only one teacher")
    parser.add_argument(
        "--output", required=True, type=terminal.path_argument, metavar="DIR", help="the directory to create"
    )
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="source_dev",
        help="the protocol that selects the checkpoint (default: %(default)s)",
    )
    args = parser.parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ConfigError(f"{args.output} already exists; choose a new directory")
    export(find_run(Workdir(args.workdir), args.objective, args.seed, args.selection), args.output)


def export(run: SelectedRun, output: Path) -> None:
    """Write a checkpoint as config.json, model.safetensors (float32), tokenizer files, and README.md, the model card.

    Raises:
      UserError: `output` is not empty or cannot be written, or the checkpoint cannot be read.
    """
    results = run.workdir.results
    classifier = load_run(run, make_mesh())
    card = model_card(run, read_rows(results) if results.exists() else [], family=classifier.architecture.family)
    warn_of_pooling(classifier.architecture.family, classifier.pooling, output)
    classifier.tokenizer.model_max_length = classifier.max_length  # so that others truncate texts as in training
    with terminal.deferred_stop(message=""):  # so that SIGTERM leaves no half-written hidden directory
        hf_checkpoint.save(
            output,
            classifier.architecture,
            classifier.params,
            tokenizer=classifier.tokenizer,
            labels=classifier.labels,
            pooling=classifier.pooling,
            notes={CARD: card},
        )
    terminal.log(f"{output}: wrote {run.objective} seed {run.seed}, step {run.step:,} ({run.selection})")


if __name__ == "__main__":
    terminal.run(main, interrupted="the output is complete or does not exist")
