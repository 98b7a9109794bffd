"""Binary: scores the checkpoints of a workdir on every language, apart from training.

    python -m xtransfer.evaluate --workdir DIR

Reads the Orbax checkpoints that `xtransfer.main` left and adds to DIR/results.jsonl what is not there yet.
"""

import argparse
from pathlib import Path

from xtransfer import cli, report
from xtransfer.data.tasks import get_task
from xtransfer.evaluation.evaluator import evaluate
from xtransfer.train.finetuning import Models
from xtransfer.workdir import Workdir, check_unchanged, locked, read_config


def main(argv: list[str]) -> None:
    """Parses the flags, evaluates, prints the table."""
    parser = argparse.ArgumentParser(prog="xtransfer.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="of a run of xtransfer.main")
    workdir = Workdir(parser.parse_args(argv).workdir)
    config = read_config(workdir)
    task = get_task(config.task)
    models = Models(config, task)
    check_unchanged(workdir.task, models.facts())
    with locked(workdir.root, "evaluation"):
        evaluate(workdir, config, task, models)
    report.main(["--workdir", str(workdir.root)])


if __name__ == "__main__":
    cli.run(main)
