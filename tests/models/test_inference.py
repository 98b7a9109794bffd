"""The shared forward pass: every example once, in order, on any mesh, with few compilations."""

from collections.abc import Iterator
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from xtransfer.models import inference
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.runtime import processes
from xtransfer.runtime.sharding import make_mesh

N, CLASSES, ROWS, SLOTS, LENGTH = 21, 3, 8, 2, 6
CONFIG = EncoderConfig(
    vocab_size=40, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16, max_positions=LENGTH
)
Batches = list[tuple[np.ndarray, dict[str, np.ndarray]]]


def model() -> tuple[Any, nnx.State]:
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Classifier(CONFIG, CLASSES, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: np.float32(rng.standard_normal(x.shape)), abstract)


def batches(order: np.ndarray) -> Batches:
    """Return batches of the examples in this order, one or two per row, the last batch not full.

    Example i has the tokens i + 1, 1, 2.
    """
    result: Batches = []
    for start in range(0, len(order), ROWS * SLOTS - 3):
        indices = order[start : start + ROWS * SLOTS - 3]
        batch = {
            name: np.zeros((ROWS, LENGTH), np.int32)
            for name in ("input_ids", "segment_ids", "position_ids", "token_type_ids")
        }
        batch["cls_index"] = np.zeros((ROWS, SLOTS), np.int32)
        batch["weight"] = np.zeros((ROWS, SLOTS), np.float32)
        cells = [(row, slot) for row in range(ROWS) for slot in range(1 + row % 2)][: len(indices)]
        cells += [(row, 1) for row in range(0, ROWS, 2)][: len(indices) - len(cells)]
        for index, (row, slot) in zip(indices, sorted(cells), strict=True):
            span = slice(3 * slot, 3 * slot + 3)
            batch["input_ids"][row, span] = index + 1, 1, 2
            batch["segment_ids"][row, span] = slot + 1
            batch["position_ids"][row, span] = 0, 1, 2
            batch["cls_index"][row, slot] = 3 * slot
            batch["weight"][row, slot] = 1
        batch["label"] = batch["cls_index"]
        result.append((indices, batch))
    return result


def expected() -> np.ndarray:
    """Return the logits of all examples, computed with one example per row and without a mesh."""
    graphdef, params = model()
    ids = np.stack([np.arange(1, N + 1), np.ones(N), np.full(N, 2)], axis=1).astype(np.int32)
    batch = {
        "input_ids": ids,
        "segment_ids": np.ones_like(ids),
        "position_ids": np.tile(np.arange(3, dtype=np.int32), (N, 1)),
        "token_type_ids": np.zeros_like(ids),
        "cls_index": np.zeros((N, 1), np.int32),
    }
    return np.asarray(jax.jit(lambda p, b: nnx.merge(graphdef, p)(b))(params, batch))[:, 0]


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 1, 1), (2, 2, 2)])
def test_logits_follow_the_order_of_the_dataset(shape: tuple[int, ...]) -> None:
    mesh = make_mesh(shape, jax.devices()[: int(np.prod(shape))])
    graphdef, params = model()
    step = inference.make_eval_step(graphdef, mesh)
    counts: list[int] = []
    order = np.random.default_rng(1).permutation(N)
    logits = inference.predict(step, params, mesh, batches(order), N, CLASSES, on_batch=counts.append)
    assert logits.shape == (N, CLASSES) and logits.dtype == np.float32
    assert sum(counts) == N and len(counts) == 2
    assert np.ptp(expected(), axis=0).min() > 0.1
    np.testing.assert_allclose(logits, expected(), atol=1e-5)


def test_batches_of_one_shape_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    mesh = make_mesh()
    graphdef, params = model()
    monkeypatch.setattr(inference.nnx, "merge", chex.assert_max_traces(nnx.merge, n=1))
    step = inference.make_eval_step(graphdef, mesh)
    placed = inference.place_params(mesh, params)
    first = inference.predict(step, placed, mesh, batches(np.arange(N)), N, CLASSES)
    second = inference.predict(step, params, mesh, batches(np.arange(N)[::-1]), N, CLASSES)
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_parameters_and_rows_are_sharded_by_the_rules() -> None:
    mesh = make_mesh((2, 2, 2))
    graphdef, params = model()
    placed = inference.place_params(mesh, params)
    kernel = placed["encoder"]["layers"][0]["intermediate"]["kernel"][...]
    assert kernel.addressable_shards[0].data.shape == (4, 8)  # [8, 16] over fsdp and tensor
    batch = {key: batches(np.arange(N))[0][1][key] for key in inference.INPUTS}
    logits = inference.make_eval_step(graphdef, mesh)(placed, inference.place_batch(mesh, batch))
    assert logits.addressable_shards[0].data.shape == (ROWS, SLOTS, CLASSES)  # every process gets all of them
    placed_again = inference.place_params(mesh, placed)
    assert placed_again["head"]["kernel"][...] is placed["head"]["kernel"][...]


def test_host_prepares_only_a_few_batches_ahead() -> None:
    produced, collected = 0, 0
    ahead: list[int] = []

    def source() -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        nonlocal produced
        for index in range(10):
            produced += 1
            ahead.append(produced - collected)
            _, batch = batches(np.array([index]))[0]
            yield np.array([index]), batch

    def collect(count: int) -> None:
        nonlocal collected
        collected += count

    mesh = make_mesh()

    def step(params: Any, batch: Any) -> jax.Array:
        return jax.numpy.zeros((ROWS, SLOTS, CLASSES))

    inference.predict(step, model()[1], mesh, source(), 10, CLASSES, on_batch=collect)
    assert collected == 10 and 2 <= max(ahead) <= 4


def test_forward_preserves_the_order_and_tags_of_batches() -> None:
    mesh = make_mesh()
    graphdef, params = model()
    step = inference.make_eval_step(graphdef, mesh)
    order = np.random.default_rng(2).permutation(N)
    results = list(inference.forward(step, params, mesh, (((str(i), i), batch) for i, batch in batches(order))))
    assert [tag[0] for tag, _ in results] == [str(indices) for indices, _ in batches(order)]
    for (_, indices), logits in results:
        np.testing.assert_allclose(logits, expected()[indices], atol=1e-5)


@pytest.mark.parametrize("order", [np.arange(N - 1), np.append(np.arange(N), 4)])
def test_missing_or_repeated_example_is_an_error(order: np.ndarray) -> None:
    mesh = make_mesh()

    def step(params: Any, batch: Any) -> jax.Array:
        return jax.numpy.zeros((ROWS, SLOTS, CLASSES))

    with pytest.raises(ValueError, match="1 of 21 examples do not occur exactly once"):
        inference.predict(step, model()[1], mesh, batches(order), N, CLASSES)


def test_default_rows_by_hand(monkeypatch):
    """A CPU gets 1,024 tokens per core, and an accelerator 32,768, both up to a limit."""
    mesh = make_mesh()
    for cores, rows in ((2, 16), (8, 64), (96, 64)):
        monkeypatch.setattr(processes, "cores", lambda cores=cores: cores)
        assert inference.default_rows(mesh, 128) == rows
    monkeypatch.setattr(processes, "cores", lambda: 2)
    assert inference.default_rows(mesh, 512) == 4
    assert inference.default_rows(mesh, 4096) == 1
