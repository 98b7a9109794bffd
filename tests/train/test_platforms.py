"""Compiled steps lower for CPUs, NVIDIA GPUs, and TPUs, on a machine that has only one of them."""

import re
from typing import Any

import jax
import pytest

from tests.fixtures.record import FIXTURES
from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import empty_batch
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf import config as hf_config
from xtransfer.models.inference import INPUTS
from xtransfer.runtime.sharding import data_shards, make_mesh
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.inputs import plan_of

PLATFORMS = ("cpu", "cuda", "tpu")
FAMILIES = ("deberta-v2", "eurobert", "gte", "modernbert", "xlm-roberta-xl")
BERT = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=1024)
LENGTHS = {"attention at once": 16, "attention in blocks": 600}
# JAX's own random numbers on GPUs. The package that has this kernel comes with the extra `cuda`.
OF_JAX = {"cu_threefry2x32_ffi"}


def traced(name: str, architecture: EncoderConfig = BERT, **settings: Any) -> Any:
    """Return a step, traced for a batch of eight packed rows on 2 × 2 × 2 devices.

    Args:
      name: "evaluation", which labelling and prediction run too, or the objective of a training step.
      architecture: the encoder's.
      settings: changes to the settings.
    """
    model, mesh = ModelConfig(**{"batch_size": 8, "max_length": 16, **settings}), make_mesh((2, 2, 2))
    compiled = CompiledSteps(model, architecture, 3, mesh)
    plan = plan_of(model, architecture, 8, data_shards(mesh) * (model.accumulation or 1))
    batch = {key: jax.ShapeDtypeStruct(x.shape, x.dtype) for key, x in empty_batch(plan, 8, 3).items()}
    if name == "evaluation":
        return compiled.eval_step.trace(compiled.abstract_params(), {key: batch[key] for key in INPUTS})
    return compiled.train_step(OBJECTIVES[name]).trace(*compiled.training_arguments(batch))


def custom_calls(text: str) -> set[str]:
    return set(re.findall(r"custom_call @([\w.$]+)", text))


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vanilla", "monox_kd", "evaluation"])
def test_steps_lower_for_every_platform(name: str, compute_dtype: str, length: int) -> None:
    """One program for all platforms contains what any of them needs, and calls no function that only one has."""
    step = traced(name, max_length=length, compute_dtype=compute_dtype)
    assert custom_calls(step.lower(lowering_platforms=PLATFORMS).as_text()) <= OF_JAX


@pytest.mark.parametrize("family", FAMILIES)
def test_architectures_lower_for_every_platform(family: str) -> None:
    architecture = hf_config.read_config(FIXTURES / f"{family}_classifier")
    step = traced("monox_kd", architecture, compute_dtype="bfloat16", accumulation=2)
    assert custom_calls(step.lower(lowering_platforms=PLATFORMS).as_text()) <= OF_JAX


@pytest.mark.parametrize("platform", PLATFORMS)
def test_program_does_not_depend_on_the_machine_that_lowers_it(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that asks for JAX's backend would compile for the wrong one ahead of time."""
    here = traced("monox_kd", compute_dtype="bfloat16").lower(lowering_platforms=(platform,)).as_text()
    monkeypatch.setattr(jax, "default_backend", lambda: "another")
    elsewhere = traced("monox_kd", compute_dtype="bfloat16").lower(lowering_platforms=(platform,)).as_text()
    assert elsewhere == here


def test_a_call_of_one_platform_is_found() -> None:
    """`custom_calls` sees a kernel in a program for several platforms. JAX's cholesky calls LAPACK on a CPU."""
    matrix = jax.ShapeDtypeStruct((2, 2), jax.numpy.float32)
    program = jax.jit(jax.numpy.linalg.cholesky).trace(matrix).lower(lowering_platforms=("cpu", "tpu")).as_text()
    assert custom_calls(program) - OF_JAX
