"""Every family: parity with recorded PyTorch results, older and unprefixed names, heads, and saving."""

import json
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.fixtures.record import CLASSES, FIXTURES
from tests.helpers.against_pytorch import check
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import leaves
from xtransfer.parity import reference


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_batch_matches_recorded_logits_and_gradients_of_pytorch(family: str) -> None:
    directory = FIXTURES / f"{family}_classifier"
    differences = check(directory, reference.load(directory / reference.FILE, directory))
    assert {"embeddings", "layer_1", "layer_2", "pooled", "logits", "gradients"} == set(differences)


def values(state: nnx.State) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in leaves(state).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_head_follows_the_order_of_the_labels(family: str) -> None:
    directory = FIXTURES / f"{family}_classifier"
    assert hf_config.read_labels(directory) == CLASSES
    tensors = load_file(directory / "model.safetensors")
    name = FAMILIES[family].source("head.kernel")[0]
    params = values(hf_checkpoint.load_classifier(directory, 3, seed=0, labels=CLASSES)[1])
    reversed_params = values(hf_checkpoint.load_classifier(directory, 3, seed=0, labels=CLASSES[::-1])[1])
    np.testing.assert_array_equal(params["head.kernel"], tensors[name].T)
    np.testing.assert_array_equal(reversed_params["head.kernel"], tensors[name][::-1].T)
    np.testing.assert_array_equal(reversed_params["pooler.dense.kernel"], params["pooler.dense.kernel"])


@pytest.mark.parametrize("family", FAMILIES)
def test_unprefixed_encoder_with_older_names_loads_the_same_parameters(family: str, tmp_path: Path) -> None:
    """Encoder-only classes and checkpoints converted from TensorFlow name their tensors like this."""
    directory = FIXTURES / f"{family}_classifier"
    expected = values(hf_checkpoint.load_classifier(directory, 3, seed=0)[1])
    tensors = {}
    for name, array in load_file(directory / "model.safetensors").items():
        prefix, _, bare = name.partition(".")
        if prefix not in ("classifier", "pre_classifier"):
            norm = "norm" in bare.lower()
            tensors[bare.replace(".weight", ".gamma").replace(".bias", ".beta") if norm else bare] = array
    assert any(name.endswith(".gamma") for name in tensors)
    raw = json.loads((directory / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({key: raw[key] for key in raw if key != "id2label"}))
    save_file(tensors, tmp_path / "model.safetensors")
    actual = values(hf_checkpoint.load_classifier(tmp_path, 3, seed=5)[1])
    assert set(actual) == set(expected)
    for path, array in expected.items():
        if path.startswith("encoder.") or (FAMILIES[family].pools_in_encoder and path.startswith("pooler.")):
            np.testing.assert_array_equal(actual[path], array)
        elif path.endswith("bias"):
            assert not actual[path].any()
        else:
            assert 0.01 < actual[path].std() < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_a_saved_model_unchanged(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    directory, saved = FIXTURES / f"{family}_classifier", tmp_path / "saved"
    config = hf_config.read_config(directory)
    _, params = hf_checkpoint.load_classifier(directory, 3, seed=0)
    hf_checkpoint.save(saved, config, params, labels=CLASSES)
    original, exported = (
        AutoModelForSequenceClassification.from_pretrained(path).eval() for path in (directory, saved)
    )
    theirs, ours = original.config.to_dict(), exported.config.to_dict()
    # position_embedding_type is a key of transformers 4 that version 5 does not know.
    changed = {"_name_or_path", "name_or_path", "problem_type", "position_embedding_type"}
    assert {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)} <= changed
    assert (ours["problem_type"], ours["id2label"]) == ("single_label_classification", dict(enumerate(CLASSES)))
    assert original.state_dict().keys() == exported.state_dict().keys()
    assert all(torch.equal(value, exported.state_dict()[name]) for name, value in original.state_dict().items())
    reloaded = values(hf_checkpoint.load_classifier(saved, 3, seed=1, labels=CLASSES)[1])
    assert all(np.array_equal(reloaded[path], array) for path, array in values(params).items())
