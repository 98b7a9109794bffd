"""The encoder: segments, packing, pooling, dropout, and dtypes. `hf/families/` has the comparison with PyTorch."""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.helpers.jaxprs import equations, float_types
from xtransfer.models import attention, dropout, heads
from xtransfer.models.architectures.bert import BertEncoder
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier, MaskedLM
from xtransfer.models.visibility import Visibility

CONFIG = EncoderConfig(
    vocab_size=50,
    hidden_size=24,
    num_layers=2,
    num_heads=3,
    intermediate_size=40,
    max_positions=16,
    hidden_dropout=0.0,
    attention_dropout=0.0,
)
LENGTHS = (5, 3, 7, 1)
ROW = 16


def build(make: Callable[[], Any], seed: int = 0) -> tuple[Any, nnx.State]:
    """Return (graphdef, params) with random parameters: with BERT's initial values, logits hardly depend on inputs."""
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    rng = np.random.default_rng(seed)

    def draw(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        centre = 1.0 if "'scale'" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(centre + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, abstract)


def classifier(config: EncoderConfig = CONFIG, **options: Any) -> tuple[Any, nnx.State]:
    return build(lambda: Classifier(config, 3, rngs=nnx.Rngs(0), **options))


@cache
def forward(graphdef: Any) -> Callable[..., Any]:
    """Return the model as a compiled function of (params, batch, key)."""
    return jax.jit(lambda params, batch, key=None: nnx.merge(graphdef, params)(batch, dropout_key=key))


def examples(seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, CONFIG.vocab_size, length) for length in LENGTHS]


def make_batch(rows: list[list[int]], slots: int, texts: list[np.ndarray]) -> dict[str, jax.Array]:
    """Return a batch with the examples `rows[r]` in row r; an empty list gives a row of padding."""
    batch = {name: np.zeros((len(rows), ROW), np.int32) for name in ("input_ids", "segment_ids", "position_ids")}
    batch["token_type_ids"] = np.zeros((len(rows), ROW), np.int32)
    batch["cls_index"] = np.zeros((len(rows), slots), np.int32)
    for row, indices in enumerate(rows):
        start = 0
        for slot, index in enumerate(indices):
            end = start + len(texts[index])
            batch["input_ids"][row, start:end] = texts[index]
            batch["segment_ids"][row, start:end] = slot + 1
            batch["position_ids"][row, start:end] = np.arange(end - start)
            batch["token_type_ids"][row, (start + end) // 2 : end] = 1
            batch["cls_index"][row, slot] = start
            start = end
    return {name: jnp.asarray(value) for name, value in batch.items()}


PACKED = [[0, 1, 2], [3], []]
PADDED = [[0], [1], [2], [3]]


@pytest.mark.parametrize("pooling", heads.POOLINGS)
def test_packed_and_padded_examples_have_equal_logits_and_gradients(pooling: str) -> None:
    """The packed batch also has empty slots and an empty row, whose logits must be finite."""
    graphdef, params = classifier(pooling=pooling)
    target = jnp.arange(12.0).reshape(4, 3) / 10

    def loss(params: nnx.State, batch: dict[str, jax.Array], packed: bool) -> tuple[jax.Array, Any]:
        all_logits = nnx.merge(graphdef, params)(batch)
        logits = jnp.concatenate([all_logits[0], all_logits[1, :1]]) if packed else all_logits[:, 0]
        return jnp.sum((logits - target) ** 2), (logits, all_logits)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=2)
    (_, (packed, all_logits)), packed_grads = step(params, make_batch(PACKED, 3, examples()), True)
    (_, (padded, _)), padded_grads = step(params, make_batch(PADDED, 1, examples()), False)
    assert all_logits.shape == (3, 3, 3) and np.isfinite(all_logits).all()
    assert float(jnp.std(padded[:, 0])) > 0.05
    np.testing.assert_allclose(packed, padded, atol=1e-5)
    for packed_grad, padded_grad in zip(jax.tree.leaves(packed_grads), jax.tree.leaves(padded_grads), strict=True):
        assert np.isfinite(packed_grad).all()
        np.testing.assert_allclose(packed_grad, padded_grad, atol=1e-5 * max(1.0, np.abs(padded_grad).max()))


