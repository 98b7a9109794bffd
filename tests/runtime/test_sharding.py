"""The mesh and the sharding rules, on eight virtual devices."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from xtransfer.errors import UserError
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.heads import Classifier, MaskedLM
from xtransfer.runtime import sharding
from xtransfer.train import optimizer, state

PARAMS = {
    "encoder": {
        "embeddings": {"word_embeddings": {"embedding": jnp.zeros((8, 4))}, "norm": {"scale": jnp.zeros(4)}},
        "layers": {0: {"attention": {"query": {"kernel": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}}}},
    },
    "head": {"kernel": jnp.zeros((4, 3)), "bias": jnp.zeros(3)},
}


def specs(mesh, tree):
    return jax.tree.map(lambda s: s.spec, sharding.param_shardings(mesh, tree))


def test_default_mesh_has_every_device_on_the_data_axis():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.data_shards(mesh) == 8


def test_rules_shard_kernels_and_replicate_biases():
    layout = specs(sharding.make_mesh((2, 2, 2)), PARAMS)
    assert layout["encoder"]["embeddings"]["word_embeddings"]["embedding"] == P("tensor", "fsdp")
    assert layout["encoder"]["layers"][0]["attention"]["query"]["kernel"] == P("fsdp", "tensor")
    assert layout["encoder"]["layers"][0]["attention"]["query"]["bias"] == P()
    assert layout["encoder"]["embeddings"]["norm"]["scale"] == P()
    assert layout["head"]["kernel"] == P("fsdp", None)


def test_axis_that_does_not_divide_is_not_sharded():
    odd = {"query": {"kernel": jnp.zeros((5, 4))}}
    assert specs(sharding.make_mesh((2, 2, 2)), {"a": odd})["a"]["query"]["kernel"] == P(None, "tensor")


def test_batch_is_sharded_by_rows_over_data_and_fsdp():
    mesh = sharding.make_mesh((2, 2, 2))
    placed = sharding.place_batch(mesh, {"input_ids": np.arange(16).reshape(8, 2)})["input_ids"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed, np.arange(16).reshape(8, 2))


def test_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match=r"mesh\.data, mesh\.fsdp, mesh\.tensor: 2×2×1 does not fit 8 devices"):
        sharding.make_mesh((2, 2, 1))
    with pytest.raises(UserError, match=r"2×3×1 does not fit 8 devices"):
        sharding.make_mesh((0, 3, 1))
    assert dict(sharding.make_mesh((0, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def abstract_params(name, **changes):
    """Return the abstract parameters of a classifier and of the pretraining model, with an odd vocabulary size."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "max_positions": 40}
    cls = ARCHITECTURES[changes.get("architecture", "bert")].config_class
    config = cls(vocab_size=1003, **sizes, family=name, **changes)
    models = (Classifier(config, 3, rngs=nnx.Rngs(0)), MaskedLM(config, rngs=nnx.Rngs(0), with_next_sentence=True))
    return nnx.eval_shape(lambda: tuple(nnx.state(model, nnx.Param) for model in models))


FAMILY_CHANGES = {"bert": {}, "roberta": {"type_vocab_size": 1}, "distilbert": {"type_vocab_size": 0}}
FAMILY_CHANGES["electra"] = {"embedding_size": 32}
FAMILY_CHANGES["modernbert"] = {"architecture": "modernbert", "layer_types": ("full_attention",) * 2}
FAMILY_CHANGES["deberta-v2"] = {"architecture": "deberta", "convolution_size": 3, "embedding_size": 32}
FAMILY_CHANGES["eurobert"] = {"architecture": "eurobert", "kv_heads": 2}
FAMILY_CHANGES["gte"] = {"architecture": "gte"}
FAMILY_CHANGES["xlm-roberta-xl"] = {"architecture": "xlm_roberta_xl"}


@pytest.mark.parametrize("name", FAMILY_CHANGES)
def test_every_matrix_has_a_rule(name):
    """Vectors and the two rows of token types are replicated on purpose; every other matrix has a rule."""
    *rules, (fallback, _) = sharding.RULES
    assert fallback == ""
    for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(name, **FAMILY_CHANGES[name])):
        leaf_name = sharding.path_name(path)
        replicated = leaf.ndim == 1 or "token_type" in leaf_name
        assert any(re.search(pattern, leaf_name) for pattern, _ in rules) != replicated, leaf_name


