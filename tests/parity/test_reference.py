"""References are computed, saved, and loaded, and rejected if they belong to other weights."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.fixtures.record import CASES, FIXTURES, RECORDED, record
from tests.helpers import pytorch_files
from xtransfer.errors import UserError
from xtransfer.models.hf.families import FAMILIES
from xtransfer.parity import reference

CLASSIFIER = FIXTURES / "bert_classifier"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of a recorded checkpoint, to be modified."""
    return Path(shutil.copytree(CLASSIFIER, tmp_path / "model"))


def load(directory: Path) -> reference.Reference:
    """Load the reference beside a checkpoint."""
    return reference.load(directory / reference.FILE, directory)


@pytest.mark.parametrize("name", RECORDED)
def test_fixtures_are_complete_and_small(name: str) -> None:
    recorded = load(FIXTURES / name)
    config = json.loads((FIXTURES / name / "config.json").read_text())
    tokens, size = int(recorded.inputs["attention_mask"].sum()), config.get("hidden_size", config.get("dim"))
    heads = config.get("num_attention_heads", config.get("n_heads"))
    rotary = any(key.startswith("rope_") for key in config)  # which needs heads of an even width
    assert (size // heads) % 2 or rotary or name == "bert_pretraining"
    assert list(recorded.activations)[:3] == ["embeddings", "layer_1", "layer_2"]
    assert {value.shape for key, value in recorded.activations.items() if key.startswith("layer_")} == {(tokens, size)}
    if not name.endswith("_masked"):
        assert recorded.activations["pooled"].shape == (len(recorded.inputs["input_ids"]), size)
    assert not recorded.inputs["attention_mask"].all() and "torch" in recorded.made_with
    if CASES[name].is_classifier:
        tensors = load_file(FIXTURES / name / "model.safetensors")
        assert parameters(name, recorded.gradients) == parameters(name, tensors)
        assert recorded.activations["logits"].shape == (4, 3) and recorded.labels is not None
        assert sum(file.stat().st_size for file in (FIXTURES / name).iterdir()) < 90_000


def parameters(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter in tensors, which may be fused in a file and not in transformers."""
    family = FAMILIES[name.partition("_")[0]]
    shapes = {}
    for key, value in tensors.items():
        targets = family.targets(family.canonical(key))
        shapes |= {path: (len(value) // len(targets), *value.shape[1:]) for path, _ in targets}
    return shapes


@pytest.mark.parametrize("name", RECORDED)
def test_pytorch_reproduces_the_recorded_reference(name: str) -> None:
    pytest.importorskip("torch")
    recorded = load(FIXTURES / name)
    architecture = None if CASES[name].is_classifier else CASES[name].architecture
    computed = reference.compute(FIXTURES / name, recorded.inputs, recorded.labels, architecture=architecture)
    assert list(computed.activations) == list(recorded.activations) and computed.weights == recorded.weights
    for kind in ("activations", "gradients"):
        ours, theirs = getattr(computed, kind), getattr(recorded, kind)
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            np.testing.assert_allclose(value, theirs[key], atol=1e-5, err_msg=key)


def test_recording_again_writes_the_same_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    record(CASES["bert_classifier"], tmp_path)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path, CLASSIFIER))
    assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = (json.loads((path / "config.json").read_text()) for path in (tmp_path, CLASSIFIER))
    assert ours | {"transformers_version": theirs["transformers_version"]} == theirs


def test_recorded_gradient_is_the_slope_of_the_loss(directory: Path) -> None:
    """The central difference (loss(w + h g) - loss(w - h g)) / 2h is |g|²."""
    pytest.importorskip("torch")
    recorded, weights = load(directory), load_file(directory / "model.safetensors")
    losses, step = [], 1e-3
    for sign in (1, -1):
        moved = {name: value + sign * step * recorded.gradients[name] for name, value in weights.items()}
        save_file(moved, directory / "model.safetensors", metadata={"format": "pt"})
        logits = reference.compute(directory, recorded.inputs).activations["logits"].astype(np.float64)
        scores = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses.append(-scores[np.arange(4), recorded.labels].mean())
    square = sum(float((value.astype(np.float64) ** 2).sum()) for value in recorded.gradients.values())
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(square, rel=1e-2)


def test_save_and_load(tmp_path: Path) -> None:
    recorded = load(CLASSIFIER)
    reference.save(tmp_path / "new" / "file.safetensors", recorded)
    loaded = reference.load(tmp_path / "new" / "file.safetensors", CLASSIFIER)
    assert (loaded.weights, loaded.made_with) == (recorded.weights, recorded.made_with)
    for kind in ("inputs", "activations", "gradients"):
        ours, theirs = getattr(loaded, kind), getattr(recorded, kind)
        assert set(ours) == set(theirs) and all(np.array_equal(ours[key], theirs[key]) for key in ours)
    assert list(loaded.activations) == list(recorded.activations)
    np.testing.assert_array_equal(loaded.labels, recorded.labels)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file.safetensors"]


def test_reference_of_other_weights_is_stale(directory: Path) -> None:
    config = directory / "config.json"
    config.write_text(config.read_text().replace("1e-07", "1e-05"))
    load(directory)  # other settings are no error: the comparison has to show their effect
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.bias"][1] += 1e-6
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(
        UserError, match=r"reference\.safetensors is stale: .* other weights than .*model has; record it again"
    ):
        load(directory)


def test_fingerprint_depends_on_every_shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[:20], "model-2.safetensors": names[20:]}
    weight_map = {name: file for file, group in shards.items() for name in group}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fingerprints = set()
    for change in (None, names[0], names[-1]):
        if change is not None:
            tensors[change] = tensors[change] + 1
        for file, group in shards.items():
            save_file({name: tensors[name] for name in group}, directory / file)
        fingerprints.add(reference.fingerprint(directory))
    assert len(fingerprints) == 3 and {len(fingerprint) for fingerprint in fingerprints} == {64}


def test_other_files_are_rejected(directory: Path, tmp_path: Path) -> None:
    complete = (directory / reference.FILE).read_bytes()
    for truncated in (complete[:-1], complete[:100]):
        (tmp_path / "file").write_bytes(truncated)
        with pytest.raises(UserError, match="not a complete safetensors file"):
            reference.load(tmp_path / "file", directory)
    with pytest.raises(UserError, match="not a reference in the format .*; record it again"):
        reference.load(directory / "model.safetensors", directory)
    with pytest.raises(UserError, match="nowhere: no such file; record one with --record"):
        reference.load(tmp_path / "nowhere", directory)
    assert reference.is_reference(directory / reference.FILE)
    assert not any(reference.is_reference(directory / name) for name in ("model.safetensors", "config.json", "none"))


def test_compute_needs_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "available", lambda: False)
    with pytest.raises(UserError, match="PyTorch is not installed"):
        reference.compute(CLASSIFIER, load(CLASSIFIER).inputs)


def test_reference_of_a_pytorch_file_is_the_same(directory: Path) -> None:
    pytest.importorskip("torch")
    inputs, tensors = load(directory).inputs, load_file(directory / "model.safetensors")
    expected = reference.compute(directory, inputs).activations
    (directory / "model.safetensors").unlink()
    path = pytorch_files.write_tensors(directory / "pytorch_model.bin", tensors)
    for name, value in reference.compute(directory, inputs).activations.items():
        np.testing.assert_array_equal(value, expected[name])
    pytorch_files.write(path, pytorch_files.program(pytorch_files.name("torch.Size") + b")R"))
    with pytest.raises(UserError, match=r"pytorch_model\.bin: its data\.pkl names 'torch\.Size'"):
        reference.compute(directory, inputs)


def test_pooler_of_a_bare_encoder_is_part_of_the_reference(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    directory = without_head("gte_classifier", tmp_path)
    recorded = reference.load(FIXTURES / "gte_classifier" / reference.FILE, FIXTURES / "gte_classifier")
    activations = reference.compute(directory, recorded.inputs).activations
    assert list(activations) == ["embeddings", "layer_1", "layer_2", "pooled"]
    for name, value in activations.items():
        np.testing.assert_allclose(value, recorded.activations[name], atol=1e-5)


def without_head(name: str, directory: Path) -> Path:
    """Copy a recorded classifier without its last linear layer."""
    shutil.copytree(FIXTURES / name, directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    tensors = {key: value for key, value in tensors.items() if not key.startswith("classifier.")}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("prefix", ["gte.", "new."])
def test_checkpoint_without_a_class_of_its_own_is_loaded_in_the_class_that_it_is_saved_as(
    prefix: str, tmp_path: Path
) -> None:
    """`new` has no class in transformers. Its published files have the prefix "new." and a head for tokens."""
    pytest.importorskip("torch")
    directory = Path(shutil.copytree(FIXTURES / "new_classifier", tmp_path / "model"))
    recorded = load(directory)
    tensors = {
        name.replace("gte.", prefix): value for name, value in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    activations = reference.compute(directory, recorded.inputs).activations
    assert list(activations) == list(recorded.activations)
    for name, value in activations.items():
        np.testing.assert_allclose(value, recorded.activations[name], atol=1e-5)
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"architectures": ["NewForTokenClassification"]}))
    tensors["classifier.weight"], tensors["classifier.bias"] = np.ones((1, 18), np.float32), np.ones(1, np.float32)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert "logits" not in reference.compute(directory, recorded.inputs).activations


def test_incomplete_checkpoint_is_a_one_line_error(directory: Path) -> None:
    pytest.importorskip("torch")
    inputs, tensors = load(directory).inputs, load_file(directory / "model.safetensors")
    remaining = {name: value for name, value in tensors.items() if ".layer.1.output." not in name}
    save_file(remaining, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not find encoder\.layer\.1\.output\.LayerNorm\.bias"):
        reference.compute(directory, inputs)
    (directory / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a complete safetensors file"):
        reference.compute(directory, inputs)


def test_error_of_transformers_becomes_one_line(directory: Path) -> None:
    pytest.importorskip("torch")
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"initializer_range": "small"}))
    with pytest.raises(UserError, match="transformers cannot load it: ") as caught:
        reference.compute(directory, load(CLASSIFIER).inputs)
    assert "\n" not in str(caught.value)
