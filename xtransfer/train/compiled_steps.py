"""The steps that one encoder runs in one role: training, and the forward pass of labelling and evaluation.

They are built from settings and shapes alone. So the very same steps compile without weights, and for devices that the
machine does not have.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import BatchPlan
from xtransfer.distillation.multi_label import terms_of_batch
from xtransfer.distillation.objectives import Objective
from xtransfer.models import heads
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.inference import make_eval_step
from xtransfer.runtime.sharding import names_of, param_shardings, path_name
from xtransfer.train import lora, optimizer, state, steps
from xtransfer.train.divisible_tables import laid_out_like, of_whole_params, with_divisible_tables
from xtransfer.train.microbatches import most_rows, num_microbatches
from xtransfer.train.saving import WHOLE, Saving, of_adapters, of_average

# Settings of batches, of the run's length, of its learning rates, and of what it starts from. The compiled programs do
# not depend on them.
_NOT_COMPILED = frozenset(
    {
        *("checkpoint", "reinit_layers"),
        *("max_length", "batch_size", "row_length", "packed"),
        *("steps", "epochs", "evaluations", "patience", "average_last"),
        *("learning_rate", "schedule", "warmup_fraction"),
    }
)


def shared_steps(
    settings: ModelConfig, architecture: EncoderConfig, num_classes: int, mesh: jax.sharding.Mesh
) -> "CompiledSteps":
    """Return the steps of a role, see `CompiledSteps`. Callers that need the same steps share one instance.

    So nothing is traced and compiled twice for two teachers, or for two experiments of one process.
    """
    compiled = {field.name: getattr(settings, field.name) for field in dataclasses.fields(ModelConfig)}
    compiled = {name: value for name, value in compiled.items() if name not in _NOT_COMPILED}
    return _cached_steps(ModelConfig(**compiled), architecture, num_classes, mesh)


@functools.lru_cache(maxsize=8)  # more than the encoders of one experiment
def _cached_steps(
    settings: ModelConfig, architecture: EncoderConfig, num_classes: int, mesh: jax.sharding.Mesh
) -> "CompiledSteps":
    return CompiledSteps(settings, architecture, num_classes, mesh)


class CompiledSteps:
    """The steps of a classifier on a mesh, each compiled once per batch shape.

    Args:
      settings: the role's settings.
      architecture: the architecture of its checkpoint.
      num_classes: K.
      mesh: a mesh of real devices, or of a topology's.

    Raises:
      UserError: a pattern of `frozen` or `lora.targets` matches no parameter, or nothing is left to train.
    """

    def __init__(self, settings: ModelConfig, architecture: EncoderConfig, num_classes: int, mesh: jax.sharding.Mesh):
        self.mesh, self._settings, self._architecture = mesh, settings, architecture
        self.graphdef, self.shapes = hf_checkpoint.abstract_classifier(
            architecture,
            num_classes,
            pooling=settings.pooling,
            dtype=jnp.dtype(settings.compute_dtype),
            remat=settings.remat,
        )
        frozen = optimizer.frozen_names(names_of(self.shapes), settings.frozen)
        self._training_graphdef, self._training_shapes = self.graphdef, self.shapes
        self._trained: frozenset[str] | None = None
        if settings.lora.rank:
            self._training_graphdef, self._training_shapes = hf_checkpoint.abstract_classifier(
                architecture,
                num_classes,
                pooling=settings.pooling,
                dtype=jnp.dtype(settings.compute_dtype),
                remat=settings.remat,
                adapt=functools.partial(lora.adapted, settings=settings.lora, frozen=settings.frozen),
            )
            self._trained = lora.trained_names(names_of(self._training_shapes), frozen)
        self.optimizer = self._optimizer()
        self._moving = frozenset(names_of(self.shapes)) - frozen if self._trained is None else self._trained
        self._averaged = self._moving if settings.ema_decay else frozenset()
        self._whole_state = state.abstract(self._training_shapes, self.optimizer, mesh, self._averaged)
        self._training_shapes = with_divisible_tables(self._training_shapes, mesh, self._moving)
        self.abstract_state = state.abstract(
            self._training_shapes, self.optimizer, mesh, self._averaged, split_params=True
        )
        self.eval_step = make_eval_step(self.graphdef, mesh)
        self._accumulation, self._size = settings.accumulation, architecture.hidden_size
        self._train_steps: dict[Objective, steps.TrainStep] = {}

    @functools.cached_property
    def matmul_parameters(self) -> int:
        """The size of all matrices that multiply every token; see `heads.multiplies_every_token`."""
        return sum(
            leaf.size
            for path, leaf in jax.tree_util.tree_leaves_with_path(self.shapes)
            if heads.multiplies_every_token(path_name(path), self._architecture, self._settings.pooling)
        )

    def abstract_params(self) -> Any:
        """Return the shapes, dtypes, and shardings of the parameters, for a restore."""
        return abstract_params(self.shapes, self.mesh)

    def initial_state(self, params: Any, seed: int) -> state.TrainState:
        """Return the state before the first step.

        Args:
          params: the parameters of a classifier, which may be donated.
          seed: the seed of new adapters.
        """
        params = laid_out_like(self.abstract_state.params)(self._attached(params, seed))
        return state.create(params, self.optimizer, self.mesh, self._averaged, split_params=True)

    def saving(self, fresh_params: Callable[[], Any], seed: int) -> Saving:
        """Return what is scored and saved of a state.

        Args:
          fresh_params: returns the parameters of a classifier before training, to resume from if the encoder is frozen.
          seed: the seed of new adapters.
        """
        if self._trained is not None:
            merge = lora.merger(self.shapes, self.mesh, self._settings.lora)
            gathered = laid_out_like(self.abstract_params())
            return of_adapters(
                self._trained,
                self.abstract_params(),
                lambda params: gathered(merge(params)),
                lambda: self._attached(fresh_params(), seed),
            )
        saving = of_average(self._whole_state, self._averaged) if self._averaged else WHOLE
        return of_whole_params(saving, self._whole_state, self.abstract_state)

    @property
    def trained_share(self) -> float:
        """The share of the parameters that is trained; both counts include adapters."""
        sizes = {path_name(path): x.size for path, x in jax.tree_util.tree_leaves_with_path(self._whole_state.params)}
        return sum(sizes[name] for name in self._moving) / sum(sizes.values())

    def _attached(self, params: Any, seed: int) -> Any:
        if self._trained is None:
            return params
        return lora.attached(params, self._training_shapes, self.mesh, seed=seed)

    def _optimizer(self) -> optax.GradientTransformationExtraArgs:
        if self._trained is None:
            return _adamw(self._settings, self._architecture, self._settings.frozen)
        # The training step passes on only what is trained, so only that has optimizer state.
        trained, inner = self._trained, _adamw(self._settings, self._architecture, ())
        return optax.GradientTransformationExtraArgs(
            lambda params: inner.init(state.select(params, trained)), inner.update
        )

    def train_step(self, objective: Objective) -> steps.TrainStep:
        """Return the training step of an objective. Objectives that differ only in whose logits they use share it."""
        objective = objective.loss_settings()
        if objective not in self._train_steps:

            def terms(model: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array) -> steps.Terms:
                logits = model(batch, dropout_key=dropout_key)  # [R, M, K]
                return terms_of_batch(objective, logits, batch)

            self._train_steps[objective] = steps.make_train_step(
                self._training_graphdef,
                terms,
                self.optimizer,
                self.mesh,
                self._training_shapes,
                num_microbatches=self.num_microbatches,
                embed=_embed,
                trained=self._trained,
                averaged=self._averaged,
                ema_decay=self._settings.ema_decay,
                split_params=True,
            )
        return self._train_steps[objective]

    def training_arguments(self, batch: Mapping[str, Any]) -> tuple[Any, ...]:
        """Return the arguments to lower a training step with: a batch, or its shapes, and the shapes of all others."""
        key = jax.eval_shape(lambda: jax.random.key(0))
        return self.abstract_state, batch, key, jax.ShapeDtypeStruct((), jnp.float32)

    def num_microbatches(self, batch: Mapping[str, Any]) -> int:
        """Return the number of microbatches in which the training step computes a batch of these shapes."""
        rows, length = batch["input_ids"].shape
        return num_microbatches(self._accumulation, rows, length, self._size, self.mesh)

    def with_microbatches(self, plan: BatchPlan) -> BatchPlan:
        """Return the layout of training batches with row counts that divide into `num_microbatches`."""
        return dataclasses.replace(
            plan, microbatch_rows=most_rows(self._accumulation, plan.row_length, self._size, self.mesh)
        )


def _embed(model: Any, batch: Mapping[str, jax.Array], dropout_key: jax.Array) -> jax.Array:
    return model.embed(batch, dropout_key=dropout_key)


def abstract_params(shapes: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the shapes and dtypes of parameters with their shardings on the mesh, for a restore."""
    layout = param_shardings(mesh, shapes)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, layout)


def _adamw(
    settings: ModelConfig, architecture: EncoderConfig, frozen: Sequence[str]
) -> optax.GradientTransformationExtraArgs:
    return optimizer.adamw(
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        frozen=frozen,
        b1=settings.adam_b1,
        b2=settings.adam_b2,
        eps=settings.adam_eps,
        layer_decay=settings.layer_decay,
        num_layers=architecture.num_layers,
    )
