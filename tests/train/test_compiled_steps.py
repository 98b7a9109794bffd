"""A role's compiled steps: built from shapes alone, laid out like a real run, and shared by equal losses."""

import dataclasses
from typing import Any

import jax
import pytest

from xtransfer.config import ModelConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.runtime.sharding import make_mesh
from xtransfer.train.compiled_steps import CompiledSteps

BERT = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=16)


def compiled_steps(mesh_shape: tuple[int, int, int] = (4, 2, 1), **changes: Any) -> CompiledSteps:
    return CompiledSteps(ModelConfig(**changes), BERT, 3, make_mesh(mesh_shape))


def layouts(tree: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]


def test_abstract_state_matches_a_real_one() -> None:
    compiled = compiled_steps()
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), compiled.shapes)
    real = compiled.initial_state(params, 0)
    assert layouts(compiled.abstract_state) == layouts(real)
    assert layouts(compiled.abstract_params()) == layouts(compiled.saving(dict, 0).saved(real).params)
    assert any("fsdp" in str(sharding.spec) for _, _, sharding in layouts(real.params))


def test_objectives_with_the_same_loss_share_a_step() -> None:
    compiled = compiled_steps()
    distilled, hot = OBJECTIVES["monox_kd"], dataclasses.replace(OBJECTIVES["monox_kd"], temperature=2.0)
    assert compiled.train_step(distilled) is compiled.train_step(OBJECTIVES["self_training"])
    steps = {
        id(compiled.train_step(objective))
        for objective in (distilled, hot, OBJECTIVES["vanilla"], OBJECTIVES["monox_pl"])
    }
    assert len(steps) == 4


def test_class_weights_with_the_same_factors_share_a_step() -> None:
    compiled, vanilla = compiled_steps(), OBJECTIVES["vanilla"]
    named = dataclasses.replace(vanilla, class_weights=("a=2",), class_factors=(2.0, 1.0, 1.0))
    balanced = dataclasses.replace(named, name="other", class_weights=("balanced",))
    assert compiled.train_step(named) is compiled.train_step(balanced)
    assert compiled.train_step(named) is not compiled.train_step(vanilla)


def test_frozen_pattern_without_a_match_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="frozen pattern 'nothing' matches no parameter"):
        compiled_steps(frozen=("nothing",))
