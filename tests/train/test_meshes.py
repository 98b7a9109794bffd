"""Every mesh, accumulation and rematerialisation: the same loss, gradient, metrics and logits as on one device."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.conftest import QUICK_COMPILE
from tests.helpers import tiny
from xtransfer import main
from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import Dataset, TrainBatches, eval_batches, make_plan
from xtransfer.data.tokens.tokenizer import Tokens
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.evaluation.metrics import METRICS, confusion_matrix
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.models.inference import predict
from xtransfer.runtime import sharding
from xtransfer.train import optimizer, state
from xtransfer.train.compiled_steps import CompiledSteps

ONE = (1, 1, 1)
MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2)]
TOLERANCE = 1e-5
EXAMPLES, CLASSES, ROWS, ROW_LENGTH = 70, 3, 32, 32
SIZES = {"hidden_size": 16, "num_layers": 1, "num_heads": 2, "intermediate_size": 32, "max_positions": ROW_LENGTH}


def dataset() -> Dataset:
    """Examples of 3 to 11 tokens, a third of them without a label, all with a teacher's logits."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 12, EXAMPLES)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = Tokens(rng.integers(1, 61, offsets[-1]).astype(np.int32), np.zeros(offsets[-1], np.uint8), offsets)
    labels = np.where(np.arange(EXAMPLES) % 3, rng.integers(0, CLASSES, EXAMPLES), -1).astype(np.int32)
    logits = rng.normal(size=(EXAMPLES, CLASSES)).astype(np.float32)
    return Dataset(tokens, labels, logits, tuple(map(str, range(EXAMPLES))), CLASSES)


@functools.cache
def batch() -> dict[str, np.ndarray]:
    """A packed batch whose number of rows any of the meshes divides in four parts; the last rows are empty."""
    plan = make_plan(EXAMPLES, ROW_LENGTH, pad_id=0, position_offset=0, multiple_of=ROWS)
    made = TrainBatches(dataset(), plan, seed=0)(0)
    filled = (made["weight"] > 0).sum(axis=1)
    assert len(filled) == ROWS and not filled[-4:].any() and len(set(filled[filled > 0])) > 1
    return made


def mesh_of(shape: tuple[int, int, int]) -> jax.sharding.Mesh:
    return sharding.make_mesh(shape, jax.devices()[: int(np.prod(shape))])


def programs(shape: tuple[int, int, int], *, dropout: float = 0.1, **settings: Any) -> CompiledSteps:
    rates = {"hidden_dropout": dropout, "attention_dropout": dropout}
    architecture = EncoderConfig(vocab_size=61, **SIZES, **rates)
    return CompiledSteps(ModelConfig(**settings), architecture, CLASSES, mesh_of(shape))


def params() -> Any:
    """Ten times the usual spread, so that gradients are large against the tolerance."""
    config = EncoderConfig(vocab_size=61, **SIZES)
    made = nnx.state(Classifier(config, CLASSES, rngs=nnx.Rngs(0)), nnx.Param)
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, made)


def recorder(*_: Any, **__: Any) -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradient."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradient, _, __: (zeros(gradient), gradient))


