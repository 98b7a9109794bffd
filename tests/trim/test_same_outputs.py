"""A trimmed model has the pieces and logits of the original, here and in transformers, for all kinds of tokenizers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import tokenizers_of_each_kind
from tests.helpers.tokenizers_of_each_kind import KINDS, TEXT
from tests.helpers.trimming import run
from xtransfer.data.batches.packing import pack
from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.tokenizer import check_tokenizer

LABELS = ("bad", "good", "so-so")
LENGTH = 48
SAME = 1e-6  # the largest difference of two logits that count as equal
FAMILIES = {"wordpiece": "bert", "unigram": "xlm-roberta", "unigram_bytes": "bert", "byte_level": "roberta"}
WORDS = sorted({word for text in TEXT for word in text.split()})


def classifier(directory: Path, kind: str, rows: int = 7) -> Path:
    """Write a random classifier with a tokenizer of a kind; its embeddings have `rows` rows beyond the vocabulary."""
    tokenizer = tokenizers_of_each_kind.trained(kind)
    family = FAMILIES.get(kind, "bert")
    after_pad = family != "bert"
    config = EncoderConfig(
        vocab_size=len(tokenizer) + rows,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        intermediate_size=32,
        max_positions=LENGTH + 2,
        pad_id=tokenizer.pad_token_id,
        position_offset=tokenizer.pad_token_id + 1 if after_pad else 0,
        head_input_dropout=after_pad,
        family=family,
    )
    params = nnx.state(Classifier(config, len(LABELS), rngs=nnx.Rngs(1)), nnx.Param)
    params = jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim > 1 else leaf, params)
    hf_checkpoint.save(directory, config, params, tokenizer=tokenizer, labels=LABELS)
    return directory


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("classifiers")
    return {kind: classifier(root / kind, kind) for kind in KINDS}


def outputs(directory: Path, texts: list[str]) -> tuple[list[list[str]], np.ndarray]:
    """Return the pieces of texts, and our logits, [n, K]."""
    config, tokenizer = hf_config.read_config(directory), load_tokenizer(directory)
    check_tokenizer(directory, tokenizer)
    tokens = tokenize(tokenizer, texts, None, LENGTH)
    batch = pack(
        tokens,
        range(len(tokens)),
        row_length=LENGTH,
        rows=len(texts),
        slots=1,
        pad_id=config.pad_id,
        position_offset=config.position_offset,
    )
    graphdef, params = hf_checkpoint.load_classifier(directory, len(LABELS), seed=0, labels=LABELS)
    logits = nnx.merge(graphdef, params)({name: jnp.asarray(value) for name, value in batch.items()})
    pieces = [tokenizer.convert_ids_to_tokens(tokens.item(i)[0].tolist()) for i in range(len(texts))]
    return pieces, np.asarray(logits)[tuple(batch["slot"].T)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4)
@given(st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join), min_size=2, max_size=2))
def test_pieces_and_logits_are_the_same(
    kind: str, classifiers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    output = tmp_path_factory.mktemp("trimmed") / "model"
    report = run(classifiers[kind], texts, output)
    pieces, logits = outputs(classifiers[kind], texts)
    trimmed_pieces, trimmed_logits = outputs(output, texts)
    assert trimmed_pieces == pieces
    assert np.abs(logits).max() > 0.01
    np.testing.assert_allclose(trimmed_logits, logits, atol=SAME, rtol=0)
    config = json.loads((output / "config.json").read_text())
    assert config["vocab_size"] == len(load_tokenizer(output)) == report["after"]["pieces"]
    assert report["after"]["pieces"] < report["before"]["pieces"] and report["complete"]
    assert report["text"] == {"texts": 2, "same": 2, "first": "", "clipped": 0} | {
        key: report["text"][key] for key in ("tokens", "unknown")
    }


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_computes_the_same_logits(kind: str, classifiers: dict[str, Path], tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    texts = list(TEXT[:2])
    run(classifiers[kind], texts, tmp_path / "model")
    results = []
    for directory in (classifiers[kind], tmp_path / "model"):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
        assert model.config.pad_token_id == tokenizer.pad_token_id
        assert model.config.id2label == dict(enumerate(LABELS))
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.no_grad():
            results.append(model(**encoded).logits.numpy())
    np.testing.assert_allclose(results[1], results[0], atol=SAME, rtol=0)
    # Two implementations may differ as much as in the parity tests; trimming may change far less.
    np.testing.assert_allclose(results[1], outputs(tmp_path / "model", texts)[1], atol=1e-4, rtol=0)
