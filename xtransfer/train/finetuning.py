"""Fine-tuning one encoder: what teacher and student, vanilla and distilled, have in common."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from xtransfer.config import ModelConfig
from xtransfer.data.pipeline import BatchPlan, Dataset, TrainBatches, eval_batches, prefetch
from xtransfer.data.tasks import Example
from xtransfer.data.text import load_tokenizer, tokenize
from xtransfer.errors import UserError
from xtransfer.models import hf
from xtransfer.models.inference import make_eval_step, predict
from xtransfer.sharding import data_shards, param_shardings
from xtransfer.train import loop, optimizer, state, steps
from xtransfer.transfer.objectives import Objective, loss_terms

_TOKENS_PER_SLOT = 8  # a row has a slot for every so many tokens: examples are seldom shorter


class Finetuner:
    """An encoder with its tokenizer on a mesh: tokenises, trains and predicts with the settings of one role.

    All runs of one instance share their compiled programs.
    """

    def __init__(
        self, role: str, settings: ModelConfig, labels: Sequence[str], mesh: jax.sharding.Mesh, *, eval_batch_size: int
    ):
        if not settings.checkpoint:
            raise UserError(f"config key {role}.checkpoint is empty: name a checkpoint, a directory or a hub id")
        self.role, self.settings, self.labels, self.mesh = role, settings, tuple(labels), mesh
        self.directory = hf.resolve(settings.checkpoint)
        self.architecture = hf.read_config(self.directory)
        self.tokenizer = load_tokenizer(self.directory)
        hf.check_tokenizer(self.architecture, self.tokenizer)
        positions = self.architecture.max_positions - self.architecture.position_offset
        if settings.max_length > positions:
            raise UserError(
                f"{role}.max_length is {settings.max_length}, but {self.directory} has {positions} positions"
            )
        self.eval_batch_size = eval_batch_size
        self.graphdef, self._fresh = self._load(seed=0)
        self.eval_step = make_eval_step(self.graphdef, mesh)
        self._train_steps: dict[Objective, steps.TrainStep] = {}

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.labels)

    def fresh_params(self, seed: int) -> Any:
        """The pretrained parameters with a head drawn from `seed` (or the checkpoint's own head)."""
        return self._load(seed=seed)[1]

    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the parameters, for a restore."""
        layout = param_shardings(self.mesh, self._fresh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self._fresh, layout)

    def dataset(self, examples: Sequence[Example], teacher_logits: np.ndarray | None = None) -> Dataset:
        """Tokenises examples; `teacher_logits` is [n, K] float32 in their order, columns in the order of `labels`."""
        pairs = [example.text_pair or "" for example in examples] if any(x.text_pair for x in examples) else None
        tokens = tokenize(self.tokenizer, [example.text for example in examples], pairs, self.settings.max_length)
        labels = np.array([example.label for example in examples], np.int32)
        return Dataset(tokens, labels, teacher_logits, tuple(example.id for example in examples), self.num_classes)

    def predict(self, params: Any, dataset: Dataset) -> np.ndarray:
        """Logits [n, K] float32 in the dataset's order."""
        batches = prefetch(eval_batches(dataset, self._plan(self.eval_batch_size)))
        return predict(self.eval_step, params, self.mesh, batches, len(dataset), self.num_classes)

    def train(self, directory: Path, objective: Objective, dataset: Dataset, dev: Dataset, seed: int) -> None:
        """Trains by `objective`, scoring checkpoints by accuracy on `dev`; goes on where it stopped."""
        if self.is_trained(directory, seed):
            return
        batches = TrainBatches(dataset, self._plan(self.settings.batch_size), seed)
        tx = self._optimizer()

        def score(params: Any) -> dict[str, float]:
            right = self.predict(params, dev).argmax(-1) == dev.labels
            return {"dev_accuracy": float(right.mean())}

        loop.fit(
            directory,
            self._run_plan(directory, seed),
            lambda: state.create(self.fresh_params(seed), tx, self.mesh),
            self._train_step(objective, tx),
            batches,
            score,
            self.mesh,
        )

    def is_trained(self, directory: Path, seed: int) -> bool:
        """Whether the run in `directory` has come to its end."""
        return loop.finished(directory, self._run_plan(directory, seed))

    def _run_plan(self, directory: Path, seed: int) -> loop.Plan:
        title = " ".join(directory.parts[-2:]) if directory.name != self.role else self.role
        return loop.Plan(title, self.settings.steps, self.settings.evaluations, seed)

    def _train_step(self, objective: Objective, tx: Any) -> steps.TrainStep:
        # Objectives that differ in whose logits they learn from only share one compiled step.
        objective = objective.loss_settings()
        if objective not in self._train_steps:

            def terms(model: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array) -> steps.Terms:
                logits = model(batch, dropout_key=dropout_key)  # [R, M, K]
                return loss_terms(objective, logits, batch["teacher_logits"], batch["label"], batch["weight"])

            self._train_steps[objective] = steps.make_train_step(self.graphdef, terms, tx, self.mesh, self._fresh)
        return self._train_steps[objective]

    def _optimizer(self) -> Any:
        settings = self.settings
        rate = optimizer.schedule(
            "linear", peak=settings.learning_rate, steps=settings.steps, warmup_fraction=settings.warmup_fraction
        )
        return optimizer.adamw(
            rate, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm, frozen=settings.frozen
        )

    def _plan(self, batch_size: int) -> BatchPlan:
        row_length = max(self.settings.row_length, self.settings.max_length)
        return BatchPlan(
            batch_size=batch_size,
            row_length=row_length,
            slots=max(1, row_length // _TOKENS_PER_SLOT) if self.settings.packed else 1,
            pad_id=self.architecture.pad_id,
            position_offset=self.architecture.position_offset,
            multiple_of=data_shards(self.mesh),
            packed=self.settings.packed,
        )

    def _load(self, seed: int) -> tuple[Any, nnx.State]:
        return hf.load_classifier(
            self.directory,
            self.num_classes,
            seed=seed,
            pooling=self.settings.pooling,
            dtype=jnp.dtype(self.settings.compute_dtype),
            labels=self.labels,
        )
