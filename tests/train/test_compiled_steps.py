"""The programs of a role: made of shapes alone, laid out as a run's arrays, and shared where the loss is the same."""

import dataclasses
from typing import Any

import jax
import pytest

from xtransfer.config import ModelConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.runtime.sharding import make_mesh
from xtransfer.train import state
from xtransfer.train.compiled_steps import CompiledSteps

BERT = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=16)


def programs(mesh_shape: tuple[int, int, int] = (4, 2, 1), **changes: Any) -> CompiledSteps:
    return CompiledSteps(ModelConfig(**changes), BERT, 3, make_mesh(mesh_shape))


def layouts(tree: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]


def test_the_abstract_state_is_that_of_a_run() -> None:
    found = programs()
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), found.shapes)
    real = state.create(params, found.optimizer, found.mesh)
    assert layouts(found.abstract_state) == layouts(real)
    assert layouts(found.abstract_params()) == layouts(real.params)
    assert any("fsdp" in str(sharding.spec) for _, _, sharding in layouts(real.params))


def test_objectives_with_the_same_loss_share_a_step() -> None:
    found = programs()
    distilled, hot = OBJECTIVES["monox_kd"], dataclasses.replace(OBJECTIVES["monox_kd"], temperature=2.0)
    assert found.train_step(distilled) is found.train_step(OBJECTIVES["self_training"])
    steps = {id(found.train_step(each)) for each in (distilled, hot, OBJECTIVES["vanilla"], OBJECTIVES["monox_pl"])}
    assert len(steps) == 4


def test_a_frozen_pattern_that_matches_nothing_is_told_at_once() -> None:
    with pytest.raises(UserError, match="frozen pattern 'nothing' matches no parameter"):
        programs(frozen=("nothing",))
