"""Write a trained classifier as a Hugging Face directory, with its model card.

    python -m xtransfer.export --workdir DIR --objective NAME --seed N [--draw NAME] --output DIR

NAME is an objective, or "teacher". A draw is a folder of DIR/draws. The output appears complete or not at all.
`--calibrated` and `--threshold` fold what was fitted on source dev into the head: a temperature, and a decision
threshold between two classes.
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from xtransfer.errors import ConfigError
from xtransfer.evaluation.recalibration import UNCHANGED, Recalibration, fitted_to
from xtransfer.evaluation.results import read_rows
from xtransfer.export.model_card import model_card
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs.classifier import load_run, warn_of_pooling
from xtransfer.runs.find import SELECTIONS, SelectedRun, find_run
from xtransfer.runs.workdir import DEFAULT_DRAW, RunId, Workdir
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import make_mesh, path_name

CARD = "README.md"


def main(argv: list[str]) -> None:
    """Parse the flags, and export."""
    parser = terminal.parser("export", __doc__)
    parser.add_argument(
        "--workdir", required=True, type=terminal.path_argument, metavar="DIR", help="the workdir of xtransfer.main"
    )
    parser.add_argument("--objective", required=True, metavar="NAME", help='the student\'s objective, or "teacher"')
    parser.add_argument("--seed", type=int, metavar="N", help="the student's seed; a draw has only one teacher")
    parser.add_argument(
        "--draw", default=DEFAULT_DRAW, metavar="NAME", help="a folder of DIR/draws (default: the runs in DIR itself)"
    )
    parser.add_argument(
        "--output", required=True, type=terminal.path_argument, metavar="DIR", help="the directory to create"
    )
    parser.add_argument(
        "--selection",
        choices=SELECTIONS,
        default="source_dev",
        help="the protocol that selects the checkpoint (default: %(default)s)",
    )
    parser.add_argument("--calibrated", action="store_true", help="divide the head by the run's temperature")
    parser.add_argument(
        "--threshold", action="store_true", help="shift the head's bias by the run's threshold, for two classes"
    )
    args = parser.parse_args(argv)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise ConfigError(f"{args.output} already exists; choose a new directory")
    run = find_run(Workdir(args.workdir, args.draw), args.objective, args.seed, args.selection)
    export(run, args.output, fitted_to(run, temperature=args.calibrated, threshold=args.threshold))


def export(run: SelectedRun, output: Path, applied: Recalibration = UNCHANGED) -> None:
    """Write a checkpoint as config.json, model.safetensors (float32), tokenizer files, and README.md, the model card.

    Args:
      run: the checkpoint.
      output: the directory to create.
      applied: what to fold into the head.

    Raises:
      UserError: `output` is not empty or cannot be written, or the checkpoint cannot be read.
    """
    results = run.workdir.results
    classifier = load_run(run, make_mesh())
    rows = read_rows(results) if results.exists() else []
    card = model_card(run, rows, family=classifier.architecture.family, applied=applied)
    warn_of_pooling(classifier.architecture.family, classifier.pooling, output)
    classifier.tokenizer.model_max_length = classifier.max_length  # so that others truncate texts as in training
    with terminal.deferred_stop(message=""):  # so that SIGTERM leaves no half-written hidden directory
        hf_checkpoint.save(
            output,
            classifier.architecture,
            _folded(classifier.params, applied),
            tokenizer=classifier.tokenizer,
            labels=classifier.labels,
            pooling=classifier.pooling,
            notes={CARD: card},
            multi_label=classifier.multi_label,
        )
    terminal.log(
        f"{output}: wrote {run.objective} {RunId(run.workdir.draw, run.seed)}, step {run.step:,} ({run.selection})"
    )


def _folded(params: Any, applied: Recalibration) -> Any:
    """Return the parameters of a classifier with a recalibrated head."""
    if applied == UNCHANGED:
        return params
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    names = ("head.kernel", "head.bias")
    head = dict(zip(names, applied.folded(*(np.asarray(leaves[name]) for name in names)), strict=True))

    def replace(path: Any, leaf: jax.Array) -> jax.Array:
        name = path_name(path)
        return jax.device_put(head[name], leaf.sharding) if name in head else leaf

    return jax.tree_util.tree_map_with_path(replace, params)


if __name__ == "__main__":
    terminal.run(main, interrupted="the output is complete or does not exist")
