"""Strict reading of tensors: each fault gives one error that names the tensor."""

import functools
import importlib.util
import json
import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from tests.fixtures.record import CASES, FIXTURES, RECORDED
from tests.helpers import pytorch_files
from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import MaskedLM
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import weights as hf_weights
from xtransfer.models.hf.config import read_config
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weights import WeightSource, leaves

CLASSIFIERS = [name for name in RECORDED if CASES[name].is_classifier]
Tensors = dict[str, np.ndarray]
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
NORM = "bert.encoder.layer.0.output.LayerNorm.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a copy of the recorded classifier that a test may damage."""
    return Path(shutil.copytree(FIXTURES / "bert_classifier", tmp_path / "model"))


def edit(directory: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


@functools.cache
def abstract_params(config: EncoderConfig, masked_lm: bool, classes: int) -> nnx.State:
    """Return the abstract parameters of a model."""
    if masked_lm:
        return nnx.split(nnx.eval_shape(lambda: MaskedLM(config, rngs=nnx.Rngs(0), with_next_sentence=True)))[1]
    return hf_checkpoint.abstract_classifier(config, classes)[1]


def load(directory: Path, *, masked_lm: bool = False, seed: int = 0, classes: int = 3) -> dict[str, np.ndarray]:
    config = read_config(directory)
    expected = abstract_params(config, masked_lm, classes)
    source = WeightSource.open(directory, FAMILIES[config.family])
    filled = source.fill(expected, seed=seed)
    source.check(expected)  # accepts what can be loaded
    assert jax.tree.map(lambda x: (x.shape, x.dtype), filled) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    return {path: np.asarray(variable[...]) for path, variable in leaves(filled).items()}


def assert_refused(directory: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(directory, **options)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError) as checked:
        check(directory, **options)
    assert str(checked.value) == str(caught.value)


def check(directory: Path, *, masked_lm: bool = False, classes: int = 3) -> None:
    config = read_config(directory)
    source = WeightSource.open(directory, FAMILIES[config.family])
    source.check(abstract_params(config, masked_lm, classes))


def equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return first.keys() == second.keys() and all(np.array_equal(first[path], second[path]) for path in first)


def test_linear_weights_are_transposed_and_embeddings_are_not(directory: Path) -> None:
    params, tensors = load(directory), load_file(directory / "model.safetensors")
    assert len(params) == len(tensors)
    np.testing.assert_array_equal(params["encoder.layers.1.attention.query.kernel"], tensors[QUERY].T)
    np.testing.assert_array_equal(
        params["encoder.embeddings.word_embeddings.embedding"], tensors["bert.embeddings.word_embeddings.weight"]
    )


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_missing_tensor_is_named(name: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    for tensor in tensors:
        save_file({key: value for key, value in tensors.items() if key != tensor}, directory / "model.safetensors")
        name = re.escape(re.sub(r"^gte\.", "new.", tensor))  # the canonical prefix
        assert_refused(directory, f"the weights lack tensor {name}$")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_surplus_tensor_is_refused_in_every_family(name: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))
    tensors = load_file(directory / "model.safetensors")
    layer = next(key for key in tensors if re.search(r"\.layers?\.1\.", key))
    number = layer.split(".1.")[0] + f".{read_config(directory).num_layers}."
    extra = np.zeros((2, 3), np.float32)
    for surplus, message in (
        (number + layer.split(".1.")[1], "has no place in the model that its config.json describes"),
        (layer.replace(".1.", ".1.extra."), r"unknown tensor .*\.extra\..* \[2, 3\]: not a plain"),
        ("adapter.weight", r"unknown tensor adapter\.weight \[2, 3\]: not a plain"),
    ):
        save_file(tensors | {surplus: extra}, directory / "model.safetensors")
        assert_refused(directory, message)


def test_missing_layer_is_named(directory: Path) -> None:
    edit(directory, lambda t: [t.pop(name) for name in list(t) if ".layer.1." in name])
    assert_refused(directory, r"lack tensor bert\.encoder\.layer\.1\.attention\.self\.key\.bias, .* and 13 more")


def test_missing_head_is_initialised_from_the_seed(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(directory, lambda t: [t.pop(f"classifier.{part}") for part in ("weight", "bias")])
    with caplog.at_level(logging.INFO):
        params = load(directory, seed=3, classes=5)
    assert "drawn from seed 3: head.bias, head.kernel" in caplog.text
    assert params["head.kernel"].shape == (15, 5)
    assert 0.015 < params["head.kernel"].std() < 0.025 and not params["head.bias"].any()
    assert equal(params, load(directory, seed=3, classes=5))
    assert not np.array_equal(params["head.kernel"], load(directory, seed=4, classes=5)["head.kernel"])


def test_pooler_may_be_missing_only_if_no_head_was_trained_on_it(directory: Path) -> None:
    edit(directory, lambda t: [t.pop(f"bert.pooler.dense.{part}") for part in ("weight", "bias")])
    assert_refused(directory, r"lack tensor bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight")
    edit(directory, lambda t: [t.pop(f"classifier.{part}") for part in ("weight", "bias")])
    assert load(directory)["pooler.dense.kernel"].std() > 0.015


def test_other_heads_are_ignored_and_new_ones_initialised(directory: Path) -> None:
    pretraining = load(FIXTURES / "bert_pretraining")
    assert "transform.kernel" not in pretraining and pretraining["head.kernel"].shape == (36, 3)
    masked = load(directory, masked_lm=True)
    np.testing.assert_array_equal(masked["transform_norm.scale"], np.ones(15))
    assert not masked["decoder_bias"].any() and masked["next_sentence.kernel"].std() > 0.01


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert.embeddings.extra.weight", r"unknown tensor bert\.embeddings\.extra\.weight \[2, 3\]: not a plain bert"),
        ("bert.encoder.layer.2.output.dense.weight", r"layer\.2\.output\.dense\.weight has no place in the model"),
        ("pooler.dense.bias", r"tensors .*pooler\.dense\.bias and .*pooler\.dense\.bias are the same parameter"),
        ("roberta.pooler.dense.bias", r"unknown tensor roberta\.pooler\.dense\.bias"),
    ],
)
def test_extra_tensor_is_refused(directory: Path, name: str, message: str) -> None:
    edit(directory, lambda t: t.update({name: np.zeros((2, 3), np.float32)}))
    assert_refused(directory, message)


