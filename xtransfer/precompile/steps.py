"""Build the steps of an experiment with abstract arguments, ready to compile."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from xtransfer.config import ExperimentConfig, ModelConfig, cache_dir
from xtransfer.data.batches import packing
from xtransfer.data.batches.batches import BatchPlan, TrainBatches, empty_batch, eval_row_sizes
from xtransfer.data.registry import load_task
from xtransfer.data.task import Task
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import Objective, configured_objectives, teacher_objective, with_class_factors
from xtransfer.errors import ConfigError, UserError, user_error
from xtransfer.models.hf import config as hf_config
from xtransfer.models.inference import INPUTS, default_rows
from xtransfer.runs import teachers
from xtransfer.runs.draws import draws_of
from xtransfer.runtime.sharding import batch_sharding, data_shards
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.inputs import ModelInputs, check_length, checkpoint_of, plan_of

STEPS = ("teacher_train", "labelling", "student_train", "evaluation")


@dataclass(frozen=True)
class Override:
    """Changes to the shape of the experiment's batches.

    Attributes:
      rows: rows per shard of data × fsdp, or None for the experiment's own.
      row_length: tokens per row, or None for the experiment's own.
      unpacked: whether to put one text in each row.
    """

    rows: int | None = None
    row_length: int | None = None
    unpacked: bool = False


@dataclass(frozen=True)
class Step:
    """A step to compile.

    Attributes:
      name: one of `STEPS`.
      function: the jitted function that training or inference calls.
      arguments: its arguments, as abstract arrays.
      row_sizes: the different numbers of rows per batch in a run, ascending. `arguments` uses the last, the largest.
      row_length: tokens per row.
      microbatches: the number of microbatches per batch.
      flops: operations of the matrix products on all chips: 6 (training) or 2 (inference) per token and parameter that
        multiplies every token. Attention's products, and matrices for the tokens of the head, are not counted.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    row_sizes: tuple[int, ...]
    row_length: int
    microbatches: int
    flops: int


