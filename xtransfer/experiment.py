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
from xtransfer.data.examples import by_language, ids_of, in_languages, labels_of
from xtransfer.data.registry import load_task
from xtransfer.data.task import Example, Task
from xtransfer.data.tokens.tokenizer import tokenizer_fingerprint
from xtransfer.distillation import transfer_set
from xtransfer.distillation.labelling import label, permute_classes
from xtransfer.distillation.logits_file import LogitsFile
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
from xtransfer.distillation.teachers import mean, trained_objectives
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import ConfigError, UserError, user_error
from xtransfer.evaluation import metrics, recalibration, results
from xtransfer.evaluation.evaluator import Run, dev_scores, evaluate, rows_of, settings_of
from xtransfer.evaluation.evaluator import runs as runs_of
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import costs, encoders, plan, sharing, starts, teachers
from xtransfer.runs import sweep as sweeps
from xtransfer.runs import workdir as workdirs
from xtransfer.runs.draws import draws_of
from xtransfer.runs.find import selected_steps
from xtransfer.runs.selection import weights_name
from xtransfer.runs.sweep import Point
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import compilation_cache, locks, processes, sharding, terminal
from xtransfer.train import metrics_log
from xtransfer.train.checkpoints import CHECKPOINTS, PARAMS, Checkpoints, fall_back, remove_leftovers
from xtransfer.train.finetuning import Finetuner, Models
from xtransfer.train.inputs import ModelInputs
from xtransfer.train.tracking import NOTHING, LoggerSource, Tracking


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
    workdir = Workdir(root)
    config = teachers.with_classes(config, workdir)
    config_record = workdirs.as_record(config)
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
        task, samples, target_dev, files = _load(config)
        saved = encoders.saved(workdir)
        models = Models(config, task, saved, teachers.ready_made(config, saved))
        facts = models.facts() | _file_facts(files)
        workdirs.check_unchanged(workdir.task, facts)
        _check_weights(workdir, config, models)
        workdirs.record(workdir.config, config_record)
        workdirs.record(workdir.task, facts)
        starts.record(workdir)
        processes.on_first(lambda: workdir.finished.unlink(missing_ok=True))
        for role in (*models.teachers, *models.students):
            processes.on_first(functools.partial(encoders.save, workdir, role, models.base(role)))
        _take_over(workdir, config, facts, others)
        draws = draws_of(config)
        examples = samples[draws[0].name]
        times = f"{len(draws)} × " if len(draws) > 1 else ""
        sources = " and ".join((task.source_language, *config.further_sources))
        terminal.log(
            f"{task.name}: {times}{len(examples.labelled):,} labelled and {len(examples.unlabelled):,} unlabelled "
            f"{sources} examples -> {', '.join(task.target_languages)} · {_devices()}"
        )
        if config.oracle:
            terminal.log(
                "oracle: every checkpoint is scored on target dev too; the protocol target_dev is not zero-shot"
            )
        for line in teachers.origins(config):
            terminal.log(line)
        if not examples.dev:
            languages = " and ".join(task.source_languages)
            terminal.log(f"no dev split in {languages}: no checkpoint is selected, and the last one is used")
        for line in plan.lines(_planned_stages(workdir, config, task, models, examples)):
            terminal.log(line)
        for line in plan.objective_lines(effective_settings(config)):
            terminal.log(line)
        tracking = Tracking(tuple(loggers), config_record)
        for draw in draws:
            if len(draws) > 1:
                terminal.log(f"draw {draw.name}: task.labelled_seed {draw.labelled_seed}, seed {draw.teacher_seed}")
            drawn, settings = workdir.at(draw.name), draw.apply(config)
            _log_balanced(trained_objectives(config), task, samples[draw.name])
            stages = Stages(drawn, settings, models, samples[draw.name], target_dev, others, tracking, files)
            stages.train_teachers()
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
            workdirs.check_config_unchanged(Workdir(sweeps.directory(root, point.name)), point.config)
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
    _load(teachers.with_classes(config))
    readers = {member: settings for member, settings in config.members.items() if not settings.is_file}
    for role, settings in {**readers, **config.encoders}.items():
        directory = teachers.description_directory(settings)
        ModelInputs(role, settings, shards=1, token_cache=None, directory=directory)