def test_position_ids_are_ignored(directory: Path) -> None:
    before = load(directory)
    edit(directory, lambda t: t.update({"bert.embeddings.position_ids": np.arange(24)[None]}))
    assert equal(before, load(directory))


def test_older_names_load_the_same_parameters(directory: Path) -> None:
    before = load(directory)

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old.removeprefix("bert.")] = tensors.pop(name)

    edit(directory, rename)
    assert equal(before, load(directory))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (QUERY, (15, 14), r"query\.weight has shape \[15, 14\], the model of its config\.json needs \[15, 15\]"),
        (NORM, (15, 1), r"LayerNorm\.weight has shape \[15, 1\], the model of its config\.json needs \[15\]"),
        ("bert.encoder.layer.0.output.dense.weight", (20, 15), r"has shape \[20, 15\], .* needs \[15, 20\]"),
        ("classifier.weight", (2, 15), r"classifier\.weight has shape \[2, 15\], .* needs \[3, 15\]"),
    ],
)
def test_wrong_shape_is_refused_with_both_shapes(
    directory: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    edit(directory, lambda t: t.update({name: np.ones(shape, np.float32)}))
    assert_refused(directory, message)


@pytest.mark.parametrize(("dtype", "shown"), [(np.float64, "F64"), (np.int32, "I32"), (np.uint8, "U8")])
def test_unsupported_dtypes_are_refused(directory: Path, dtype: Any, shown: str) -> None:
    edit(directory, lambda t: t.update({NORM: t[NORM].astype(dtype)}))
    assert_refused(directory, rf"LayerNorm\.weight has dtype {shown}, expected one of F32, F16, BF16: convert it")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened_to_float32(directory: Path, dtype: str) -> None:
    narrow = jax.numpy.dtype(dtype)
    before = load(directory)
    edit(directory, lambda t: t.update({name: value.astype(narrow) for name, value in t.items()}))
    after = load(directory)
    assert {value.dtype for value in after.values()} == {np.dtype(np.float32)}
    assert equal(after, {path: value.astype(narrow).astype(np.float32) for path, value in before.items()})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(directory: Path, value: float) -> None:
    edit(directory, lambda t: t[QUERY].__setitem__((3, 5), value))
    assert_refused(directory, r"self\.query\.weight has NaN or Inf")


def test_tied_copy_must_equal_its_original(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "bert_pretraining", tmp_path / "model"))
    before = load(directory, masked_lm=True)
    word, decoder = "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder"
    edit(
        directory, lambda t: t.update({f"{decoder}.weight": t[word] + 0, f"{decoder}.bias": t["cls.predictions.bias"]})
    )
    assert equal(before, load(directory, masked_lm=True))
    edit(directory, lambda t: t[f"{decoder}.weight"].__setitem__((-1, -1), 9.0))
    assert_refused(directory, r"decoder\.weight differs from the one it is tied to", masked_lm=True)
    edit(directory, lambda t: t.pop(word))
    assert_refused(directory, rf"the weights lack tensor {re.escape(word)}$", masked_lm=True)


