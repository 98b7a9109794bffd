"""DeBERTa's distances: buckets by hand and against the reference, and the shift that replaces a gather."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from xtransfer.models.architectures.deberta import DebertaConfig, DebertaEncoder, buckets_of, shifted


def test_buckets_by_hand() -> None:
    """Up to half of 8 buckets, each distance is its own; 5 … 9 share a logarithmic scale that ends at 10 − 1."""
    # ceil(ln(d / 4) / ln(9 / 4) · 3) + 4 for d = 5 … 9: 0.83, 1.5, 2.07, 2.56, 3
    right = [0, 1, 2, 3, 4, 5, 6, 7, 7, 7]
    expected = [-bucket for bucket in right[:0:-1]] + right
    assert buckets_of(10, 8, 10).tolist() == expected


def test_without_buckets_every_distance_is_its_own() -> None:
    assert buckets_of(4, 0, 512).tolist() == [-3, -2, -1, 0, 1, 2, 3]


@pytest.mark.parametrize(("buckets", "max_distance"), [(256, 512), (32, 128), (6, 24), (0, 64)])
def test_buckets_equal_those_of_transformers(buckets: int, max_distance: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.deberta_v2.modeling_deberta_v2 import build_relative_position

    length = 700
    table = build_relative_position(torch.zeros(1, length, 2), torch.zeros(1, length, 2), buckets or -1, max_distance)
    table = table[0].numpy()  # [query, key]
    ours = buckets_of(length, buckets, max_distance)
    np.testing.assert_array_equal(ours, np.concatenate([table[0, :0:-1], table[:, 0]]))


def test_attention_without_distances_has_a_gradient() -> None:
    """Without c2p and p2c there are no relative scores, so the table of distances has no gradient."""
    sizes = {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 8, "max_positions": 8}
    encoder = DebertaEncoder(DebertaConfig(vocab_size=9, **sizes, score_terms=()), rngs=nnx.Rngs(0))
    ids, segments = jnp.arange(5)[None], jnp.ones((1, 5), jnp.int32)
    gradient = nnx.grad(lambda model: jnp.sum(model(ids, ids, ids, segments) ** 3))(encoder)
    assert not gradient.relative_embeddings.embedding[...].any()
    assert gradient.layers[0].attention.query.kernel[...].any()


@pytest.mark.parametrize("length", [1, 2, 5])
def test_shift_takes_the_same_entries_as_a_gather(length: int) -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, length, 2 * length - 1)).astype(np.float32)
    i, j = np.indices((length, length))
    np.testing.assert_array_equal(shifted(jnp.asarray(x)), x[..., i, length - 1 - i + j])