def _load(
    config: ExperimentConfig,
) -> tuple[Task, dict[str, TransferSet], dict[str, Sequence[Example]], dict[str, LogitsFile]]:
    """Check what needs the data.

    Returns:
      The task, the text of each draw, target dev for an oracle, and the files that stand in for teachers, by member.
    """
    task = load_task(config.task, config.further_sources)
    task = replace(task, load=functools.cache(task.load))
    teachers.refuse_target_text(config, task.target_languages)
    kind = task.multi_label
    metrics.check_names("config key metrics", config.metrics, task.labels, multi_label=kind)
    check_classes(config, task.labels, multi_label=kind)
    metrics.check_single("config key selection_metric", config.selection_metric, task.labels, multi_label=kind)
    _check_fitted_thresholds(config)
    samples = {draw.name: transfer_set.gather(draw.apply(config), task) for draw in draws_of(config)}
    for sample in samples.values():
        _steps(config, sample)
    dev = next(iter(samples.values())).dev
    for language, examples in by_language(dev).items():
        metrics.check_defined((config.selection_metric,), task.gold(examples), f"{language} dev", task.labels)
    if dev:
        recalibration.check(config.calibration, task.labels, task.gold(dev))
    for language in task.languages:
        for split in config.evaluation_splits:
            gold = task.gold(task.load(split, language))
            metrics.check_defined(config.metrics, gold, f"{language} {split}", task.labels)
    target_dev = {name: task.load("dev", name) for name in task.target_languages} if config.oracle else {}
    for language, examples in target_dev.items():
        metrics.check_defined((config.selection_metric,), task.gold(examples), f"{language} dev", task.labels)
    return task, samples, target_dev, teachers.read_files(config, task.labels, samples.values())