@pytest.mark.parametrize("name", FAMILY_CHANGES)
def test_kernels_of_a_layer_widen_over_tensor_and_narrow_back(name):
    shardings = sharding.param_shardings(
        sharding.make_mesh((2, 2, 2)), abstract_params(name, **FAMILY_CHANGES[name])[0]
    )
    layout = {sharding.path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(shardings)}
    layer = "encoder.layers.1."
    gated = f"{layer}feed_forward.gate.kernel" in layout
    widening = ("feed_forward.gate", "feed_forward.up") if gated else ("intermediate",)
    for part in ("attention.query", "attention.key", "attention.value", *widening):
        assert layout[f"{layer}{part}.kernel"] == P("fsdp", "tensor")
    for part in ("attention.output", "feed_forward.output" if gated else "output"):
        assert layout[f"{layer}{part}.kernel"] == P("tensor", "fsdp")


@pytest.mark.parametrize("frozen", [(), ("word_embeddings",)])
def test_each_device_has_a_quarter_of_the_parameters_and_an_eighth_of_the_moments(frozen):
    mesh, (shapes, _) = sharding.make_mesh((2, 4, 1)), abstract_params("bert")
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    tx = optimizer.adamw(weight_decay=0.01, clip_norm=1.0, frozen=frozen)
    train_state = state.create(params, tx, mesh)
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    matrices = {name: leaf for name, leaf in leaves.items() if leaf.ndim == 2}
    unsplit = [name for name in matrices if "token_type" in name]  # `fsdp` does not shard its two rows
    vectors = sum(leaf.nbytes for leaf in leaves.values()) - sum(leaf.nbytes for leaf in matrices.values())
    quarters = {name: leaf.nbytes / (1 if name in unsplit else 4) for name, leaf in matrices.items()}
    eighths = {name: size / (1 if leaves[name].shape[0] % 2 else 2) for name, size in quarters.items()}
    table = eighths["encoder.embeddings.word_embeddings.embedding"] if frozen else 0
    counters = 4 * sum(leaf.ndim == 0 for leaf in jax.tree.leaves(train_state.opt_state))
    for tree, expected in (
        (train_state.params, sum(quarters.values()) + vectors),
        (train_state.opt_state, 2 * (sum(eighths.values()) - table + vectors) + counters),
    ):
        device_bytes = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                device_bytes[shard.device] += shard.data.nbytes
        assert set(device_bytes.values()) == {expected}


@pytest.mark.parametrize("topology", [(2, 4, 1), (1, 8, 1), (16, 16, 1), (1, 256, 1)])
@pytest.mark.parametrize(("vocabulary", "size"), [(119547, 768), (250002, 1024)])
def test_published_vocabularies_are_sharded_along_the_hidden_size(topology, vocabulary, size):
    mesh = jax.sharding.AbstractMesh(topology, sharding.AXES)
    table = {"word_embeddings": {"embedding": jax.ShapeDtypeStruct((vocabulary, size), jnp.float32)}}
    layout = sharding.param_shardings(mesh, {"encoder": table})["encoder"]["word_embeddings"]["embedding"]
    assert layout.shard_shape((vocabulary, size)) == (vocabulary, size // topology[1])


@pytest.mark.parametrize(
    ("topology", "name", "shape", "shard_shape"),
    [
        ((8, 1, 1), "layers.0.query.kernel", (768, 768), (96, 768)),
        ((8, 1, 1), "layers.0.output.kernel", (3072, 768), (384, 768)),
        ((2, 2, 2), "layers.0.query.kernel", (768, 768), (192, 384)),
        ((2, 2, 2), "layers.0.output.kernel", (3072, 768), (768, 384)),
        ((256, 1, 1), "layers.0.query.kernel", (768, 768), (96, 768)),  # groups of eight
        ((12, 1, 1), "layers.0.query.kernel", (768, 768), (192, 768)),  # groups of four
        ((8, 1, 1), "layers.0.query.bias", (768,), (768,)),  # a vector costs more to gather than to update
        ((8, 1, 1), "word_embeddings.embedding", (119547, 768), (119547, 768)),  # 8 does not divide its rows
        ((2, 4, 1), "word_embeddings.embedding", (119547, 768), (119547, 192)),
        ((8, 1, 1), "head.kernel", (768, 2), (96, 2)),
        ((5, 1, 1), "layers.0.query.kernel", (768, 768), (768, 768)),
        ((1, 8, 1), "layers.0.query.kernel", (768, 768), (96, 768)),
    ],
)
def test_matrix_updates_are_sharded_by_rows(topology, name, shape, shard_shape):
    mesh = jax.sharding.AbstractMesh(topology, sharding.AXES)
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(name.split(".")):
        tree = {key: tree}
    (layout,) = jax.tree.leaves(sharding.update_shardings(mesh, {"encoder": tree}))
    assert layout.shard_shape(shape) == shard_shape


def test_constrain_uses_the_mesh_of_the_trace():
    mesh, x = sharding.make_mesh((2, 4, 1)), jnp.ones((8, 3, 8))

    @functools.partial(jax.jit, in_shardings=sharding.batch_sharding(mesh))
    def laid_out(x):
        with sharding.on_mesh(mesh):
            return sharding.constrain(x, sharding.LOOKUP_COLUMNS), sharding.constrain(x, sharding.BATCH_SPEC)

    parts, rows = laid_out(x)
    assert {shard.data.shape for shard in parts.addressable_shards} == {(4, 3, 2)}
    assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 3, 8)}
    assert sharding.constrain(x, sharding.BATCH_SPEC) is x  # no mesh, no layout


