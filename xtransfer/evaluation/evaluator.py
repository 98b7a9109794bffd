"""Scoring the checkpoints of a workdir in every language: Orbax checkpoints in, result rows out."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer import storage
from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.data.batches.batches import Dataset
from xtransfer.data.task import Example, Task
from xtransfer.distillation.objectives import definitions
from xtransfer.evaluation import agreement, metrics, recalibration, results, token_counts
from xtransfer.evaluation.recalibration import Recalibration
from xtransfer.runs import costs
from xtransfer.runs.draws import draws_of
from xtransfer.runs.find import known_languages, read_dev_scores, selected_steps
from xtransfer.runs.selection import PROTOCOLS, choose, weights_name
from xtransfer.runs.workdir import DEFAULT_DRAW, TEACHER, RunId, Workdir
from xtransfer.runtime import checksums, processes, terminal
from xtransfer.train import metrics_log
from xtransfer.train.checkpoints import CHECKPOINTS, PARAMS, Checkpoints
from xtransfer.train.finetuning import Finetuner, Models

_log = logging.getLogger(__name__)

_SHOWN = 5  # the most places that a warning names


@dataclass(frozen=True)
class Run:
    """One trained model: its objective (`TEACHER` for the teacher), its draw and seed, and its directory."""

    objective: str
    id: RunId
    directory: Path

    @property
    def name(self) -> str:
        """The run as people call it."""
        if self.objective == TEACHER:
            return TEACHER if self.id.draw == DEFAULT_DRAW else f"{TEACHER} {self.id.draw}"
        return f"{self.objective} {self.id}"

    @property
    def facts(self) -> dict[str, Any]:
        """The keys of a result row that name the run."""
        return {"objective": self.objective, "draw": self.id.draw, "seed": self.id.seed}


def runs(workdir: Workdir, config: ExperimentConfig) -> list[Run]:
    """Return the runs of an experiment in the order of its stages."""
    result = []
    for draw in draws_of(config):
        drawn = workdir.at(draw.name)
        if not config.teacher.is_file:
            result.append(Run(TEACHER, RunId(draw.name, draw.teacher_seed), drawn.teacher))
        result += [
            Run(objective, RunId(draw.name, seed), drawn.student(objective, seed))
            for objective in config.objectives
            for seed in config.seeds
        ]
    return result


def rows_of(runs: Iterable[Run], rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the result rows of some runs, in the order of the rows."""
    keys = {(run.objective, run.id) for run in runs}
    return [dict(row) for row in rows if (row["objective"], results.run_id(row)) in keys]


def unfinished(workdir: Workdir, config: ExperimentConfig) -> list[Run]:
    """Return the runs that are not finished yet, which `evaluate` leaves out. All processes take part."""
    return [run for run in runs(workdir, config) if not _is_finished(run, config)]


def _is_finished(run: Run, config: ExperimentConfig) -> bool:
    return metrics_log.finished(run.directory, settings_of(run, config).known_steps)


def settings_of(run: Run, config: ExperimentConfig) -> ModelConfig:
    """Return the settings of a run's model."""
    return config.teacher if run.objective == TEACHER else config.encoders[config.encoder_of(run.objective)]


def languages_of(config: ExperimentConfig, task: Task, requested: Sequence[str], objective: str) -> tuple[str, ...]:
    """Return the languages to score a run in, the source languages first.

    Args:
      config: the experiment's config.
      task: the task, whose target languages include the requested ones.
      requested: some of its languages; () is all of them.
      objective: the run's objective, or "teacher"; see `known_languages`.
    """
    known = known_languages(config, task, objective)
    return tuple(language for language in known if not requested or language in requested)