@functools.cache
def step(shape: tuple[int, int, int], objective: str = "monox_kd", **settings: Any) -> tuple[Any, dict[str, Any]]:
    """(gradient, loss terms) of the training step that `main` runs, on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "adamw", recorder)
        found = programs(shape, **settings)
    start = state.create(params(), found.optimizer, found.mesh)
    after, terms = found.train_step(OBJECTIVES[objective])(
        start, sharding.place_batch(found.mesh, batch()), jax.random.key(5)
    )
    return jax.device_get((after.opt_state, terms))


def assert_same(found: tuple[Any, dict[str, Any]], expected: tuple[Any, dict[str, Any]]) -> None:
    """Means of the terms within the tolerance; of a gradient relative to the tensor's largest.

    A gradient that is rounding alone (of a key's bias, on which attention does not depend) is held to a hundredth of
    the largest of all.
    """
    for name, (total, count) in expected[1].items():
        assert found[1][name][1] == count, name
        assert abs(found[1][name][0] - total) <= TOLERANCE * max(count, 1), name
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(expected[0]))
    assert largest > 0.1
    for (path, here), there in zip(
        jax.tree_util.tree_leaves_with_path(found[0]), jax.tree.leaves(expected[0]), strict=True
    ):
        scale = max(np.abs(there).max(), 1e-2 * largest)
        worst = np.abs(here - there).max() / scale
        assert here.dtype == np.float32 and worst <= TOLERANCE, (sharding.path_name(path), worst)


@pytest.mark.parametrize("shape", MESHES)
def test_training_with_dropout(shape: tuple[int, int, int]) -> None:
    assert_same(step(shape), step(ONE))


def test_dropout_is_there() -> None:
    with pytest.raises(AssertionError):
        assert_same(step(ONE), step(ONE, "vanilla", dropout=0.0))


@pytest.mark.parametrize(("shape", "parts"), [(ONE, 2), ((8, 1, 1), 4), ((2, 4, 1), 4), ((2, 2, 2), 2)])
def test_training_in_parts_that_count_different_numbers(shape: tuple[int, int, int], parts: int) -> None:
    """Dropout too is that of the whole batch."""
    shards = shape[0] * shape[1]
    labelled = (batch()["label"] >= 0).reshape(shards, parts, -1).sum(axis=(0, 2))
    assert len(set(labelled)) > 1
    assert_same(step(shape, "vanilla", accumulation=parts), step(ONE, "vanilla"))


def test_groups_that_share_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of four devices each, as larger meshes have of eight."""
    monkeypatch.setattr(sharding, "UPDATE_GROUP", 4)
    assert_same(step.__wrapped__((8, 1, 1), "monox_kd", accumulation=2), step(ONE))


def test_what_is_computed_again_is_the_same() -> None:
    assert_same(step(ONE, remat=True), step(ONE))


@pytest.mark.parametrize("shape", MESHES)
def test_all_together(shape: tuple[int, int, int]) -> None:
    assert_same(step(shape, "monox_pl", accumulation=4, remat=True), step(ONE, "monox_pl"))


@functools.cache
def evaluated(shape: tuple[int, int, int]) -> np.ndarray:
    """Logits of all examples by the step that labels, evaluates and predicts; full batches and a short one."""
    found, weights = programs(shape), params()
    shards = sharding.data_shards(found.mesh)
    plan = make_plan(16, ROW_LENGTH, pad_id=0, position_offset=0, multiple_of=shards)
    batches = list(eval_batches(dataset(), plan))
    assert len({each["weight"].shape for _, each in batches}) == 2
    return predict(found.eval_step, weights, found.mesh, batches, EXAMPLES, CLASSES)


@pytest.mark.parametrize("shape", MESHES)
def test_labelling_and_evaluation(shape: tuple[int, int, int]) -> None:
    here, there = evaluated(shape), evaluated(ONE)
    np.testing.assert_allclose(here, there, atol=TOLERANCE, rtol=0)
    assert there.std() > 0.1
    known = dataset().labels >= 0
    for metric in METRICS.values():
        found = [metric(confusion_matrix(x.argmax(-1)[known], dataset().labels[known], CLASSES)) for x in (here, there)]
        assert found[0] == found[1]


def test_an_experiment_has_the_results_of_one_device(tmp_path: Path) -> None:
    """Two whole runs, with dropout: on 2×2×2 devices here, and on one of another process."""
    data = tiny.write_task(tmp_path / "data", train=64, other=24)
    checkpoints = tiny.checkpoint(tmp_path / "teacher", seed=1), tiny.checkpoint(tmp_path / "student", seed=2)
    settings = tiny.config_file(tmp_path / "tiny.py", data, *checkpoints)
    # Unpacked, a text is in the same row for any number of devices, so that its dropout is the same.
    flags = [f"--config.{role}.{key}" for role in ("teacher", "student") for key in ("packed=False", "steps=16")]
    flags += ["--config.objectives=('vanilla','monox_kd')", "--config.student.accumulation=2"]

    def arguments(name: str) -> list[str]:
        return ["--config", str(settings), "--workdir", str(tmp_path / name), *flags]

    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XLA_FLAGS": QUICK_COMPILE}
    command = [sys.executable, "-m", "xtransfer.main", *arguments("one")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as other:
        main.main([*arguments("eight"), "--config.mesh.fsdp=2", "--config.mesh.tensor=2"])
    assert other.returncode == 0
    assert (tmp_path / "eight" / "results.jsonl").read_bytes() == (tmp_path / "one" / "results.jsonl").read_bytes()
    one, eight = (next((tmp_path / name / "logits").glob("*/shard-00000.npy")) for name in ("one", "eight"))
    found, expected = np.load(eight, allow_pickle=False), np.load(one, allow_pickle=False)
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
