"""The training step: its gradient by hand, its dropout, and the same numbers on every mesh."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.jaxprs import equations, float_types
from xtransfer import sharding
from xtransfer.models.encoder import Classifier, EncoderConfig
from xtransfer.train import optimizer, state, steps
from xtransfer.transfer.objectives import OBJECTIVES, loss_terms

CONFIG = EncoderConfig(vocab_size=32, hidden_size=16, num_layers=2, num_heads=2, intermediate_size=32, max_positions=16)
ROWS, LENGTH, SLOTS, CLASSES = 8, 16, 2, 3


def batch(seed=0, empty_rows=0):
    """Two examples of eight tokens a row, labels and teacher logits for all; the last rows are empty."""
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


def trained(mesh_shape, objective="monox_kd", count=3, devices=None):
    """Parameters and losses after a few steps on a mesh."""
    mesh = sharding.make_mesh(mesh_shape, devices)
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optimizer.adamw(1e-2, weight_decay=0.01, clip_norm=1.0)
    loss_fn = functools.partial(objective_terms, OBJECTIVES[objective])
    step = steps.make_train_step(graphdef, loss_fn, tx, mesh, params)
    now, losses = state.create(params, tx, mesh), []
    for i in range(count):
        now, terms = step(now, sharding.place_batch(mesh, batch(i, empty_rows=3)), jax.random.key(7))
        losses.append({name: float(total) / max(float(n), 1) for name, (total, n) in terms.items()})
    assert int(now.step) == count
    return jax.device_get(now.params), losses


@pytest.mark.parametrize("objective", ["vanilla", "monox_kd", "monox_pl"])
def test_eight_devices_are_one_device(objective):
    single, single_losses = trained((1, 1, 1), objective, devices=jax.devices()[:1])
    for shape in ((8, 1, 1), (2, 2, 2)):
        spread, losses = trained(shape, objective)
        for one, other in zip(single_losses, losses, strict=True):
            assert other == pytest.approx(one, abs=1e-5)
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-4), spread, single)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_gradient_are_float32_under_bfloat16_compute(objective):
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0), dtype=jnp.bfloat16), nnx.Param)

    def loss(params, examples):
        terms = objective_terms(OBJECTIVES[objective], nnx.merge(graphdef, params), examples, jax.random.key(0))
        return terms["loss"][0], terms

    (total, terms), gradient = jax.eval_shape(jax.value_and_grad(loss, has_aux=True), params, batch())
    assert {leaf.dtype for leaf in jax.tree.leaves((total, terms, gradient))} == {jnp.dtype("float32")}
    found = equations(loss, params, batch())
    assert "bfloat16" in float_types(found, "dot_general")
    for primitive in ("exp", "log", "reduce_sum", "reduce_max"):
        assert set(float_types(found, primitive)) == {"float32"}, primitive
    # Nothing that has the logits' shape, or that of one number an example, is ever rounded.
    shapes = {(ROWS, SLOTS, CLASSES), (ROWS, SLOTS)}
    rounded = [v.aval for e in found for v in e.outvars if v.aval.dtype == jnp.bfloat16]
    assert not [value for value in rounded if value.shape in shapes]


def test_state_is_laid_out_by_the_rules():
    mesh = sharding.make_mesh((2, 2, 2))
    _, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    made = state.create(params, optimizer.adamw(1e-2, weight_decay=0.0, clip_norm=0.0), mesh)
    split = [leaf for leaf in jax.tree.leaves(made.params) if not leaf.sharding.is_fully_replicated]
    moments = [leaf for leaf in jax.tree.leaves(made.opt_state) if not leaf.sharding.is_fully_replicated]
    assert len(split) > 10
    assert len(moments) == 2 * len(split)


def test_one_step_of_descent_by_hand():
    """Loss (w · x − y)² over two examples, of which the second counts nothing: w − 0.1 · 2 (w x − y) x."""

    def loss_fn(model, data, key):
        error = (model.w * data["x"] - data["y"]) ** 2
        return {"loss": (jnp.sum(error * data["weight"]), jnp.sum(data["weight"]))}

    data = {"x": np.float32([2, 9]), "y": np.float32([5, 9]), "weight": np.float32([1, 0])}
    w, terms = after_one_step(loss_fn, data, devices=1, accumulation=1)
    assert [float(x) for x in terms["loss"]] == [1.0, 1.0]
    assert w == pytest.approx(3.0 - 0.1 * 2 * (3 * 2 - 5) * 2)


class Line(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(3.0))


def after_one_step(loss_fn, data, devices, accumulation):
    """w, from 3, and the terms after a step of descent at rate 0.1."""
    mesh = sharding.make_mesh((devices, 1, 1), jax.devices()[:devices])
    graphdef, params = nnx.split(Line(), nnx.Param)
    tx = optax.sgd(0.1)
    step = steps.make_train_step(graphdef, loss_fn, tx, mesh, params, accumulation=accumulation)
    now, terms = step(state.create(params, tx, mesh), sharding.place_batch(mesh, data), jax.random.key(0))
    return float(jax.tree.leaves(now.params)[0]), jax.device_get(terms)


@pytest.mark.parametrize(("devices", "accumulation"), [(1, 1), (1, 2), (1, 4), (2, 2)])
def test_parts_that_count_different_numbers_by_hand(devices, accumulation):
    """Errors 3 · 2 − 5 = 1, 3 · 1 − 5 = −2 and 3 · 2 − 3 = 3 count, one in a part and two in the other.

    Loss (1 + 4 + 9) / 3; gradient 2 (1 · 2 − 2 · 1 + 3 · 2) / 3 = 4.
    """

    def loss_fn(model, data, key):
        error = (model.w * data["x"] - data["y"]) ** 2
        return {"loss": (jnp.sum(error * data["weight"]), jnp.sum(data["weight"]))}

    data = {"x": np.float32([2, 1, 2, 9]), "y": np.float32([5, 5, 3, 9]), "weight": np.float32([1, 1, 1, 0])}
    w, terms = after_one_step(loss_fn, data, devices, accumulation)
    assert [float(x) for x in terms["loss"]] == [14.0, 3.0]
    assert w == pytest.approx(3.0 - 0.1 * 4)


def test_the_parts_take_every_second_row_and_a_key_each():
    def loss_fn(model, data, key):
        return {"loss": (model.w * jnp.sum(data["x"]) * jax.random.uniform(key), jnp.float32(1))}

    key = jax.random.fold_in(jax.random.key(0), 0)
    whole, part = jax.random.uniform(key), [jax.random.uniform(jax.random.fold_in(key, i)) for i in range(2)]
    data = {"x": np.float32([1, 10, 100, 1000])}
    assert after_one_step(loss_fn, data, 1, 1)[1]["loss"][0] == pytest.approx(3 * 1111 * whole)
    assert after_one_step(loss_fn, data, 2, 2)[1]["loss"][0] == pytest.approx(3 * (101 * part[0] + 1010 * part[1]))


def test_accumulation_takes_less_memory_and_moves_no_row():
    mesh = sharding.make_mesh()
    config = dataclasses.replace(CONFIG, num_layers=1)
    graphdef, params = nnx.split(Classifier(config, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    tx, loss_fn = (
        optimizer.adamw(1e-2, weight_decay=0.0, clip_norm=0.0),
        functools.partial(objective_terms, OBJECTIVES["monox_kd"]),
    )
    rows = {key: jax.ShapeDtypeStruct((256, *x.shape[1:]), x.dtype) for key, x in batch().items()}
    needed, abstract = {}, state.abstract(params, tx, mesh)
    for accumulation in (1, 4):
        step = steps.make_train_step(graphdef, loss_fn, tx, mesh, params, accumulation=accumulation)
        compiled = step.lower(abstract, rows, jax.eval_shape(lambda: jax.random.key(0))).compile()
        needed[accumulation] = compiled.memory_analysis().temp_size_in_bytes
        found = re.findall(
            r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", compiled.as_text()
        )
        assert set(found) == {"all-reduce"}
    assert needed[4] < 0.4 * needed[1]


def test_a_batch_that_counts_nothing_changes_nothing_and_is_finite():
    mesh = sharding.make_mesh()
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    before = jax.tree.map(np.array, params)
    tx = optimizer.adamw(1e-2, weight_decay=0.0, clip_norm=1.0)
    step = steps.make_train_step(graphdef, functools.partial(objective_terms, OBJECTIVES["monox_kd"]), tx, mesh, params)
    now, terms = step(
        state.create(params, tx, mesh), sharding.place_batch(mesh, batch(empty_rows=ROWS)), jax.random.key(0)
    )
    assert [float(x) for x in terms["loss"]] == [0.0, 0.0]
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(now.params), before)


def test_dropout_is_a_function_of_key_and_step():
    first, _ = trained((8, 1, 1))
    again, _ = trained((8, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, first, again)

    def logits(step):
        model = Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0))
        return np.asarray(model(batch(), dropout_key=jax.random.fold_in(jax.random.key(7), step)))

    assert np.abs(logits(1) - logits(2)).max() > 1e-3
