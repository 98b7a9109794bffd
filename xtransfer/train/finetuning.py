"""Fine-tuning one encoder: everything that teacher and student share, whatever the objective."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from xtransfer.config import ExperimentConfig, ModelConfig, cache_dir
from xtransfer.data.batches.batches import BatchPlan, Dataset, TrainBatches, eval_batches
from xtransfer.data.batches.prefetch import prefetch
from xtransfer.data.examples import data_sets
from xtransfer.data.task import Example, Task, load_if_present
from xtransfer.distillation.objectives import Objective
from xtransfer.errors import CheckpointError, ConfigError, DivergedError, UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.inference import default_rows, predict
from xtransfer.runtime import processes, terminal
from xtransfer.runtime.sharding import data_shards, make_mesh, names_of, path_name, process_slice
from xtransfer.train import loop, metrics_log, reinit, state
from xtransfer.train.checkpoints import CHECKPOINTS, Checkpoints
from xtransfer.train.compiled_steps import shared_steps
from xtransfer.train.inputs import ModelInputs, SavedEncoder, checkpoint_of
from xtransfer.train.schedules import learning_rates
from xtransfer.train.tracking import NOTHING, Tracking
from xtransfer.train.work import Work

_SAMPLED_BATCHES = 16  # batches from which the share of padding is estimated
_MIN_REAL_SHARE = 0.75  # warn if a smaller share of the tokens in a batch is real

DevScores = Callable[[np.ndarray, np.ndarray], dict[str, float]]
"""From logits [n, K] and labels of a dev split, see `task.gold`, to the metrics that rank a checkpoint.

