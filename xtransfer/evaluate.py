"""Binary: scores the checkpoints of a workdir on every language, apart from training.

    python -m xtransfer.evaluate --workdir DIR

Reads the Orbax checkpoints that `xtransfer.main` left and adds to DIR/results.jsonl what is not there yet.
"""

import argparse
import dataclasses
import math
from pathlib import Path

import jax

from xtransfer.config import ExperimentConfig, MeshConfig
from xtransfer.data.registry import load_task
from xtransfer.evaluation.evaluator import evaluate
from xtransfer.report.workdir_report import report
from xtransfer.runs.workdir import Workdir, check_unchanged, read_config
from xtransfer.runtime import cluster, locks, processes, terminal
from xtransfer.runtime.sharding import mesh_sizes
from xtransfer.train.finetuning import Models


def main(argv: list[str]) -> None:
    """Parses the flags, evaluates, prints the table."""
    parser = argparse.ArgumentParser(prog="xtransfer.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", required=True, type=Path, metavar="DIR", help="of a run of xtransfer.main")
    cluster.add_flags(parser)
    args = parser.parse_args(argv)
    terminal.start(cluster.flags_of(args))
    workdir = Workdir(args.workdir)
    config = _for_these_devices(read_config(workdir))
    task = load_task(config.task)
    models = Models(config, task)
    check_unchanged(workdir.task, models.facts())
    with locks.group_lock(workdir.root, "evaluation"):
        evaluate(workdir, config, task, models)
    processes.on_first(lambda: report(workdir))


def _for_these_devices(config: ExperimentConfig) -> ExperimentConfig:
    """The config, without its mesh where that does not fit: a pod's checkpoints are scored on a laptop too."""
    devices = jax.device_count()
    if math.prod(mesh_sizes(dataclasses.astuple(config.mesh), devices)) == devices:
        return config
    terminal.log(f"the mesh on record does not fit the {devices} device(s) here: batches are split over all of them")
    return dataclasses.replace(config, mesh=MeshConfig())


if __name__ == "__main__":
    terminal.run(main)
