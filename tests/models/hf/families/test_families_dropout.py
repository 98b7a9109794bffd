"""Dropout of every family has the sites and rates of the original: the same statistics over many draws."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.fixtures.record import FIXTURES
from xtransfer.models.dropout import DropoutKey
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config

DRAWS = 6000
HEAD_KEYS = ("classifier_dropout", "seq_classif_dropout", "cls_dropout", "pooler_dropout")
ENCODER_KEYS = (
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"),
    *("embedding_dropout", "mlp_dropout"),
)
# EuroBERT's head has no dropout.
PARTS = [
    *((part, family) for family in ("bert", "roberta", "distilbert", "electra") for part in ("encoder", "head")),
    *(
        (part, family)
        for family in ("modernbert", "deberta-v2", "gte", "xlm-roberta-xl")
        for part in ("encoder", "head")
    ),
    ("encoder", "eurobert"),
]


@pytest.mark.parametrize(("part", "family"), PARTS)
def test_dropout_gives_the_same_mean_and_deviation_as_in_pytorch(part: str, family: str, tmp_path: Path) -> None:
    """Compare both over many draws: a missing, doubled, or misplaced site changes one of them."""
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    directory = FIXTURES / f"{family}_classifier"
    encoder_rate, head_rate = (0.4, 0.0) if part == "encoder" else (0.0, 0.5)
    rates = dict.fromkeys(ENCODER_KEYS, encoder_rate) | dict.fromkeys(HEAD_KEYS, head_rate)
    raw = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: rates.get(key, value) for key, value in raw.items()}))
    shutil.copy(directory / "model.safetensors", tmp_path)
    ids = np.array([[7, 30, 12, 25, 9, 18]])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").train()
    for module in model.modules():
        if hasattr(module, "pos_dropout"):  # one mask for a whole batch, which is one draw; see below
            module.pos_dropout.p = 0.0
    with torch.no_grad():
        outputs = model(torch.from_numpy(np.repeat(ids, DRAWS, 0)), output_hidden_states=True)
    theirs = (outputs.logits if part == "head" else outputs.hidden_states[-1][:, 0]).numpy()
    config = hf_config.read_config(tmp_path)
    pooling = hf_config.read_pooling(tmp_path)
    model = nnx.merge(*hf_checkpoint.load_classifier(tmp_path, 3, seed=0, pooling=pooling))
    for layer in model.encoder.layers:
        if hasattr(layer.attention, "distance_rate"):
            layer.attention.distance_rate = 0.0
    batch = {
        "input_ids": jnp.tile(jnp.asarray(ids), (DRAWS, 1)),
        "token_type_ids": jnp.zeros((DRAWS, 6), jnp.int32),
        "position_ids": jnp.tile(jnp.arange(6) + config.position_offset, (DRAWS, 1)),
        "segment_ids": jnp.ones((DRAWS, 6), jnp.int32),
    }
    key = jax.random.key(0)
    if part == "head":
        ours = model(batch | {"cls_index": jnp.zeros((DRAWS, 1), jnp.int32)}, dropout_key=key)[:, 0]
    else:
        ours = model.encoder(*batch.values(), dropout_key=DropoutKey(key))[:, 0]
    deviation = theirs.std(0)
    assert deviation.min() > 1e-3
    # Five standard errors of a mean, and of a standard deviation (0.046 for normal numbers, more for these).
    np.testing.assert_allclose((np.mean(ours, 0) - theirs.mean(0)) / deviation, 0, atol=5 * (2 / DRAWS) ** 0.5)
    np.testing.assert_allclose(np.std(ours, 0) / deviation, 1, atol=0.06)


def test_one_mask_of_debertas_distances_serves_all_rows() -> None:
    """As in the original, the table of distances is dropped out once per layer and step, not once per row."""
    model = nnx.merge(*hf_checkpoint.load_classifier(FIXTURES / "deberta-v2_classifier", 3, seed=0))
    for layer in model.encoder.layers:
        layer.attention.attention_rate = layer.attention.output_rate = layer.rate = 0.0
        layer.attention.distance_rate = 0.3
    model.encoder.embeddings.rate = 0.0
    ids = jnp.tile(jnp.arange(5, 11), (3, 1))
    positions, segments = jnp.tile(jnp.arange(6), (3, 1)), jnp.ones((3, 6), jnp.int32)
    inputs = (ids, jnp.zeros_like(ids), positions, segments)
    plain = model.encoder(*inputs)
    first, second = (model.encoder(*inputs, dropout_key=DropoutKey(jax.random.key(seed))) for seed in (0, 1))
    np.testing.assert_array_equal(first[0], first[1])
    assert min(float(jnp.abs(x - y).max()) for x, y in ((first, plain), (second, plain), (first, second))) > 1e-3