def test_tokens_do_not_attend_to_other_segments_or_padding() -> None:
    graphdef, params = build(lambda: BertEncoder(CONFIG, rngs=nnx.Rngs(0)))
    batch = make_batch([[0, 1]], 2, examples())

    @jax.jit
    def hidden(ids: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, params)
        return model(ids, batch["token_type_ids"], batch["position_ids"], batch["segment_ids"])[0]

    before = hidden(batch["input_ids"])
    after = hidden(batch["input_ids"].at[0, 5:].set(7))  # change the second example and the padding
    np.testing.assert_array_equal(before[:5], after[:5])
    assert float(jnp.abs(before[5:8] - after[5:8]).max()) > 1e-2


def test_hidden_states_are_the_embeddings_and_the_output_of_each_layer() -> None:
    graphdef, params = build(lambda: BertEncoder(CONFIG, rngs=nnx.Rngs(0)))
    batch = make_batch([[0, 1]], 2, examples())
    inputs = [batch[name] for name in ("input_ids", "token_type_ids", "position_ids", "segment_ids")]

    @jax.jit
    def run(params: nnx.State) -> tuple[list[jax.Array], list[jax.Array]]:
        model = nnx.merge(graphdef, params)
        same = inputs[3][:, None, :, None] == inputs[3][:, None, None, :]
        seen = Visibility(inputs[3], None, jnp.where(same, 0.0, -jnp.inf))
        steps = [model.embeddings(*inputs[:3], None)]
        for layer in model.layers:
            steps.append(layer(steps[-1], seen, None))
        return model.hidden_states(*inputs), [*steps, model(*inputs)]

    states, steps = run(params)
    assert len(states) == CONFIG.num_layers + 1
    for state, step in zip([*states, states[-1]], steps, strict=True):
        np.testing.assert_allclose(state, step, atol=1e-5)
    assert np.abs(states[0] - states[1]).max() > 0.1 < np.abs(states[1] - states[2]).max()


def test_embeddings_are_projected_and_may_lack_token_types() -> None:
    """Computed by hand: word + position, LayerNorm at the embedding size, then the projection."""
    config = dataclasses.replace(CONFIG, embedding_size=10, type_vocab_size=0)
    graphdef, params = build(lambda: BertEncoder(config, rngs=nnx.Rngs(0)))
    table = {".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params["embeddings"])}
    assert set(table) == {
        "word_embeddings.embedding",
        "position_embeddings.embedding",
        "norm.scale",
        "norm.bias",
        "project.kernel",
        "project.bias",
    }
    ids, positions = np.array([[3, 1, 4]]), np.array([[2, 3, 4]])
    x = table["word_embeddings.embedding"][ids] + table["position_embeddings.embedding"][positions]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.layer_norm_eps)
    expected = (x * table["norm.scale"] + table["norm.bias"]) @ table["project.kernel"] + table["project.bias"]
    actual = nnx.merge(graphdef, params).embeddings(jnp.asarray(ids), jnp.full((1, 3), 7), jnp.asarray(positions), None)
    assert actual.shape == (1, 3, CONFIG.hidden_size)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("act", "expected"),
    [("tanh", np.tanh), ("relu", lambda x: np.maximum(x, 0)), ("silu", lambda x: x / (1 + np.exp(-x)))],
)
def test_head_has_its_own_activation(act: str, expected: Callable[[np.ndarray], np.ndarray]) -> None:
    config = dataclasses.replace(CONFIG, head_act=act, hidden_act="relu")
    pooler = nnx.merge(*build(lambda: heads.Pooler(config, rngs=nnx.Rngs(0))))
    x = np.random.default_rng(0).standard_normal((1, 2, CONFIG.hidden_size)).astype(np.float32)
    dense = x @ np.asarray(pooler.dense.kernel[...]) + np.asarray(pooler.dense.bias[...])
    np.testing.assert_allclose(pooler(jnp.asarray(x)), expected(dense), atol=1e-5)


