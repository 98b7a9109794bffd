"""The stages of an experiment: teacher -> logits -> students -> evaluation. Finished work is never repeated."""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np

from xtransfer.config import ExperimentConfig, cache_dir, refuse_pattern
from xtransfer.data.batches.batches import Dataset
from xtransfer.data.registry import load_task
from xtransfer.data.task import Example, Task
from xtransfer.data.tokens.tokenizer import tokenizer_fingerprint
from xtransfer.distillation import transfer_set
from xtransfer.distillation.labelling import label, permute_classes
from xtransfer.distillation.logits_store import LogitsStore, open_store
from xtransfer.distillation.objectives import OBJECTIVES, Objective, configured_objective
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import ConfigError
from xtransfer.evaluation import metrics, recalibration, results
from xtransfer.evaluation.evaluator import dev_scores, evaluate
from xtransfer.evaluation.evaluator import runs as runs_of
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import costs, encoders, plan, starts, versions
from xtransfer.runs import workdir as workdirs
from xtransfer.runs.find import selected_steps
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import compilation_cache, locks, processes, sharding, terminal
from xtransfer.train.checkpoints import Checkpoints, fall_back
from xtransfer.train.finetuning import Finetuner, Models
from xtransfer.train.loop import CHECKPOINTS

SHARD_SIZE = 1024  # examples per logits shard; an interruption loses at most one shard


def run(config: ExperimentConfig, root: Path, *, from_earlier_step: bool = False) -> None:
    """Run every stage that is not finished yet.

    Everything that a user may have to fix (settings, data in every language, checkpoints) is checked before anything is
    trained, and only then are the settings recorded.

    Args:
      config: the experiment's config.
      root: the workdir.
      from_earlier_step: remove a run's newest checkpoint if it is damaged, and resume from the one before it.

    Raises:
      UserError: a setting, the data, or a checkpoint cannot be used, or the workdir belongs to other settings or data.
    """
    sharding.check_platform(config.platform)
    refuse_pattern(root, "--workdir")
    compilation_cache.enable(cache_dir(config.task))
    workdir, config_record = Workdir(root), workdirs.as_record(config)
    first_record = processes.on_first(lambda: config_record)
    if first_record != config_record:
        keys = ", ".join(key for key in config_record if first_record[key] != config_record[key])
        raise ConfigError(f"config keys {keys} differ from process 0: start all processes with the same settings")
    with locks.group_lock(root):
        workdirs.check_config_unchanged(workdir, config)
        if from_earlier_step:
            processes.on_first(functools.partial(_fall_back, workdir, config))
        objectives = [configured_objective(config, name) for name in config.objectives]
        task = load_task(config.task)
        task = replace(task, load=functools.cache(task.load))
        metrics.check_names("metrics", config.metrics, task.labels)
        metrics.check_single("selection_metric", config.selection_metric, task.labels)
        examples = transfer_set.gather(config, task)
        metrics.check_defined((config.selection_metric,), _labels(examples.dev), f"{task.source_language} dev")
        recalibration.check(config.calibration, task.labels, _labels(examples.dev))
        for language in (task.source_language, *task.target_languages):
            for split in config.evaluation_splits:
                metrics.check_defined(config.metrics, _labels(task.load(split, language)), f"{language} {split}")
        target_dev = {name: task.load("dev", name) for name in task.target_languages} if config.oracle else {}
        for language, split_examples in target_dev.items():
            metrics.check_defined((config.selection_metric,), _labels(split_examples), f"{language} dev")
        models = Models(config, task, encoders.saved(workdir))
        facts = models.facts()
        workdirs.check_unchanged(workdir.task, facts)
        _check_weights(workdir, config, models)
        versions.note(workdir)
        workdirs.record(workdir.config, config_record)
        workdirs.record(workdir.task, facts)
        starts.record(workdir)
        processes.on_first(lambda: workdir.finished.unlink(missing_ok=True))
        for role in (workdirs.TEACHER, encoders.STUDENT):
            processes.on_first(functools.partial(encoders.save, workdir, role, models.base(role)))
        terminal.log(
            f"{task.name}: {len(examples.labelled):,} labelled and {len(examples.unlabelled):,} unlabelled "
            f"{task.source_language} examples -> {', '.join(task.target_languages)} · {_devices()}"
        )
        if config.oracle:
            terminal.log(
                "oracle: every checkpoint is scored on target dev too; the protocol target_dev is not zero-shot"
            )
        for line in plan.lines(_planned_stages(workdir, config, task, models, examples)):
            terminal.log(line)
        stages = Stages(workdir, config, models, examples, target_dev)
        stages.train_teacher()
        for seed in config.seeds:
            for objective in objectives:
                stages.train_student(objective, seed)
        with locks.group_lock(root, "evaluation", wait=True):
            evaluate(workdir, config, task, models)
        # Write it while the workdir is still held, so that nobody takes a finished run for a dead one.
        processes.on_first(lambda: workdirs.mark_finished(workdir, (run.directory for run in runs_of(workdir, config))))


