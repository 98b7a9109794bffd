"""The stages of an experiment: teacher -> logits -> students -> evaluation. What is done is not redone."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import jax
import numpy as np

from xtransfer import cli, sharding
from xtransfer.config import ExperimentConfig
from xtransfer.data.tasks import Example, Task, get_task, labelled_subset, unlabelled_examples
from xtransfer.data.text import tokenizer_fingerprint
from xtransfer.errors import UserError
from xtransfer.evaluation.evaluator import evaluate, selected_step
from xtransfer.models.hf import fingerprint_params
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.finetuning import Finetuner
from xtransfer.transfer import objectives
from xtransfer.transfer.label import label, permute_classes
from xtransfer.transfer.logits_store import LogitsStore, open_store
from xtransfer.transfer.objectives import OBJECTIVES, Objective
from xtransfer.workdir import Workdir, locked, record_config

SHARD_SIZE = 1024  # examples of a logits shard: what an interruption may cost


@dataclass(frozen=True)
class Material:
    """What is learnt from, all in the source language: L, U, and the dev split that chooses checkpoints."""

    labelled: list[Example]
    unlabelled: list[Example]
    dev: list[Example]

    @property
    def everything(self) -> list[Example]:
        """L ∪ U."""
        return self.labelled + self.unlabelled


def run(config: ExperimentConfig, root: Path) -> None:
    """Runs every stage that is not done yet; `UserError` for what the user can mend, before anything is computed."""
    chosen = [_objective(config, name) for name in config.objectives]
    workdir = Workdir(root)
    with locked(workdir):
        record_config(workdir.config, config)
        task = get_task(config.task)
        mesh = sharding.make_mesh()
        batch = config.evaluation_batch_size
        teacher = Finetuner("teacher", config.teacher, task.labels, mesh, eval_batch_size=batch)
        student = Finetuner("student", config.student, task.labels, mesh, eval_batch_size=batch)
        material = gather(config, task)
        cli.log(
            f"{task.name}: {len(material.labelled):,} labelled and {len(material.unlabelled):,} unlabelled "
            f"{task.source_language} examples -> {', '.join(task.target_languages)} · {jax.device_count()} "
            f"{jax.devices()[0].platform} device(s)"
        )
        train_teacher(workdir, config, teacher, material)
        for seed in config.seeds:
            for objective in chosen:
                train_student(workdir, config, teacher, student, material, objective, seed)
        with locked(workdir, "evaluation"):
            evaluate(workdir)


def gather(config: ExperimentConfig, task: Task) -> Material:
    """Reads the source language's splits and draws L and U from them."""
    settings = config.task
    train = task.load("train", task.source_language)
    labelled = labelled_subset(train, settings.labelled, settings.labelled_seed, task.labels)
    needs_text = any(OBJECTIVES[name].data == "all" for name in config.objectives)
    kind = settings.unlabelled_from if needs_text else "none"
    unlabelled = unlabelled_examples(task, kind, settings.unlabelled, settings.labelled_seed, labelled)
    return Material(labelled, unlabelled, task.load("dev", task.source_language))


def train_teacher(workdir: Workdir, config: ExperimentConfig, teacher: Finetuner, material: Material) -> None:
    """Stage 1: the monolingual encoder on L."""
    dataset, dev = teacher.dataset(material.labelled), teacher.dataset(material.dev)
    teacher.train(workdir.teacher, OBJECTIVES["vanilla"], dataset, dev, config.teacher_seed)


def train_student(
    workdir: Workdir,
    config: ExperimentConfig,
    teacher: Finetuner,
    student: Finetuner,
    material: Material,
    objective: Objective,
    seed: int,
) -> None:
    """Stages 2 and 3: the logits that an objective learns from, then the student."""
    directory = workdir.student(objective.name, seed)
    if student.is_trained(directory, seed):
        return
    if objective.teacher == "monolingual":
        store = label_examples(workdir, teacher, workdir.teacher, material.everything)
    elif objective.teacher == "vanilla":
        store = label_examples(workdir, student, workdir.student("vanilla", seed), material.everything)
    else:
        store = None
    examples = material.everything if objective.data == "all" else material.labelled
    logits = None if store is None else _logits(store, examples, student.labels)
    student.train(directory, objective, student.dataset(examples, logits), student.dataset(material.dev), seed)


def label_examples(workdir: Workdir, model: Finetuner, run: Path, examples: Sequence[Example]) -> LogitsStore:
    """Stage 2: the logits of a trained model for examples, computed once and kept under the workdir."""
    with Checkpoints(run / "checkpoints", read_only=True) as checkpoints:
        params = checkpoints.restore_params(selected_step(run, "source_dev"), model.abstract_params())
    key = {
        "teacher_fingerprint": fingerprint_params(params),
        "tokenizer_fingerprint": tokenizer_fingerprint(model.tokenizer),
        "max_length": model.settings.max_length,
        "data_fingerprint": _fingerprint(examples),
    }
    ids = [example.id for example in examples]
    store = open_store(workdir.logits, key, classes=model.labels, ids=ids, shard_size=SHARD_SIZE)
    if not store.complete:
        with cli.ticking(f"labels of {run.relative_to(workdir.root)}", len(examples), unit="examples") as ticker:

            def predict(indices: np.ndarray) -> np.ndarray:
                return model.predict(params, model.dataset([examples[i] for i in indices]))

            label(store, predict, ticker.advance)
    return store


def _objective(config: ExperimentConfig, name: str) -> Objective:
    if name not in OBJECTIVES:
        raise UserError(f"config key objectives: no objective {name!r}; there are {', '.join(OBJECTIVES)}")
    options = config.transfer
    objective = replace(
        OBJECTIVES[name],
        temperature=options.temperature,
        temperature_on=cast(Literal["teacher", "both"], options.temperature_on),
        scale_by_t2=options.scale_by_t2,
        threshold=options.threshold,
    )
    objectives.validate(objective)
    if objective.teacher == "vanilla" and "vanilla" not in config.objectives[: config.objectives.index(name)]:
        raise UserError(f"config key objectives: {name} learns from the student of 'vanilla': list that before it")
    return objective


def _logits(store: LogitsStore, examples: Sequence[Example], labels: Sequence[str]) -> np.ndarray:
    return permute_classes(store.read([example.id for example in examples]), store.classes, labels)


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.text, example.text_pair]).encode())
    return digest.hexdigest()
