"""Checkpoints: parity of the pretraining heads with PyTorch, saving, labels, names, and fingerprints."""

import dataclasses
import json
import re
import resource
import shutil
import signal
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.fixtures.record import CASES, FIXTURES, RECORDED, record
from tests.helpers import pytorch_files, tiny
from xtransfer.data.tokens.tokenizer import load_tokenizer
from xtransfer.errors import UserError
from xtransfer.models.heads import Classifier
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf import weights as hf_weights
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import leaves
from xtransfer.parity import activations, reference
from xtransfer.runtime.sharding import make_mesh, param_shardings

CLASSIFIER = FIXTURES / "bert_classifier"
LABELS = ("negative", "neutral", "positive")


def check_pretraining(directory: Path) -> None:
    """Compare the encoder and all of its pretraining heads with the reference beside the checkpoint."""
    recorded = reference.load(directory / reference.FILE, directory)
    batch = activations.batch_of(recorded.inputs, hf_config.read_config(directory))
    rows, length = batch["input_ids"].shape
    batch["mlm_positions"] = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    graphdef, params = hf_checkpoint.load_masked_lm(directory, seed=0)
    mlm_logits = jax.jit(lambda params, batch: nnx.merge(graphdef, params)(batch))(params, batch)
    ours = activations.activations(directory, recorded.inputs)
    ours["prediction_logits"] = np.asarray(mlm_logits)[batch["segment_ids"] == 1]
    heads = ["prediction_logits"]
    if "seq_relationship_logits" in recorded.activations:
        model = nnx.merge(graphdef, params)
        ours["seq_relationship_logits"] = np.asarray(model.next_sentence_logits(jax.tree.map(jnp.asarray, batch)))[:, 0]
        heads = ["pooled", "prediction_logits", "seq_relationship_logits"]
    comparison = activations.compare(ours, recorded.activations)
    assert [row.name for row in comparison][-len(heads) :] == heads
    assert max(row.maximum for row in comparison) <= activations.TOLERANCE, comparison


@pytest.mark.parametrize("name", [name for name in RECORDED if CASES[name].has_language_model])
def test_pretraining_heads_match_recorded_outputs(name: str) -> None:
    check_pretraining(FIXTURES / name)


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].has_language_model])
def test_pretraining_heads_match_live_outputs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    record(CASES[name], tmp_path / "model", seed=1)
    check_pretraining(tmp_path / "model")


@pytest.mark.parametrize("name", [name for name in RECORDED if CASES[name].has_language_model])
def test_transformers_loads_saved_pretraining_heads_unchanged(name: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import transformers

    architecture = getattr(transformers, CASES[name].architecture)
    directory = FIXTURES / name
    hf_checkpoint.save(
        tmp_path / "saved", hf_config.read_config(directory), hf_checkpoint.load_masked_lm(directory, seed=0)[1]
    )
    original, saved = (architecture.from_pretrained(path).eval() for path in (directory, tmp_path / "saved"))
    assert original.config.architectures == saved.config.architectures
    for (key, tensor), (saved_key, saved_tensor) in zip(
        original.state_dict().items(), saved.state_dict().items(), strict=True
    ):
        assert key == saved_key and torch.equal(tensor, saved_tensor), key


def equal(first: nnx.State, second: nnx.State) -> bool:
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    )


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_saved_classifier_loads_bit_for_bit(pooling: str, tmp_path: Path) -> None:
    config = hf_config.read_config(CLASSIFIER)
    _, params = hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=0)
    hf_checkpoint.save(tmp_path / "new" / "saved", config, params, labels=LABELS, pooling=pooling)
    assert hf_config.read_config(tmp_path / "new" / "saved") == config
    assert hf_config.read_labels(tmp_path / "new" / "saved") == LABELS
    assert hf_config.read_pooling(tmp_path / "new" / "saved") == pooling
    _, loaded = hf_checkpoint.load_classifier(tmp_path / "new" / "saved", 3, seed=1, pooling=pooling, labels=LABELS)
    assert equal(params, loaded)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["saved"]
    other_pooling = {"cls": "mean", "mean": "cls"}[pooling]
    with pytest.raises(UserError, match=f"trained with pooling {pooling}, not {other_pooling}"):
        hf_checkpoint.load_classifier(tmp_path / "new" / "saved", 3, seed=1, pooling=other_pooling, labels=LABELS)


