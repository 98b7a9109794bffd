"""The mesh and the rules, on eight virtual devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from xtransfer import sharding
from xtransfer.errors import UserError

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
    with pytest.raises(UserError, match="mesh 2×2×1 does not fit 8 devices"):
        sharding.make_mesh((2, 2, 1))