class Stages:
    """The stages up to the students. All seeds and objectives share tokens and logits stores.

    For an oracle, `target_dev` holds the examples of each target language's dev split.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: ExperimentConfig,
        models: Models,
        examples: TransferSet,
        target_dev: Mapping[str, Sequence[Example]] = MappingProxyType({}),
    ):
        self.workdir, self.config, self.models, self.examples = workdir, config, models, examples
        self._target_examples = target_dev
        self._stores: dict[Path, LogitsStore] = {}

    def train_teacher(self) -> None:
        """Run stage 1: fine-tune the monolingual encoder on L."""
        teacher = self.models.teacher
        if not teacher.is_trained(self.workdir.teacher):
            dataset, dev = self._dataset(teacher, self.examples.labelled), teacher.dataset(self.examples.dev)
            seed = self.config.teacher_seed
            with costs.recorded(self.workdir, "teacher", self.workdir.teacher, teacher.trained):
                teacher.train(self.workdir.teacher, OBJECTIVES["vanilla"], dataset, dev, seed, self._dev_scores)

    def train_student(self, objective: Objective, seed: int) -> None:
        """Run stages 2 and 3: label the text with the objective's teacher, then train the student."""
        student, directory = self.models.student, self.workdir.student(objective.name, seed)
        if student.is_trained(directory):
            return
        dataset = self._everything if objective.data == "all" else self._labelled
        if objective.teacher != "none":
            is_vanilla = objective.teacher == "vanilla"
            model = student if is_vanilla else self.models.teacher
            store = self._label(model, self.workdir.student("vanilla", seed) if is_vanilla else self.workdir.teacher)
            logits = permute_classes(store.read(dataset.ids), store.classes, student.labels)
            dataset = replace(dataset, teacher_logits=logits)
        dev, target_dev = self._dev, self._target_dev
        with costs.recorded(self.workdir, "students", directory, student.trained):
            student.train(directory, objective, dataset, dev, seed, self._dev_scores, target_dev)

    def _dev_scores(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return dev_scores(logits, labels, self.models.student.labels, self.config.selection_metric)

    def _label(self, model: Finetuner, directory: Path) -> LogitsStore:
        """Run stage 2: store the logits of the model trained in `directory` for L ∪ U, unless they are stored."""
        if directory in self._stores:
            return self._stores[directory]
        examples = self.examples.everything
        with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
            params = checkpoints.restore_params(selected_steps(directory)["source_dev"], model.abstract_params())
        key = {
            "teacher_fingerprint": hf_checkpoint.fingerprint_params(params),
            "tokenizer_fingerprint": tokenizer_fingerprint(model.inputs.tokenizer),
            "max_length": model.settings.max_length,
            "data_fingerprint": _fingerprint(examples),
        }
        ids = [example.id for example in examples]
        store = open_store(self.workdir.logits, key, classes=model.labels, ids=ids, shard_size=SHARD_SIZE)
        if not processes.on_first(lambda: store.complete):
            title = f"labelling with {directory.relative_to(self.workdir.root)}"
            dataset = self._dataset(model, examples)
            missing = sum(len(store.shard_indices(shard)) for shard in processes.on_first(store.missing_shards))
            with (
                costs.recorded(self.workdir, "labelling", directory, model.predicted),
                terminal.progress_bar(title, missing, unit="examples") as progress,
            ):

                def predict(indices: np.ndarray) -> np.ndarray:
                    return model.predict(params, dataset.take(indices), progress.advance)

                label(store, predict)
        self._stores[directory] = store
        return store

    def _dataset(self, model: Finetuner, sample: Sequence[Example]) -> Dataset:
        return model.dataset(sample, self.examples.drawn_from)

    @functools.cached_property
    def _everything(self) -> Dataset:
        return self._dataset(self.models.student, self.examples.everything)

    @functools.cached_property
    def _labelled(self) -> Dataset:
        return self._dataset(self.models.student, self.examples.labelled)

    @functools.cached_property
    def _dev(self) -> Dataset:
        return self.models.student.dataset(self.examples.dev)

    @functools.cached_property
    def _target_dev(self) -> dict[str, Dataset]:
        return {name: self.models.student.dataset(examples) for name, examples in self._target_examples.items()}


def _fall_back(workdir: Workdir, config: ExperimentConfig) -> None:
    for directory in (workdir.teacher, *_students(workdir, config)):
        fall_back(directory / CHECKPOINTS)


def _students(workdir: Workdir, config: ExperimentConfig) -> list[Path]:
    return [workdir.student(name, seed) for seed in config.seeds for name in config.objectives]


def _check_weights(workdir: Workdir, config: ExperimentConfig, models: Models) -> None:
    """Refuse to start if a model is still to be trained and its base checkpoint is gone."""
    runs = ((models.teacher, [workdir.teacher]), (models.student, _students(workdir, config)))
    for model, directories in runs:
        trained = [model.is_trained(directory) for directory in directories]  # a list: all processes take part
        if not all(trained):
            model.check_weights()


def _planned_stages(
    workdir: Workdir, config: ExperimentConfig, task: Task, models: Models, examples: TransferSet
) -> list[plan.Stage]:
    """Return the stages of an experiment with their estimated times, before anything is computed."""
    machine = plan.measure()
    teacher, student = (
        plan.Work(model.compiled_steps.matmul_parameters, model.inputs.mean_tokens(examples.labelled))
        for model in (models.teacher, models.student)
    )
    runs = [(OBJECTIVES[name], seed) for seed in config.seeds for name in config.objectives]
    missing = [
        (objective, seed)
        for objective, seed in runs
        if not models.student.is_trained(workdir.student(objective.name, seed))
    ]
    seconds: float | None = None
    if not models.teacher.is_trained(workdir.teacher):
        seconds = teacher.training_seconds(machine, config.teacher.steps, config.teacher.batch_size)
        seconds += machine.compile_seconds
    size = f"{config.teacher.steps:,} steps of {config.teacher.batch_size} examples"
    stages = [plan.Stage("teacher", size, seconds)]

    # The monolingual teacher labels once for all seeds, and each seed's vanilla student for itself.
    labellers = {0: teacher} if any(o.teacher == "monolingual" for o, _ in missing) else {}
    labellers |= {1 + seed: student for o, seed in missing if o.teacher == "vanilla"}
    if labellers:
        count = len(examples.everything)
        seconds = sum(model.inference_seconds(machine, count) for model in labellers.values())
        stages.append(plan.Stage("labelling", f"{len(labellers)} × {count:,} examples", seconds))

    oracle = task.target_languages if config.oracle else ()
    scored = len(examples.dev) + sum(len(task.load("dev", language)) for language in oracle)
    dev = config.student.evaluations * student.inference_seconds(machine, scored)
    seconds = student.training_seconds(machine, config.student.steps, config.student.batch_size) + dev
    seconds *= len(missing)
    seconds += len({objective.loss_settings() for objective, _ in missing}) * machine.compile_seconds
    size = f"{len(runs)} × {config.student.steps:,} steps of {config.student.batch_size} examples"
    stages.append(plan.Stage("students", size, seconds if missing else None))

    unscored = processes.on_first(lambda: _num_unscored(workdir, [(o.name, seed) for o, seed in runs]))
    count = sum(
        len(task.load(split, language))
        for split in config.evaluation_splits
        for language in (task.source_language, *task.target_languages)
    )
    selected = 2 + bool(config.student.average_last) + config.oracle  # at most
    seconds = selected * unscored * student.inference_seconds(machine, count)
    size = f"{len(runs)} × {selected} checkpoints, {count:,} examples each"
    stages.append(plan.Stage("evaluation", size, seconds if unscored else None))
    return stages


def _num_unscored(workdir: Workdir, runs: Sequence[tuple[str, int]]) -> int:
    """Return the number of runs, each an objective and a seed, that have no results yet."""
    rows = results.read_rows(workdir.results) if workdir.results.exists() else []
    scored = {(row["objective"], row["seed"]) for row in rows}
    return sum(run not in scored for run in runs)


def _devices() -> str:
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    return f"{devices} of {processes.count()} processes" if processes.count() > 1 else devices


def _labels(examples: Sequence[Example]) -> list[int]:
    return [example.label for example in examples]


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.text, example.text_pair]).encode())
    return digest.hexdigest()
