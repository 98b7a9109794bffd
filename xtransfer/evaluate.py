"""Score the checkpoints of a workdir in every language, in a process of its own.

    python -m xtransfer.evaluate --workdir DIR

Reads the Orbax checkpoints that `xtransfer.main` wrote, and adds the missing results to DIR/results.jsonl.
"""

import argparse
import dataclasses
import math

import jax

from xtransfer.config import ExperimentConfig, MeshConfig, cache_dir
from xtransfer.data.registry import load_task
from xtransfer.evaluation.evaluator import evaluate
from xtransfer.report.workdir_report import report
from xtransfer.runs import encoders
from xtransfer.runs.workdir import Workdir, check_unchanged, read_config
from xtransfer.runtime import cluster, compilation_cache, locks, processes, terminal
from xtransfer.runtime.sharding import mesh_sizes
from xtransfer.train.finetuning import Models


def main(argv: list[str]) -> None:
    """Parse the flags, evaluate, and report."""
    parser = argparse.ArgumentParser(prog="python -m xtransfer.evaluate", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--workdir", required=True, type=terminal.path_argument, metavar="DIR", help="the workdir of xtransfer.main"
    )
    cluster.add_flags(parser)
    args = parser.parse_args(argv)
    terminal.start(cluster.parse_flags(args))
    workdir = Workdir(args.workdir)
    config = _fit_devices(read_config(workdir))
    compilation_cache.enable(cache_dir(config.task))
    task = load_task(config.task)
    models = Models(config, task, encoders.saved(workdir))
    check_unchanged(workdir.task, models.facts())
    with locks.group_lock(workdir.root, "evaluation"):
        evaluate(workdir, config, task, models)
    processes.on_first(lambda: report(workdir))


def _fit_devices(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config, without its mesh if that does not fit: a laptop can score a pod's checkpoints."""
    devices = jax.device_count()
    if math.prod(mesh_sizes(dataclasses.astuple(config.mesh), devices)) == devices:
        return config
    terminal.log(f"the recorded mesh does not fit the {devices} device(s) here; splitting batches over all of them")
    return dataclasses.replace(config, mesh=MeshConfig())


if __name__ == "__main__":
    terminal.run(main)