class FakeDevice:
    """A device that has only the index of its process."""

    def __init__(self, process_index):
        self.process_index = process_index


def mesh_of(processes):
    """Return a mesh [data, fsdp, tensor] whose devices belong to these processes."""
    devices = np.vectorize(FakeDevice, otypes=[object])(np.array(processes))
    return SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, devices.shape, strict=True)))


@pytest.mark.parametrize(
    ("processes", "me", "expected"),
    [
        ([[[0]], [[0]], [[1]], [[1]]], 0, (0, 2)),  # data over two processes
        ([[[0]], [[0]], [[1]], [[1]]], 1, (1, 2)),
        ([[[0], [1], [2], [3]]], 2, (2, 4)),  # fsdp over four
        ([[[0], [0]], [[1], [1]]], 1, (1, 2)),  # fsdp within a process
        ([[[0, 1]], [[2, 3]]], 0, (0, 2)),  # processes along tensor have the same rows
        ([[[0, 1]], [[2, 3]]], 3, (1, 2)),
        ([[[0, 1, 2, 3]]], 2, (0, 1)),  # every process has all rows
        ([[[0]], [[1]], [[0]], [[1]]], 0, (0, 1)),  # rows that are not consecutive: each builds the whole batch
        ([[[1]], [[0]], [[0]], [[1]]], 0, (0, 1)),
        ([[[0]], [[1]], [[1]], [[1]]], 0, (0, 1)),  # shares of different sizes
        ([[[0]], [[1]], [[1]], [[1]]], 1, (0, 1)),
        ([[[1]], [[1]], [[0]], [[0]]], 1, (0, 2)),  # in any order
    ],
)
def test_process_slice_gives_the_rows_that_a_process_builds(monkeypatch, processes, me, expected):
    monkeypatch.setattr(jax, "process_index", lambda: me)
    assert sharding.process_slice(mesh_of(processes)) == expected


def test_single_process_builds_the_whole_batch():
    assert sharding.process_slice(sharding.make_mesh()) == (0, 1)
    assert sharding.process_slice(sharding.make_mesh((2, 2, 2))) == (0, 1)


def test_on_host_gathers_a_sharded_array():
    mesh, values = sharding.make_mesh((1, 4, 2)), np.arange(32, dtype=np.float32).reshape(8, 4)
    sharded = jax.device_put(values, jax.NamedSharding(mesh, P("fsdp", "tensor")))
    np.testing.assert_array_equal(sharding.on_host(sharded), values)
    np.testing.assert_array_equal(sharding.on_host(values), values)


def test_other_platform_than_requested_is_refused():
    sharding.check_platform("")
    sharding.check_platform("cpu")
    message = "config key platform is 'tpu', but JAX finds only cpu devices: install JAX's package for tpu"
    with pytest.raises(UserError, match=message):
        sharding.check_platform("tpu")


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend 'tpu': none"), AssertionError()])
def test_missing_devices_are_an_error(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(UserError, match="finds no device of a kind that JAX_PLATFORMS names: (Unable|no such)"):
        sharding.check_platform("")
