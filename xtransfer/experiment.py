"""The stages of an experiment: teacher -> logits -> students -> evaluation. Finished work is never repeated.

An experiment goes through the first three once for each draw (see `runs.draws`). A sweep is one experiment for each of
its points, and takes finished runs over from one point to the next.
"""

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from xtransfer import storage
from xtransfer.config import CalibrationConfig, ExperimentConfig, cache_dir, refuse_pattern
from xtransfer.data.batches.batches import Dataset
from xtransfer.data.registry import load_task
from xtransfer.data.task import Example, Task
from xtransfer.data.tokens.tokenizer import tokenizer_fingerprint
from xtransfer.distillation import transfer_set
from xtransfer.distillation.labelling import label, permute_classes
from xtransfer.distillation.logits_store import LogitsStore, open_store, store_key
from xtransfer.distillation.objectives import (
    BALANCED,
    Objective,
    check_classes,
    configured_objectives,
    definitions,
    effective_settings,
    teacher_objective,
    with_class_factors,
)
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import ConfigError, UserError, user_error
from xtransfer.evaluation import metrics, recalibration, results
from xtransfer.evaluation.evaluator import Run, dev_scores, evaluate, rows_of
from xtransfer.evaluation.evaluator import runs as runs_of
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import costs, encoders, plan, sharing, starts
from xtransfer.runs import sweep as sweeps
from xtransfer.runs import workdir as workdirs
from xtransfer.runs.draws import draws_of
from xtransfer.runs.find import selected_steps
from xtransfer.runs.selection import weights_name
from xtransfer.runs.sweep import Point
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import compilation_cache, locks, processes, sharding, terminal
from xtransfer.train import loop
from xtransfer.train.checkpoints import PARAMS, Checkpoints, fall_back, remove_leftovers
from xtransfer.train.finetuning import Finetuner, Models
from xtransfer.train.inputs import ModelInputs
from xtransfer.train.loop import CHECKPOINTS
from xtransfer.train.tracking import NOTHING, LoggerSource, Tracking

SHARD_SIZE = 1024  # examples per logits shard; an interruption loses at most one shard


