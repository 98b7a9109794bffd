"""Encoders on rows of more than 512 tokens, up to the 8,192 that ModernBERT reads: packing, prediction, training."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.fixtures.record import FIXTURES, Case, record
from tests.helpers import predicting, tiny
from xtransfer.config import ModelConfig
from xtransfer.data.batches.batches import Dataset, TrainBatches
from xtransfer.data.batches.packing import pack
from xtransfer.data.tokens.tokenizer import Tokens
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.models import visibility
from xtransfer.models.architectures.modernbert import GLOBAL, LOCAL, ModernBertConfig
from xtransfer.models.heads import Classifier
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.parity import activations, reference
from xtransfer.predict import __main__ as predict_main
from xtransfer.runtime.sharding import make_mesh, place_batch
from xtransfer.train import state
from xtransfer.train.compiled_steps import CompiledSteps
from xtransfer.train.inputs import plan_of

FAMILIES = ("bert", "deberta-v2", "eurobert", "gte", "modernbert", "xlm-roberta-xl")
LONGEST = 8192
MODERNBERT = ModernBertConfig(
    vocab_size=len(tiny.word_tokenizer()),
    hidden_size=4,
    num_layers=2,
    num_heads=1,
    intermediate_size=8,
    max_positions=LONGEST,
    type_vocab_size=0,
    norm_bias=False,
    hidden_dropout=0.1,
    attention_dropout=0.0,
    head_act="gelu",
    family="modernbert",
    layer_types=(GLOBAL, LOCAL),
)


def tokens(lengths: list[int], vocabulary: int = 30, seed: int = 0) -> Tokens:
    """Return random texts of these lengths."""
    ids = np.random.default_rng(seed).integers(5, vocabulary, sum(lengths)).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Tokens(ids, np.zeros_like(ids), offsets, np.zeros(len(lengths), bool))


def one_device() -> jax.sharding.Mesh:
    return make_mesh((1, 1, 1), jax.devices()[:1])


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_have_the_same_logits_in_a_long_row_and_alone(family: str) -> None:
    """The long row begins with 31 texts of 20 tokens and ends with padding. DeBERTa computes it at once."""
    directory, texts = FIXTURES / f"{family}_classifier", tokens([20] * 31)
    config = hf_config.read_config(directory)
    graphdef, params = hf_checkpoint.load_classifier(directory, 3, seed=0, pooling=hf_config.read_pooling(directory))
    layout: dict[str, Any] = {"pad_id": config.pad_id, "position_offset": config.position_offset}
    long = pack(texts, range(31), row_length=640, rows=1, slots=31, **layout)
    alone = pack(texts, range(31), row_length=20, rows=31, slots=1, **layout)
    logits = jax.jit(lambda batch: nnx.merge(graphdef, params)(batch))
    in_long_row, expected = (logits({k: v for k, v in batch.items() if k != "slot"}) for batch in (long, alone))
    assert float(jnp.std(expected, axis=0).min()) > 0.02
    np.testing.assert_allclose(in_long_row[0], expected[:, 0], atol=1e-5)


def test_dropout_and_gradients_are_those_of_attention_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """With rematerialisation too, which must keep the window an integer."""
    config = dataclasses.replace(MODERNBERT, hidden_size=8, num_heads=2, window=20, attention_dropout=0.1)
    batch = pack(tokens([300, 250, 500]), range(3), row_length=600, rows=2, slots=2, pad_id=0)
    batch.pop("slot")

    def logits_and_gradients(*, remat: bool) -> list[jax.Array]:
        # With "cls", the last layer would not be computed in blocks.
        model = Classifier(config, 3, rngs=nnx.Rngs(0), pooling="mean", remat=remat)
        graphdef, params = nnx.split(model, nnx.Param)
        params = jax.tree.map(lambda leaf: leaf * 20 if leaf.ndim > 1 else leaf, params)  # so that attention has peaks

        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            logits = nnx.merge(graphdef, params)(batch, dropout_key=jax.random.key(3))
            return jnp.sum(logits**2), logits

        return jax.tree.leaves(jax.jit(jax.grad(loss, has_aux=True))(params))

    in_blocks = [logits_and_gradients(remat=remat) for remat in (False, True)]
    monkeypatch.setattr(visibility, "LONGEST_AT_ONCE", 600)
    at_once = logits_and_gradients(remat=False)
    for results in in_blocks:
        for actual, expected in zip(results, at_once, strict=True):
            assert float(jnp.abs(expected).max()) > 1e-3
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))


def test_long_texts_have_the_activations_of_pytorch(tmp_path: Path) -> None:
    """Compare a global and a local layer on texts that are longer than several windows."""
    pytest.importorskip("torch")
    ids = {"pad_token_id": 2, "bos_token_id": 3, "eos_token_id": 4, "cls_token_id": 3, "sep_token_id": 4}
    shape = {"hidden_size": 18, "num_hidden_layers": 2, "local_attention": 128, "max_position_embeddings": 1024}
    record(Case("ModernBertForSequenceClassification", {**ids, **shape, "global_attn_every_n_layers": 2}), tmp_path)
    texts = tokens([700, 520, 40])
    config = hf_config.read_config(tmp_path)
    examples = [(texts.input_ids[a:b], texts.token_type_ids[a:b]) for a, b in itertools.pairwise(texts.offsets)]
    inputs = activations.pad(examples, config)
    theirs = reference.compute(tmp_path, inputs, architecture="ModernBertForSequenceClassification")
    differences = activations.compare(activations.activations(tmp_path, inputs), theirs.activations)
    assert [row.name for row in differences] == ["embeddings", "layer_1", "layer_2", "pooled", "logits"]
    assert max(row.maximum for row in differences) <= activations.TOLERANCE, differences


def test_prediction_reads_8192_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word at the end of what is read changes the probabilities, and a word beyond it does not."""
    params = nnx.state(Classifier(MODERNBERT, 3, rngs=nnx.Rngs(1), pooling="mean"), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf * 50 if leaf.ndim > 1 else leaf, params)
    model = tmp_path / "model"
    hf_checkpoint.save(
        model, MODERNBERT, params, tokenizer=tiny.word_tokenizer(), labels=predicting.LABELS, pooling="mean"
    )
    words = np.random.default_rng(0).choice(["good", "film", "bad", "der", "très"], 9000)
    texts = []
    for changed in (None, LONGEST - 3, LONGEST - 2):  # with [CLS] and [SEP], LONGEST - 2 words are read
        text = words.copy()
        if changed is not None:
            text[changed] = "poor"
        texts.append(" ".join(text))
    source = predicting.write(tmp_path / "in" / "a.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.setattr(predict_main, "make_mesh", one_device)
    rows = predicting.run(model, source, "--max-length", str(LONGEST))
    first, within, beyond = ([row["probabilities"][label] for label in predicting.LABELS] for row in rows)
    assert first == beyond and first != within


def test_training_step_on_rows_of_8192_tokens() -> None:
    """Two texts share a row, and all parameters move."""
    settings = ModelConfig(max_length=LONGEST, batch_size=2)
    mesh = one_device()
    compiled = CompiledSteps(settings, MODERNBERT, 3, mesh)
    dataset = Dataset(tokens([5100, 3000]), np.array([0, 2], np.int32), None, ("a", "b"), 3)
    batch = TrainBatches(dataset, plan_of(settings, MODERNBERT, 2, 1), seed=0)(0)
    assert batch["input_ids"].shape == (1, LONGEST) and np.count_nonzero(batch["segment_ids"]) == 8100
    params = nnx.state(Classifier(MODERNBERT, 3, rngs=nnx.Rngs(0)), nnx.Param)
    before = jax.device_get(params)
    step = compiled.train_step(OBJECTIVES["vanilla"])
    start = state.create(params, compiled.optimizer, mesh)
    after, terms = step(start, place_batch(mesh, batch), jax.random.key(0), np.float32(1e-3))
    loss, count = terms["loss"]
    assert float(count) == 2 and float(loss) / 2 == pytest.approx(np.log(3), abs=0.1)  # a new head knows nothing
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after.params), strict=True):
        assert np.isfinite(new).all() and np.abs(np.asarray(new) - old).max() > 1e-5