def test_half_precision_halves_the_file_and_is_read_as_float32(tmp_path: Path) -> None:
    config = hf_config.read_config(FIXTURES / "bert_pretraining")
    _, params = hf_checkpoint.load_masked_lm(FIXTURES / "bert_pretraining", seed=0)
    for dtype, tolerance in (("float16", 1e-3), ("bfloat16", 8e-3)):
        hf_checkpoint.save(tmp_path / dtype, config, params, dtype=dtype)
        size = (tmp_path / dtype / "model.safetensors").stat().st_size
        assert size < 0.56 * (FIXTURES / "bert_pretraining" / "model.safetensors").stat().st_size
        _, loaded = hf_checkpoint.load_masked_lm(tmp_path / dtype, seed=0)
        for original, restored in zip(jax.tree.leaves(params), jax.tree.leaves(loaded), strict=True):
            assert restored.dtype == jnp.float32
            np.testing.assert_allclose(original, restored, atol=tolerance)


def test_saving_overwrites_nothing_and_leaves_nothing_incomplete(tmp_path: Path) -> None:
    _, params = hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=0)
    config = hf_config.read_config(CLASSIFIER)

    class Broken:
        def save_pretrained(self, directory: str) -> None:
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="model: cannot be written: No space left on device"):
        hf_checkpoint.save(tmp_path / "model", config, params, tokenizer=Broken())
    assert not list(tmp_path.iterdir())
    params["head"]["bias"].set_value(jnp.array([0.0, jnp.nan, 0.0]))
    with pytest.raises(UserError, match=r"classifier\.bias has NaN"):
        hf_checkpoint.save(tmp_path / "model", config, params)
    assert not list(tmp_path.iterdir())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "existing.txt").write_text("keep")
    with pytest.raises(UserError, match="already exists"):
        hf_checkpoint.save(tmp_path / "model", config, params)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match="cannot be written"):
        hf_checkpoint.save(tmp_path / "file" / "model", config, params)


