"""Parity with PyTorch's BERT, saving, labels, names of checkpoints, fingerprints."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.fixtures.record_bert import CASES, RECORDED, record
from xtransfer.errors import UserError
from xtransfer.models import hf
from xtransfer.models.encoder import Classifier

FIXTURES = Path(__file__).parent / "fixtures"
CLASSIFIER = FIXTURES / "bert_classifier"
LABELS = ("negative", "neutral", "positive")
TOLERANCE = 1e-4


def batch_of(reference: Any) -> dict[str, jax.Array]:
    rows, length = reference["input_ids"].shape
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return {
        "input_ids": jnp.asarray(reference["input_ids"]),
        "token_type_ids": jnp.asarray(reference["token_type_ids"]),
        "position_ids": jnp.asarray(positions),
        "segment_ids": jnp.asarray(reference["attention_mask"]),
        "cls_index": jnp.zeros((rows, 1), jnp.int32),
        "mlm_positions": jnp.asarray(positions),
    }


def outputs(graphdef: Any, params: nnx.State, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What the model computes, under the names of the reference."""
    model = nnx.merge(graphdef, params)
    found = {}
    keys = ("input_ids", "token_type_ids", "position_ids")
    found["hidden_0"] = model.encoder.embeddings(*(batch[key] for key in keys), None)
    found["last"] = model.encoder(*(batch[key] for key in (*keys, "segment_ids")))
    found["pooler_output"] = model.pooler(found["last"][:, :1])[:, 0]
    if isinstance(model, Classifier):
        found["logits"] = model(batch)[:, 0]
    else:
        found["prediction_logits"], following = model(batch)
        found["seq_relationship_logits"] = following[:, 0]
    return found


def check_parity(directory: Path, architecture: str) -> dict[str, float]:
    """Largest differences from PyTorch, at the tokens that are not padding."""
    reference = dict(np.load(directory / "reference.npz", allow_pickle=False))
    layers = max(int(name.split("_")[1]) for name in reference if name.startswith("hidden_"))
    reference["last"] = reference[f"hidden_{layers}"]
    if architecture == "BertForPreTraining":
        graphdef, params = hf.load_masked_lm(directory, seed=0)
    else:
        classes = reference["logits"].shape[-1] if "logits" in reference else 2
        graphdef, params = hf.load_classifier(directory, classes, seed=0)
    found = jax.jit(lambda p, b: outputs(graphdef, p, b))(params, batch_of(reference))
    real = reference["attention_mask"] == 1
    differences = {}
    for name, value in found.items():
        if name in reference:
            assert value.dtype == jnp.float32
            difference = np.abs(np.asarray(value) - reference[name])
            differences[name] = float((difference[real] if value.ndim == 3 else difference).max())
    assert {"last", "pooler_output", "hidden_0"} < set(differences) or architecture == "BertModel"
    assert max(differences.values()) <= TOLERANCE, differences
    return differences


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_outputs_of_pytorch_are_met(name: str) -> None:
    check_parity(FIXTURES / f"bert_{name}", CASES[name].architecture)


@pytest.mark.parametrize("name", CASES)
def test_live_outputs_of_pytorch_are_met_and_saved_models_are_the_same_to_it(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    case = CASES[name]
    record(case, tmp_path / "model", seed=1)
    print(name, check_parity(tmp_path / "model", case.architecture))
    if case.architecture == "BertModel":
        return
    config = hf.read_config(tmp_path / "model")
    if case.architecture == "BertForPreTraining":
        _, params = hf.load_masked_lm(tmp_path / "model", seed=0)
        hf.save(tmp_path / "saved", config, params)
    else:
        labels = tuple(case.settings.get("id2label", {0: "LABEL_0", 1: "LABEL_1"}).values())
        _, params = hf.load_classifier(tmp_path / "model", len(labels), seed=0)
        hf.save(tmp_path / "saved", config, params, labels=labels)
    cls = getattr(transformers, case.architecture)
    first, second = (cls.from_pretrained(tmp_path / part).eval() for part in ("model", "saved"))
    configs = [model.config.to_dict() for model in (first, second)]
    assert {key: (one, configs[1].get(key)) for key, one in configs[0].items() if configs[1].get(key) != one} in (
        {},
        {"_name_or_path": (str(tmp_path / "model"), str(tmp_path / "saved"))},
        {"name_or_path": (str(tmp_path / "model"), str(tmp_path / "saved"))},
    )
    for (key, one), (other_key, other) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert key == other_key and torch.equal(one, other), key


def equal(one: nnx.State, other: nnx.State) -> bool:
    return jax.tree.structure(one) == jax.tree.structure(other) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_a_saved_classifier_comes_back_bit_for_bit(pooling: str, tmp_path: Path) -> None:
    config = hf.read_config(CLASSIFIER)
    _, params = hf.load_classifier(CLASSIFIER, 3, seed=0)
    hf.save(tmp_path / "new" / "saved", config, params, labels=LABELS, pooling=pooling)
    assert hf.read_config(tmp_path / "new" / "saved") == config
    assert hf.read_labels(tmp_path / "new" / "saved") == LABELS
    assert hf.read_pooling(tmp_path / "new" / "saved") == pooling
    _, again = hf.load_classifier(tmp_path / "new" / "saved", 3, seed=1, pooling=pooling, labels=LABELS)
    assert equal(params, again)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["saved"]
    other = {"cls": "mean", "mean": "cls"}[pooling]
    with pytest.raises(UserError, match=f"trained with pooling {pooling}, not {other}"):
        hf.load_classifier(tmp_path / "new" / "saved", 3, seed=1, pooling=other, labels=LABELS)


def test_half_precision_halves_the_file_and_is_read_as_float32(tmp_path: Path) -> None:
    config = hf.read_config(FIXTURES / "bert_pretraining")
    _, params = hf.load_masked_lm(FIXTURES / "bert_pretraining", seed=0)
    for dtype, tolerance in (("float16", 1e-3), ("bfloat16", 8e-3)):
        hf.save(tmp_path / dtype, config, params, dtype=dtype)
        size = (tmp_path / dtype / "model.safetensors").stat().st_size
        assert size < 0.56 * (FIXTURES / "bert_pretraining" / "model.safetensors").stat().st_size
        _, again = hf.load_masked_lm(tmp_path / dtype, seed=0)
        for one, other in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True):
            assert other.dtype == jnp.float32
            np.testing.assert_allclose(one, other, atol=tolerance)


