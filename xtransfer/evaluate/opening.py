"""Opening an experiment to score it: its config for the devices here, its task, and its models."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from xtransfer.config import ExperimentConfig, MeshConfig, cache_dir
from xtransfer.data.registry import load_task
from xtransfer.data.task import Task
from xtransfer.evaluation.metrics import check_names
from xtransfer.runs import encoders
from xtransfer.runs.workdir import Workdir, check_unchanged, read_config
from xtransfer.runtime import compilation_cache, terminal
from xtransfer.runtime.sharding import mesh_sizes
from xtransfer.train.finetuning import Models


@dataclass(frozen=True)
class Experiment:
    """An experiment in a workdir, with what it takes to score its checkpoints."""

    workdir: Workdir
    config: ExperimentConfig
    task: Task
    models: Models


def open_experiment(workdir: Workdir, names: Sequence[str] = ()) -> Experiment:
    """Open the experiment in a workdir, finished or not.

    Args:
      workdir: the workdir.
      names: the metrics to score; () takes the experiment's own.

    Raises:
      UserError: there is no experiment, its data or checkpoints have changed, or a metric does not suit its task.
    """
    config = fit_devices(with_metrics(read_config(workdir), names))
    compilation_cache.enable(cache_dir(config.task))
    task = load_task(config.task)
    task = dataclasses.replace(task, load=functools.cache(task.load))
    check_names("metrics", config.metrics, task.labels)
    models = Models(config, task, encoders.saved(workdir))
    check_unchanged(workdir.task, models.facts())
    return Experiment(workdir, config, task, models)


def with_metrics(config: ExperimentConfig, names: Sequence[str]) -> ExperimentConfig:
    """Return the config with other metrics, unless there are none; a UserError says if accuracy is missing."""
    if not names:
        return config
    config = dataclasses.replace(config, metrics=tuple(dict.fromkeys(names)))
    config.check()
    return config


def fit_devices(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config, without its mesh if that does not fit: a laptop can score a pod's checkpoints."""
    devices = jax.device_count()
    if math.prod(mesh_sizes(dataclasses.astuple(config.mesh), devices)) == devices:
        return config
    terminal.log(f"the recorded mesh does not fit the {devices} device(s) here; splitting batches over all of them")
    return dataclasses.replace(config, mesh=MeshConfig())