def _file_facts(files: Mapping[str, LogitsFile]) -> dict[str, Any]:
    """Return the fingerprints of the files that stand in for teachers, as facts of the experiment."""
    fingerprints = {member: file.fingerprint for member, file in files.items()}
    main = fingerprints.pop(workdirs.TEACHER, None)
    facts = {} if main is None else {"teacher_logits": main}
    return facts | ({"teachers_logits": fingerprints} if fingerprints else {})


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
      tracking: the loggers.
      files: the files that stand in for teachers, by member.
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
        files: Mapping[str, LogitsFile] = MappingProxyType({}),
    ):
        self.workdir, self.config, self.models, self.examples = workdir, config, models, examples
        self._target_examples, self.others, self._tracking = target_dev, others, tracking
        self._files = files
        self._stores: dict[tuple[Path, str], LogitsStore] = {}
        self._teacher_stores: dict[tuple[str, ...], LogitsStore] = {}
        self._datasets: dict[tuple[str, ...], Dataset] = {}

    def train_teachers(self) -> None:
        """Run stage 1: fine-tune each monolingual encoder on L, or take a ready-made one over. A file needs neither."""
        for member, teacher in self.models.teachers.items():
            directory = self.workdir.member(member)
            if teacher.is_trained(directory):
                continue
            splits = self.examples.dev_in(self.config.languages_of(member))
            dev = {language: teacher.dataset(examples) for language, examples in splits.items()}
            if self.config.members[member].is_ready_made:
                teacher.adopt(directory, dev, self._dev_scores)
                continue
            labelled = teachers.read_by(self.config, member, self.examples.labelled)
            objective = self._with_class_factors(teacher_objective(self.config), labelled)
            dataset, seed = self._dataset(teacher, labelled), teachers.seed(self.config, member)
            with costs.recorded(self.workdir, "teacher", directory, teacher.trained):
                teacher.train(
                    directory,
                    objective,
                    dataset,
                    dev,
                    seed,
                    self._dev_scores,
                    tracking=self._tracking,
                )

    def train_student(self, objective: Objective, seed: int) -> None:
        """Run stages 2 and 3: label the text with the objective's teacher, then train the student."""
        student, directory = self.models.student_of(objective.name), self.workdir.student(objective.name, seed)
        if student.is_trained(directory):
            return
        dataset = self._text(student, objective)
        if objective.teacher != "none":
            name = objective.student_teacher
            labeller: Finetuner | None
            if name is not None:
                labeller, labelled_by = self.models.student_of(name), self.workdir.student(name, seed)
                store = self._label(labeller, labelled_by, self.examples.for_teacher(objective))
            else:  # if its logits are cut, a single teacher that is a model, see `ExperimentConfig.check`
                labeller, labelled_by = self.models.teachers.get(workdirs.TEACHER), self.workdir.teacher
                store = self._teachers_store(objective)
            ids = self.examples.ids_for_teacher(objective)
            logits = permute_classes(store.read(ids), store.classes, student.labels)
            if objective.pseudo_labels and self.config.transfer.fitted_thresholds and labeller is not None:
                logits = logits - self._cuts(labeller, labelled_by)
            dataset = replace(dataset, teacher_logits=logits)
        knows_source = not objective.languages
        objective = self._with_class_factors(objective, self.examples.labelled)
        dev = self._dev(student) if knows_source else {}  # without it, the last checkpoint is used
        target_dev = self._target_dev(student) if knows_source else {}
        with costs.recorded(self.workdir, "students", directory, student.trained):
            student.train(directory, objective, dataset, dev, seed, self._dev_scores, target_dev, self._tracking)

    def _with_class_factors(self, objective: Objective, labelled: Sequence[Example]) -> Objective:
        return with_class_factors(objective, self.models.student.labels, _classes(labelled))

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

    @property
    def _kind(self) -> list[str]:
        """What the keys of stores name besides their sources: the kind of a task on which the logits depend."""
        return ["multi-label"] if self.config.task.multi_label else []

    def _teachers_store(self, objective: Objective) -> LogitsStore:
        """Return the logits of the monolingual teacher, or the mean of several, for L ∪ U, or for originals."""
        key = _text_of(objective)
        if key not in self._teacher_stores:
            examples = self.examples.for_teacher(objective)
            parts = {member: teachers.read_by(self.config, member, examples) for member in self.config.members}
            stores = {member: self._member_store(member, part) for member, part in parts.items() if part}
            is_mean = bool(self.config.teachers)
            self._teacher_stores[key] = self._mean_store(stores, examples) if is_mean else stores[workdirs.TEACHER]
        return self._teacher_stores[key]

    def _member_store(self, member: str, examples: Sequence[Example]) -> LogitsStore:
        """Return the logits of one teacher for examples in its languages."""
        if member in self._files:
            return self._stored(self._files[member], examples)
        return self._label(self.models.teachers[member], self.workdir.member(member), examples)

    def _mean_store(self, stores: Mapping[str, LogitsStore], examples: Sequence[Example]) -> LogitsStore:
        """Store the mean of several teachers for examples, and how much they disagree, unless they are stored."""
        config = self.config
        parts = [
            [store.directory.name, config.members[member].weight, list(config.languages_of(member))]
            for member, store in stores.items()
        ]
        identity = json.dumps([config.transfer.teacher_mean, parts, *self._kind])
        key = {
            "teacher_fingerprint": f"mean {hashlib.sha256(identity.encode()).hexdigest()}",
            "tokenizer_fingerprint": "",
            "max_length": 0,
            "data_fingerprint": transfer_set.fingerprint(examples),
        }
        store = self._open_store(key, self.models.labels, examples)

        def is_complete() -> bool:
            return store.complete and store.disagreement() is not None

        if not processes.on_first(is_complete):
            averaged, disagreement = self._mean(stores, examples)
            label(store, lambda indices: averaged[indices])
            processes.on_first(functools.partial(store.write_disagreement, disagreement))
        average, largest = processes.on_first(lambda: _mean_and_largest(store.disagreement()))
        terminal.log(
            f"the teachers disagree by {average:.3f} nats on average (Jensen-Shannon), by {largest:.3f} at most"
        )
        return store

    def _mean(self, stores: Mapping[str, LogitsStore], examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean of the teachers' logits for n examples, [n, K], and their disagreement, [n]."""
        classes = self.models.labels
        logits = np.zeros((len(stores), len(examples), len(classes)), np.float32)
        weights = np.zeros((len(stores), len(examples)))
        for number, (member, store) in enumerate(stores.items()):
            rows = in_languages(examples, self.config.languages_of(member))
            logits[number, rows] = permute_classes(store.read(store.ids), store.classes, classes)
            weights[number, rows] = self.config.members[member].weight
        of_logits, kind = self.config.transfer.teacher_mean == "logits", self.config.task.multi_label
        return mean(logits, weights, of_logits=of_logits, multi_label=kind)

    def _label(self, model: Finetuner, directory: Path, examples: Sequence[Example]) -> LogitsStore:
        """Run stage 2: store the logits of the model trained in `directory` for examples, unless they are stored."""
        fingerprint = transfer_set.fingerprint(examples)
        if (directory, fingerprint) in self._stores:
            return self._stores[directory, fingerprint]
        with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
            params = checkpoints.restore_params(selected_steps(directory)["source_dev"], model.abstract_params())
        key: dict[str, Any] = {
            "teacher_fingerprint": hf_checkpoint.fingerprint_params(params),
            "tokenizer_fingerprint": tokenizer_fingerprint(model.inputs.tokenizer),
            "max_length": model.settings.max_length,
            "data_fingerprint": fingerprint,
        }
        store = self._open_store(key, model.labels, examples)
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
        self._stores[directory, fingerprint] = store
        return store

    def _stored(self, file: LogitsFile, examples: Sequence[Example]) -> LogitsStore:
        """Run stage 2 without a model: store the logits of a file for examples, unless they are stored."""
        key = {
            "teacher_fingerprint": " ".join(["file", file.fingerprint, *self._kind]),
            "tokenizer_fingerprint": "",
            "max_length": 0,
            "data_fingerprint": transfer_set.fingerprint(examples),
        }
        store = self._open_store(key, self.models.labels, examples)
        label(store, lambda indices: file.of([store.ids[index] for index in indices]))
        return store

    def _open_store(self, key: dict[str, Any], classes: Sequence[str], examples: Sequence[Example]) -> LogitsStore:
        """Return the store of a key for examples, which another workdir may have already."""
        name = store_key(**key)
        stores = [other.logits / name for other in self.others]
        processes.on_first(lambda: sharing.copy_first(stores, self.workdir.logits / name))
        return open_store(self.workdir.logits, key, classes=classes, ids=ids_of(examples))

    def _dataset(self, model: Finetuner, sample: Sequence[Example]) -> Dataset:
        return model.dataset(sample, self.examples.drawn_from)

    def _text(self, model: Finetuner, objective: Objective) -> Dataset:
        """Return the text that an objective learns from, as an encoder reads it."""
        key = (model.role, objective.data, *objective.languages)
        if key not in self._datasets:
            self._datasets[key] = self._dataset(model, self.examples.of(objective))
        return self._datasets[key]

    def _dev(self, model: Finetuner) -> dict[str, Dataset]:
        """Return the dev splits of the source languages, as an encoder reads them."""
        return self._splits(model, by_language(self.examples.dev))

    def _target_dev(self, model: Finetuner) -> dict[str, Dataset]:
        return self._splits(model, self._target_examples)

    def _splits(self, model: Finetuner, splits: Mapping[str, Sequence[Example]]) -> dict[str, Dataset]:
        return {name: self._split(model, f"dev {name}", split) for name, split in splits.items()}

    def _split(self, model: Finetuner, name: str, examples: Sequence[Example]) -> Dataset:
        """Return a whole split of this name, as an encoder reads it."""
        if (model.role, name) not in self._datasets:
            self._datasets[model.role, name] = model.dataset(examples)
        return self._datasets[model.role, name]


def _mean_and_largest(values: np.ndarray | None) -> tuple[float, float]:
    return (0.0, 0.0) if values is None else (float(values.mean()), float(values.max()))


def _fall_back(workdir: Workdir, config: ExperimentConfig) -> None:
    for directory in _directories(workdir, config):
        fall_back(directory / CHECKPOINTS)


def _clean_up(workdir: Workdir, config: ExperimentConfig) -> None:
    for directory in _directories(workdir, config):
        metrics_log.mend(directory)
        remove_leftovers(directory / CHECKPOINTS)


def _directories(workdir: Workdir, config: ExperimentConfig) -> list[Path]:
    """Return the directory of every run, with those of further teachers, which are not scored on test."""
    directories = [directory for _, _, directory in teachers.runs(workdir, config)]
    return list(dict.fromkeys([*directories, *(run.directory for run in runs_of(workdir, config))]))


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
            steps = settings_of(mine, config).known_steps
            if processes.on_first(functools.partial(sharing.is_whole, their.directory)) and metrics_log.finished(
                their.directory, steps
            ):
                processes.on_first(functools.partial(_copy_run, workdir, mine, other, their))
        _take_teachers_over(workdir, config, facts, other, their_config)


def _take_teachers_over(
    workdir: Workdir,
    config: ExperimentConfig,
    facts: Mapping[str, Any],
    other: Workdir,
    their_config: ExperimentConfig,
) -> None:
    """Copy further teachers that another workdir has trained in the same way. All processes take part."""
    theirs = {(member, draw): directory for member, draw, directory in teachers.runs(other, their_config)}
    for member, draw, mine in teachers.runs(workdir, config):
        their = theirs.get((member, draw))
        if member == workdirs.TEACHER or their is None or processes.on_first(mine.exists):
            continue
        keys = [_member_key(one, draw, member) for one in (config, their_config)]
        if keys[0] != keys[1]:
            continue
        if not processes.on_first(functools.partial(sharing.has_same_checkpoints, other, facts, [member])):
            continue
        if processes.on_first(functools.partial(sharing.is_whole, their)) and metrics_log.finished(
            their, config.members[member].known_steps
        ):
            processes.on_first(functools.partial(sharing.copy_run, their, mine))


def _sharing_key(config: ExperimentConfig, run: Run) -> str:
    """Return a text that is equal for two runs if, and only if, they are trained with the same settings."""
    return json.dumps([_settings_key(config, run.id.draw, run.objective), run.id.seed], sort_keys=True)


def _member_key(config: ExperimentConfig, name: str, member: str) -> list[Any]:
    """Return what decides the training of a further teacher in the draw of this name."""
    draw = next(draw for draw in draws_of(config) if draw.name == name)
    return [_settings_key(config, name, member), teachers.seed(draw.apply(config), member)]


def _settings_key(config: ExperimentConfig, name: str, objective: str) -> str:
    """Return a text for the settings that decide the training of an objective in the draw of this name."""
    draw = next(draw for draw in draws_of(config) if draw.name == name)
    return json.dumps(sharing.settings_of(draw.apply(config), objective), sort_keys=True)


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
    students: dict[str, list[Path]] = {role: [] for role in models.students}
    for run in runs_of(workdir, config):
        if run.objective != workdirs.TEACHER:
            students[config.encoder_of(run.objective)].append(run.directory)
    directories = {
        member: [directory for other, _, directory in teachers.runs(workdir, config) if other == member]
        for member in models.teachers
    }
    for model, runs in [
        *((models.teachers[member], directories[member]) for member in directories),
        *((models.students[role], students[role]) for role in students),
    ]:
        trained = [model.is_trained(directory) for directory in runs]  # a list: all processes take part
        if not all(trained):
            model.check_weights()


def _planned_stages(
    workdir: Workdir, config: ExperimentConfig, task: Task, models: Models, examples: TransferSet
) -> list[plan.Stage]:
    """Return the stages of an experiment with their estimated times, before anything is computed."""
    machine = plan.measure()
    sample = examples.labelled or examples.everything or examples.drawn_from[0]
    work = {
        role: plan.Work(model.compiled_steps.matmul_parameters, model.inputs.mean_tokens(sample))
        for role, model in {**models.teachers, **models.students}.items()
    }
    objectives = definitions(config)
    all_runs = runs_of(workdir, config)
    runs = [(objectives[run.objective], run) for run in all_runs if run.objective != workdirs.TEACHER]
    missing = [
        (objective, run) for objective, run in runs if not models.student_of(run.objective).is_trained(run.directory)
    ]
    steps, steps_by_objective = _steps(config, examples)
    stages = []
    for member, model in models.teachers.items():
        settings = config.members[member]
        if not settings.learns:
            continue
        directories = [directory for other, _, directory in teachers.runs(workdir, config) if other == member]
        untrained = [directory for directory in directories if not model.is_trained(directory)]
        seconds: float | None = None
        if untrained:
            seconds = work[member].training_seconds(machine, steps[member], settings.batch_size) * len(untrained)
            seconds += machine.compile_seconds
        times = f"{len(directories)} × " if len(directories) > 1 else ""
        stages.append(plan.Stage(member, f"{times}{plan.length([steps[member]], settings)}", seconds))

    # The monolingual teachers of a draw label once for all seeds, and each seed's students for themselves.
    labellers: dict[tuple[str, str, str, int], int] = {}  # (draw, role, text, seed) -> number of examples
    for objective, run in missing:
        if objective.student_teacher is not None:
            role = config.encoder_of(objective.student_teacher)
            text = " ".join((objective.student_teacher, *_text_of(objective)))
            labellers[run.id.draw, role, text, run.id.seed] = len(examples.for_teacher(objective))
        elif objective.teacher == "monolingual":
            for member in models.teachers:
                part = teachers.read_by(config, member, examples.for_teacher(objective))
                if part:
                    labellers[run.id.draw, member, " ".join(_text_of(objective)), -1] = len(part)
    if labellers:
        seconds = sum(work[role].inference_seconds(machine, count) for (_, role, *_), count in labellers.items())
        counts = sorted(set(labellers.values()))
        size = " to ".join(f"{count:,}" for count in dict.fromkeys((counts[0], counts[-1])))
        stages.append(plan.Stage("labelling", f"{len(labellers)} × {size} examples", seconds))

    oracle = task.target_languages if config.oracle else ()
    scored = len(examples.dev) + sum(len(task.load("dev", language)) for language in oracle)
    seconds = 0.0
    for objective, run in missing:
        role = config.encoder_of(run.objective)
        encoder, student = config.encoders[role], work[role]
        seconds += student.training_seconds(machine, steps_by_objective[run.objective], encoder.batch_size)
        if not objective.languages:
            seconds += encoder.evaluations * student.inference_seconds(machine, scored)
    programs = {
        (config.encoder_of(run.objective), objective.loss_settings(), steps_by_objective[run.objective])
        for objective, run in missing
    }
    seconds += len(programs) * machine.compile_seconds
    size = f"{len(runs)} × {plan.length(list(steps_by_objective.values()), config.student)}"
    stages.append(plan.Stage("students", size, seconds if missing else None))

    unscored = processes.on_first(lambda: _num_unscored(workdir, [run for _, run in runs]))
    count = sum(len(task.load(split, language)) for split in config.evaluation_splits for language in task.languages)
    selected = 2 + bool(config.student.average_last) + config.oracle  # at most
    seconds = selected * unscored * work[encoders.STUDENT].inference_seconds(machine, count)
    size = f"{len(runs)} × {selected} checkpoints, {count:,} examples each"
    stages.append(plan.Stage("evaluation", size, seconds if unscored else None))
    return stages


def _text_of(objective: Objective) -> tuple[str, ...]:
    """Return what tells the text apart that the teacher of an objective labels; nothing for L ∪ U."""
    return (objective.data, *objective.languages) if objective.reads_target_text else ()


def _log_balanced(objectives: Sequence[Objective], task: Task, examples: TransferSet) -> None:
    """Log the class weights that depend on a draw's labelled text, if an objective has such weights."""
    balanced = next((objective for objective in objectives if objective.class_weights == BALANCED), None)
    if balanced:
        factors = with_class_factors(balanced, task.labels, _classes(examples.labelled)).class_factors
        named = ", ".join(f"{name} {factor:.4g}" for name, factor in zip(task.labels, factors, strict=True))
        terminal.log(f"balanced class weights: {named}")


def _classes(examples: Sequence[Example]) -> list[int]:
    return labels_of(examples).tolist()


def _steps(config: ExperimentConfig, examples: TransferSet) -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of steps of each teacher, and of a student by objective; a UserError says if none can be."""
    by_objective = {}
    for objective in configured_objectives(config):
        role = config.encoder_of(objective.name)
        by_objective[objective.name] = config.encoders[role].resolved(len(examples.of(objective)), f"{role}.").steps
    by_member = {
        member: settings.resolved(len(teachers.read_by(config, member, examples.labelled)), f"{member}.").steps
        for member, settings in config.members.items()
        if settings.learns
    }
    return by_member, by_objective


def _num_unscored(workdir: Workdir, runs: Sequence[Run]) -> int:
    """Return the number of runs that have no results yet."""
    rows = results.whole_rows(workdir.results)
    scored = {(row["objective"], results.run_id(row)) for row in rows}
    return sum((run.objective, run.id) not in scored for run in runs)


def _devices() -> str:
    devices = f"{jax.device_count()} {jax.devices()[0].platform} device(s)"
    return f"{devices} of {processes.count()} processes" if processes.count() > 1 else devices
