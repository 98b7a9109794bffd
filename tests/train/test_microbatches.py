"""Microbatches: the gradient computed by hand, from every row once, with less memory and no more communication."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.data.batches import packing
from xtransfer.distillation.objectives import OBJECTIVES, loss_terms
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.runtime import sharding
from xtransfer.train import optimizer, state, steps
from xtransfer.train.microbatches import MICROBATCH_VALUES, most_rows, num_microbatches

CONFIG = EncoderConfig(vocab_size=32, hidden_size=16, num_layers=3, num_heads=2, intermediate_size=32, max_positions=16)
CLASSES = 3


class Line(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.float32(3.0))


def after_one_step(loss_fn, data, devices, microbatches, embed=None):
    """Return w and the loss terms after one step of gradient descent from w = 3 with learning rate 0.1."""
    mesh = sharding.make_mesh((devices, 1, 1), jax.devices()[:devices])
    graphdef, params = nnx.split(Line(), nnx.Param)
    tx = optax.sgd(0.1)
    step = steps.make_train_step(
        graphdef, loss_fn, tx, mesh, params, num_microbatches=lambda batch: microbatches, embed=embed
    )
    new_state, terms = step(state.create(params, tx, mesh), sharding.place_batch(mesh, data), jax.random.key(0), 0.1)
    return float(jax.tree.leaves(new_state.params)[0]), jax.device_get(terms)


@pytest.mark.parametrize(("devices", "microbatches"), [(1, 1), (1, 2), (1, 4), (2, 2)])
def test_unequal_counts_match_hand_computation(devices, microbatches):
    """Errors 3 · 2 − 5 = 1, 3 · 1 − 5 = −2, and 3 · 2 − 3 = 3 count; the fourth row has weight 0.

    The loss is (1 + 4 + 9) / 3, and the gradient 2 (1 · 2 − 2 · 1 + 3 · 2) / 3 = 4.
    """

    def loss_fn(model, data, key):
        error = (model.w * data["x"] - data["y"]) ** 2
        return {"loss": (jnp.sum(error * data["weight"]), jnp.sum(data["weight"]))}

    data = {"x": np.float32([2, 1, 2, 9]), "y": np.float32([5, 5, 3, 9]), "weight": np.float32([1, 1, 1, 0])}
    w, terms = after_one_step(loss_fn, data, devices, microbatches)
    assert [float(x) for x in terms["loss"]] == [14.0, 3.0]
    assert w == pytest.approx(3.0 - 0.1 * 4)


@pytest.mark.parametrize("devices", [1, 2])
def test_microbatches_know_their_row_numbers_and_share_one_key(devices):
    def loss_fn(model, data, key):
        uniform = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row)))(data["row_index"])
        return {"loss": (model.w * jnp.sum(data["x"] * uniform), jnp.float32(1))}

    key = jax.random.fold_in(jax.random.key(0), 0)
    uniform = [float(jax.random.uniform(jax.random.fold_in(key, row))) for row in range(4)]
    expected = 3 * sum(x * u for x, u in zip([1, 10, 100, 1000], uniform, strict=True))
    total = after_one_step(loss_fn, {"x": np.float32([1, 10, 100, 1000])}, devices, 2)[1]["loss"][0]
    assert total == pytest.approx(expected)


@pytest.mark.parametrize("devices", [1, 2])
def test_gradient_of_a_single_lookup_matches_hand_computation(devices):
    """With e = w x, the loss w e = w² x has a mean over four rows with the gradient 2 w · mean(x) = 2 · 3 · 2.5."""

    def embed(model, data, key):
        return model.w * data["x"]

    def loss_fn(model, data, key):
        assert data["embedded"].shape == data["x"].shape == (4 // devices // 2,)
        return {"loss": (jnp.sum(model.w * data["embedded"]), jnp.float32(data["x"].shape[0]))}

    w, terms = after_one_step(loss_fn, {"x": np.float32([1, 2, 3, 4])}, devices, 2, embed)
    assert [float(x) for x in terms["loss"]] == [90.0, 4.0]
    assert w == pytest.approx(3.0 - 0.1 * 15)


def encoder_step(microbatches, mesh):
    """Return the compiled training step of a small encoder for 256 rows."""
    graphdef, params = nnx.split(Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    tx = optimizer.adamw(weight_decay=0.0, clip_norm=0.0)

    def loss_fn(model, rows, key):
        logits = model(rows, dropout_key=key)
        return loss_terms(OBJECTIVES["monox_kd"], logits, rows["teacher_logits"], rows["label"], rows["weight"])

    def embed(model, rows, key):
        return model.embed(rows, dropout_key=key)

    ids, slots = jax.ShapeDtypeStruct((256, 16), jnp.int32), jax.ShapeDtypeStruct((256, 2), jnp.int32)
    rows = {name: ids for name in ("input_ids", "segment_ids", "position_ids", "token_type_ids")}
    rows |= {"cls_index": slots, "label": slots, "weight": jax.ShapeDtypeStruct((256, 2), jnp.float32)}
    rows["teacher_logits"] = jax.ShapeDtypeStruct((256, 2, CLASSES), jnp.float32)
    step = steps.make_train_step(
        graphdef, loss_fn, tx, mesh, params, num_microbatches=lambda batch: microbatches, embed=embed
    )
    abstract = state.abstract(params, tx, mesh)
    return step.lower(abstract, rows, jax.eval_shape(lambda: jax.random.key(0)), 0.01).compile()


def test_microbatches_take_less_memory_and_reduce_gradients_once():
    mesh = sharding.make_mesh()
    whole_batch, microbatched = encoder_step(1, mesh), encoder_step(4, mesh)
    assert microbatched.memory_analysis().temp_size_in_bytes < 0.4 * whole_batch.memory_analysis().temp_size_in_bytes
    text = microbatched.as_text()
    kinds = r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    assert set(re.findall(kinds, text)) == {"all-reduce", "all-gather"}  # of gradients, and of updated parameters
    for body in re.findall(r"body=%?([\w.-]+)", text):
        loop = text[text.index(f"%{body} ") :]
        assert not re.findall(kinds, loop[: loop.index("\n}\n")])


@functools.cache
def fake_mesh(platform, data, fsdp=1):
    devices = np.array([SimpleNamespace(platform=platform)] * data * fsdp).reshape(data, fsdp, 1)
    return SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, devices.shape, strict=True)))


@pytest.mark.parametrize(
    ("rows", "length", "microbatches"),
    [
        (8 * 128, 128, 4),  # microbatches of 32 rows
        (8 * 32, 128, 1),  # 4,096 tokens need no split
        (8 * 33, 128, 1),  # three microbatches of 11 rows would be too small
        (8 * 37, 128, 1),  # a prime number of rows has no suitable divisor
        (8 * 48, 128, 2),
        (8 * 16, 512, 2),
        (8 * 3, 4096, 3),
        (8 * 3, 8192, 1),  # a single row is too long already
    ],
)
def test_default_number_of_microbatches_suits_a_tpu(rows, length, microbatches):
    assert num_microbatches(0, rows, length, 768, fake_mesh("tpu", 8)) == microbatches
    assert num_microbatches(0, rows // 8, length, 768, fake_mesh("tpu", 1)) == microbatches
    assert num_microbatches(0, rows, length, 768, fake_mesh("cpu", 8)) == 1
    assert num_microbatches(6, rows, length, 768, fake_mesh("cpu", 8)) == 6
    assert num_microbatches(6, rows, length, 768, fake_mesh("tpu", 8)) == 6


@given(st.integers(1, 4096), st.sampled_from([8, 100, 128, 512, 4096]), st.sampled_from([768, 1024, 2560]))
def test_rounded_rows_divide_into_microbatches_that_fit(rows, length, size):
    mesh = fake_mesh("tpu", 8)
    most = most_rows(0, length, size, mesh)
    rounded = packing.round_up_rows(rows, 8, most)
    values = rounded // 8 * length * size
    count = num_microbatches(0, rounded, length, size, mesh)
    if most is None:
        assert count == 1 and length * size > MICROBATCH_VALUES
    else:
        assert rounded // 8 % count == 0 and values // count <= MICROBATCH_VALUES
        assert count == 1 or 2 * values // count >= MICROBATCH_VALUES


def test_most_rows_in_one_microbatch():
    assert most_rows(0, 128, 768, fake_mesh("tpu", 8)) == 32
    assert most_rows(0, 100, 1024, fake_mesh("tpu", 8)) == 30  # 3,072 tokens
    assert most_rows(0, 8192, 768, fake_mesh("tpu", 8)) is None
    assert most_rows(0, 128, 256, fake_mesh("tpu", 8)) is None
    assert most_rows(0, 128, 768, fake_mesh("tpu", 4, 2)) is None
    assert most_rows(0, 128, 768, fake_mesh("cpu", 8)) is None
    assert most_rows(2, 128, 768, fake_mesh("tpu", 8)) is None


def test_number_of_microbatches_depends_on_setting_mesh_and_width():
    assert num_microbatches(1, 8 * 128, 128, 768, fake_mesh("tpu", 8)) == 1  # the setting
    # Each microbatch would have to gather the `fsdp` shards again.
    assert num_microbatches(0, 8 * 128, 128, 768, fake_mesh("tpu", 1, 8)) == 1
    assert num_microbatches(0, 8 * 128, 128, 256, fake_mesh("tpu", 8)) == 1  # narrow model
    assert num_microbatches(0, 8 * 48, 128, 1024, fake_mesh("tpu", 8)) == 2  # wide model: 3,072 tokens each
    assert num_microbatches(0, 8 * 32, 128, 1024, fake_mesh("tpu", 8)) == 2
    assert num_microbatches(0, 8 * 24, 128, 1024, fake_mesh("tpu", 8)) == 1
