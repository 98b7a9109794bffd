"""Every family is the same function as its original, recorded; older and bare names; the head; and the way back."""

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
def test_recorded_logits_and_gradients_of_pytorch_are_met_by_a_packed_batch(family: str) -> None:
    directory = FIXTURES / f"{family}_classifier"
    found = check(directory, reference.load(directory / reference.FILE, directory))
    assert {"embeddings", "layer_1", "layer_2", "pooled", "logits", "gradients"} == set(found)


def values(state: nnx.State) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf[...]) for path, leaf in leaves(state).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trained_head_is_kept_in_the_order_of_the_labels(family: str) -> None:
    directory = FIXTURES / f"{family}_classifier"
    assert hf_config.read_labels(directory) == CLASSES
    tensors = load_file(directory / "model.safetensors")
    name = FAMILIES[family].source("head.kernel")[0]
    params = values(hf_checkpoint.load_classifier(directory, 3, seed=0, labels=CLASSES)[1])
    turned = values(hf_checkpoint.load_classifier(directory, 3, seed=0, labels=CLASSES[::-1])[1])
    np.testing.assert_array_equal(params["head.kernel"], tensors[name].T)
    np.testing.assert_array_equal(turned["head.kernel"], tensors[name][::-1].T)
    np.testing.assert_array_equal(turned["pooler.dense.kernel"], params["pooler.dense.kernel"])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_encoder_without_prefix_and_with_older_names_is_the_same(family: str, tmp_path: Path) -> None:
    """As the encoder-only classes, and checkpoints converted from TensorFlow, name their tensors."""
    directory = FIXTURES / f"{family}_classifier"
    whole = values(hf_checkpoint.load_classifier(directory, 3, seed=0)[1])
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
    bare_model = values(hf_checkpoint.load_classifier(tmp_path, 3, seed=5)[1])
    assert set(bare_model) == set(whole)
    for path, array in whole.items():
        if path.startswith("encoder.") or (family == "bert" and path.startswith("pooler.")):
            np.testing.assert_array_equal(bare_model[path], array)
        elif path.endswith("bias"):
            assert not bare_model[path].any()
        else:
            assert 0.01 < bare_model[path].std() < 0.03


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_saved_as_the_same_model(family: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForSequenceClassification

    directory, saved = FIXTURES / f"{family}_classifier", tmp_path / "saved"
    config = hf_config.read_config(directory)
    _, params = hf_checkpoint.load_classifier(directory, 3, seed=0)
    hf_checkpoint.save(saved, config, params, labels=CLASSES)
    first, second = (AutoModelForSequenceClassification.from_pretrained(path).eval() for path in (directory, saved))
    theirs, ours = first.config.to_dict(), second.config.to_dict()
    # position_embedding_type: a key of transformers 4 that 5 does not know.
    changed = {"_name_or_path", "name_or_path", "problem_type", "position_embedding_type"}
    assert {key for key in theirs.keys() | ours.keys() if theirs.get(key) != ours.get(key)} <= changed
    assert (ours["problem_type"], ours["id2label"]) == ("single_label_classification", dict(enumerate(CLASSES)))
    assert first.state_dict().keys() == second.state_dict().keys()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    again = values(hf_checkpoint.load_classifier(saved, 3, seed=1, labels=CLASSES)[1])
    assert all(np.array_equal(again[path], array) for path, array in values(params).items())
