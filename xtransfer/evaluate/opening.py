"""Opening an experiment to score it: its config for the devices here, its task, and its models."""

import dataclasses
import functools
import math
from dataclasses import dataclass

import jax

from xtransfer.config import ExperimentConfig, MeshConfig, cache_dir
from xtransfer.data.registry import load_task
from xtransfer.data.task import Task
from xtransfer.distillation.objectives import Objective, definitions
from xtransfer.errors import ConfigError
from xtransfer.evaluation.metrics import check_names
from xtransfer.runs import encoders, teachers
from xtransfer.runs.workdir import Workdir, check_unchanged, read_config
from xtransfer.runtime import compilation_cache, terminal
from xtransfer.runtime.sharding import mesh_sizes
from xtransfer.train.finetuning import Models


@dataclass(frozen=True)
class Experiment:
    """An experiment in a workdir, with what it takes to score its checkpoints.

    Attributes:
      workdir: the workdir.
      config: the experiment's config, with the requested metrics and splits.
      task: its task, whose target languages include the requested ones.
      models: its models.
      languages: the languages to score; () is all of the task's.
    """

    workdir: Workdir
    config: ExperimentConfig
    task: Task
    models: Models
    languages: tuple[str, ...] = ()

    @property
    def objectives(self) -> dict[str, Objective]:
        """The definitions of the objectives, by name."""
        return definitions(self.config)


@dataclass(frozen=True)
class Scope:
    """What to score an experiment on, if not on what its config says.

    Attributes:
      metrics: the metrics; () takes the experiment's.
      split: the split; "" takes the experiment's.
      languages: the languages, which the experiment need not have; () takes the experiment's.
    """

    metrics: tuple[str, ...] = ()
    split: str = ""
    languages: tuple[str, ...] = ()


def open_experiment(workdir: Workdir, scope: Scope = Scope()) -> Experiment:
    """Open the experiment in a workdir, finished or not.

    Raises:
      UserError: there is no experiment, its data or checkpoints have changed, a metric does not suit its task, or the
        task lacks a language or a split of the scope.
    """
    config = fit_devices(_within(scope, read_config(workdir)))
    compilation_cache.enable(cache_dir(config.task))
    task = load_task(config.task, config.further_sources)
    task = dataclasses.replace(task, load=functools.cache(task.load))
    where = "--metrics" if scope.metrics else "config key metrics"
    check_names(where, config.metrics, task.labels, multi_label=task.multi_label)
    saved = encoders.saved(workdir)
    models = Models(config, task, saved, teachers.ready_made(config, saved))
    check_unchanged(workdir.task, models.facts(), ignore=("teacher_logits", "teachers_logits"))  # scoring needs no file
    if set(scope.languages) - set(task.languages):
        targets = tuple(name for name in scope.languages if name not in task.source_languages)
        try:
            task = load_task(dataclasses.replace(config.task, target_languages=targets))
        except ConfigError as error:
            raise ConfigError(f"--languages {','.join(scope.languages)}: {error}") from error
        task = dataclasses.replace(task, load=functools.cache(task.load))
    if scope.split or scope.languages:  # a start of the experiment has checked no more than its own
        for language in scope.languages or task.languages:
            for split in config.evaluation_splits:
                task.load(split, language)
    return Experiment(workdir, config, task, models, scope.languages)


def _within(scope: Scope, config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with the metrics and the split of the scope."""
    headline = config.headline_metric
    if scope.metrics:
        if headline not in scope.metrics:
            names = ",".join(scope.metrics)
            raise ConfigError(
                f"--metrics {names}: an experiment is scored by {headline} too, which other commands report: "
                f"--metrics {headline},{names}"
            )
        config = dataclasses.replace(config, metrics=scope.metrics)
    return dataclasses.replace(config, evaluation_splits=(scope.split,)) if scope.split else config


def fit_devices(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config, without its mesh if that does not fit: a laptop can score a pod's checkpoints."""
    devices = jax.device_count()
    if math.prod(mesh_sizes(dataclasses.astuple(config.mesh), devices)) == devices:
        return config
    terminal.log(f"the recorded mesh does not fit the {devices} device(s) here; splitting batches over all of them")
    return dataclasses.replace(config, mesh=MeshConfig())
