"""Fine-tuning one encoder: what teacher and student, vanilla and distilled, have in common."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xtransfer.config import ExperimentConfig, ModelConfig, cache_dir
from xtransfer.data.batches.batches import Dataset, TrainBatches, eval_batches
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.task import Example, Task
from xtransfer.distillation.objectives import Objective
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.inference import predict
from xtransfer.runtime import terminal
from xtransfer.runtime.sharding import data_shards, make_mesh, process_slice
from xtransfer.train import loop, state
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.inputs import ModelInputs

_SAMPLED = 16  # batches by which the share of padding is told
_FULL = 0.75  # share of real tokens in a batch below which something is worth changing


class Finetuner:
    """An encoder with its tokenizer on a mesh: tokenises, trains and predicts with the settings of one role.

    All runs of one instance share their compiled programs. What cannot work (a checkpoint, its head, a
    tokenizer, a length, a frozen pattern) is a `UserError` here, before anything is trained.
    """

    def __init__(
        self,
        role: str,
        settings: ModelConfig,
        labels: Sequence[str],
        mesh: jax.sharding.Mesh,
        *,
        eval_batch_size: int,
        token_cache: Path | None = None,
    ):
        self.inputs = ModelInputs(role, settings, shards=data_shards(mesh), token_cache=token_cache)
        self.role, self.settings, self.labels, self.mesh = role, settings, tuple(labels), mesh
        self.eval_batch_size = eval_batch_size
        self.fresh_params(seed=0)  # reads every tensor once: a checkpoint that does not fit is found now
        self.compiled_steps = CompiledSteps(settings, self.inputs.architecture, self.num_classes, mesh)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.labels)

    def fresh_params(self, seed: int) -> Any:
        """The pretrained parameters with a head drawn from `seed` (or the checkpoint's own head)."""
        return hf_checkpoint.load_classifier(
            self.inputs.directory,
            self.num_classes,
            seed=seed,
            pooling=self.settings.pooling,
            dtype=jnp.dtype(self.settings.compute_dtype),
            labels=self.labels,
            mesh=self.mesh,
        )[1]

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the parameters, for a restore."""
        return self.compiled_steps.abstract_params()

    def dataset(self, examples: Sequence[Example], drawn_from: Sequence[Sequence[Example]] = ()) -> Dataset:
        """The examples with their tokens, which are as of `ModelInputs.tokens`; without a teacher's logits."""
        return self.inputs.dataset(examples, self.num_classes, drawn_from)

    def predict(self, params: Any, dataset: Dataset, on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Logits [n, K] float32 in the dataset's order; `on_batch(b)` hears of each b examples that are done.

        Raises:
          UserError: logits that are not finite.
        """
        batches = prefetch(eval_batches(dataset, self.inputs.evaluation_plan(self.eval_batch_size)))
        logits = predict(
            self.compiled_steps.eval_step, params, self.mesh, batches, len(dataset), self.num_classes, on_batch=on_batch
        )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise UserError(
                f"{self.role}: the logits of {len(bad)} examples are not finite, the first is {dataset.ids[bad[0]]}: "
                "the training went wrong, try a lower learning_rate"
            )
        return logits

    def train(self, directory: Path, objective: Objective, dataset: Dataset, dev: Dataset, seed: int) -> None:
        """Trains by `objective`, scoring checkpoints by accuracy on `dev`; goes on where it stopped."""
        if self.is_trained(directory):
            return

        def score(params: Any) -> dict[str, float]:
            right = self.predict(params, dev).argmax(-1) == dev.labels
            return {"dev_accuracy": float(right.mean())}

        title = self.role if directory.name == self.role else " ".join(directory.parts[-2:])
        plan = dataclasses.replace(self.inputs.training_plan, part=process_slice(self.mesh))
        batches = TrainBatches(dataset, plan, seed)
        sizes, share = "/".join(map(str, batches.row_sizes)), batches.real_share(_SAMPLED)
        terminal.log(f"{title}: batches of {sizes} rows of {plan.row_length} tokens, {share:.0%} of them real")
        in_parts = self.settings.accumulation > 1
        # A short training has padding for the sake of fewer programs; but parts have it for nothing.
        if share < _FULL and (plan.fitted_sizes > 1 or in_parts):
            names = ("batch_size", "row_length", *(("accumulation",) if in_parts else ()))
            keys = " or ".join(f"{self.role}.{name}" for name in names)
            terminal.log(
                f"warning: {title}: more than a quarter of each batch is padding: change {keys} to waste less time"
            )
        loop.fit(
            directory,
            loop.Plan(title, self.settings.steps, self.settings.evaluations, seed),
            loop.Start(
                lambda: state.create(self.fresh_params(seed), self.compiled_steps.optimizer, self.mesh),
                self.compiled_steps.abstract_state,
            ),
            self.compiled_steps.train_step(objective),
            batches,
            score,
            self.mesh,
        )

    def is_trained(self, directory: Path) -> bool:
        """Whether the run in `directory` has come to its end."""
        return loop.finished(directory, self.settings.steps)


class Models:
    """Teacher and student of an experiment on one mesh, each made when it is first asked for."""

    def __init__(self, config: ExperimentConfig, task: Task):
        self._config, self._task = config, task
        self.mesh = make_mesh(dataclasses.astuple(config.mesh))

    @functools.cached_property
    def teacher(self) -> Finetuner:
        """The monolingual encoder."""
        return self._finetuner("teacher", self._config.teacher)

    @functools.cached_property
    def student(self) -> Finetuner:
        """The multilingual encoder."""
        return self._finetuner("student", self._config.student)

    def facts(self) -> dict[str, Any]:
        """What an experiment is made from beside its settings: with any of it changed, results would be another's."""
        task = self._task
        return {
            "name": task.name,
            "labels": list(task.labels),
            "synthetic": task.synthetic,
            "source_language": task.source_language,
            "target_languages": list(task.target_languages),
            "data": task.fingerprint(),
            "teacher_checkpoint": hf_checkpoint.fingerprint_files(self.teacher.inputs.directory),
            "student_checkpoint": hf_checkpoint.fingerprint_files(self.student.inputs.directory),
        }

    def _finetuner(self, role: str, settings: ModelConfig) -> Finetuner:
        terminal.log(f"{role}: {settings.checkpoint}")
        return Finetuner(
            role,
            settings,
            self._task.labels,
            self.mesh,
            eval_batch_size=self._config.evaluation_batch_size,
            token_cache=cache_dir(self._config.task) / "tokens",
        )