`metrics_log.dev_score` is the one by which they do.
"""


@dataclasses.dataclass(frozen=True)
class TrainedWeights:
    """The weights of a finished run, for a ready-made teacher.

    Attributes:
      encoder: the run's config and tokenizer, and the fingerprint of its weights.
      labels: the names of its classes, in the order of its logits.
      pooling: how it pools.
      multi_label: whether it gives a text any number of labels.
      restore: returns its parameters, from their shapes, dtypes, and shardings.
    """

    encoder: SavedEncoder
    labels: tuple[str, ...]
    pooling: str
    multi_label: bool
    restore: Callable[[Any], Any]


class Finetuner:
    """An encoder with its tokenizer on a mesh: tokenizes, trains, and predicts with the settings of one role.

    All runs of one instance share their compiled steps. The constructor raises a UserError for everything that cannot
    work (a checkpoint, its head, a tokenizer, a length, a frozen pattern), before anything is trained.
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
        saved: Path | None = None,
        multi_label: bool = False,
        ready_made: TrainedWeights | None = None,
    ):
        """Read the config, the tokenizer, and every tensor of the checkpoint, or of `saved` what it has.

        Args:
          role: the config key of a student's encoder or of a teacher.
          settings: the role's settings.
          labels: the class names, in order.
          mesh: the device mesh.
          eval_batch_size: rows per batch of evaluation.
          token_cache: the directory of the token cache; None keeps nothing.
          saved: the config and tokenizer of a checkpoint that is gone. Such an encoder predicts, and cannot be trained.
          multi_label: whether the task is a multi-label one.
          ready_made: the run that takes the place of a checkpoint, for a teacher that is trained already.
        """
        directory = saved if saved is not None or ready_made is None else ready_made.encoder.directory
        self._ready_made = ready_made
        self.inputs = ModelInputs(
            role, settings, shards=data_shards(mesh), token_cache=token_cache, directory=directory
        )
        self.has_weights = saved is None
        self.role, self.settings, self.labels, self.mesh = role, settings, tuple(labels), mesh
        self.multi_label = multi_label
        self.eval_batch_size = eval_batch_size
        self.trained, self.predicted = Work(), Work()  # the work of all runs so far; dev counts as predicted
        self._reported: set[str] = set()
        try:
            self.compiled_steps = shared_steps(settings, self.inputs.architecture, self.num_classes, mesh)
        except ConfigError as error:
            raise ConfigError(f"config group {role}: {error}") from error
        if self.has_weights:
            reinit.check(role, settings, self.inputs.architecture, names_of(self.compiled_steps.shapes))
            self._check_params()

    @property
    def num_classes(self) -> int:
        """The number of classes, K."""
        return len(self.labels)

    def fresh_params(self, seed: int) -> Any:
        """Return the pretrained parameters, with the checkpoint's own head, or a new one that is drawn from `seed`.

        Layers that the settings reinitialise are drawn from it too.
        """
        self.check_weights()
        if self._ready_made is not None:
            run = self._ready_made
            self._check_ready_made(run.labels, run.pooling, is_multi_label=run.multi_label)
            return _with_classes(run.restore(self.abstract_params()), run.labels, self.labels)
        params = hf_checkpoint.load_classifier(
            self.inputs.directory, self.num_classes, seed=seed, **self._classifier_arguments
        )[1]
        if not self.settings.reinit_layers:
            return params
        return reinit.reinitialised(
            params,
            self.inputs.architecture.num_layers - self.settings.reinit_layers,
            seed=seed,
            scale=hf_config.read_initializer_range(self.inputs.directory),
        )

    def _check_params(self) -> None:
        """Read every tensor once, so that a checkpoint that does not fit fails now.

        Nothing is placed on a device, so a model that is too large for the devices fails when it is trained.
        """
        if self._ready_made is not None:
            self.fresh_params(seed=0)
            return
        directory = self.inputs.directory
        if not self.settings.learns:
            labels, pooling = hf_checkpoint.trained_classes(directory), hf_config.read_pooling(directory)
            self._check_ready_made(labels, pooling, is_multi_label=hf_config.is_multi_label(directory))
        if self.settings.reinit_layers:
            hf_config.read_initializer_range(directory)
        hf_checkpoint.check_classifier(directory, self.num_classes, **self._classifier_arguments)

    @property
    def _classifier_arguments(self) -> dict[str, Any]:
        return {
            "pooling": self.settings.pooling,
            "dtype": jnp.dtype(self.settings.compute_dtype),
            "labels": self.labels,
            "mesh": self.mesh,
            "multi_label": self.multi_label,
        }

    def _check_ready_made(self, labels: Sequence[str], pooling: str, *, is_multi_label: bool) -> None:
        """Refuse a trained classifier of another kind of task or with other classes, or with another pooling."""
        name = self.settings.checkpoint
        if sorted(labels) != sorted(self.labels):
            raise CheckpointError(
                f"{name}: its classes are {', '.join(labels)}, the task's are {', '.join(self.labels)}: name a "
                "teacher of this task"
            )
        if is_multi_label != self.multi_label:
            kinds = ("one label per text", "any number of labels per text (multi-label)")
            raise CheckpointError(
                f"{name}: it was trained for {kinds[is_multi_label]}, and the task has {kinds[self.multi_label]}: name "
                "a teacher of this task"
            )
        if pooling != self.settings.pooling:
            raise ConfigError(
                f"config key {self.role}.pooling is {self.settings.pooling!r}, but {name} was trained with "
                f"{pooling!r}: set --config.{self.role}.pooling={pooling}"
            )

    def check_weights(self) -> None:
        """Refuse to train from a checkpoint that is gone."""
        if not self.has_weights:
            raise CheckpointError(
                f"{self.role}.checkpoint {self.settings.checkpoint} is gone, and training needs its weights: restore "
                f"it, or set --config.{self.role}.checkpoint to where it is now"
            )

    def abstract_params(self) -> Any:
        """Return the shapes, dtypes, and shardings of the parameters, for a restore."""
        return self.compiled_steps.abstract_params()

    def training_plan(self, examples: int) -> BatchPlan:
        """Return the layout of this process's training batches from a number of examples."""
        plan = self.compiled_steps.with_microbatches(self.inputs.training_plan(examples))
        return dataclasses.replace(plan, process_slice=process_slice(self.mesh))

    def dataset(self, examples: Sequence[Example], drawn_from: Sequence[Sequence[Example]] = ()) -> Dataset:
        """Return a dataset of the examples without teacher logits; see `ModelInputs.tokens`.

        If texts are truncated, log how many, once for each set of examples.
        """
        dataset = self.inputs.dataset(examples, self.num_classes, drawn_from, multi_label=self.multi_label)
        truncated = int(np.count_nonzero(dataset.tokens.truncated))
        if truncated:
            names = " and ".join(data_sets(examples))
            self._report(
                f"warning: {truncated:,} of {len(examples):,} texts of {names} are longer than {self.role}.max_length, "
                f"{self.settings.max_length} tokens, and are truncated"
            )
        return dataset

    def predict(self, params: Any, dataset: Dataset, on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """Return the logits [n, K] float32 in the dataset's order; call `on_batch` with the size of each batch.

        Raises:
          UserError: the logits are not finite.
        """
        batches = prefetch(self._counted(dataset))
        logits = predict(
            self.compiled_steps.eval_step, params, self.mesh, batches, len(dataset), self.num_classes, on_batch=on_batch
        )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise DivergedError(
                f"{self.role}: the logits of {len(bad)} examples are not finite; the first is {dataset.ids[bad[0]]}: "
                "training diverged, try a lower learning_rate"
            )
        return logits

    def _counted(self, dataset: Dataset) -> Iterator[tuple[np.ndarray, Mapping[str, np.ndarray]]]:
        """Yield the batches of `eval_batches`, and count them."""
        for indices, batch in eval_batches(dataset, self.inputs.evaluation_plan(self.eval_batch_size)):
            segments = batch["segment_ids"]  # [R, S]
            self.predicted.add(len(indices), int(np.count_nonzero(segments)), segments.size)
            yield indices, batch

    def train(
        self,
        directory: Path,
        objective: Objective,
        dataset: Dataset,
        dev: Mapping[str, Dataset],
        seed: int,
        dev_scores: DevScores,
        target_dev: Mapping[str, Dataset] = MappingProxyType({}),
        tracking: Tracking = NOTHING,
    ) -> None:
        """Train by `objective`, scoring checkpoints on `dev`, or resume; do nothing if it is finished.

        `dev` holds the dev splits by source language, and the mean over them ranks checkpoints. If it is empty, only
        the last checkpoint is kept, and has no score. For an oracle, `target_dev` holds the dev splits of the target
        languages, on which checkpoints are scored too.
        """
        if self.is_trained(directory):
            return

        def score(params: Any) -> dict[str, Any]:
            scores = self._scores(params, dev, dev_scores)
            if not (dev and target_dev):
                return scores
            in_targets = {
                language: dev_scores(self.predict(params, split), split.labels)
                for language, split in target_dev.items()
            }
            on_own_dev = {**scores.get(metrics_log.SOURCE_DEV_METRICS, {}), **in_targets}
            ranks = {language: metrics_log.dev_score(metrics) for language, metrics in on_own_dev.items()}
            return {**scores, metrics_log.TARGET_DEV_SCORES: ranks, metrics_log.TARGET_DEV_METRICS: in_targets}

        title = self.role if directory.name == self.role else " ".join(directory.parts[-2:])
        settings = self.settings.resolved(len(dataset), f"{self.role}.")
        if self.settings.epochs:
            terminal.log(
                f"{title}: {settings.steps:,} steps of {settings.batch_size} examples, from {len(dataset):,} examples "
                f"and {self.role}.epochs {self.settings.epochs:g}"
            )
        if self.settings.lora.rank:
            share = self.compiled_steps.trained_share
            terminal.log(f"{title}: LoRA of rank {self.settings.lora.rank} trains {share:.2%} of the parameters")
        plan = self.training_plan(len(dataset))
        batches = TrainBatches(dataset, plan, seed)
        sizes, real_share = "/".join(map(str, batches.row_sizes)), batches.real_share(_SAMPLED_BATCHES)
        terminal.log(f"{title}: batches of {sizes} rows of {plan.row_length} tokens, {real_share:.0%} of them real")
        step = self.compiled_steps.train_step(objective)

        def counted_step(*arguments: Any) -> Any:
            slots = arguments[1]["segment_ids"].size
            self.trained.add(plan.batch_size, real_share * slots, slots)
            return step(*arguments)

        accumulates = self.settings.accumulation > 1
        # A short run pads on purpose, to compile fewer steps. Padding for the sake of microbatches saves nothing.
        if real_share < _MIN_REAL_SHARE and (plan.fitted_sizes > 1 or accumulates):
            keys = f"{self.role}.batch_size or {self.role}.row_length"
            if accumulates:
                keys += f" or {self.role}.accumulation"
            terminal.log(f"warning: {title}: more than a quarter of each batch is padding; change {keys} to save time")
        loop.fit(
            directory,
            loop.Plan(
                title,
                settings.steps,
                settings.evaluations,
                seed,
                settings.patience,
                settings.average_last,
                records_steps=self.settings.known_steps is None,
            ),
            loop.Start(
                lambda: self.compiled_steps.initial_state(self.fresh_params(seed), seed),
                self.compiled_steps.abstract_state,
                self.compiled_steps.saving(lambda: self.fresh_params(seed), seed),
            ),
            counted_step,
            learning_rates(settings),
            batches,
            score,
            self.mesh,
            tracking,
        )

    def _scores(self, params: Any, dev: Mapping[str, Dataset], dev_scores: DevScores) -> dict[str, Any]:
        """Return the metrics on the dev splits of source languages, see `metrics_log.mean_over_languages`."""
        return metrics_log.mean_over_languages(
            {language: dev_scores(self.predict(params, split), split.labels) for language, split in dev.items()}
        )

    def adopt(self, directory: Path, dev: Mapping[str, Dataset], dev_scores: DevScores) -> None:
        """Save the weights of a checkpoint that is trained already as step 0 of a run, in place of training it.

        So it is scored, labels, and is exported like a teacher that was trained here, also after its checkpoint has
        moved.
        """
        if self.is_trained(directory):
            return
        params = self.fresh_params(seed=0)
        scores = self._scores(params, dev, dev_scores)
        row = {"step": 0, **scores}
        processes.on_first(functools.partial(metrics_log.write, directory, [row]))
        counter = {"count": jnp.zeros((), jnp.int32)}
        with Checkpoints(directory / CHECKPOINTS) as checkpoints:
            if 0 not in checkpoints.steps():
                score = metrics_log.dev_score(row) if scores else None
                checkpoints.save(state.TrainState(np.int32(0), params, counter), score=score, rows=[row])

    def _report(self, line: str) -> None:
        """Log a line unless it has been logged: dev is read for the selection of a checkpoint, and to score it."""
        if line not in self._reported:
            self._reported.add(line)
            terminal.log(line)

    def is_trained(self, directory: Path) -> bool:
        """Return whether the run in `directory` is finished."""
        return metrics_log.finished(directory, self.settings.known_steps)


def _with_classes(params: Any, old: Sequence[str], new: Sequence[str]) -> Any:
    """Return the parameters of a classifier with the columns of its head in the order of `new`, matched by name."""
    order = np.array([old.index(name) for name in new])

    def permute(path: Any, leaf: jax.Array) -> jax.Array:
        is_head = path_name(path) in ("head.kernel", "head.bias")
        return jax.device_put(leaf[..., order], leaf.sharding) if is_head else leaf

    return params if list(old) == list(new) else jax.tree_util.tree_map_with_path(permute, params)


class Models:
    """Teacher and student of an experiment on one mesh, each created on first use.

    Args:
      config: the experiment's config.
      task: its task.
      saved: the config and tokenizer of the base checkpoints, by role, to use where a checkpoint is gone.
      ready_made: the finished runs that teach as they are, by role.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        task: Task,
        saved: Mapping[str, SavedEncoder] = MappingProxyType({}),
        ready_made: Mapping[str, TrainedWeights] = MappingProxyType({}),
    ):
        self._config, self._task, self._saved, self._ready_made = config, task, saved, ready_made
        self._bases: dict[str, SavedEncoder] = {}
        self.mesh = make_mesh(dataclasses.astuple(config.mesh))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the task's classes, in canonical order."""
        return self._task.labels

    @functools.cached_property
    def teachers(self) -> dict[str, Finetuner]:
        """The monolingual encoders by config key, without those that a file stands in for."""
        members = self._config.members.items()
        return {member: self._finetuner(member, settings) for member, settings in members if not settings.is_file}

    @property
    def teacher(self) -> Finetuner:
        """The monolingual encoder; of several, the first."""
        return self.teachers["teacher"]

    @functools.cached_property
    def students(self) -> dict[str, Finetuner]:
        """The encoders of students by config key, the multilingual one first."""
        return {role: self._finetuner(role, settings) for role, settings in self._config.encoders.items()}

    @property
    def student(self) -> Finetuner:
        """The multilingual encoder."""
        return self.students["student"]

    def student_of(self, objective: str) -> Finetuner:
        """Return the encoder that an objective trains."""
        return self.students[self._config.encoder_of(objective)]

    def facts(self) -> dict[str, Any]:
        """Return the facts that, besides the settings, decide an experiment's results: task, data, and checkpoints."""
        task = self._task
        absent = [split for split in ("train", "dev") if load_if_present(task, split, task.source_language) is None]
        checkpoints = {member: self.base(member).fingerprint for member in self.teachers}
        main = checkpoints.pop("teacher", "")  # "" if a file stands in for it
        students = {role: self.base(role).fingerprint for role in self.students if role != "student"}
        return {
            "name": task.name,
            "labels": list(task.labels),
            "synthetic": task.synthetic,
            "source_language": task.source_language,
            **({"source_languages": list(task.source_languages)} if task.other_sources else {}),
            "target_languages": list(task.target_languages),
            "data": task.fingerprint(),
            "teacher_checkpoint": main,
            "student_checkpoint": self.base("student").fingerprint,
            **({"multi_label": True} if task.multi_label else {}),
            **dict.fromkeys(absent, False),
            **({"teachers": checkpoints} if checkpoints else {}),
            **({"students": students} if students else {}),
        }

    def base(self, role: str) -> SavedEncoder:
        """Return the base checkpoint of a role, or the saved part of it if it is gone."""
        model = self.students[role] if role in self._config.encoders else self.teachers[role]
        if not model.has_weights:
            return self._saved[role]
        if role in self._ready_made:
            return self._ready_made[role].encoder
        if role not in self._bases:  # hashing the weights takes a while
            directory = model.inputs.directory
            self._bases[role] = SavedEncoder(directory, hf_checkpoint.fingerprint_files(directory))
        return self._bases[role]

    def _finetuner(self, role: str, settings: ModelConfig) -> Finetuner:
        terminal.log(f"{role}: {settings.checkpoint}")

        def automatic_rows() -> int:
            return default_rows(self.mesh, settings.row_length or settings.max_length)

        return Finetuner(
            role,
            settings,
            self._task.labels,
            self.mesh,
            eval_batch_size=self._config.evaluation_batch_size or processes.on_first(automatic_rows),
            token_cache=cache_dir(self._config.task) / "tokens",
            saved=self._saved[role].directory if self._is_gone(role, settings) else None,
            multi_label=self._task.multi_label,
            ready_made=self._ready_made.get(role),
        )

    def _is_gone(self, role: str, settings: ModelConfig) -> bool:
        """Return whether a checkpoint has no weights any more, and the saved part of it can be used."""
        if role not in self._saved or role in self._ready_made:
            return False
        try:
            hf_checkpoint.weight_files(checkpoint_of(role, settings))
        except UserError:
            terminal.log(f"{role}: {settings.checkpoint} is gone; using {self._saved[role].directory}")
            return True
        return False
