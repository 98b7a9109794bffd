"""Scores the checkpoints of a workdir on every language: reads Orbax, writes rows of results."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from xtransfer import cli, sharding
from xtransfer.config import ExperimentConfig
from xtransfer.data.pipeline import Dataset
from xtransfer.data.tasks import Task, get_task
from xtransfer.evaluation import metrics, selection, statistics
from xtransfer.train import loop
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.finetuning import Finetuner
from xtransfer.workdir import Workdir, read_config

TEACHER = statistics.TEACHER


@dataclass(frozen=True)
class Run:
    """One trained model: the row's objective ("teacher" for the teacher), its seed, and where it lies."""

    objective: str
    seed: int
    directory: Path


def runs(workdir: Workdir, config: ExperimentConfig) -> list[Run]:
    """The runs of an experiment in the order of its stages."""
    students = [Run(o, s, workdir.student(o, s)) for o in config.objectives for s in config.seeds]
    return [Run(TEACHER, config.teacher_seed, workdir.teacher), *students]


def evaluate(workdir: Workdir) -> list[dict[str, Any]]:
    """Scores every selected checkpoint that has no rows yet; returns all rows of the experiment's runs.

    The teacher is scored in the source language only: it knows no other. Runs that are not finished
    are named and left out.
    """
    config = read_config(workdir)
    task = get_task(config.task)
    mesh = sharding.make_mesh()
    wanted = runs(workdir, config)
    rows = statistics.read_rows(workdir.results) if workdir.results.exists() else []
    scored = {(row["objective"], row["seed"]) for row in rows}
    for role, model_config in ((TEACHER, config.teacher), ("student", config.student)):
        mine = [run for run in wanted if (run.objective == TEACHER) == (role == TEACHER)]
        missing = [run for run in mine if (run.objective, run.seed) not in scored]
        ready = [run for run in missing if _is_finished(run, model_config.steps)]
        for run in missing:
            if run not in ready:
                cli.log(f"{run.directory}: not finished, left out")
        if not ready:
            continue
        model = Finetuner(role, model_config, task.labels, mesh, eval_batch_size=config.evaluation_batch_size)
        languages = [task.source_language, *(() if role == TEACHER else task.target_languages)]
        datasets = {
            (split, language): model.dataset(task.load(split, language))
            for split in config.evaluation_splits
            for language in languages
        }
        for run in ready:
            rows += _score(workdir, task, model, run, datasets)
            _write_whole(workdir.results, rows)  # a run's rows are all there, or none
    keys = {(run.objective, run.seed) for run in wanted}
    return [row for row in rows if (row["objective"], row["seed"]) in keys]


def _score(
    workdir: Workdir, task: Task, model: Finetuner, run: Run, datasets: dict[tuple[str, str], Dataset]
) -> Iterator[dict[str, Any]]:
    chosen = _selected(run.directory)
    with Checkpoints(run.directory / "checkpoints", read_only=True) as checkpoints:
        for step in sorted(set(chosen.values())):
            protocols = [name for name, best in chosen.items() if best == step]
            params = checkpoints.restore_params(step, model.abstract_params())
            for (split, language), dataset in datasets.items():
                logits = model.predict(params, dataset)
                _write_predictions(
                    workdir.predictions(run.directory, step, split, language), dataset, logits, task.labels
                )
                guesses = logits.argmax(-1)
                warning = metrics.degenerate_warning(guesses, dataset.labels, len(task.labels))
                if warning:
                    cli.log(f"warning: {run.directory} step {step} on {language}: {warning}")
                row = {"task": task.name, "objective": run.objective, "seed": run.seed, "step": step}
                where = {"split": split, "language": language}
                for score in metrics.scores(guesses, dataset.labels, len(task.labels)):
                    for protocol in protocols:
                        yield row | {"selection": protocol} | where | score._asdict()
    cli.log(f"{run.directory}: scored")


def selected_step(run: Path, protocol: str) -> int:
    """The step of a run that a protocol chooses, by what training recorded."""
    return _selected(run)[protocol]


def _selected(run: Path) -> dict[str, int]:
    return selection.choose({int(row["step"]): row["dev_accuracy"] for row in loop.read_metrics(run)})


def _is_finished(run: Run, steps: int) -> bool:
    rows = loop.read_metrics(run.directory)
    return bool(rows) and rows[-1]["step"] == steps


def _write_predictions(path: Path, dataset: Dataset, logits: np.ndarray, labels: Sequence[str]) -> None:
    rows = [
        {
            "id": name,
            "label": labels[int(gold)],
            "prediction": labels[int(scores.argmax())],
            "logits": [round(float(score), 5) for score in scores],
        }
        for name, gold, scores in zip(dataset.ids, dataset.labels, logits, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, rows)


def _write_whole(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)
