"""Tables with additional rows: devices share their update, and nothing that is scored or saved changes."""

import gc
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xtransfer.config import LoraConfig, ModelConfig
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.runtime.sharding import AXES, make_mesh, path_name, place_batch
from xtransfer.train import loop
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.divisible_tables import laid_out_like, with_divisible_tables
from xtransfer.train.saving import WHOLE

WORDS = "encoder.embeddings.word_embeddings.embedding"
VOCABULARY = 37
RATE = np.float32(1e-2)
BERT = EncoderConfig(
    vocab_size=VOCABULARY, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32, max_positions=16
)


def by_name(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("mesh", "shape", "extended"),
    [
        ((8, 1, 1), (119547, 768), (119552, 768)),  # 64 · 1868
        ((256, 1, 1), (119547, 768), (119552, 768)),  # groups of eight
        ((4, 1, 1), (250037, 384), (250048, 384)),  # 32 · 7814
        ((2, 4, 1), (119547, 768), (119552, 768)),  # 16 · 7472
        ((2, 1, 2), (250002, 1024), (250016, 1024)),  # rows are also split over `tensor`: 32 · 7813
        ((8, 1, 1), (119544, 768), (119544, 768)),  # 8 divides it
        ((1, 8, 1), (119547, 768), (119547, 768)),  # only `data` shares updates
        ((1, 1, 1), (119547, 768), (119547, 768)),
        ((8, 1, 1), (2, 768), (2, 768)),  # token types
    ],
)
def test_rows_that_devices_can_share(mesh: Any, shape: Any, extended: Any) -> None:
    abstract = {WORDS: jax.ShapeDtypeStruct(shape, jnp.float32), "head.kernel": jax.ShapeDtypeStruct((37, 3), "f4")}
    result = with_divisible_tables(abstract, jax.sharding.AbstractMesh(mesh, AXES), {WORDS, "head.kernel"})
    assert result == abstract | {WORDS: jax.ShapeDtypeStruct(extended, jnp.float32)}
    assert with_divisible_tables(abstract, jax.sharding.AbstractMesh(mesh, AXES), {"head.kernel"}) == abstract


def test_rows_are_added_as_zeros_and_cut_again() -> None:
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    two, three = (jax.ShapeDtypeStruct((rows, 2), jnp.float32, sharding=sharding) for rows in (2, 3))
    tree = {"table": jnp.float32([[1, 2], [3, 4]]), "other": jnp.ones((2, 2))}
    longer = laid_out_like({"table": three, "other": two})(tree)
    assert longer["table"].tolist() == [[1, 2], [3, 4], [0, 0]] and longer["other"] is tree["other"]
    assert laid_out_like({"table": two, "other": two})(longer)["table"].tolist() == tree["table"].tolist()


def compiled_steps(devices: int, vocabulary: int = VOCABULARY, **settings: Any) -> CompiledSteps:
    mesh = make_mesh((devices, 1, 1), jax.devices()[:devices])
    architecture = replace(BERT, vocab_size=vocabulary)
    return CompiledSteps(ModelConfig(**settings), architecture, 3, mesh)


def batch_of(vocabulary: int) -> dict[str, np.ndarray]:
    """Return 16 unpacked rows of 12 random tokens."""
    random = np.random.default_rng(0)
    ids = random.integers(0, vocabulary, (16, 12)).astype(np.int32)
    zeros, ones = np.zeros_like(ids), np.ones((16, 1), np.float32)
    batch = {"input_ids": ids, "segment_ids": zeros + 1, "position_ids": zeros, "token_type_ids": zeros}
    batch |= {"cls_index": zeros[:, :1], "label": zeros[:, :1], "weight": ones}
    return batch | {"teacher_logits": random.standard_normal((16, 1, 3)).astype(np.float32)}


def test_distances_get_no_rows_because_dropout_masks_depend_on_their_number() -> None:
    sizes = {name: getattr(BERT, name) for name in ("vocab_size", "num_layers", "num_heads", "intermediate_size")}
    config = ARCHITECTURES["deberta"].config_class(
        **sizes, hidden_size=16, max_positions=16, buckets=11, architecture="deberta"
    )
    compiled = CompiledSteps(ModelConfig(), config, 3, make_mesh((8, 1, 1), jax.devices()[:8]))
    shapes = {name: leaf.shape for name, leaf in by_name(compiled.abstract_state.params).items()}
    assert shapes["encoder.relative_embeddings.embedding"] == (22, 16)
    assert shapes[WORDS] == (64, 16)


def initial_params(vocabulary: int = VOCABULARY) -> Any:
    return nnx.state(Classifier(replace(BERT, vocab_size=vocabulary), 3, rngs=nnx.Rngs(0)), nnx.Param)


def after_two_steps(compiled: CompiledSteps, vocabulary: int = VOCABULARY) -> tuple[Any, Any]:
    """Return the state after two steps, and what is saved of it."""
    state, step = compiled.initial_state(initial_params(vocabulary), 0), compiled.train_step(OBJECTIVES["monox_kd"])
    for _ in range(2):
        state, _ = step(state, place_batch(compiled.mesh, batch_of(vocabulary)), jax.random.key(1), RATE)
    return state, compiled.saving(dict, 0).saved(state)