def test_head_is_permuted_to_the_order_of_the_labels() -> None:
    order = ("positive", "negative", "neutral")
    _, params = hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=0, labels=LABELS)
    _, permuted = hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=0, labels=order)
    for leaf in ("kernel", "bias"):
        by_label = dict(zip(order, np.moveaxis(np.asarray(permuted["head"][leaf][...]), -1, 0), strict=True))
        for index, label in enumerate(LABELS):
            np.testing.assert_array_equal(by_label[label], params["head"][leaf][...][..., index])
    assert equal(params["encoder"], permuted["encoder"]) and equal(params["pooler"], permuted["pooler"])


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (
            3,
            ("negative", "neutral", "good"),
            "classes are negative, neutral, positive, the task's are negative, neutral, good: if they are the same "
            "classes, write the task's names into id2label; otherwise set `checkpoint` to the encoder that this cl",
        ),
        (
            2,
            ("negative", "positive"),
            "classes are negative, neutral, positive, the task's are negative, positive: set `checkpoint` to the enc",
        ),
        (2, None, r"3 classes \(negative, neutral, positive\), expected 2: .*; no setting drops a trained head$"),
    ],
)
def test_head_with_other_classes_is_refused(classes: int, labels: tuple[str, ...] | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        hf_checkpoint.load_classifier(CLASSIFIER, classes, seed=0, labels=labels)
    with pytest.raises(UserError, match=message):
        hf_checkpoint.check_classifier(CLASSIFIER, classes, labels=labels)


@pytest.mark.parametrize("row", [0, -1])
def test_check_reads_every_shard_and_places_nothing(row: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, mesh = Path(shutil.copytree(CLASSIFIER, tmp_path / "model")), make_mesh((1, 4, 2))
    monkeypatch.setattr(hf_weights, "_placed", lambda *_: pytest.fail("a leaf was placed on a device"))
    hf_checkpoint.check_classifier(directory, 3, labels=LABELS, mesh=mesh)
    tensors = load_file(directory / "model.safetensors")
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    tensors[name][row, row] = np.inf
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match=f"{re.escape(name)} has NaN or Inf"):
        hf_checkpoint.check_classifier(directory, 3, labels=LABELS, mesh=mesh)


def test_checkpoint_with_an_untied_decoder_loads_only_as_a_classifier(tmp_path: Path) -> None:
    """A classifier does not need the decoder, but continued pretraining would lose it."""
    directory = Path(shutil.copytree(FIXTURES / "bert_pretraining", tmp_path / "model"))
    path, weights = directory / "config.json", directory / "model.safetensors"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tie_word_embeddings": False}))
    tensors = load_file(weights)
    decoder = tensors["bert.embeddings.word_embeddings.weight"][::-1].copy()
    save_file(tensors | {"cls.predictions.decoder.weight": decoder}, weights, metadata={"format": "pt"})
    _, params = hf_checkpoint.load_classifier(directory, 2, seed=0)
    _, expected = hf_checkpoint.load_classifier(FIXTURES / "bert_pretraining", 2, seed=0)
    assert equal(params, expected)
    with pytest.raises(UserError, match=r"config\.json: tie_word_embeddings is False: only True is supported"):
        hf_checkpoint.load_masked_lm(directory, seed=0)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_full_disk_is_a_one_line_error_that_names_the_directory(file: str, tmp_path: Path) -> None:
    """Each of the three writers raises a different exception."""
    directory = tiny.checkpoint(tmp_path / "tiny")
    (_, params), config = hf_checkpoint.load_masked_lm(directory, seed=0), hf_config.read_config(directory)
    tokenizer = load_tokenizer(hf_checkpoint.EMBEDDED / "mini-bert-en")  # larger than these weights
    limit = {"config.json": 300, "model.safetensors": 5000, "tokenizer.json": 40_000}[file]
    previous_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, previous_limit[1]))
        with pytest.raises(UserError, match=f"^{tmp_path}/models/out: cannot be written: .*File too large") as caught:
            hf_checkpoint.save(tmp_path / "models" / "out", config, params, tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, previous_limit)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert "\n" not in str(caught.value) and not list((tmp_path / "models").iterdir())


def test_code_of_a_checkpoint_is_never_executed(tmp_path: Path) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "modeling_own.Own"}}))
    (tmp_path / "model" / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    _, params = hf_checkpoint.load_classifier(path.parent, 3, seed=0)
    assert equal(params, hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=0)[1])
    hf_checkpoint.load_masked_lm(path.parent, seed=0)
    assert not (tmp_path / "ran").exists()


def test_labels_that_do_not_match_the_weights_are_refused(tmp_path: Path) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "a", "1": "b"}}))
    with pytest.raises(UserError, match=r"config\.json: id2label names 2 classes, but the head in the weights has 3"):
        hf_checkpoint.load_classifier(tmp_path / "model", 2, seed=0, labels=("a", "b"))


def test_embedded_names_and_directories_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(CLASSIFIER, tmp_path / "checkpoints" / "tiny-bert")
    monkeypatch.setattr(hf_checkpoint, "EMBEDDED", tmp_path / "checkpoints")
    assert hf_checkpoint.resolve("tiny-bert") == tmp_path / "checkpoints" / "tiny-bert"
    assert hf_checkpoint.resolve(str(CLASSIFIER)) == CLASSIFIER
    for name in ("./nowhere", "/no/such/directory", "a/b/c", "../tiny-bert", str(CLASSIFIER / "config.json"), ""):
        with pytest.raises(UserError, match=r"not a directory, a hub id, or an embedded checkpoint \(tiny-bert\)"):
            hf_checkpoint.resolve(name)


def test_conflicting_revisions_are_refused() -> None:
    with pytest.raises(UserError, match=r"two revisions, v1\.2 and main: choose one"):
        hf_checkpoint.resolve("someone/some-bert@v1.2", "main")