def test_mean_pooling_averages_each_segment() -> None:
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((1, 6, 4)).astype(np.float32)
    segments = jnp.array([[1, 1, 1, 2, 2, 0]])
    means = heads.segment_mean(jnp.asarray(hidden), segments, 3)[0]
    np.testing.assert_allclose(means[0], hidden[0, :3].mean(0), rtol=1e-6)
    np.testing.assert_allclose(means[1], hidden[0, 3:5].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(means[2], np.zeros(4))


@pytest.mark.parametrize("width", [None, 5])
def test_masked_lm_decodes_its_positions_with_the_tied_decoder(width: int | None) -> None:
    config = dataclasses.replace(CONFIG, embedding_size=width, hidden_act="relu", masked_lm_act="gelu")
    graphdef, params = build(lambda: MaskedLM(config, rngs=nnx.Rngs(0), with_next_sentence=True))
    batch = make_batch([[0, 1]], 2, examples()) | {"mlm_positions": jnp.array([[6, 1, 0]])}
    logits = forward(graphdef)(params, batch)
    next_sentence_logits = jax.jit(lambda params: nnx.merge(graphdef, params).next_sentence_logits(batch))(params)
    assert logits.shape == (1, 3, CONFIG.vocab_size) and next_sentence_logits.shape == (1, 2, 2)
    assert logits.dtype == next_sentence_logits.dtype == jnp.float32

    @jax.jit
    def expected(params: nnx.State) -> tuple[jax.Array, jax.Array]:
        model = nnx.merge(graphdef, params)
        keys = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
        hidden = model.encoder(*(batch[key] for key in keys))[0]
        transformed = model.transform_norm(jax.nn.gelu(model.transform(hidden), approximate=False))
        decoded = transformed @ model.encoder.embeddings.word_embeddings.embedding[...].T + model.decoder_bias[...]
        return decoded[jnp.array([6, 1, 0])], model.next_sentence(
            jnp.tanh(model.pooler.dense(hidden[jnp.array([0, 5])]))
        )

    decoded, next_sentence = expected(params)
    np.testing.assert_allclose(logits[0], decoded, atol=1e-4)
    np.testing.assert_allclose(next_sentence_logits[0], next_sentence, atol=1e-5)


def logits_with(key: jax.Array | None, **rates: Any) -> np.ndarray:
    graphdef, params = classifier(dataclasses.replace(CONFIG, num_layers=1, **rates))
    return np.asarray(forward(graphdef)(params, make_batch(PACKED, 3, examples()), key))


def test_no_dropout_without_a_key() -> None:
    np.testing.assert_array_equal(logits_with(None, hidden_dropout=0.5, attention_dropout=0.5), logits_with(None))
    np.testing.assert_array_equal(logits_with(jax.random.key(0), classifier_dropout=0.0), logits_with(None))


@pytest.mark.parametrize("rates", [{"hidden_dropout": 0.3}, {"attention_dropout": 0.3}, {"classifier_dropout": 0.3}])
def test_dropout_depends_only_on_its_key(rates: dict[str, float]) -> None:
    first = logits_with(jax.random.key(0), **rates)
    np.testing.assert_array_equal(first, logits_with(jax.random.key(0), **rates))
    assert np.abs(first - logits_with(jax.random.key(1), **rates)).max() > 1e-3
    assert np.abs(first - logits_with(None, **rates)).max() > 1e-3


HIDDEN, PROBS = ((3, ROW, 24), 0.1), ((3, 3, ROW, ROW), 0.2)
# The last layer computes the three slots of a row only.
LAST_HIDDEN, LAST_PROBS, HEAD = ((3, 3, 24), 0.1), ((3, 3, ROW, 3), 0.2), ((3, 3, 24), 0.3)
LAYERS = [PROBS, HIDDEN, HIDDEN, LAST_PROBS, LAST_HIDDEN, LAST_HIDDEN]
SITES: dict[str, tuple[dict[str, Any], list[Any]]] = {
    "bert": ({}, [HIDDEN, *LAYERS, HEAD]),
    "head_input": ({"head_input_dropout": True}, [HIDDEN, *LAYERS, HEAD, HEAD]),
    "no_attention_output": (
        {"attention_output_dropout": False},
        [HIDDEN, PROBS, HIDDEN, LAST_PROBS, LAST_HIDDEN, HEAD],
    ),
}


@pytest.mark.parametrize("kind", SITES)
def test_every_site_and_layer_draws_its_own_mask(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record the shape, rate, and key of every mask; `dropout` and attention call the same function."""
    sites: list[tuple[tuple[int, ...], float]] = []
    keys: list[jax.Array] = []
    draw = dropout.keep_mask

    def spy(key: dropout.DropoutKey, rate: float, shape: tuple[int, ...]) -> jax.Array | None:
        if rate:
            sites.append((shape, rate))
            keys.append(jax.random.key_data(key.key))
        return draw(key, rate, shape)

    monkeypatch.setattr(dropout, "keep_mask", spy)
    monkeypatch.setattr(attention, "kept_probabilities", spy)
    changes, expected = SITES[kind]
    rates = {"hidden_dropout": 0.1, "attention_dropout": 0.2, "classifier_dropout": 0.3}
    graphdef, params = classifier(dataclasses.replace(CONFIG, **rates, **changes))
    batch = make_batch(PACKED, 3, examples())

    def run(params: nnx.State, key: jax.Array) -> list[jax.Array]:
        sites.clear()
        keys.clear()
        nnx.merge(graphdef, params)(batch, dropout_key=key)
        return list(keys)

    distinct = {np.asarray(key).tobytes() for key in jax.jit(run)(params, jax.random.key(0))}
    assert sites == expected
    assert len(distinct) == len(sites)
    eqns = equations(run, params, jax.random.key(0))
    assert sum(e.primitive.name == "random_bits" for e in eqns) == len(sites)  # and nothing else draws


def test_classifier_dropout_falls_back_to_the_hidden_rate() -> None:
    rates = {"hidden_dropout": 0.25, "classifier_dropout": None}
    assert nnx.merge(*classifier(dataclasses.replace(CONFIG, **rates))).rate == 0.25


def test_bfloat16_is_close_to_float32_with_float32_parameters_and_logits() -> None:
    batch = make_batch(PACKED, 3, examples())
    (float32_model, params), (bfloat16_model, bfloat16_params) = classifier(), classifier(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(bfloat16_params)} == {jnp.dtype("float32")}
    ids = jax.ShapeDtypeStruct((2, ROW), jnp.int32)
    hidden = jax.eval_shape(lambda p, x: nnx.merge(bfloat16_model, p).encoder(x, x, x, x), bfloat16_params, ids)
    assert hidden.dtype == jnp.bfloat16
    logits = forward(bfloat16_model)(bfloat16_params, batch)
    assert logits.dtype == jnp.float32
    assert 0 < float(jnp.abs(logits - forward(float32_model)(params, batch)).max()) < 0.1


def test_softmax_norms_pooler_and_logits_are_float32_in_a_bfloat16_model() -> None:
    graphdef, params = classifier(dtype=jnp.bfloat16)
    batch = make_batch(PACKED, 3, examples())
    eqns = equations(lambda p, b: nnx.merge(graphdef, p)(b), params, batch)
    layers, norms = CONFIG.num_layers, 1 + 2 * CONFIG.num_layers
    for primitive, sites in (("exp", layers), ("rsqrt", norms), ("tanh", 1)):
        assert float_types(eqns, primitive) == ["float32"] * 2 * sites, primitive
    for primitive in ("reduce_sum", "reduce_max", "square"):
        assert set(float_types(eqns, primitive)) <= {"float32"}, primitive
    products = [tuple(str(v.aval.dtype) for v in (*e.invars, *e.outvars)) for e in eqns if "dot_general" in str(e)]
    products = [types for types in products if len(types) == 3]
    low, full = "bfloat16", "float32"
    # The scores of each layer, and its weighted values before they are divided by the sums.
    assert products.count((low, low, full)) == 2 * layers and products[-2:] == [(full,) * 3] * 2
    assert set(products) == {(low, low, low), (low, low, full), (full, full, full)}
    # Of the arrays with the scores' shape, only the exponentials are rounded, and the sums add the rounded values.
    rows, slots = batch["cls_index"].shape
    scores = [(rows, CONFIG.num_heads, ROW, queries) for queries in (ROW, slots)]  # the last layer's come last
    rounded = [e for e in eqns if e.primitive.name == "convert_element_type" and e.outvars[0].aval.shape in scores]
    assert [str(e.outvars[0].aval.dtype) for e in rounded] == [low, full] * layers
    sums = [e.invars[0] for e in eqns if e.primitive.name == "reduce_sum" and e.invars[0].aval.shape in scores]
    assert [id(x) for x in sums] == [id(e.outvars[0]) for e in rounded[1::2]]
    assert [id(e.invars[0]) for e in rounded[1::2]] == [id(e.outvars[0]) for e in rounded[::2]]


def test_gradient_of_a_bfloat16_model_has_float32_scores_and_statistics() -> None:
    """With dropout, the exponentials and the sums in attention and norms are float32 in the backward pass too."""
    rates = {"hidden_dropout": 0.1, "attention_dropout": 0.2}
    graphdef, params = classifier(dataclasses.replace(CONFIG, **rates), dtype=jnp.bfloat16)
    batch = make_batch(PACKED, 3, examples())

    def loss(params: nnx.State) -> jax.Array:
        return jnp.sum(nnx.merge(graphdef, params)(batch, dropout_key=jax.random.key(0)))

    eqns = equations(jax.grad(loss), params)
    layers, norms, gelus = CONFIG.num_layers, 1 + 2 * CONFIG.num_layers, CONFIG.num_layers
    for primitive, sites in (("exp", layers + gelus), ("rsqrt", norms), ("erf", 2 * gelus), ("tanh", 1)):
        assert float_types(eqns, primitive) == ["float32"] * 2 * sites, primitive
    for primitive in ("reduce_max", "square"):
        assert set(float_types(eqns, primitive)) <= {"float32"}, primitive
    (rows, slots), heads = batch["cls_index"].shape, CONFIG.num_heads
    size = CONFIG.hidden_size // heads
    for queries, count in ((ROW, layers - 1), (slots, 1)):  # the last layer computes the slots only
        for shape in ((rows, heads, ROW, queries), (rows, heads, size, queries)):
            sums = [e for e in eqns if e.primitive.name == "reduce_sum" and e.invars[0].aval.shape == shape]
            assert [str(e.invars[0].aval.dtype) for e in sums] == ["float32"] * count
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(jax.eval_shape(jax.grad(loss), params))} == {"float32"}


@pytest.mark.parametrize(
    "model",
    [lambda rngs: Classifier(CONFIG, 3, rngs=rngs), lambda rngs: MaskedLM(CONFIG, rngs=rngs, with_next_sentence=True)],
)
def test_state_has_only_parameters_with_berts_initial_values(model: Callable[[nnx.Rngs], Any]) -> None:
    rest = nnx.split(nnx.eval_shape(lambda: model(nnx.Rngs(0))), nnx.Param, ...)[2]
    assert not jax.tree.leaves(rest)
    params = jax.jit(lambda: nnx.state(model(nnx.Rngs(0))))()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "'kernel'" in name or "'embedding'" in name:
            assert abs(float(jnp.std(leaf)) - 0.02) < 4 * 0.02 / (2 * leaf.size) ** 0.5
        else:
            np.testing.assert_array_equal(leaf, 1.0 if "'scale'" in name else 0.0)


@pytest.mark.parametrize("change", [{"num_heads": 5}, {"hidden_act": "mish"}, {"head_act": "sine"}])
def test_impossible_configs_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=str(next(iter(change.values())))):
        BertEncoder(dataclasses.replace(CONFIG, **change), rngs=nnx.Rngs(0))


def test_unknown_pooling_is_refused() -> None:
    with pytest.raises(ValueError, match="max"):
        Classifier(CONFIG, 2, rngs=nnx.Rngs(0), pooling="max")
