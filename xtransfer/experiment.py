"""The stages of an experiment: teacher -> logits -> students -> evaluation. What is done is not redone."""

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np

from xtransfer.config import ExperimentConfig
from xtransfer.data.batches.batches import Dataset
from xtransfer.data.registry import load_task
from xtransfer.data.task import Example
from xtransfer.data.tokens.tokenizer import tokenizer_fingerprint
from xtransfer.distillation import transfer_set
from xtransfer.distillation.labelling import label, permute_classes
from xtransfer.distillation.logits_store import LogitsStore, open_store
from xtransfer.distillation.objectives import OBJECTIVES, Objective, configured_objective
from xtransfer.distillation.transfer_set import TransferSet
from xtransfer.errors import UserError
from xtransfer.evaluation.evaluator import evaluate, selected_step
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.runs import workdir as workdirs
from xtransfer.runs.workdir import Workdir
from xtransfer.runtime import locks, processes, sharding, terminal
from xtransfer.train.checkpoints import Checkpoints
from xtransfer.train.finetuning import Finetuner, Models
from xtransfer.train.loop import CHECKPOINTS

SHARD_SIZE = 1024  # examples of a logits shard: what an interruption may cost


def run(config: ExperimentConfig, root: Path) -> None:
    """Runs every stage that is not done yet.

    All that a user may have to mend (settings, data of every language, checkpoints) is looked at before
    anything is trained, and the settings are put on record only then.
    """
    sharding.check_platform(config.platform)
    workdir, settings = Workdir(root), workdirs.as_record(config)
    if (wanted := processes.on_first(lambda: settings)) != settings:
        keys = ", ".join(key for key in settings if wanted[key] != settings[key])
        raise UserError(f"config keys {keys} are not those of process 0: start all processes with the same settings")
    with locks.group_lock(root):
        workdirs.check_unchanged(workdir.config, settings)
        chosen = [configured_objective(config, name) for name in config.objectives]
        task = load_task(config.task)
        task = replace(task, load=functools.cache(task.load))
        material = transfer_set.gather(config, task)
        for language in (task.source_language, *task.target_languages):
            for split in config.evaluation_splits:
                task.load(split, language)
        models = Models(config, task)
        facts = models.facts()
        workdirs.check_unchanged(workdir.task, facts)
        workdirs.record(workdir.config, settings)
        workdirs.record(workdir.task, facts)
        terminal.log(
            f"{task.name}: {len(material.labelled):,} labelled and {len(material.unlabelled):,} unlabelled "
            f"{task.source_language} examples -> {', '.join(task.target_languages)} · {jax.device_count()} "
            f"{jax.devices()[0].platform} device(s)"
            + (f" of {processes.count()} processes" if processes.count() > 1 else "")
        )
        stages = Stages(workdir, config, models, material)
        stages.train_teacher()
        for seed in config.seeds:
            for objective in chosen:
                stages.train_student(objective, seed)
        with locks.group_lock(root, "evaluation", wait=True):
            evaluate(workdir, config, task, models)


class Stages:
    """The stages up to the students; tokens and stores are made once and shared by all seeds and objectives."""

    def __init__(self, workdir: Workdir, config: ExperimentConfig, models: Models, material: TransferSet):
        self.workdir, self.config, self.models, self.material = workdir, config, models, material
        self._stores: dict[Path, LogitsStore] = {}

    def train_teacher(self) -> None:
        """Stage 1: the monolingual encoder on L."""
        teacher = self.models.teacher
        if not teacher.is_trained(self.workdir.teacher):
            dataset, dev = self._dataset(teacher, self.material.labelled), teacher.dataset(self.material.dev)
            teacher.train(self.workdir.teacher, OBJECTIVES["vanilla"], dataset, dev, self.config.teacher_seed)

    def train_student(self, objective: Objective, seed: int) -> None:
        """Stages 2 and 3: the logits that an objective learns from, then the student."""
        student, directory = self.models.student, self.workdir.student(objective.name, seed)
        if student.is_trained(directory):
            return
        dataset = self._everything if objective.data == "all" else self._labelled
        if objective.teacher != "none":
            is_vanilla = objective.teacher == "vanilla"
            model = student if is_vanilla else self.models.teacher
            store = self._labels_of(
                model, self.workdir.student("vanilla", seed) if is_vanilla else self.workdir.teacher
            )
            logits = permute_classes(store.read(dataset.ids), store.classes, student.labels)
            dataset = replace(dataset, teacher_logits=logits)
        student.train(directory, objective, dataset, self._dev, seed)

    def _labels_of(self, model: Finetuner, run_: Path) -> LogitsStore:
        """Stage 2: the logits of a trained model for L ∪ U, computed once and kept under the workdir."""
        if run_ in self._stores:
            return self._stores[run_]
        examples = self.material.everything
        with Checkpoints(run_ / CHECKPOINTS, read_only=True) as checkpoints:
            params = checkpoints.restore_params(selected_step(run_, "source_dev"), model.abstract_params())
        key = {
            "teacher_fingerprint": hf_checkpoint.fingerprint_params(params),
            "tokenizer_fingerprint": tokenizer_fingerprint(model.inputs.tokenizer),
            "max_length": model.settings.max_length,
            "data_fingerprint": _fingerprint(examples),
        }
        ids = [example.id for example in examples]
        store = open_store(self.workdir.logits, key, classes=model.labels, ids=ids, shard_size=SHARD_SIZE)
        if not processes.on_first(lambda: store.complete):
            title, dataset = f"labels of {run_.relative_to(self.workdir.root)}", self._dataset(model, examples)
            missing = sum(len(store.shard_indices(shard)) for shard in processes.on_first(store.missing_shards))
            with terminal.progress_bar(title, missing, unit="examples") as ticker:

                def predict(indices: np.ndarray) -> np.ndarray:
                    return model.predict(params, dataset.take(indices), ticker.advance)

                label(store, predict)
        self._stores[run_] = store
        return store

    def _dataset(self, model: Finetuner, drawn: Sequence[Example]) -> Dataset:
        return model.dataset(drawn, self.material.drawn_from)

    @functools.cached_property
    def _everything(self) -> Dataset:
        return self._dataset(self.models.student, self.material.everything)

    @functools.cached_property
    def _labelled(self) -> Dataset:
        return self._dataset(self.models.student, self.material.labelled)

    @functools.cached_property
    def _dev(self) -> Dataset:
        return self.models.student.dataset(self.material.dev)


def _fingerprint(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.id, example.text, example.text_pair]).encode())
    return digest.hexdigest()