def test_embedded_checkpoints_resolve_by_name_without_the_hub() -> None:
    for name in ("mini-bert-en", "mini-bert-multilingual"):
        assert hf_checkpoint.resolve(name) == hf_checkpoint.EMBEDDED / name


@pytest.mark.parametrize("name", [f"{name}_classifier" for name, family in FAMILIES.items() if family.pretrains])
def test_a_language_models_head_is_new_if_the_file_lacks_it(name: str) -> None:
    """As for sentence encoders, which are published without it. The classification head is left behind."""
    graphdef, params = hf_checkpoint.load_masked_lm(FIXTURES / name, seed=3)
    model = nnx.merge(graphdef, params)
    assert not hasattr(model, "head") and not np.any(model.decoder_bias[...])
    assert hasattr(model, "pooler") == name.startswith(("bert", "gte", "new", "modernbert"))
    if not name.startswith("modernbert"):  # its language model decodes what its pooler makes
        assert 0.01 < float(np.std(model.transform.kernel[...])) < 0.03
        assert np.all(model.transform_norm.scale[...] == 1)


def test_a_family_without_a_language_models_head_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["electra"]
    rules = tuple(rule for rule in family.rules if rule.target != "decoder_bias")
    monkeypatch.setitem(FAMILIES, "electra", dataclasses.replace(family, rules=rules))
    expected = r"config\.json: model_type is electra: only bert, .* checkpoints can be pretrained further"
    with pytest.raises(UserError, match=expected):
        hf_checkpoint.load_masked_lm(FIXTURES / "electra_classifier", seed=0)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("name", ["bert_pretraining", "electra_classifier"])
def test_parameters_on_a_mesh_are_equal_and_sharded_by_the_rules(name: str, shape: tuple[int, ...]) -> None:
    mesh = make_mesh(shape)
    if CASES[name].is_classifier:
        order = ("positive", "negative", "neutral")
        _, unsharded = hf_checkpoint.load_classifier(FIXTURES / name, 3, seed=0, labels=order)
        _, sharded = hf_checkpoint.load_classifier(FIXTURES / name, 3, seed=0, labels=order, mesh=mesh)
    else:
        _, unsharded = hf_checkpoint.load_masked_lm(FIXTURES / name, seed=0)
        _, sharded = hf_checkpoint.load_masked_lm(FIXTURES / name, seed=0, mesh=mesh)
    assert equal(unsharded, sharded)
    layout = param_shardings(mesh, unsharded)
    assert jax.tree.map(lambda leaf: leaf.sharding, sharded) == layout
    for leaf, placed in zip(jax.tree.leaves(sharded), jax.tree.leaves(jax.device_put(sharded, layout)), strict=True):
        assert placed is leaf  # device_put had nothing to move


def test_new_head_is_the_same_on_a_mesh() -> None:
    mesh = make_mesh((1, 4, 2))
    _, unsharded = hf_checkpoint.load_classifier(FIXTURES / "bert_pretraining", 4, seed=7)
    _, sharded = hf_checkpoint.load_classifier(FIXTURES / "bert_pretraining", 4, seed=7, mesh=mesh)
    assert equal(unsharded, sharded) and not sharded["head"]["kernel"][...].sharding.is_fully_replicated


def test_fingerprint_depends_on_every_value_and_name() -> None:
    _, params = hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=0)
    _, other = hf_checkpoint.load_classifier(CLASSIFIER, 3, seed=5)
    before = hf_checkpoint.fingerprint_params(params)
    assert before == hf_checkpoint.fingerprint_params(other) and len(before) == 64
    bias = other["encoder"]["layers"][1]["output"]["bias"]
    bias.set_value(bias[...].at[3].add(1e-6))
    assert hf_checkpoint.fingerprint_params(other) != before
    renamed = nnx.from_flat_state([((*path[:-1], path[-1] + "_"), leaf) for path, leaf in nnx.to_flat_state(params)])
    assert hf_checkpoint.fingerprint_params(renamed) != before