class Role:
    """The steps of one role ("teacher", "student", or "students.NAME"): its encoder on a mesh, and its batches."""

    def __init__(self, role: str, config: ExperimentConfig, task: Task, mesh: jax.sharding.Mesh, override: Override):
        settings: ModelConfig = {**config.members, **config.encoders}[role]
        if override.row_length:
            settings = dataclasses.replace(settings, row_length=override.row_length)
        if override.unpacked:
            settings = dataclasses.replace(settings, packed=False)
        self.role, self.config, self.task, self.mesh, self.rows = role, config, task, mesh, override.rows
        self.settings = settings
        directory = teachers.description_directory(settings) or checkpoint_of(role, settings, only_config=True)
        self.architecture = hf_config.read_config(directory)
        check_length(role, settings, self.architecture)
        self.compiled_steps = CompiledSteps(self.settings, self.architecture, len(task.labels), mesh)

    def train(self, name: str, objective: Objective) -> Step:
        """Return the training step of an objective."""
        plan, sizes = self._training(objective)
        # Any sample compiles to the same step, so one example of each class is enough.
        objective = with_class_factors(objective, self.task.labels, range(len(self.task.labels)))
        batch = self._batch(plan, sizes[-1])
        arguments = self.compiled_steps.training_arguments(batch)
        function, microbatches = self.compiled_steps.train_step(objective), self.compiled_steps.num_microbatches(batch)
        return self._step(name, function, arguments, plan, sizes, flops=6, microbatches=microbatches)

    def infer(self, name: str) -> Step:
        """Return the step that labelling and evaluation run."""
        row_length = self.settings.row_length or self.settings.max_length
        plan = self._plan(self.config.evaluation_batch_size or default_rows(self.mesh, row_length), 1)
        full, short = eval_row_sizes(plan)
        sizes = tuple(sorted({short, full})) if self.rows is None else (full,)
        batch = self._batch(plan, sizes[-1])
        arguments = (self.compiled_steps.abstract_params(), {key: batch[key] for key in INPUTS})
        return self._step(name, self.compiled_steps.eval_step, arguments, plan, sizes, flops=2)

    def _step(
        self,
        name: str,
        function: Any,
        arguments: tuple[Any, ...],
        plan: BatchPlan,
        sizes: tuple[int, ...],
        *,
        flops: int,
        microbatches: int = 1,
    ) -> Step:
        tokens = sizes[-1] * plan.row_length
        return Step(
            name,
            function,
            arguments,
            sizes,
            plan.row_length,
            microbatches,
            flops * tokens * self.compiled_steps.matmul_parameters,
        )

    def _plan(self, batch_size: int, microbatches: int) -> BatchPlan:
        """Return the layout of a batch. It does not depend on the tokenizer."""
        shards = data_shards(self.mesh)
        if self.rows is not None and self.rows % microbatches:
            raise ConfigError(
                f"--rows-per-chip {self.rows} is not a multiple of {self.role}.accumulation={microbatches}"
            )
        batch_size = batch_size if self.rows is None else self.rows * shards
        return plan_of(self.settings, self.architecture, batch_size, shards * microbatches)

    def _training(self, objective: Objective) -> tuple[BatchPlan, tuple[int, ...]]:
        """Return the layout of the training batches, and their numbers of rows. Only packed batches need the texts."""
        plan = self._plan(self.settings.batch_size, self.settings.accumulation or 1)
        if self.rows is not None:
            return plan, (plan.batch_size,)
        plan = self.compiled_steps.with_microbatches(plan)
        if not plan.packed:
            return plan, (packing.round_up_rows(plan.batch_size, plan.multiple_of, plan.microbatch_rows),)
        if plan.row_length < self.settings.max_length:
            raise ConfigError(
                f"--row-length {plan.row_length} is below {self.role}.max_length; also pass --rows-per-chip"
            )
        try:
            return self._packed_training(objective)
        except UserError as error:
            raise user_error(
                error.exit_status,
                f"{error} (to compile without data and tokenizer, pass --rows-per-chip or --unpacked)",
            ) from error

    def _packed_training(self, objective: Objective) -> tuple[BatchPlan, tuple[int, ...]]:
        """Return the same for packed batches, from the tokenized texts."""
        tokens_dir = cache_dir(self.config.task) / "tokens"
        inputs = ModelInputs(self.role, self.settings, shards=data_shards(self.mesh), token_cache=tokens_dir)
        transfer = transfer_set.gather(draws_of(self.config)[0].apply(self.config), self.task)
        dataset = inputs.dataset(transfer.of(objective), len(self.task.labels), transfer.drawn_from)
        plan = self.compiled_steps.with_microbatches(inputs.training_plan(len(dataset)))
        return plan, TrainBatches(dataset, plan, seed=0).row_sizes

    def _batch(self, plan: BatchPlan, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return a batch as abstract arrays, sharded over the mesh."""
        sharding = batch_sharding(self.mesh)
        batch = empty_batch(plan, rows, len(self.task.labels), multi_label=self.task.multi_label)
        return {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for key, x in batch.items()}


def steps(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, override: Override, names: Sequence[str] = STEPS
) -> Iterator[Step]:
    """Yield the named steps of an experiment on a mesh, in the order of `STEPS`. Encoders are built when needed.

    The student is the encoder of the first objective with a teacher, or else of the first objective, and trains on it.
    A ready-made teacher has no training step, and a file no step at all.
    """
    config = teachers.with_classes(config)
    objectives = configured_objectives(config)
    objective = next((objective for objective in objectives if objective.teacher != "none"), objectives[0])
    task = _task(config)
    teacher = functools.cache(lambda: Role("teacher", config, task, mesh, override))
    student = functools.cache(lambda: Role(config.encoder_of(objective.name), config, task, mesh, override))
    builders = {
        "teacher_train": lambda: teacher().train("teacher_train", teacher_objective(config)),
        "labelling": lambda: teacher().infer("labelling"),
        "student_train": lambda: student().train("student_train", objective),
        "evaluation": lambda: student().infer("evaluation"),
    }
    if not config.teacher.learns:
        del builders["teacher_train"]
    if config.teacher.is_file:
        del builders["labelling"]
    return (builders[name]() for name in STEPS if name in names and name in builders)


def _task(config: ExperimentConfig) -> Task:
    """Load the task. If its data is missing, name a task that needs none."""
    try:
        return load_task(config.task, config.further_sources)
    except UserError as error:
        raise user_error(
            error.exit_status, f"{error} (to compile without data, pass --config.task.name=minireviews)"
        ) from error
