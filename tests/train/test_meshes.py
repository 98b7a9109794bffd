"""Meshes, accumulation, and rematerialisation: the same loss, gradient, metrics, and logits as one device."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.helpers import tiny
from tests.helpers.forkserver import Process
from xtransfer import main
from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import Dataset, TrainBatches, eval_batches, make_plan
from xtransfer.data.tokens.tokenizer import Tokens
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.evaluation.metrics import METRICS
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.models.inference import predict
from xtransfer.runtime import sharding
from xtransfer.train import optimizer
from xtransfer.train.compiled_steps import CompiledSteps

ONE_DEVICE = (1, 1, 1)
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
TOLERANCE = 1e-5
EXAMPLES, CLASSES, ROWS, ROW_LENGTH = 70, 3, 32, 32
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_positions": ROW_LENGTH}
BERT = EncoderConfig(vocab_size=61, **SIZES)
# A loss whose examples have different factors, and of which some do not count.
WEIGHTED = dataclasses.replace(
    OBJECTIVES["monox_pl"],
    name="weighted",
    threshold=0.5,
    confidence_weighted=True,
    class_factors=(0.25, 1.0, 4.0),
    focal_gamma=0.5,
)
LOSSES = {**OBJECTIVES, "weighted": WEIGHTED}


def dataset() -> Dataset:
    """Return examples of 3 to 11 tokens with teacher logits; a third of them have no label."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, EXAMPLES)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Tokens(
        rng.integers(1, 61, offsets[-1]).astype(np.int32),
        np.zeros(offsets[-1], np.uint8),
        offsets,
        np.zeros(len(offsets) - 1, bool),
    )
    labels = np.where(np.arange(EXAMPLES) % 3, rng.integers(0, CLASSES, EXAMPLES), -1).astype(np.int32)
    logits = rng.normal(size=(EXAMPLES, CLASSES)).astype(np.float32)
    return Dataset(tokens, labels, logits, tuple(map(str, range(EXAMPLES))), CLASSES)


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """Return a packed batch whose rows divide into four microbatches on every mesh; the last rows are empty."""
    plan = make_plan(EXAMPLES, ROW_LENGTH, pad_id=0, position_offset=0, multiple_of=ROWS)
    packed = TrainBatches(dataset(), plan, seed=0)(0)
    filled = (packed["weight"] > 0).sum(axis=1)
    assert len(filled) == ROWS and not filled[-4:].any() and len(set(filled[filled > 0])) > 1
    return packed


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def compiled_steps(
    shape: tuple[int, int, int], *, architecture: EncoderConfig = BERT, dropout: float = 0.1, **settings: Any
) -> CompiledSteps:
    return CompiledSteps(ModelConfig(**settings), architecture.with_dropout(dropout), CLASSES, mesh_of(shape))


def params(architecture: EncoderConfig) -> Any:
    """Return parameters with ten times the usual spread, so that gradients are large compared with the tolerance."""
    initial = nnx.state(Classifier(architecture, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, initial)


def recording_optimizer(*_: Any, **__: Any) -> optax.GradientTransformation:
    """Return an optimizer that changes nothing and whose state is the last gradient."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradient, _, __: (zeros(gradient), gradient))


@functools.cache
def step(
    shape: tuple[int, int, int], objective: str = "monox_kd", *, architecture: EncoderConfig = BERT, **settings: Any
) -> tuple[Any, dict[str, Any]]:
    """Run the training step of `main`, and return (gradient, loss terms) on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "adamw", recording_optimizer)
        compiled = compiled_steps(shape, architecture=architecture, **settings)
    start = compiled.initial_state(params(architecture), 0)
    new_state, terms = compiled.train_step(LOSSES[objective])(
        start, sharding.place_batch(compiled.mesh, batch()), jax.random.key(5), np.float32(1.0)
    )
    return jax.device_get((compiled.saving(dict, 0).saved(new_state).opt_state, terms))