def test_fingerprint_of_a_directory_covers_only_the_files_that_are_read(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(hf_checkpoint.EMBEDDED / "mini-bert-en", tmp_path / "model"))
    before = hf_checkpoint.fingerprint_files(directory)
    for name in ("README.md", "model.fp16.safetensors", "pytorch_model.bin", "reference.safetensors"):
        (directory / name).write_text("other")
    assert hf_checkpoint.fingerprint_files(directory) == before
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (directory / name).write_bytes((directory / name).read_bytes() + b" ")
        assert hf_checkpoint.fingerprint_files(directory) != before
        before = hf_checkpoint.fingerprint_files(directory)


def test_fingerprint_covers_pytorch_files_and_their_index(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(CLASSIFIER, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    pytorch_files.write_tensors(directory / "pytorch_model.bin", tensors)
    prints = [hf_checkpoint.fingerprint_files(directory)]
    pytorch_files.write_tensors(directory / "pytorch_model.bin", tensors | {"classifier.bias": np.ones(3, np.float32)})
    prints.append(hf_checkpoint.fingerprint_files(directory))
    (directory / "pytorch_model.bin").rename(directory / "part.bin")
    for indent in (0, 1):
        table = {"weight_map": dict.fromkeys(tensors, "part.bin")}
        (directory / "pytorch_model.bin.index.json").write_text(json.dumps(table, indent=indent))
        prints.append(hf_checkpoint.fingerprint_files(directory))
    assert len(set(prints)) == 4


def test_saved_config_has_the_special_ids_of_the_tokenizer(tmp_path: Path) -> None:
    directory = tiny.checkpoint(tmp_path / "tiny")
    config = json.loads((directory / "config.json").read_text())
    assert {key: value for key, value in config.items() if key.endswith("token_id")} == {
        "pad_token_id": 0,
        "cls_token_id": 2,
        "sep_token_id": 3,
    }


@pytest.mark.parametrize("name", RECORDED)
def test_every_parameter_of_every_family_is_loaded(name: str) -> None:
    directory = FIXTURES / name
    params, dtype = hf_checkpoint.load_parameters(directory)
    if CASES[name].has_language_model:
        expected = hf_checkpoint.load_masked_lm(directory, seed=0)[1]
    else:
        pooling = hf_config.read_pooling(directory)
        expected = hf_checkpoint.load_classifier(directory, 3, seed=0, pooling=pooling)[1]
    ours, theirs = leaves(params), leaves(expected)
    assert ours.keys() == theirs.keys() and dtype == "float32"
    for path, leaf in theirs.items():
        np.testing.assert_array_equal(np.asarray(ours[path][...]), np.asarray(leaf[...]), err_msg=path)


def test_half_of_a_head_is_refused(tmp_path: Path) -> None:
    base = tiny.checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    del tensors["cls.predictions.bias"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the weights lack tensor cls.predictions.bias"):
        hf_checkpoint.load_parameters(base)


@pytest.mark.parametrize("name", [case.name for case in sorted(FIXTURES.glob("*_classifier"))])
def test_the_shapes_of_a_classifier_do_not_need_a_key_for_each_parameter(name: str) -> None:
    config = hf_config.read_config(FIXTURES / name)
    graphdef, shapes = hf_checkpoint.abstract_classifier(config, 3, pooling="mean", dtype=jnp.bfloat16, remat=True)

    def make() -> Classifier:
        return Classifier(config, 3, rngs=nnx.Rngs(0), pooling="mean", dtype=jnp.dtype(jnp.bfloat16), remat=True)

    assert (graphdef, shapes) == nnx.split(nnx.eval_shape(make))


def test_the_shapes_of_a_classifier_can_be_changed() -> None:
    config = hf_config.read_config(CLASSIFIER)
    del hf_checkpoint.abstract_classifier(config, 3)[1]["head"]
    assert hf_checkpoint.abstract_classifier(config, 3)[1]["head"]["kernel"].shape == (config.hidden_size, 3)
