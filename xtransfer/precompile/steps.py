"""The steps of an experiment, with abstract arguments, ready to be compiled."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from xtransfer import config as settings
from xtransfer.config import ExperimentConfig, ModelConfig
from xtransfer.data.batches import packing
from xtransfer.data.batches.batches import BatchPlan, TrainBatches, empty_batch, eval_row_sizes
from xtransfer.data.registry import load_task
from xtransfer.data.task import Task
from xtransfer.distillation import transfer_set
from xtransfer.distillation.objectives import OBJECTIVES, Objective, configured_objective
from xtransfer.errors import UserError
from xtransfer.models.hf import config as hf_config
from xtransfer.models.inference import INPUTS
from xtransfer.runtime.sharding import batch_sharding, data_shards, path_name
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.inputs import ModelInputs, check_length, checkpoint_of, plan_of

STEPS = ("teacher_train", "labelling", "student_train", "evaluation")


@dataclass(frozen=True)
class Override:
    """A batch in place of the experiment's: rows on each shard of data × fsdp, tokens of a row, one text in a row."""

    rows: int | None = None
    row_length: int | None = None
    unpacked: bool = False


@dataclass(frozen=True)
class Step:
    """A step to be compiled.

    Attributes:
      name: one of `STEPS`.
      function: jitted, as training or inference calls it.
      arguments: of it, abstract.
      row_sizes: rows of the batches that a run has, ascending; the last is the one in `arguments`.
      row_length: tokens of a row.
      microbatches: how many a batch is computed in, one after the other.
      flops: of the matrix products, all chips together, by the rule of 6 (training) or 2 for each parameter and token.
    """

    name: str
    function: Any
    arguments: tuple[Any, ...]
    row_sizes: tuple[int, ...]
    row_length: int
    microbatches: int
    flops: int


class Role:
    """The encoder of one role with its programs on a mesh, and the batches that it will see."""

    def __init__(self, role: str, config: ExperimentConfig, task: Task, mesh: jax.sharding.Mesh, override: Override):
        own: ModelConfig = getattr(config, role)
        if override.row_length:
            own = dataclasses.replace(own, row_length=override.row_length)
        self.settings = dataclasses.replace(own, packed=own.packed and not override.unpacked)
        self.role, self.config, self.task, self.mesh, self.rows = role, config, task, mesh, override.rows
        self.architecture = hf_config.read_config(checkpoint_of(role, own, only_config=True))
        check_length(role, own, self.architecture)
        self.compiled_steps = CompiledSteps(self.settings, self.architecture, len(task.labels), mesh)

    def train(self, name: str, objective: Objective) -> Step:
        """The training step by an objective."""
        plan, sizes = self._training(objective)
        batch = self._batch(plan, sizes[-1])
        key = jax.eval_shape(lambda: jax.random.key(0))
        arguments = (self.compiled_steps.abstract_state, batch, key)
        function, microbatches = self.compiled_steps.train_step(objective), self.compiled_steps.num_microbatches(batch)
        return self._step(name, function, arguments, plan, sizes, flops=6, microbatches=microbatches)

    def infer(self, name: str) -> Step:
        """The step that labelling and evaluation run."""
        plan = self._plan(self.config.evaluation_batch_size, 1)
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
        return Step(name, function, arguments, sizes, plan.row_length, microbatches, flops * tokens * self._parameters)

    @functools.cached_property
    def _parameters(self) -> int:
        """Those that every token is multiplied with: all but the tables that tokens are looked up in."""
        leaves = jax.tree_util.tree_leaves_with_path(self.compiled_steps.shapes)
        return sum(leaf.size for path, leaf in leaves if not path_name(path).endswith(".embedding"))

    def _plan(self, batch_size: int, parts: int) -> BatchPlan:
        """The layout of a batch without its tokenizer, which decides nothing of its shape."""
        shards = data_shards(self.mesh)
        if self.rows is not None and self.rows % parts:
            raise UserError(f"--rows-per-chip {self.rows} is not a multiple of {self.role}.accumulation {parts}")
        batch_size = batch_size if self.rows is None else self.rows * shards
        return plan_of(self.settings, self.architecture, batch_size, shards * parts)

    def _training(self, objective: Objective) -> tuple[BatchPlan, tuple[int, ...]]:
        """The layout of the training's batches and their row counts, which only packing takes the texts for."""
        plan = self._plan(self.settings.batch_size, self.settings.accumulation or 1)
        if self.rows is not None or not plan.packed:
            return plan, (packing.round_up(plan.batch_size, plan.multiple_of),)
        if plan.row_length < self.settings.max_length:
            raise UserError(f"--row-length {plan.row_length} is below {self.role}.max_length: give --rows-per-chip too")
        try:
            return self._training_of_texts(objective)
        except UserError as error:
            raise UserError(f"{error} (without data and tokenizer, give --rows-per-chip, or --unpacked)") from error

    def _training_of_texts(self, objective: Objective) -> tuple[BatchPlan, tuple[int, ...]]:
        tokens_dir = settings.cache_dir(self.config.task) / "tokens"
        reader = ModelInputs(self.role, self.settings, shards=data_shards(self.mesh), token_cache=tokens_dir)
        material = transfer_set.gather(self.config, self.task)
        examples = material.everything if objective.data == "all" else material.labelled
        dataset, plan = reader.dataset(examples, len(self.task.labels), material.drawn_from), reader.training_plan
        return plan, TrainBatches(dataset, plan, 0).row_sizes

    def _batch(self, plan: BatchPlan, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
        layout = batch_sharding(self.mesh)
        batch = empty_batch(plan, rows, len(self.task.labels))
        return {key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout) for key, x in batch.items()}


def steps(
    config: ExperimentConfig, mesh: jax.sharding.Mesh, override: Override, names: Sequence[str] = STEPS
) -> Iterator[Step]:
    """The steps of an experiment on a mesh, in the order of `STEPS`; an encoder is made when it is needed."""
    chosen = [configured_objective(config, name) for name in config.objectives]
    objective = next((each for each in chosen if each.teacher != "none"), chosen[0])
    task = _task(config)
    teacher = functools.cache(lambda: Role("teacher", config, task, mesh, override))
    student = functools.cache(lambda: Role("student", config, task, mesh, override))
    made = {
        "teacher_train": lambda: teacher().train("teacher_train", OBJECTIVES["vanilla"]),
        "labelling": lambda: teacher().infer("labelling"),
        "student_train": lambda: student().train("student_train", objective),
        "evaluation": lambda: student().infer("evaluation"),
    }
    return (made[name]() for name in STEPS if name in names)


def _task(config: ExperimentConfig) -> Task:
    try:
        return load_task(config.task)
    except UserError as error:
        raise UserError(f"{error} (to compile without data, give --config.task.name=minireviews)") from error
