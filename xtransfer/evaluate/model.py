"""Scoring one classifier, a finished run or a Hugging Face directory, on any task, split, and languages."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xtransfer import config as settings
from xtransfer import storage
from xtransfer.config import ExperimentConfig, TaskConfig
from xtransfer.data.registry import load_task
from xtransfer.data.task import Task
from xtransfer.distillation.objectives import definitions, uses_target_text
from xtransfer.errors import ConfigError, MachineError
from xtransfer.evaluate import step_table, xtreme
from xtransfer.evaluation import metrics
from xtransfer.evaluation.classifiers import ClassifierScorer, LanguageResult
from xtransfer.evaluation.evaluator import prediction_rows
from xtransfer.evaluation.results import TARGET_TEXT_MARK, marked_row, write_rows
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.report.table import Table
from xtransfer.runs.classifier import open_classifier, selected_run
from xtransfer.runs.find import SelectedRun, known_languages
from xtransfer.runs.workdir import DEFAULT_DRAW
from xtransfer.runtime import compilation_cache, processes, terminal
from xtransfer.runtime.sharding import make_mesh

NO_SELECTION = "none"
"""The "selection" of a row about a model that is no run: there was nothing to select from."""


@dataclass(frozen=True)
class Request:
    """What to score, as the command line states it.

    Attributes:
      model: a run's directory, a Hugging Face directory, or a hub id with an optional @revision.
      config: FILE[:ARG] of an experiment with the task; "" takes a run's own.
      overrides: flags `--config.key=value`.
      languages: the languages; () takes the task's, or the source language for a teacher.
      split: the split.
      selection: the protocol that selects a run's checkpoint.
      metrics: the metrics; () takes the config's.
      output: the directory to write results and predictions to, or None.
      xtreme: the directory of a submission to XTREME, or None.
    """

    model: Path
    config: str
    overrides: Sequence[str]
    languages: tuple[str, ...]
    split: str
    selection: str
    metrics: tuple[str, ...]
    output: Path | None
    xtreme: Path | None


def evaluate_model(request: Request) -> None:
    """Score the classifier, print its table, and write what the request asks for.

    Raises:
      UserError: the model, the task, or a flag cannot be used; or classifier and task have different classes.
    """
    if processes.count() > 1:
        raise ConfigError("--model runs in one process: leave out --processes")
    output = request.output
    if output is not None and output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(f"{output} already exists; choose another --output")
    if output is not None:
        storage.check_creatable(output)
    directory = hf_checkpoint.resolve(str(request.model))
    run = selected_run(directory, request.selection)
    config = _config(request, run)
    task, languages = _task(config.task, request.languages, run)
    where = "--metrics" if request.metrics else "config key metrics"
    metrics.check_names(where, config.metrics, task.labels, multi_label=task.multi_label)
    layout = None if request.xtreme is None else xtreme.check(task.name, request.split, request.xtreme)
    compilation_cache.enable(settings.cache_dir(config.task))
    mesh = make_mesh()
    classifier = open_classifier(directory, mesh, selection=request.selection)
    scorer = ClassifierScorer(classifier, task, mesh, config.evaluation_batch_size)
    total = sum(len(task.load(request.split, language)) for language in languages)
    with terminal.progress_bar("evaluation", total, unit="examples") as progress:
        results = [scorer.score(request.split, name, config.metrics, progress.advance) for name in languages]
    for result in results:
        if result.truncated:
            terminal.log(
                f"warning: {result.truncated:,} of {len(result.examples):,} texts of {task.name}/{request.split}/"
                f"{result.language} are longer than {classifier.max_length} tokens, and are truncated"
            )
    marked = run is not None and uses_target_text(definitions(run.config), run.objective)
    name = f"{request.model} ({TARGET_TEXT_MARK})" if marked else str(request.model)
    step_table.show_table(_table(name, request.split, task, results))
    if output is not None:
        _write(output, _rows(request, run, task, results), request.split, task, results)
    if layout is not None and request.xtreme is not None:
        xtreme.export(request.xtreme, layout, task, results)


def _config(request: Request, run: SelectedRun | None) -> ExperimentConfig:
    if request.config:
        config = settings.load(request.config, request.overrides)
    elif run is None:
        raise ConfigError(f"{request.model}: name the task to score it on: --config FILE[:arg]")
    elif request.overrides:
        raise ConfigError(
            f"{request.overrides[0]}: an override needs --config FILE[:arg]; without it, the run's counts"
        )
    else:
        config = run.config
    return dataclasses.replace(config, metrics=request.metrics) if request.metrics else config


def _task(config: TaskConfig, languages: tuple[str, ...], run: SelectedRun | None) -> tuple[Task, tuple[str, ...]]:
    """Return the task, set up with the requested languages, and the languages to score."""
    targets = tuple(language for language in languages if language not in config.sources)
    task = load_task(dataclasses.replace(config, target_languages=targets) if targets else config)
    task = dataclasses.replace(task, load=functools.cache(task.load))
    known = () if run is None else known_languages(run.config, task, run.objective)
    return task, languages or known or task.languages


def _rows(
    request: Request, run: SelectedRun | None, task: Task, results: Sequence[LanguageResult]
) -> Iterator[dict[str, Any]]:
    """Yield result rows. A model that is no run has its own name as the objective, and seed and step 0."""
    row: dict[str, Any] = {"task": task.name, "objective": str(request.model), "draw": DEFAULT_DRAW, "seed": 0}
    row |= {"step": 0, "selection": NO_SELECTION}
    if run is not None:
        row |= {"objective": run.objective, "draw": run.workdir.draw, "seed": run.seed}
        row |= {"step": run.step, "selection": run.selection}
    for result in results:
        for score in result.scores:
            scored = row | {"split": request.split, "language": result.language} | score._asdict()
            yield scored if run is None else marked_row(scored, definitions(run.config))


def _table(model: str, split: str, task: Task, results: Sequence[LanguageResult]) -> Table:
    """Return a table with a row for each language and a column for each score."""
    names = [score.metric for score in results[0].scores]
    lines = [
        (result.language, f"{len(result.examples):,}", *(step_table.cell(x.metric, x.value) for x in result.scores))
        for result in results
    ]
    targets = [result for result in results if result.language not in task.source_languages]
    if len(targets) > 1:
        means = [sum(result.scores[i].value for result in targets) / len(targets) for i in range(len(names))]
        cells = [step_table.cell(name, mean) for name, mean in zip(names, means, strict=True)]
        lines.append(("avg of targets", "", *cells))
    return Table(("language", "examples", *names), tuple(lines), title=f"{model} on {task.name} {split}")


def _write(
    output: Path, rows: Iterator[dict[str, Any]], split: str, task: Task, results: Sequence[LanguageResult]
) -> None:
    """Write results.jsonl and predictions/<split>-<language>.jsonl; the directory appears complete or not at all."""
    try:
        with storage.atomic_directory(output) as partial:
            write_rows(partial / "results.jsonl", rows)
            for result in results:
                predictions = prediction_rows(result.examples, result.logits, task)
                storage.write_jsonl(partial / "predictions" / f"{split}-{result.language}.jsonl", predictions)
    except OSError as error:
        raise MachineError(f"{output} cannot be written: {error.strerror or error}") from error
    terminal.log(f"written: {output}")
