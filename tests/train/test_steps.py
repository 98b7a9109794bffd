"""The training step: the same results on every mesh, precision, sharding, and dropout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers.jaxprs import equations, float_types
from xtransfer.distillation.objectives import OBJECTIVES, loss_terms
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.runtime import sharding
from xtransfer.train import optimizer, state, steps

CONFIG = EncoderConfig(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=16)
ROWS, LENGTH, SLOTS, CLASSES = 8, 16, 2, 3


def batch(seed=0, empty_rows=0):
    """Return two examples of eight tokens per row, with labels and teacher logits; the last rows are empty."""
    rng = np.random.default_rng(seed)
    used = np.arange(ROWS)[:, None] < ROWS - empty_rows
    return {
        "input_ids": rng.integers(1, 32, (ROWS, LENGTH)).astype(np.int32) * used,
        "segment_ids": np.broadcast_to(np.repeat([1, 2], 8), (ROWS, LENGTH)).astype(np.int32) * used,
        "position_ids": np.broadcast_to(np.tile(np.arange(8), 2), (ROWS, LENGTH)).astype(np.int32) * used,
        "token_type_ids": np.zeros((ROWS, LENGTH), np.int32),
        "cls_index": np.broadcast_to([0, 8], (ROWS, SLOTS)).astype(np.int32) * used,
        "label": np.where(used, rng.integers(-1, CLASSES, (ROWS, SLOTS)), -1).astype(np.int32),
        "teacher_logits": rng.normal(size=(ROWS, SLOTS, CLASSES)).astype(np.float32) * used[..., None],
        "weight": np.broadcast_to(used, (ROWS, SLOTS)).astype(np.float32),
    }


def objective_terms(objective, model, examples, key):
    logits = model(examples, dropout_key=key)
    return loss_terms(objective, logits, examples["teacher_logits"], examples["label"], examples["weight"])


@functools.cache
def trained(mesh_shape, objective="monox_kd", count=3):
    """Return the parameters and losses after a few steps on a mesh of the first devices."""
    mesh = sharding.make_mesh(mesh_shape, jax.devices()[: math.prod(mesh_shape)])
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optimizer.adamw(weight_decay=0.01, clip_norm=1.0)
    loss_fn = functools.partial(objective_terms, OBJECTIVES[objective])
    step = steps.make_train_step(graphdef, loss_fn, tx, mesh, params)
    train_state, losses = state.create(params, tx, mesh), []
    for i in range(count):
        rows = sharding.place_batch(mesh, batch(i, empty_rows=3))
        train_state, terms = step(train_state, rows, jax.random.key(7), 1e-2)
        losses.append({name: float(total) / max(float(n), 1) for name, (total, n) in terms.items()})
    assert int(train_state.step) == count
    return jax.device_get(train_state.params), losses


@pytest.mark.parametrize("objective", ["vanilla", "monox_kd", "monox_pl"])
def test_eight_devices_match_one_device(objective):
    single, single_losses = trained((1, 1, 1), objective)
    for shape in ((8, 1, 1), (2, 2, 2)):
        sharded, losses = trained(shape, objective)
        for expected, actual in zip(single_losses, losses, strict=True):
            assert actual == pytest.approx(expected, abs=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), sharded, single)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_float32_under_bfloat16_compute(objective):
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), nnx.Param)

    def loss(params, examples):
        terms = objective_terms(OBJECTIVES[objective], nnx.merge(graphdef, params), examples, jax.random.key(0))
        return terms["loss"][0], terms

    (total, terms), gradient = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves((total, terms, gradient))} == {jnp.dtype("float32")}
    eqns = equations(loss, params, batch())
    assert "bfloat16" in float_types(eqns, "dot_general")
    for primitive in ("exp", "log", "reduce_sum", "reduce_max"):
        assert set(float_types(eqns, primitive)) == {"float32"}, primitive
    # No array with the logits' shape, or with one number per example, is ever rounded.
    shapes = {(ROWS, SLOTS, CLASSES), (ROWS, SLOTS)}
    rounded = [v.aval for e in eqns for v in e.outvars if v.aval.dtype == jnp.bfloat16]
    assert not [value for value in rounded if value.shape in shapes]


def test_state_is_sharded_by_the_rules():
    mesh = sharding.make_mesh((2, 2, 2))
    _, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    train_state = state.create(params, optimizer.adamw(weight_decay=0.0, clip_norm=0.0), mesh)
    sharded = [leaf for leaf in jax.tree.leaves(train_state.params) if not leaf.sharding.is_fully_replicated]
    assert len(sharded) > 10
    assert all("data" not in str(leaf.sharding.spec) for leaf in sharded)
    expected = [layout.spec for layout in jax.tree.leaves(sharding.update_shardings(mesh, params))]
    assert sum("data" in str(spec) for spec in expected) >= len(sharded)
    (adam,) = [
        part
        for part in jax.tree.leaves(train_state.opt_state, is_leaf=lambda x: hasattr(x, "mu"))
        if hasattr(part, "mu")
    ]
    for moments in (adam.mu, adam.nu):
        assert [leaf.sharding.spec for leaf in jax.tree.leaves(moments)] == expected


def test_parameters_may_be_kept_in_the_shards_of_their_updates():
    mesh = sharding.make_mesh()
    _, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optimizer.adamw(weight_decay=0.0, clip_norm=0.0)
    kept = [leaf.sharding for leaf in jax.tree.leaves(state.abstract(params, tx, mesh, split_params=True).params)]
    assert kept == jax.tree.leaves(sharding.update_shardings(mesh, params))
    assert sum("data" in str(layout.spec) for layout in kept) > 10
    whole = jax.tree.leaves(state.abstract(params, tx, mesh).params)
    assert all(leaf.sharding.is_fully_replicated for leaf in whole)


@pytest.mark.parametrize("split_params", [False, True])
def test_frozen_parameters_are_not_gathered(split_params):
    mesh, gathers = sharding.make_mesh(), {}
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    loss_fn = functools.partial(objective_terms, OBJECTIVES["vanilla"])
    for frozen in ((), ("encoder",)):
        tx = optimizer.adamw(weight_decay=0.0, clip_norm=0.0, frozen=frozen)
        step = steps.make_train_step(graphdef, loss_fn, tx, mesh, params, split_params=split_params)
        abstract = state.abstract(params, tx, mesh, split_params=split_params)
        arguments = abstract, batch(), jax.eval_shape(lambda: jax.random.key(0)), 1e-2
        gathers[frozen] = step.lower(*arguments).compile().as_text().count(" all-gather(")
    assert gathers[()] > 14 > 3 > gathers["encoder",]  # two layers, tables, and head; then only pooler and head


def test_empty_batch_changes_nothing_and_stays_finite():
    mesh = sharding.make_mesh()
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    before = jax.tree.map(np.array, params)
    tx = optimizer.adamw(weight_decay=0.0, clip_norm=1.0)
    step = steps.make_train_step(graphdef, functools.partial(objective_terms, OBJECTIVES["monox_kd"]), tx, mesh, params)
    train_state, terms = step(
        state.create(params, tx, mesh), sharding.place_batch(mesh, batch(empty_rows=ROWS)), jax.random.key(0), 1e-2
    )
    assert [float(x) for x in terms["loss"]] == [0.0, 0.0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(train_state.params), before)


def test_dropout_depends_only_on_key_and_step():
    params, _ = trained((8, 1, 1), "monox_kd")
    repeated_params, _ = trained.__wrapped__((8, 1, 1), "monox_kd")  # not the cached result
    jax.tree.map(np.testing.assert_array_equal, params, repeated_params)

    def logits(step):
        model = Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0))
        return np.asarray(model(batch(), dropout_key=jax.random.fold_in(jax.random.key(7), step)))

    assert np.abs(logits(1) - logits(2)).max() > 1e-3
