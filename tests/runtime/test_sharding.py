"""The mesh and the rules, on eight virtual devices."""

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
from xtransfer.models.encoder import EncoderConfig
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


def test_by_default_every_device_is_data():
    mesh = sharding.make_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1, "tensor": 1}
    assert sharding.data_shards(mesh) == 8


def test_rules_split_kernels_and_leave_biases():
    found = specs(sharding.make_mesh((2, 2, 2)), PARAMS)
    assert found["encoder"]["embeddings"]["word_embeddings"]["embedding"] == P("tensor", "fsdp")
    assert found["encoder"]["layers"][0]["attention"]["query"]["kernel"] == P("fsdp", "tensor")
    assert found["encoder"]["layers"][0]["attention"]["query"]["bias"] == P()
    assert found["encoder"]["embeddings"]["norm"]["scale"] == P()
    assert found["head"]["kernel"] == P("fsdp", None)


def test_an_axis_that_does_not_divide_is_left_whole():
    odd = {"query": {"kernel": jnp.zeros((5, 4))}}
    assert specs(sharding.make_mesh((2, 2, 2)), {"a": odd})["a"]["query"]["kernel"] == P(None, "tensor")


def test_a_batch_is_split_by_rows_over_data_and_fsdp():
    mesh = sharding.make_mesh((2, 2, 2))
    placed = sharding.place_batch(mesh, {"input_ids": np.arange(16).reshape(8, 2)})["input_ids"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    np.testing.assert_array_equal(placed, np.arange(16).reshape(8, 2))


def test_a_mesh_that_does_not_fit_the_devices():
    with pytest.raises(UserError, match=r"mesh\.data, mesh\.fsdp, mesh\.tensor: 2×2×1 does not fit 8 devices"):
        sharding.make_mesh((2, 2, 1))
    with pytest.raises(UserError, match=r"2×3×1 does not fit 8 devices"):
        sharding.make_mesh((0, 3, 1))
    assert dict(sharding.make_mesh((0, 2, 2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def family(name, **changes):
    """The abstract parameters of a classifier and of the pretraining heads, of an odd vocabulary."""
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "intermediate_size": 128, "max_positions": 40}
    config = EncoderConfig(vocab_size=1003, **sizes, family=name, **changes)
    models = (Classifier(config, 3, rngs=nnx.Rngs(0)), MaskedLM(config, rngs=nnx.Rngs(0)))
    return nnx.eval_shape(lambda: tuple(nnx.state(model, nnx.Param) for model in models))


FAMILY_CHANGES = {"bert": {}, "roberta": {"type_vocab_size": 1}, "distilbert": {"type_vocab_size": 0}}
FAMILY_CHANGES["electra"] = {"embedding_size": 32}


@pytest.mark.parametrize("name", FAMILY_CHANGES)
def test_every_matrix_has_a_rule_of_its_own(name):
    """What has one axis, and the two rows of token types, are whole on purpose; every other matrix has a rule."""
    *rules, (fallback, _) = sharding.RULES
    assert fallback == ""
    for path, leaf in jax.tree_util.tree_leaves_with_path(family(name, **FAMILY_CHANGES[name])):
        path = sharding.path_name(path)
        whole = leaf.ndim == 1 or "token_type" in path
        assert any(re.search(pattern, path) for pattern, _ in rules) != whole, path


@pytest.mark.parametrize("name", FAMILY_CHANGES)
def test_the_kernels_of_a_layer_widen_over_tensor_and_narrow_back(name):
    found = sharding.param_shardings(sharding.make_mesh((2, 2, 2)), family(name, **FAMILY_CHANGES[name])[0])
    found = {sharding.path_name(path): leaf.spec for path, leaf in jax.tree_util.tree_leaves_with_path(found)}
    layer = "encoder.layers.1."
    for part in ("attention.query", "attention.key", "attention.value", "intermediate"):
        assert found[f"{layer}{part}.kernel"] == P("fsdp", "tensor")
    assert found[f"{layer}attention.output.kernel"] == found[f"{layer}output.kernel"] == P("tensor", "fsdp")


@pytest.mark.parametrize("frozen", [(), ("word_embeddings",)])
def test_parameters_take_a_quarter_on_each_of_four_devices_and_moments_half_of_that(frozen):
    mesh, (shapes, _) = sharding.make_mesh((2, 4, 1)), family("bert")
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    tx = optimizer.adamw(1e-3, weight_decay=0.01, clip_norm=1.0, frozen=frozen)
    made = state.create(params, tx, mesh)
    leaves = {sharding.path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    matrices = {name: leaf for name, leaf in leaves.items() if leaf.ndim == 2}
    tiny = [name for name in matrices if "token_type" in name]  # two rows: `fsdp` has no share of them
    vectors = sum(leaf.nbytes for leaf in leaves.values()) - sum(leaf.nbytes for leaf in matrices.values())
    quarters = {name: leaf.nbytes / (1 if name in tiny else 4) for name, leaf in matrices.items()}
    eighths = {name: size / (1 if leaves[name].shape[0] % 2 else 2) for name, size in quarters.items()}
    table = eighths["encoder.embeddings.word_embeddings.embedding"] if frozen else 0
    counters = 4 * sum(leaf.ndim == 0 for leaf in jax.tree.leaves(made.opt_state))
    for tree, expected in (
        (made.params, sum(quarters.values()) + vectors),
        (made.opt_state, 2 * (sum(eighths.values()) - table + vectors) + counters),
    ):
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(tree):
            for shard in leaf.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {expected}


@pytest.mark.parametrize("topology", [(2, 4, 1), (1, 8, 1), (16, 16, 1), (1, 256, 1)])
@pytest.mark.parametrize(("vocabulary", "size"), [(119547, 768), (250002, 1024)])
def test_published_vocabularies_are_split_by_the_hidden_size(topology, vocabulary, size):
    mesh = jax.sharding.AbstractMesh(topology, sharding.AXES)
    table = {"word_embeddings": {"embedding": jax.ShapeDtypeStruct((vocabulary, size), jnp.float32)}}
    found = sharding.param_shardings(mesh, {"encoder": table})["encoder"]["word_embeddings"]["embedding"]
    assert found.shard_shape((vocabulary, size)) == (vocabulary, size // topology[1])


@pytest.mark.parametrize(
    ("topology", "name", "shape", "part"),
    [
        ((8, 1, 1), "layers.0.query.kernel", (768, 768), (96, 768)),
        ((8, 1, 1), "layers.0.output.kernel", (3072, 768), (384, 768)),
        ((2, 2, 2), "layers.0.query.kernel", (768, 768), (192, 384)),
        ((2, 2, 2), "layers.0.output.kernel", (3072, 768), (768, 384)),
        ((256, 1, 1), "layers.0.query.kernel", (768, 768), (96, 768)),  # groups of eight
        ((12, 1, 1), "layers.0.query.kernel", (768, 768), (192, 768)),  # of four
        ((8, 1, 1), "layers.0.query.bias", (768,), (768,)),  # a vector costs more to gather than to update
        ((8, 1, 1), "word_embeddings.embedding", (119547, 768), (119547, 768)),  # 8 does not divide its rows
        ((2, 4, 1), "word_embeddings.embedding", (119547, 768), (119547, 192)),
        ((8, 1, 1), "head.kernel", (768, 2), (96, 2)),
        ((5, 1, 1), "layers.0.query.kernel", (768, 768), (768, 768)),
        ((1, 8, 1), "layers.0.query.kernel", (768, 768), (96, 768)),
    ],
)
def test_matrices_are_updated_in_parts_of_their_rows(topology, name, shape, part):
    mesh = jax.sharding.AbstractMesh(topology, sharding.AXES)
    tree = jax.ShapeDtypeStruct(shape, jnp.float32)
    for key in reversed(name.split(".")):
        tree = {key: tree}
    (found,) = jax.tree.leaves(sharding.update_shardings(mesh, {"encoder": tree}))
    assert found.shard_shape(shape) == part


def test_constrain_is_about_the_mesh_that_is_traced_for():
    mesh, x = sharding.make_mesh((2, 4, 1)), jnp.ones((8, 3, 8))

    @functools.partial(jax.jit, in_shardings=sharding.batch_sharding(mesh))
    def laid_out(x):
        with sharding.on_mesh(mesh):
            return sharding.constrain(x, sharding.LOOKUP_PARTS), sharding.constrain(x, sharding.BATCH_SPEC)

    parts, rows = laid_out(x)
    assert {shard.data.shape for shard in parts.addressable_shards} == {(4, 3, 2)}
    assert {shard.data.shape for shard in rows.addressable_shards} == {(1, 3, 8)}
    assert sharding.constrain(x, sharding.BATCH_SPEC) is x  # no mesh, no layout


class Elsewhere:
    """A device of another process, of which only that is known."""

    def __init__(self, process_index):
        self.process_index = process_index


def mesh_of(processes):
    """A mesh [data, fsdp, tensor] of devices of these processes."""
    devices = np.vectorize(Elsewhere, otypes=[object])(np.array(processes))
    return SimpleNamespace(devices=devices, shape=dict(zip(sharding.AXES, devices.shape, strict=True)))


@pytest.mark.parametrize(
    ("processes", "me", "part"),
    [
        ([[[0]], [[0]], [[1]], [[1]]], 0, (0, 2)),  # data over two processes
        ([[[0]], [[0]], [[1]], [[1]]], 1, (1, 2)),
        ([[[0], [1], [2], [3]]], 2, (2, 4)),  # fsdp over four
        ([[[0], [0]], [[1], [1]]], 1, (1, 2)),  # fsdp within a process
        ([[[0, 1]], [[2, 3]]], 0, (0, 2)),  # processes along tensor have the same rows
        ([[[0, 1]], [[2, 3]]], 3, (1, 2)),
        ([[[0, 1, 2, 3]]], 2, (0, 1)),  # all of them
        ([[[0]], [[1]], [[0]], [[1]]], 0, (0, 1)),  # no run: each makes the whole batch
        ([[[1]], [[0]], [[0]], [[1]]], 0, (0, 1)),
        ([[[0]], [[1]], [[1]], [[1]]], 0, (0, 1)),  # no equal runs
        ([[[0]], [[1]], [[1]], [[1]]], 1, (0, 1)),
        ([[[1]], [[1]], [[0]], [[0]]], 1, (0, 2)),  # in any order
    ],
)
def test_the_rows_that_a_process_makes(monkeypatch, processes, me, part):
    monkeypatch.setattr(jax, "process_index", lambda: me)
    assert sharding.process_slice(mesh_of(processes)) == part


def test_one_process_makes_the_whole_batch():
    assert sharding.process_slice(sharding.make_mesh()) == (0, 1)
    assert sharding.process_slice(sharding.make_mesh((2, 2, 2))) == (0, 1)


def test_an_array_in_parts_comes_to_the_host_whole():
    mesh, values = sharding.make_mesh((1, 4, 2)), np.arange(32, dtype=np.float32).reshape(8, 4)
    split = jax.device_put(values, jax.NamedSharding(mesh, P("fsdp", "tensor")))
    np.testing.assert_array_equal(sharding.on_host(split), values)
    np.testing.assert_array_equal(sharding.on_host(values), values)


def test_another_platform_than_was_asked_for():
    sharding.check_platform("")
    sharding.check_platform("cpu")
    message = "config key platform is 'tpu', but JAX finds only cpu devices: install JAX's package for tpu"
    with pytest.raises(UserError, match=message):
        sharding.check_platform("tpu")


@pytest.mark.parametrize("raised", [RuntimeError("Unable to initialize backend 'tpu': none"), AssertionError()])
def test_devices_that_jax_does_not_find(monkeypatch, raised):
    def fail():
        raise raised

    monkeypatch.setattr(jax, "default_backend", fail)
    with pytest.raises(UserError, match="finds no device of a kind that JAX_PLATFORMS names: (Unable|no such)"):
        sharding.check_platform("")