def test_truncated_or_corrupt_file_is_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    original = path.read_bytes()
    for content in (
        b"",
        original[:7],
        original[:500],
        original[:-1],
        original[:-4000],
        b"\xff" * 8 + original[8:],
        b"not weights",
    ):
        path.write_bytes(content)
        assert_refused(directory, r"model\.safetensors: not a complete safetensors file")
    path.write_bytes(original)
    load(directory)


def test_lfs_pointer_in_place_of_the_weights_is_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1234\n")
    assert_refused(directory, r"model\.safetensors: a Git LFS pointer, not the file itself: run `git lfs pull`")


class Payload:
    """An object that creates a directory when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_pickled_objects_are_refused_and_never_executed(directory: Path) -> None:
    marker = directory / "executed"
    (directory / "model.safetensors").rename(directory / "kept")
    (directory / "model.pt").write_bytes(pickle.dumps(Payload(marker)))
    assert_refused(directory, r"no model\.safetensors and no pytorch_model\.bin, in one file or with an index: choose")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))
    assert_refused(directory, r"pytorch_model\.bin: it is not a zip file, as PyTorch 1\.6 and later write")
    pytorch_files.write(directory / "pytorch_model.bin", pickle.dumps(Payload(marker)))
    assert_refused(
        directory,
        r"pytorch_model\.bin: its data\.pkl (names|has the opcode) .*, or save the model's state_dict alone, as safet",
    )
    (directory / "model.pt").rename(directory / "model.safetensors")
    assert_refused(directory, r"model\.safetensors: not a complete safetensors file")
    assert not marker.exists()
    pickle.loads((directory / "model.safetensors").read_bytes())
    assert marker.exists()


def to_pytorch(directory: Path) -> Path:
    """Replace the weights by a PyTorch file, and return it."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    return pytorch_files.write_tensors(directory / "pytorch_model.bin", tensors)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_pytorch_files_load_the_same_parameters(name: str, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / name, tmp_path / "model"))
    before = load(directory)
    to_pytorch(directory)
    assert equal(before, load(directory))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_pytorch_files_are_widened_to_float32(directory: Path, dtype: str) -> None:
    tensors = {
        key: value.astype(jax.numpy.dtype(dtype)) for key, value in load_file(directory / "model.safetensors").items()
    }
    before = load(directory)
    pytorch_files.write_tensors(directory / "pytorch_model.bin", tensors)
    (directory / "model.safetensors").unlink()
    expected = {path: value.astype(jax.numpy.dtype(dtype)).astype(np.float32) for path, value in before.items()}
    assert equal(load(directory), expected)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs PyTorch")
def test_files_that_pytorch_writes_load_the_same_parameters(directory: Path) -> None:
    import torch
    import transformers

    before = load(directory)
    model = transformers.BertForSequenceClassification.from_pretrained(directory)
    (directory / "model.safetensors").unlink()
    torch.save(model.state_dict(), directory / "pytorch_model.bin")
    assert equal(before, load(directory))


def test_safetensors_come_before_pytorch_files(directory: Path) -> None:
    before = load(directory)
    (directory / "pytorch_model.bin").write_bytes(b"never opened")
    assert equal(before, load(directory))
    shard(directory)
    assert equal(before, load(directory))
    assert hf_weights.find_weights(directory).name == "model.safetensors.index.json"


def test_faults_of_pytorch_files_name_the_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    path = to_pytorch(directory)
    for name, value, message in (
        (NORM, np.full(15, np.nan, np.float32), "has NaN or Inf: the checkpoint is broken"),
        (NORM, np.ones(14, np.float32), r"has shape \[14\], the model of its config\.json needs \[15\]"),
        (NORM, np.ones(15, np.int64), "has dtype I64, expected one of F32, F16, BF16"),
        ("extra", np.ones(2, np.float32), r"\[2\]: not a plain bert checkpoint"),
    ):
        pytorch_files.write_tensors(path, tensors | {name: value})
        assert_refused(directory, rf"pytorch_model\.bin: (unknown )?tensor {re.escape(name)} {message}")


