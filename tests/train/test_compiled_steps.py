"""A role's compiled steps: built from shapes alone, laid out like a real run, and shared by equal losses."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from xtransfer.config import LoraConfig, ModelConfig, TeacherConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.inference import INPUTS
from xtransfer.runtime.sharding import make_mesh
from xtransfer.train import compiled_steps
from xtransfer.train.compiled_steps import CompiledSteps

BERT = EncoderConfig(vocab_size=40, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=16)


def steps_of(mesh_shape: tuple[int, int, int] = (4, 2, 1), **changes: Any) -> CompiledSteps:
    return CompiledSteps(ModelConfig(**changes), BERT, 3, make_mesh(mesh_shape))


def layouts(tree: Any) -> list[Any]:
    return [(leaf.shape, leaf.dtype, leaf.sharding) for leaf in jax.tree.leaves(tree)]


def test_abstract_state_matches_a_real_one() -> None:
    compiled = steps_of()
    params = jax.tree.map(lambda leaf: jax.numpy.zeros(leaf.shape, leaf.dtype), compiled.shapes)
    real = compiled.initial_state(params, 0)
    assert layouts(compiled.abstract_state) == layouts(real)
    assert layouts(compiled.abstract_params()) == layouts(compiled.saving(dict, 0).saved(real).params)
    assert any("fsdp" in str(sharding.spec) for _, _, sharding in layouts(real.params))


def test_objectives_with_the_same_loss_share_a_step() -> None:
    compiled = steps_of()
    distilled, hot = OBJECTIVES["monox_kd"], dataclasses.replace(OBJECTIVES["monox_kd"], temperature=2.0)
    assert compiled.train_step(distilled) is compiled.train_step(OBJECTIVES["self_training"])
    steps = {
        id(compiled.train_step(objective))
        for objective in (distilled, hot, OBJECTIVES["vanilla"], OBJECTIVES["monox_pl"])
    }
    assert len(steps) == 4


def test_class_weights_with_the_same_factors_share_a_step() -> None:
    compiled, vanilla = steps_of(), OBJECTIVES["vanilla"]
    named = dataclasses.replace(vanilla, class_weights=("a=2",), class_factors=(2.0, 1.0, 1.0))
    balanced = dataclasses.replace(named, name="other", class_weights=("balanced",))
    assert compiled.train_step(named) is compiled.train_step(balanced)
    assert compiled.train_step(named) is not compiled.train_step(vanilla)


def test_frozen_pattern_without_a_match_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="frozen pattern 'nothing' matches no parameter"):
        steps_of(frozen=("nothing",))


def test_roles_that_differ_only_in_their_batches_share_their_steps() -> None:
    mesh = make_mesh((4, 2, 1))
    student = compiled_steps.shared_steps(ModelConfig(checkpoint="a", batch_size=8, evaluations=2), BERT, 3, mesh)
    teacher = TeacherConfig(checkpoint="b", batch_size=16, max_length=12, patience=1, weight=2.0)
    assert compiled_steps.shared_steps(teacher, BERT, 3, mesh) is student
    others = [
        compiled_steps.shared_steps(ModelConfig(weight_decay=0.1), BERT, 3, mesh),
        compiled_steps.shared_steps(ModelConfig(ema_decay=0.9), BERT, 3, mesh),
        compiled_steps.shared_steps(ModelConfig(lora=LoraConfig(rank=2)), BERT, 3, mesh),
        compiled_steps.shared_steps(ModelConfig(), BERT.with_dropout(0.3), 3, mesh),
        compiled_steps.shared_steps(ModelConfig(), BERT, 2, mesh),
        compiled_steps.shared_steps(ModelConfig(), BERT, 3, make_mesh((8, 1, 1))),
    ]
    assert len({id(steps) for steps in (student, *others)}) == 7


def test_settings_that_shared_steps_ignore_do_not_change_a_program() -> None:
    changes = {"checkpoint": "a", "max_length": 12, "batch_size": 16, "row_length": 64, "packed": False}
    changes |= {"steps": 7, "epochs": 1.0, "evaluations": 2, "patience": 1, "average_last": 1, "reinit_layers": 1}
    changes |= {"learning_rate": 1e-3, "schedule": "cosine", "warmup_fraction": 0.5}
    assert changes.keys() == compiled_steps._NOT_COMPILED
    rows = {name: jax.ShapeDtypeStruct((8, 12), jnp.int32) for name in INPUTS if name != "cls_index"}
    slots = {"cls_index": jnp.int32, "label": jnp.int32, "weight": jnp.float32}
    batch = rows | {name: jax.ShapeDtypeStruct((8, 2), dtype) for name, dtype in slots.items()}
    batch["teacher_logits"] = jax.ShapeDtypeStruct((8, 2, 3), jnp.float32)

    def programs(**settings: Any) -> tuple[str, str]:
        compiled = steps_of(**settings)
        step = compiled.train_step(OBJECTIVES["monox_kd"])
        training = step.lower(*compiled.training_arguments(batch))  # type: ignore[attr-defined]
        inputs = {name: batch[name] for name in INPUTS}
        forward = compiled.eval_step.lower(compiled.abstract_params(), inputs)  # type: ignore[attr-defined]
        return training.as_text(), forward.as_text()

    usual = programs()
    assert programs(**changes) == usual
    assert programs(weight_decay=0.5) != usual