def run(
    config: ExperimentConfig,
    root: Path,
    *,
    from_earlier_step: bool = False,
    others: Sequence[Workdir] = (),
    loggers: Sequence[LoggerSource] = (),
) -> None:
    """Run every stage that is not finished yet.

    Everything that a user may have to fix (settings, data in every language, checkpoints) is checked before anything is
    trained, and only then are the settings recorded.

    Args:
      config: the experiment's config.
      root: the workdir.
      from_earlier_step: remove a run's newest checkpoint if it is damaged, and resume from the one before it.
      others: workdirs to take over finished runs and logits from, if nothing that decides them differs.
      loggers: the loggers that follow the teacher and each student in training.

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
        processes.on_first(functools.partial(_clean_up, workdir, config))
        objectives = configured_objectives(config)
        task, samples, target_dev = _load(config)
        models = Models(config, task, encoders.saved(workdir))
        facts = models.facts()
        workdirs.check_unchanged(workdir.task, facts)
        _check_weights(workdir, config, models)
        workdirs.record(workdir.config, config_record)
        workdirs.record(workdir.task, facts)
        starts.record(workdir)
        processes.on_first(lambda: workdir.finished.unlink(missing_ok=True))
        for role in (workdirs.TEACHER, encoders.STUDENT):
            processes.on_first(functools.partial(encoders.save, workdir, role, models.base(role)))
        _take_over(workdir, config, facts, others)
        draws = draws_of(config)
        examples = samples[draws[0].name]
        times = f"{len(draws)} × " if len(draws) > 1 else ""
        terminal.log(
            f"{task.name}: {times}{len(examples.labelled):,} labelled and {len(examples.unlabelled):,} unlabelled "
            f"{task.source_language} examples -> {', '.join(task.target_languages)} · {_devices()}"
        )
        if config.oracle:
            terminal.log(
                "oracle: every checkpoint is scored on target dev too; the protocol target_dev is not zero-shot"
            )
        for line in plan.lines(_planned_stages(workdir, config, task, models, examples)):
            terminal.log(line)
        for line in plan.objective_lines(effective_settings(config)):
            terminal.log(line)
        tracking = Tracking(tuple(loggers), config_record)
        for draw in draws:
            if len(draws) > 1:
                terminal.log(f"draw {draw.name}: task.labelled_seed {draw.labelled_seed}, seed {draw.teacher_seed}")
            drawn, settings = workdir.at(draw.name), draw.apply(config)
            _log_balanced((*objectives, teacher_objective(config)), task, samples[draw.name])
            stages = Stages(drawn, settings, models, samples[draw.name], target_dev, others, tracking)
            stages.train_teacher()
            for seed in config.seeds:
                for objective in objectives:
                    stages.train_student(objective, seed)
        with locks.group_lock(root, "evaluation", wait=True):
            evaluate(workdir, config, task, models)
        # Write it while the workdir is still held, so that nobody takes a finished run for a dead one.
        processes.on_first(lambda: workdirs.mark_finished(workdir, (run.directory for run in runs_of(workdir, config))))


def run_sweep(
    points: Sequence[Point], root: Path, *, from_earlier_step: bool = False, loggers: Sequence[LoggerSource] = ()
) -> UserError | None:
    """Run the experiment of every point that is not finished yet.

    The settings and the data of all points are checked before anything is trained. A point that fails is named, and the
    others go on.

    Args:
      points: the points of the sweep.
      root: the directory of the sweep.
      from_earlier_step: see `run`.
      loggers: see `run`.

    Returns:
      The error to end with if points failed, which leaves time to report on the others; None if all are finished.

    Raises:
      UserError: the settings or the data of a point cannot be used, or the directory holds an experiment.
    """
    refuse_pattern(root, "--workdir")
    if Workdir(root).config.exists():
        raise ConfigError(f"{root} holds an experiment and no sweep: choose another --workdir")
    for point in points:
        try:
            check(point.config)
        except UserError as error:
            raise user_error(error.exit_status, f"point {point.name}: {error}") from error
    failures: list[UserError] = []
    with locks.group_lock(root):
        processes.on_first(lambda: sweeps.record(root, points))
        for number, point in enumerate(points, start=1):
            terminal.log(f"point {number} of {len(points)}: {point.name}")
            directory = sweeps.directory(root, point.name)
            earlier = processes.on_first(lambda: [str(other.root) for other in sweeps.workdirs(root)])
            others = [Workdir(Path(path)) for path in earlier if Path(path) != directory]
            try:
                run(point.config, directory, from_earlier_step=from_earlier_step, others=others, loggers=loggers)
            except UserError as error:
                failures.append(user_error(error.exit_status, f"{point.name}: {error}"))
                terminal.log(f"error: {failures[-1]}")
            jax.clear_caches()  # the next point compiles functions of its own
    if not failures:
        return None
    text = f"{len(failures)} of {len(points)} points failed; the first is {failures[0]}"
    return user_error(failures[0].exit_status, text)


def check(config: ExperimentConfig) -> None:
    """Refuse settings and data that cannot be used, without reading weights or writing anything.

    Raises:
      UserError: see `run`.
    """
    configured_objectives(config)
    _load(config)
    for role, settings in ((workdirs.TEACHER, config.teacher), (encoders.STUDENT, config.student)):
        ModelInputs(role, settings, shards=1, token_cache=None)


def _load(config: ExperimentConfig) -> tuple[Task, dict[str, TransferSet], dict[str, list[Example]]]:
    """Check what needs the data, and return the task, the text of each draw, and target dev for an oracle."""
    task = load_task(config.task)
    task = replace(task, load=functools.cache(task.load))
    kind = task.multi_label
    metrics.check_names("config key metrics", config.metrics, task.labels, multi_label=kind)
    check_classes(config, task.labels, multi_label=kind)
    metrics.check_single("config key selection_metric", config.selection_metric, task.labels, multi_label=kind)
    _check_fitted_thresholds(config)
    samples = {draw.name: transfer_set.gather(draw.apply(config), task) for draw in draws_of(config)}
    for sample in samples.values():
        _steps(config, sample)
    dev = task.load("dev", task.source_language)
    metrics.check_defined((config.selection_metric,), task.gold(dev), f"{task.source_language} dev", task.labels)
    recalibration.check(config.calibration, task.labels, task.gold(dev))
    for language in (task.source_language, *task.target_languages):
        for split in config.evaluation_splits:
            gold = task.gold(task.load(split, language))
            metrics.check_defined(config.metrics, gold, f"{language} {split}", task.labels)
    target_dev = {name: task.load("dev", name) for name in task.target_languages} if config.oracle else {}
    for language, examples in target_dev.items():
        metrics.check_defined((config.selection_metric,), task.gold(examples), f"{language} dev", task.labels)
    return task, samples, target_dev


def _check_fitted_thresholds(config: ExperimentConfig) -> None:
    """Refuse fitted thresholds for an objective that also learns from the logits, which they shift."""
    for name, objective in definitions(config).items() if config.transfer.fitted_thresholds else ():
        if name in config.objectives and objective.pseudo_labels and objective.soft_weight:
            raise ConfigError(
                f"config key transfer.fitted_thresholds is True, but {name} also learns from the teacher's "
                "probabilities, which have no threshold: set it to False"
            )


class Stages:
    """The stages of one draw up to the students. All seeds and objectives share tokens and logits stores.

    Args:
      workdir: the workdir, with the draw.
      config: the config of this draw alone.
      models: teacher and student.
      examples: the draw's text.
      target_dev: for an oracle, the examples of each target language's dev split.
      others: workdirs that may have the logits.
    """

    def __init__(
        self,
        workdir: Workdir,
        config: ExperimentConfig,
        models: Models,
        examples: TransferSet,
        target_dev: Mapping[str, Sequence[Example]] = MappingProxyType({}),
        others: Sequence[Workdir] = (),
        tracking: Tracking = NOTHING,
    ):
        self.workdir, self.config, self.models, self.examples = workdir, config, models, examples
        self._target_examples, self.others, self._tracking = target_dev, others, tracking
        self._stores: dict[Path, LogitsStore] = {}

    def train_teacher(self) -> None:
        """Run stage 1: fine-tune the monolingual encoder on L."""
        teacher = self.models.teacher
        if not teacher.is_trained(self.workdir.teacher):
            dataset, dev = self._dataset(teacher, self.examples.labelled), teacher.dataset(self.examples.dev)
            seed, objective = self.config.teacher_seed, self._with_class_factors(teacher_objective(self.config))
            with costs.recorded(self.workdir, "teacher", self.workdir.teacher, teacher.trained):
                teacher.train(
                    self.workdir.teacher,
                    objective,
                    dataset,
                    dev,
                    seed,
                    self._dev_scores,
                    tracking=self._tracking,
                )

    def train_student(self, objective: Objective, seed: int) -> None:
        """Run stages 2 and 3: label the text with the objective's teacher, then train the student."""
        student, directory = self.models.student, self.workdir.student(objective.name, seed)
        if student.is_trained(directory):
            return
        dataset = self._everything if objective.data == "all" else self._labelled
        if objective.teacher != "none":
            is_vanilla = objective.teacher == "vanilla"
            model = student if is_vanilla else self.models.teacher
            teacher_directory = self.workdir.student("vanilla", seed) if is_vanilla else self.workdir.teacher
            store = self._label(model, teacher_directory)
            logits = permute_classes(store.read(dataset.ids), store.classes, student.labels)
            if objective.pseudo_labels and self.config.transfer.fitted_thresholds:
                logits = logits - self._cuts(model, teacher_directory)
            dataset = replace(dataset, teacher_logits=logits)
        objective = self._with_class_factors(objective)
        dev, target_dev = self._dev, self._target_dev
        with costs.recorded(self.workdir, "students", directory, student.trained):
            student.train(directory, objective, dataset, dev, seed, self._dev_scores, target_dev, self._tracking)

    def _with_class_factors(self, objective: Objective) -> Objective:
        return with_class_factors(objective, self.models.student.labels, _classes(self.examples.labelled))

    def _cuts(self, teacher: Finetuner, directory: Path) -> np.ndarray:
        """Return the logits above which the teacher trained in `directory` gives each class as a pseudo-label [K].

        They are fitted to source dev, and kept with the teacher's run.
        """
        step = selected_steps(directory)["source_dev"]
        path, name = self.workdir.calibration(directory), weights_name(step, PARAMS)
        fitted = recalibration.recorded_everywhere(path, name)
        if not fitted.has_threshold:
            with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
                params = checkpoints.restore_params(step, teacher.abstract_params())
            dev = teacher.dataset(self.examples.dev)
            logits, settings = teacher.predict(params, dev), CalibrationConfig(threshold=True)
            title = f"{directory.name} step {name}"
            fitted = recalibration.fit_and_record(path, name, settings, fitted, logits, dev.labels, title=title)
        return np.array(fitted.class_log_odds, np.float32)

    def _dev_scores(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return dev_scores(logits, labels, self.models.student.labels, self.config.selection_metric)

    def _label(self, model: Finetuner, directory: Path) -> LogitsStore:
        """Run stage 2: store the logits of the model trained in `directory` for L ∪ U, unless they are stored."""
        if directory in self._stores:
            return self._stores[directory]
        examples = self.examples.everything
        with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
            params = checkpoints.restore_params(selected_steps(directory)["source_dev"], model.abstract_params())
        key: dict[str, Any] = {
            "teacher_fingerprint": hf_checkpoint.fingerprint_params(params),
            "tokenizer_fingerprint": tokenizer_fingerprint(model.inputs.tokenizer),
            "max_length": model.settings.max_length,
            "data_fingerprint": _fingerprint(examples),
        }
        ids = [example.id for example in examples]
        name = store_key(**key)
        stores = [other.logits / name for other in self.others]
        processes.on_first(lambda: sharing.copy_first(stores, self.workdir.logits / name))
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
    for one in runs_of(workdir, config):
        fall_back(one.directory / CHECKPOINTS)


def _clean_up(workdir: Workdir, config: ExperimentConfig) -> None:
    for one in runs_of(workdir, config):
        loop.mend(one.directory)
        remove_leftovers(one.directory / CHECKPOINTS)


def _take_over(workdir: Workdir, config: ExperimentConfig, facts: Mapping[str, Any], others: Sequence[Workdir]) -> None:
    """Copy runs that another workdir has finished with the same settings, data, and checkpoints, with their results.

    Only the settings and the base checkpoints that a run uses count. Its checkpoints become hard links where the file
    system has them. All processes take part, and process 0 writes.
    """
    for other in others:
        if not processes.on_first(functools.partial(sharing.has_same_data, other, facts)):
            continue
        their_config = workdirs.read_config(other)
        theirs = {_sharing_key(their_config, run): run for run in runs_of(other, their_config)}
        for mine in runs_of(workdir, config):
            their = theirs.get(_sharing_key(config, mine))
            if their is None or processes.on_first(mine.directory.exists):
                continue
            roles = sharing.roles_of(config, mine.objective)
            if not processes.on_first(functools.partial(sharing.has_same_checkpoints, other, facts, roles)):
                continue
            steps = (config.teacher if mine.objective == workdirs.TEACHER else config.student).known_steps
            if processes.on_first(functools.partial(sharing.is_whole, their.directory)) and loop.finished(
                their.directory, steps
            ):
                processes.on_first(functools.partial(_copy_run, workdir, mine, other, their))


def _sharing_key(config: ExperimentConfig, run: Run) -> str:
    """Return a text that is equal for two runs if, and only if, they are trained with the same settings."""
    draw = next(draw for draw in draws_of(config) if draw.name == run.id.draw)
    return json.dumps([sharing.settings_of(draw.apply(config), run.objective), run.id.seed], sort_keys=True)


def _copy_run(workdir: Workdir, mine: Run, other: Workdir, their: Run) -> None:
    """Copy a finished run, with its predictions and result rows. The run itself comes last, and completes the copy."""
    predictions, source = (
        place.root / "predictions" / run.directory.relative_to(place.root)
        for place, run in ((workdir, mine), (other, their))
    )
    sharing.copy_first([source], predictions)
    if mine.objective != workdirs.TEACHER and other.tokens.exists() and not workdir.tokens.exists():
        storage.write_atomically(workdir.tokens, other.tokens.read_bytes())
    if other.results.exists():
        rows = results.whole_rows(workdir.results)
        kept = [row for row in rows if (row["objective"], results.run_id(row)) != (mine.objective, mine.id)]
        # Their teacher may be another one. Evaluation compares the student with the teacher of this workdir.
        taken = [
            row | mine.facts
            for row in rows_of([their], results.whole_rows(other.results))
            if row["metric"] not in metrics.TEACHER_METRICS
        ]
        results.write_rows(workdir.results, [*kept, *taken])
    sharing.copy_run(their.directory, mine.directory)
    terminal.log(f"{mine.name}: the same as in {other.root}")


def _check_weights(workdir: Workdir, config: ExperimentConfig, models: Models) -> None:
    """Refuse to start if a model is still to be trained and its base checkpoint is gone."""
    for model, is_teacher in ((models.teacher, True), (models.student, False)):
        runs = [run for run in runs_of(workdir, config) if (run.objective == workdirs.TEACHER) == is_teacher]
        trained = [model.is_trained(run.directory) for run in runs]  # a list: all processes take part
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
    all_runs = runs_of(workdir, config)
    teachers = [run for run in all_runs if run.objective == workdirs.TEACHER]
    objectives = definitions(config)
    runs = [(objectives[run.objective], run) for run in all_runs if run.objective != workdirs.TEACHER]
    missing = [(objective, run) for objective, run in runs if not models.student.is_trained(run.directory)]
    untrained = [run for run in teachers if not models.teacher.is_trained(run.directory)]
    steps, steps_by_objective = _steps(config, examples)
    seconds: float | None = None
    if untrained:
        seconds = teacher.training_seconds(machine, steps, config.teacher.batch_size) * len(untrained)
        seconds += machine.compile_seconds
    times = f"{len(teachers)} × " if len(teachers) > 1 else ""
    size = f"{times}{plan.length([steps], config.teacher)}"
    stages = [plan.Stage("teacher", size, seconds)]

    # The monolingual teacher of a draw labels once for all seeds, and each seed's vanilla student for itself.
    labellers = {(run.id.draw, -1): teacher for o, run in missing if o.teacher == "monolingual"}
    labellers |= {(run.id.draw, run.id.seed): student for o, run in missing if o.teacher == "vanilla"}
    if labellers:
        count = len(examples.everything)
        seconds = sum(model.inference_seconds(machine, count) for model in labellers.values())
        stages.append(plan.Stage("labelling", f"{len(labellers)} × {count:,} examples", seconds))

    oracle = task.target_languages if config.oracle else ()
    scored = len(examples.dev) + sum(len(task.load("dev", language)) for language in oracle)
    dev = config.student.evaluations * student.inference_seconds(machine, scored)
    seconds = sum(
        student.training_seconds(machine, steps_by_objective[run.objective], config.student.batch_size) + dev
        for _, run in missing
    )
    programs = {(objective.loss_settings(), steps_by_objective[run.objective]) for objective, run in missing}
    seconds += len(programs) * machine.compile_seconds
    size = f"{len(runs)} × {plan.length(list(steps_by_objective.values()), config.student)}"
    stages.append(plan.Stage("students", size, seconds if missing else None))

    unscored = processes.on_first(lambda: _num_unscored(workdir, [run for _, run in runs]))
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


def _log_balanced(objectives: Sequence[Objective], task: Task, examples: TransferSet) -> None:
    """Log the class weights that depend on a draw's labelled text, if an objective has such weights."""
    balanced = next((objective for objective in objectives if objective.class_weights == BALANCED), None)
    if balanced:
        factors = with_class_factors(balanced, task.labels, _classes(examples.labelled)).class_factors
        named = ", ".join(f"{name} {factor:.4g}" for name, factor in zip(task.labels, factors, strict=True))
        terminal.log(f"balanced class weights: {named}")


def _classes(examples: Sequence[Example]) -> list[int]:
    return [example.label for example in examples]


def _steps(config: ExperimentConfig, examples: TransferSet) -> tuple[int, dict[str, int]]:
    """Return the number of steps of the teacher, and of a student by objective; a UserError says if none can be."""
    count = {"all": len(examples.everything), "labelled": len(examples.labelled)}
    by_objective = {
        name: config.student.resolved(count[definitions(config)[name].data], "student.").steps
        for name in config.objectives
    }
    return config.teacher.resolved(count["labelled"], "teacher.").steps, by_objective


def _num_unscored(workdir: Workdir, runs: Sequence[Run]) -> int:
    """Return the number of runs that have no results yet."""
    rows = results.whole_rows(workdir.results)
    scored = {(row["objective"], results.run_id(row)) for row in rows}
    return sum((run.objective, run.id) not in scored for run in runs)


def _devices() -> str:
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    return f"{devices} of {processes.count()} processes" if processes.count() > 1 else devices


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.text, example.text_pair]).encode())
    return digest.hexdigest()