def test_sharded_pytorch_files_load_the_same_parameters(directory: Path) -> None:
    before, tensors = load(directory), load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    shards = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    table = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for file in shards:
        part = {name: value for name, value in tensors.items() if table[name] == file}
        pytorch_files.write_tensors(directory / file, part)
    index = directory / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": table}))
    assert equal(before, load(directory))
    index.write_text(json.dumps({"weight_map": table | {NORM: "x.safetensors"}}))
    assert_refused(directory, r"bin\.index\.json: weight_map must map tensors to \.bin files of this directory")
    index.write_text(json.dumps({"weight_map": table | {NORM: "lost.bin"}}))
    assert_refused(directory, r"bin\.index\.json: lost\.bin missing")


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


@pytest.mark.parametrize("shift", [4, 1 << 42])
def test_tensor_beyond_the_file_or_inside_another_is_refused(directory: Path, shift: int) -> None:
    path = directory / "model.safetensors"
    header, data = read_header(path)
    header[NORM]["data_offsets"] = [offset + shift for offset in header[NORM]["data_offsets"]]
    raw = json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    assert_refused(directory, r"model\.safetensors: not a complete safetensors file")


def test_duplicate_tensor_name_is_refused(directory: Path) -> None:
    path = directory / "model.safetensors"
    header, data = read_header(path)
    duplicate = {**header[NORM], "data_offsets": [len(data), len(data) + 60]}
    raw = json.dumps(header).encode()[:-1] + f', "{NORM}": {json.dumps(duplicate)}}}'.encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data + bytes(60))
    assert_refused(directory, r"model\.safetensors: not a complete safetensors file")


def shard(directory: Path) -> dict[str, str]:
    """Split the weights into two files with an index, and return its weight_map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    table = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
    for file in SHARDS:
        save_file({name: value for name, value in tensors.items() if table[name] == file}, directory / file)
    write_index(directory, table)
    return table


SHARDS = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
OTHER = dict(zip(SHARDS, reversed(SHARDS), strict=True))


def write_index(directory: Path, table: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_sharded_weights_load_the_same_parameters(directory: Path) -> None:
    before = load(directory)
    shard(directory)
    assert equal(before, load(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {NORM: "../outside.safetensors"}, "must map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "/etc/x.safetensors"}, "must map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "pytorch_model.bin"}, "must map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: 3}, "must map tensors to .safetensors files of this directory"),
        (lambda t: [], "must map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "lost.safetensors"}, r"lost\.safetensors missing"),
        (lambda t: t | {NORM: ".hidden.safetensors"}, "must map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "a\\..\\b.safetensors"}, "must map tensors to .safetensors files of this directory"),
        (lambda t: t | {"ghost": t[NORM]}, "tensor ghost is not in the file that the index names, or not in both"),
        (lambda t: {k: v for k, v in t.items() if k != NORM}, r"LayerNorm\.weight is not in the file that"),
        (lambda t: t | {NORM: OTHER[t[NORM]]}, r"LayerNorm\.weight is not in the file that"),
    ],
)
def test_wrong_index_is_refused(directory: Path, change: Callable[[Any], Any], message: str) -> None:
    write_index(directory, change(shard(directory)))
    assert_refused(directory, rf"index\.json: .*{message}")


def test_tensor_in_two_shards_or_twice_in_the_index_is_refused(directory: Path) -> None:
    table = shard(directory)
    path = directory / "model.safetensors.index.json"
    path.write_text(path.read_text().replace("{", f'{{"weight_map": {{"{NORM}": "x.safetensors"}}, ', 1))
    assert_refused(directory, r"index\.json: not valid JSON \(the key 'weight_map' occurs twice\): download it again")
    write_index(directory, table)
    other = directory / OTHER[table[NORM]]
    save_file(load_file(other) | {NORM: np.ones(15, np.float32)}, other)
    assert_refused(directory, r"index\.json: tensor .*output\.LayerNorm\.weight is in several of the files")


def test_shapes_are_checked_before_any_data_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("tensor data was read")

    monkeypatch.setattr(hf_weights.Tensor, "pieces", fail)
    edit(directory, lambda t: t.update({"classifier.bias": np.ones(4, np.float32)}))
    assert_refused(directory, r"classifier\.bias has shape \[4\], the model of its config\.json needs \[3\]")


@pytest.mark.parametrize("rows", [1, 7, 10**6])
def test_reading_in_pieces_gives_the_same_parameters(
    directory: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load(directory)
    monkeypatch.setattr(hf_weights, "_PIECE", 15 * rows)
    assert equal(before, load(directory))
    edit(directory, lambda t: t["bert.embeddings.word_embeddings.weight"].__setitem__((-1, -1), np.nan))
    assert_refused(directory, r"word_embeddings\.weight has NaN or Inf")