def evaluate(
    workdir: Workdir, config: ExperimentConfig, task: Task, models: Models, languages: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Score every selected checkpoint that has no rows yet, and return all rows of the experiment's runs.

    A checkpoint whose predictions are missing or damaged predicts again, and keeps the rows that it has. A damaged row
    is removed and scored again. The teacher is scored in the source languages only, the ones it knows, and students
    there against the teacher too. Unfinished runs are left out. If the config asks for a temperature or a threshold,
    fit them on source dev first, and score their effect too. All processes take part, and process 0 writes.

    Args:
      workdir: the experiment's workdir.
      config: its config; `metrics` and `evaluation_splits` say what to score.
      task: its task.
      models: its models.
      languages: the languages to score; () is all of the task's.
    """
    objectives = definitions(config)
    processes.on_first(functools.partial(results.mend, workdir.results, objectives))
    rows = results.read_rows(workdir.results) if workdir.results.exists() else []
    scored = {_key(row) for row in rows}
    all_runs = runs(workdir, config)
    constants: list[str] = []
    teachers: dict[str, Run] = {}  # by draw; a draw's teacher comes before its students

    @functools.cache
    def dataset(model: Finetuner, split: str, language: str) -> Dataset:
        return model.dataset(task.load(split, language))

    for run in all_runs:
        is_teacher = run.objective == TEACHER
        if not _is_finished(run, config):
            continue
        if is_teacher:
            teachers[run.id.draw] = run
        scored_languages = languages_of(config, task, languages, run.objective)
        effects = recalibration.effects_of(config.calibration, multi_label=task.multi_label)
        before = recalibration.metrics_of(config.calibration, multi_label=task.multi_label)
        names = tuple(dict.fromkeys((*config.metrics, *before)))
        rows_of_job = [*metrics.score_names(names, task.labels), *effects]
        all_jobs = list(_jobs(run, config.evaluation_splits, scored_languages, rows_of_job))
        due = processes.on_first(functools.partial(_due, workdir, config, run, all_jobs, scored))
        jobs = [job for job, is_due in zip(all_jobs, due, strict=True) if is_due]
        added: list[dict[str, Any]] = []
        if jobs:
            model = models.teacher if is_teacher else models.student_of(run.objective)
            recalibrate = functools.partial(_recalibrate, workdir, config, task, model, run, dataset)
            score = functools.partial(_score, workdir, task, model, run, jobs, dataset, names, constants)
            new = score(effects, recalibrate, counts_tokens=model is models.student)
            with costs.recorded(workdir, "evaluation", run.directory, model.predicted):
                added += (row for row in new if _key(row) not in scored)
        if not is_teacher and run.id.draw in teachers:
            known = languages_of(config, task, languages, TEACHER)
            in_source = [job for job in all_jobs if job.language in known]
            against = functools.partial(_against_teacher, workdir, task, run, teachers[run.id.draw], in_source, scored)
            added += processes.on_first(against)
        if added:
            rows += (results.marked_row(row, objectives) for row in added)
            # All rows of a run are written at once, so that it has all of them or none.
            processes.on_first(functools.partial(results.write_rows, workdir.results, rows))
    if constants:
        more = f"; and {len(constants) - _SHOWN} more" if len(constants) > _SHOWN else ""
        terminal.log(
            f"warning: these checkpoints predict {'the same labels' if task.multi_label else 'one class'} for every "
            f"example: {'; '.join(constants[:_SHOWN])}{more}"
        )
    return rows_of(all_runs, rows)


def dev_scores(logits: np.ndarray, labels: np.ndarray, classes: Sequence[str], name: str) -> dict[str, float]:
    """Return a checkpoint's metrics on dev for a row of `metrics.jsonl`, among them the score that ranks it.

    Accuracy ranks by itself. Any other metric is added under its own name, and as a score of which more is better. A
    multi-label task has no accuracy.

    Args:
      logits: [n, K].
      labels: integers [n] in 0 .. K − 1; in a multi-label task [n, K], 0 or 1.
      classes: the names of the K classes.
      name: the metric to rank by, see `metrics.check_single`.
    """
    accuracy: dict[str, float] = {}
    if labels.ndim == 1:
        accuracy = {metrics_log.DEV_ACCURACY: metrics.score(logits, labels, classes, "accuracy")}
    if name == "accuracy":
        return accuracy
    value = metrics.score(logits, labels, classes, name)
    rank = value if metrics.metric_of(name).higher_is_better else -value
    return {**accuracy, f"dev_{name}": value, metrics_log.DEV_SCORE: rank}


@dataclass(frozen=True)
class _Job:
    """The weights of a checkpoint on one split of one language, for the protocols that selected them.

    Attributes:
      step: the checkpoint's step.
      item: the checkpoint's item that holds the weights.
      protocols: the protocols that selected it.
      split: the split to score.
      language: the language to score.
      keys: the `_key` of every result row of the job.
    """

    step: int
    item: str
    protocols: tuple[str, ...]
    split: str
    language: str
    keys: frozenset[tuple[Any, ...]]

    @property
    def weights_name(self) -> str:
        """The name of the weights."""
        return weights_name(self.step, self.item)


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("objective", "draw", "seed", "step", "selection", "split", "language", "metric"))


def _due(
    workdir: Workdir, config: ExperimentConfig, run: Run, jobs: Sequence[_Job], scored: set[tuple[Any, ...]]
) -> list[bool]:
    """Return for each job whether rows or predictions are missing, or what the config asks to fit to its weights."""
    record, settings = workdir.calibration(run.directory), dataclasses.asdict(config.calibration)

    def is_due(job: _Job) -> bool:
        path = workdir.predictions(run.directory, job.weights_name, job.split, job.language)
        is_fitted = recalibration.usable(record, job.weights_name).has(**settings)
        return not job.keys <= scored or not is_fitted or _is_lost(path)

    return [is_due(job) for job in jobs]


def _is_lost(predictions: Path) -> bool:
    """Return whether a file of predictions is missing or damaged; a damaged one is logged."""
    if not predictions.is_file():
        return True
    fault = checksums.fault_of(predictions)
    if fault is not None:
        _log.warning("%s is damaged, so predicting again: %s", predictions, fault)
    return fault is not None


def _jobs(run: Run, splits: Sequence[str], languages: Sequence[str], names: Sequence[str]) -> Iterator[_Job]:
    scores = read_dev_scores(run.directory)
    protocols_by_weights: dict[tuple[int, str], dict[str, list[str]]] = {}
    for language in languages:
        for protocol, step in choose(scores, language).items():
            by_language = protocols_by_weights.setdefault((step, PROTOCOLS[protocol].item), {})
            by_language.setdefault(language, []).append(protocol)
    for step, item in sorted(protocols_by_weights, key=lambda weights: (weights[0], weights[1] != PARAMS)):
        for split in splits:
            for language, protocols in protocols_by_weights[step, item].items():
                keys = frozenset(
                    (*run.facts.values(), step, protocol, split, language, name)
                    for protocol in protocols
                    for name in names
                )
                yield _Job(step, item, tuple(protocols), split, language, keys)


def _score(
    workdir: Workdir,
    task: Task,
    model: Finetuner,
    run: Run,
    jobs: Sequence[_Job],
    dataset: Callable[[Finetuner, str, str], Dataset],
    names: Sequence[str],
    constants: list[str],
    effects: Sequence[str],
    recalibrate: Callable[[Any, str], Recalibration],
    *,
    counts_tokens: bool,
) -> Iterator[dict[str, Any]]:
    title = f"evaluation of {run.directory.relative_to(workdir.root)}"
    total = sum(len(task.load(job.split, job.language)) for job in jobs)
    with (
        terminal.progress_bar(title, total, unit="examples") as progress,
        Checkpoints(run.directory / CHECKPOINTS, read_only=True) as checkpoints,
    ):
        for (step, item), jobs_of_weights in itertools.groupby(jobs, lambda job: (job.step, job.item)):
            params = checkpoints.restore_params(step, model.abstract_params(), item)
            fitted = recalibrate(params, weights_name(step, item)) if effects else recalibration.UNCHANGED
            for job in jobs_of_weights:
                examples = task.load(job.split, job.language)
                data = dataset(model, job.split, job.language)
                logits = model.predict(params, data, progress.advance)
                if counts_tokens:
                    record = functools.partial(token_counts.record, workdir, job.split, model.inputs)
                    processes.on_first(functools.partial(record, examples, data.tokens))
                row = {"task": task.name, **run.facts, "step": step}
                gold = task.gold(examples)
                scores = _scores(run, job, gold, logits, task.labels, names, constants)
                for score in [*scores, *recalibration.effects(fitted, effects, logits, gold, task.labels)]:
                    for protocol in job.protocols:
                        selected = {"selection": protocol, "split": job.split, "language": job.language}
                        yield row | selected | score._asdict()
                path = workdir.predictions(run.directory, job.weights_name, job.split, job.language)
                predictions = storage.jsonl(prediction_rows(examples, logits, task))  # read by process 0 alone
                processes.on_first(functools.partial(checksums.write, path, predictions))


def _against_teacher(
    workdir: Workdir, task: Task, run: Run, teacher: Run, jobs: Sequence[_Job], scored: set[tuple[Any, ...]]
) -> list[dict[str, Any]]:
    """Return the missing rows of a student's metrics against its teacher's selected checkpoint.

    Args:
      workdir: the workdir, with the predictions of all jobs by both.
      task: the task.
      run: the student.
      teacher: its teacher.
      jobs: the student's jobs in the languages of the teacher.
      scored: the keys of the rows that exist.
    """
    selected = weights_name(selected_steps(teacher.directory)["source_dev"], PARAMS)
    rows = []
    for job in jobs:
        row = {"task": task.name, **run.facts, "step": job.step}
        places = [{"selection": protocol, "split": job.split, "language": job.language} for protocol in job.protocols]
        missing = [
            row | place
            for place in places
            if any(_key(row | place | {"metric": name}) not in scored for name in metrics.TEACHER_METRICS)
        ]
        if missing:
            ours = workdir.predictions(run.directory, job.weights_name, job.split, job.language)
            theirs = workdir.predictions(teacher.directory, selected, job.split, job.language)
            scores = agreement.scores(ours, theirs, task.labels, multi_label=task.multi_label)
            new = (one | score._asdict() for one in missing for score in scores)
            rows += [one for one in new if _key(one) not in scored]
    return rows


def _recalibrate(
    workdir: Workdir,
    config: ExperimentConfig,
    task: Task,
    model: Finetuner,
    run: Run,
    dataset: Callable[[Finetuner, str, str], Dataset],
    params: Any,
    name: str,
) -> Recalibration:
    """Return what the config asks to fit to the weights of this name, from the run's record or fitted now."""
    path, settings = workdir.calibration(run.directory), config.calibration
    recorded = recalibration.recorded_everywhere(path, name)
    if recorded.has(**dataclasses.asdict(settings)):
        return recorded
    known = known_languages(config, task, run.objective)
    splits = [dataset(model, "dev", language) for language in task.source_languages if language in known]
    logits = np.concatenate([model.predict(params, dev) for dev in splits])
    labels = np.concatenate([dev.labels for dev in splits])
    return recalibration.fit_and_record(path, name, settings, recorded, logits, labels, title=f"{run.name} step {name}")


def _scores(
    run: Run,
    job: _Job,
    gold: np.ndarray,
    logits: np.ndarray,
    labels: Sequence[str],
    names: Sequence[str],
    constants: list[str],
) -> list[metrics.Score]:
    """Score one job by the named metrics, and add it to `constants` if the model gave every example the same class."""
    constant = metrics.described_constant(logits, gold, labels)
    if constant is not None:
        constants.append(f"{run.name} step {job.weights_name} on {job.split} {job.language} ({constant})")
    return metrics.scores(logits, gold, labels, names)


def prediction_rows(examples: Sequence[Example], logits: np.ndarray, task: Task) -> Iterator[dict[str, Any]]:
    """Yield the line of a predictions file for each example. In a multi-label task, label and prediction are lists.

    Args:
      examples: n examples.
      logits: [n, K], columns in the task's order of classes.
      task: the task.
    """
    labels = task.labels
    for example, scores in zip(examples, logits, strict=True):
        if task.multi_label:
            label: Any = [labels[index] for index in example.classes or ()]
            prediction: Any = [name for name, is_predicted in zip(labels, scores > 0, strict=True) if is_predicted]
        else:
            label, prediction = labels[example.label], labels[int(scores.argmax())]
        yield {
            "id": example.id,
            "label": label,
            "prediction": prediction,
            "logits": [round(float(score), 5) for score in scores],
        }