@pytest.mark.parametrize(
    ("vocabulary", "extended", "settings"), [(37, 64, {}), (37, 64, {"ema_decay": 0.5}), (501, 512, {})]
)
def test_eight_devices_train_and_save_like_one(vocabulary: int, extended: int, settings: dict[str, Any]) -> None:
    one, eight = (compiled_steps(devices, vocabulary, **settings) for devices in (1, 8))
    (_, expected), (state, saved) = after_two_steps(one, vocabulary), after_two_steps(eight, vocabulary)
    table = by_name(state.params)[WORDS]
    assert table.shape == (extended, 16) and (np.asarray(table)[vocabulary:] == 0).all()
    moments = [leaf for name, leaf in by_name(state.opt_state).items() if name.endswith(WORDS)]
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in (table, *moments)]
    assert shards == [(extended // 8, 16)] * 3
    assert by_name(saved.params)[WORDS].sharding.is_fully_replicated
    assert jax.tree.structure(saved) == jax.tree.structure(expected)
    for (name, actual), wanted in zip(by_name(saved).items(), jax.tree.leaves(expected), strict=True):
        assert actual.shape == wanted.shape, name
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    ("vocabulary", "table", "exchanged"), [(37, "f32[64,16]", "table"), (5003, "f32[5056,16]", "rows")]
)
def test_gradient_crosses_devices_as_the_smaller_of_table_and_rows(vocabulary: int, table: str, exchanged: str) -> None:
    """The batch has 192 tokens: more than the table of 64 rows, fewer than the one of 5,056."""
    compiled = compiled_steps(8, vocabulary)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch_of(vocabulary))
    step = compiled.train_step(OBJECTIVES["monox_kd"])
    program = step.lower(*compiled.training_arguments(shapes)).compile().as_text()
    results: dict[str, set[str]] = {"table": set(), "rows": set()}
    for result, kind in re.findall(r"= (.*) (all-reduce|all-gather|reduce-scatter|all-to-all)(?:-start)?\(", program):
        results["rows" if kind == "all-gather" else "table"] |= set(re.findall(r"f32\[[\d,]*\]", result))
    by_table, by_rows = table in results["table"], "f32[16,12,16]" in results["rows"]
    assert (by_table, by_rows) == (exchanged == "table", exchanged == "rows")


@pytest.mark.parametrize("settings", [{}, {"ema_decay": 0.5}], ids=["plain", "average"])
def test_saved_state_restores_bit_for_bit(settings: dict[str, Any]) -> None:
    compiled = compiled_steps(8, **settings)
    state, saved = after_two_steps(compiled)
    saving = compiled.saving(dict, 0)
    restored = saving.restored(saved)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for actual, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert actual.sharding.is_equivalent_to(wanted.sharding, wanted.ndim)
        np.testing.assert_array_equal(actual, wanted)
    abstract = saving.abstract(compiled.abstract_state)
    assert [leaf.shape for leaf in jax.tree.leaves(abstract)] == [leaf.shape for leaf in jax.tree.leaves(saved)]


@pytest.mark.parametrize(("devices", "settings"), [(1, {}), (8, {"frozen": ("word_embeddings",)})])
def test_tables_that_are_not_shared_get_no_rows(devices: int, settings: dict[str, Any]) -> None:
    compiled = compiled_steps(devices, **settings)
    assert by_name(compiled.abstract_state.params)[WORDS].shape == (VOCABULARY, 16)


@pytest.mark.parametrize("settings", [{}, {"frozen": ("word_embeddings",)}], ids=["trained", "frozen table"])
def test_only_a_state_in_shards_is_changed_to_be_saved(settings: dict[str, Any]) -> None:
    assert compiled_steps(1, **settings).saving(dict, 0) is WHOLE
    assert compiled_steps(8, **settings).saving(dict, 0) is not WHOLE


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema_decay": 0.5}, {"lora": LoraConfig(rank=2), "ema_decay": 0.5}],
    ids=["plain", "average", "LoRA"],
)
def test_only_the_first_save_of_a_run_compiles(settings: dict[str, Any]) -> None:
    compiled = compiled_steps(8, **settings)
    state, saving = compiled.initial_state(initial_params(), 0), compiled.saving(dict, 0)
    events: list[str] = []

    def note(name: str, seconds: float, **details: Any) -> None:
        events.append(name)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        counts = []
        for _ in range(2):
            saving.saved(state)
            counts.append(sum(name.startswith("/jax/core/compile/") for name in events))
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(
    ("settings", "average_last"),
    [({}, 0), ({}, 3), ({"ema_decay": 0.5}, 0)],
    ids=["plain", "mean of checkpoints", "average"],
)
def test_what_is_saved_takes_no_memory_in_later_steps(
    settings: dict[str, Any], average_last: int, tmp_path: Path
) -> None:
    """Checkpoints are at 3, 6, and 9. Only the mean of checkpoints, which begins with the first, stays."""
    compiled = compiled_steps(8, **settings)
    saving, step = compiled.saving(dict, 0), compiled.train_step(OBJECTIVES["monox_kd"])
    weights = jax.tree.leaves(saving.abstract(compiled.abstract_state).params)
    matrices = [leaf for leaf in weights if leaf.ndim == 2 and leaf.shape[0] % 8 == 0]
    shapes, sizes = {leaf.shape for leaf in matrices} | {(VOCABULARY, 16)}, []

    def measured_step(*arguments: Any) -> Any:
        live = [x for x in jax.live_arrays() if x.shape in shapes and len(x.sharding.device_set) == 8]
        sizes.append(sum(x.nbytes for x in live if x.is_fully_replicated))
        return step(*arguments)

    start = loop.Start(lambda: compiled.initial_state(initial_params(), 0), compiled.abstract_state, saving)
    plan = loop.Plan("test", steps=9, evaluations=3, seed=0, average_last=average_last)
    rates = np.full(plan.steps, RATE)
    gc.collect()
    loop.fit(tmp_path, plan, start, measured_step, rates, lambda i: batch_of(VOCABULARY), None, compiled.mesh)
    mean = sum(leaf.size * 4 for leaf in weights if leaf.shape in shapes) if average_last else 0
    assert sizes == [sizes[0]] * 3 + [sizes[0] + mean] * 6