def test_nothing_is_written_over_or_left_half_written(tmp_path: Path) -> None:
    _, params = hf.load_classifier(CLASSIFIER, 3, seed=0)
    config = hf.read_config(CLASSIFIER)

    class Broken:
        def save_pretrained(self, directory: str) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="model: cannot be written: No space left on device"):
        hf.save(tmp_path / "model", config, params, tokenizer=Broken())
    assert not list(tmp_path.iterdir())
    params["head"]["bias"].set_value(jnp.array([0.0, jnp.nan, 0.0]))
    with pytest.raises(UserError, match=r"classifier\.bias has NaN"):
        hf.save(tmp_path / "model", config, params)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="exists already"):
        hf.save(tmp_path / "model", config, params)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="cannot be written"):
        hf.save(tmp_path / "file" / "model", config, params)


def test_labels_in_another_order_are_permuted_by_name() -> None:
    order = ("positive", "negative", "neutral")
    _, params = hf.load_classifier(CLASSIFIER, 3, seed=0, labels=LABELS)
    _, permuted = hf.load_classifier(CLASSIFIER, 3, seed=0, labels=order)
    for leaf in ("kernel", "bias"):
        found = dict(zip(order, np.moveaxis(np.asarray(permuted["head"][leaf][...]), -1, 0), strict=True))
        for index, label in enumerate(LABELS):
            np.testing.assert_array_equal(found[label], params["head"][leaf][...][..., index])
    assert equal(params["encoder"], permuted["encoder"]) and equal(params["pooler"], permuted["pooler"])


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (
            3,
            ("negative", "neutral", "good"),
            "classes are negative, neutral, positive, the task's are negative, neutral, good",
        ),
        (2, ("negative", "positive"), "classes are negative, neutral, positive, the task's are negative, positive"),
        (2, None, r"3 classes \(negative, neutral, positive\), wanted 2"),
    ],
)
def test_a_head_of_other_classes_is_refused(classes: int, labels: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf.load_classifier(CLASSIFIER, classes, seed=0, labels=labels)


def test_labels_that_do_not_fit_the_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(UserError, match=r"config\.json: id2label names 2 classes, but the head in the weights has 3"):
        hf.load_classifier(tmp_path / "model", 2, seed=0, labels=("a", "b"))


def test_embedded_names_and_directories_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "checkpoints" / "tiny-bert")
    monkeypatch.setattr(hf, "EMBEDDED", tmp_path / "checkpoints")
    assert hf.resolve("tiny-bert") == tmp_path / "checkpoints" / "tiny-bert"
    assert hf.resolve(str(CLASSIFIER)) == CLASSIFIER
    for name in ("./nowhere", "/no/such/directory", "a/b/c", "../tiny-bert", str(CLASSIFIER / "config.json"), ""):
        with pytest.raises(UserError, match=r"not a directory, a hub id, or an embedded checkpoint \(tiny-bert\)"):
            hf.resolve(name)


def test_hub_ids_ask_for_readable_files_of_a_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any, list[str]]] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repo, revision, allow_patterns))
        return str(CLASSIFIER)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hf.resolve("someone/some-bert@v1.2") == CLASSIFIER
    hf.resolve("some-bert", "main")
    assert [entry[:2] for entry in asked] == [("someone/some-bert", "v1.2"), ("some-bert", "main")]
    assert "config.json" in asked[0][2] and not any(
        pattern.endswith(("bin", "py", "pt", "*")) for pattern in asked[0][2]
    )
    with pytest.raises(UserError, match=r"two revisions, v1\.2 and main"):
        hf.resolve("someone/some-bert@v1.2", "main")


@pytest.mark.parametrize("error", [OSError("no\nnetwork"), ValueError("bad id"), RuntimeError()])
def test_a_hub_that_fails_gives_one_line(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*args: Any, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(UserError, match="someone/some-bert: no such directory.*not had from the hub: .") as caught:
        hf.resolve("someone/some-bert")
    assert "\n" not in str(caught.value)


def test_the_real_hub_client_offline_gives_one_line() -> None:
    with pytest.raises(UserError, match="^someone/no-such-bert: ") as caught:
        hf.resolve("someone/no-such-bert")
    assert "\n" not in str(caught.value)


def test_a_fingerprint_sees_every_number_and_name() -> None:
    _, params = hf.load_classifier(CLASSIFIER, 3, seed=0)
    _, same = hf.load_classifier(CLASSIFIER, 3, seed=5)
    before = hf.fingerprint_params(params)
    assert before == hf.fingerprint_params(same) and len(before) == 64
    bias = same["encoder"]["layers"][1]["output"]["bias"]
    bias.set_value(bias[...].at[3].add(1e-6))
    assert hf.fingerprint_params(same) != before
    swapped = nnx.from_flat_state([((*path[:-1], path[-1] + "_"), leaf) for path, leaf in nnx.to_flat_state(params)])
    assert hf.fingerprint_params(swapped) != before