def assert_same(actual: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]]) -> None:
    """Compare the means of the terms, and each gradient relative to the largest value of its tensor.

    Attention does not depend on the key's bias, so this gradient is only rounding. It is compared relative to a
    hundredth of the largest gradient.
    """
    for name, (total, count) in expected[1].items():
        assert actual[1][name][1] == count, name
        assert abs(actual[1][name][0] - total) <= TOLERANCE * max(count, 1), name
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    assert largest > 0.05
    for (path, gradient), reference in zip(
        jax.tree_util.tree_leaves_with_path(actual[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        scale = max(np.abs(reference).max(), 1e-2 * largest)
        worst = np.abs(gradient - reference).max() / scale
        assert gradient.dtype == np.float32 and worst <= TOLERANCE, (sharding.path_name(path), worst)


@pytest.mark.parametrize("shape", MESHES)
def test_training_with_dropout_matches_one_device(shape: tuple[int, int, int]) -> None:
    assert_same(step(shape), step(ONE_DEVICE))


def test_dropout_changes_the_result() -> None:
    with pytest.raises(AssertionError):
        assert_same(step(ONE_DEVICE), step(ONE_DEVICE, "vanilla", dropout=0.0))


@pytest.mark.parametrize(("shape", "microbatches"), [(ONE_DEVICE, 2), ((8, 1, 1), 4), ((2, 4, 1), 4), ((2, 2, 2), 2)])
def test_microbatches_with_unequal_counts_match_the_whole_batch(shape: tuple[int, int, int], microbatches: int) -> None:
    """Dropout also matches the whole batch."""
    shards = shape[0] * shape[1]
    labelled = (batch()["label"] >= 0).reshape(shards, microbatches, -1).sum(axis=(0, 2))
    assert len(set(labelled)) > 1
    assert_same(step(shape, "vanilla", accumulation=microbatches), step(ONE_DEVICE, "vanilla"))


def test_update_groups_match_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of four devices; larger meshes have groups of eight."""
    monkeypatch.setattr(sharding, "UPDATE_GROUP", 4)
    assert_same(step.__wrapped__((8, 1, 1), "monox_kd", accumulation=2), step(ONE_DEVICE))


def test_rematerialisation_changes_nothing() -> None:
    assert_same(step(ONE_DEVICE, remat=True), step(ONE_DEVICE))


@pytest.mark.parametrize("shape", MESHES)
def test_accumulation_with_rematerialisation_matches_one_device(shape: tuple[int, int, int]) -> None:
    assert_same(step(shape, "monox_pl", accumulation=4, remat=True), step(ONE_DEVICE, "monox_pl"))


@pytest.mark.parametrize("shape", MESHES)
def test_weighted_losses_match_one_device(shape: tuple[int, int, int]) -> None:
    """Factors and counts differ between shards and microbatches. The denominator is the global number of examples."""
    single = step(ONE_DEVICE, "weighted")
    assert 0 < single[1]["loss"][1] < EXAMPLES
    assert_same(step(shape, "weighted", accumulation=4), single)


@functools.cache
def evaluation_logits(shape: tuple[int, int, int]) -> np.ndarray:
    """Return the logits of all examples from the evaluation step, with full batches and a short one."""
    compiled, weights = compiled_steps(shape), params(BERT)
    shards = sharding.data_shards(compiled.mesh)
    plan = make_plan(16, ROW_LENGTH, pad_id=0, position_offset=0, multiple_of=shards)
    batches = list(eval_batches(dataset(), plan))
    assert len({eval_batch["weight"].shape for _, eval_batch in batches}) == 2
    return predict(compiled.eval_step, weights, compiled.mesh, batches, EXAMPLES, CLASSES)


@pytest.mark.parametrize("shape", MESHES)
def test_evaluation_logits_and_metrics_match_one_device(shape: tuple[int, int, int]) -> None:
    sharded, single = evaluation_logits(shape), evaluation_logits(ONE_DEVICE)
    np.testing.assert_allclose(sharded, single, atol=TOLERANCE, rtol=0)
    assert single.std() > 0.1
    known = dataset().labels >= 0
    for name in ("accuracy", "macro_f1"):  # the others depend on more than the predicted classes
        values = [METRICS[name].function(x[known], dataset().labels[known]) for x in (sharded, single)]
        assert values[0] == values[1]


def test_experiment_on_eight_devices_matches_one_device(tmp_path: Path) -> None:
    """Run it twice, with dropout: on 2×2×2 devices in this process, and on one device in another process."""
    data = tiny.write_task(tmp_path / "data", train=64, other=24)
    checkpoints = tiny.checkpoint(tmp_path / "teacher", seed=1), tiny.checkpoint(tmp_path / "student", seed=2)
    settings = tiny.config_file(tmp_path / "tiny.py", data, *checkpoints)
    # Without packing, a text is in the same row for any number of devices, so its dropout mask is the same.
    flags = [f"--config.{role}.{key}" for role in ("teacher", "student") for key in ("packed=False", "steps=16")]
    flags += ["--config.objectives=('vanilla','monox_kd')", "--config.student.accumulation=2"]

    def arguments(name: str) -> list[str]:
        return ["--config", str(settings), "--workdir", str(tmp_path / name), *flags]

    single_device_run = Process(["-m", "xtransfer.main", *arguments("one")], tmp_path / "log")
    main.main([*arguments("eight"), "--config.mesh.fsdp=2", "--config.mesh.tensor=2"])
    assert single_device_run.wait() == 0, (tmp_path / "log").read_text()
    assert (tmp_path / "eight" / "results.jsonl").read_bytes() == (tmp_path / "one" / "results.jsonl").read_bytes()
    one, eight = (next((tmp_path / name / "logits").glob("*/shard-00000.npy")) for name in ("one", "eight"))
    actual, expected = np.load(eight, allow_pickle=False), np.load(one, allow_pickle=False)
    assert expected.std() > 0.05
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)
