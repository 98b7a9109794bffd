"""Strict reading of tensors: each fault gives one error that names the tensor."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from xtransfer.errors import UserError
from xtransfer.models.encoder import Classifier, MaskedLM
from xtransfer.models.hf_config import read_config
from xtransfer.models.hf_weights import Source, leaves
from xtransfer.models.weight_maps import BERT

FIXTURES = Path(__file__).parent / "fixtures"
Tensors = dict[str, np.ndarray]
QUERY = "bert.encoder.layer.1.attention.self.query.weight"
NORM = "bert.encoder.layer.0.output.LayerNorm.weight"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A copy of the recorded classifier, to be spoilt."""
    return Path(shutil.copytree(FIXTURES / "bert_classifier", tmp_path / "model"))


def edit(directory: Path, change: Callable[[Tensors], Any]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def load(directory: Path, *, masked_lm: bool = False, seed: int = 0, classes: int = 3) -> dict[str, np.ndarray]:
    config = read_config(directory)

    def model() -> Any:
        if masked_lm:
            return MaskedLM(config, rngs=nnx.Rngs(0))
        return Classifier(config, classes, rngs=nnx.Rngs(0))

    abstract = nnx.split(nnx.eval_shape(model))[1]
    filled = Source.open(directory, BERT).fill(abstract, seed=seed)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), filled) == jax.tree.map(lambda x: (x.shape, x.dtype), abstract)
    return {path: np.asarray(variable[...]) for path, variable in leaves(filled).items()}


def refuses(directory: Path, message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(directory, **options)
    assert str(directory) in str(caught.value) and "\n" not in str(caught.value)


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[path], other[path]) for path in one)


def test_linear_weights_are_transposed_and_embeddings_are_not(directory: Path) -> None:
    found, tensors = load(directory), load_file(directory / "model.safetensors")
    assert len(found) == len(tensors)
    np.testing.assert_array_equal(found["encoder.layers.1.attention.query.kernel"], tensors[QUERY].T)
    np.testing.assert_array_equal(
        found["encoder.embeddings.word_embeddings.embedding"], tensors["bert.embeddings.word_embeddings.weight"]
    )


def test_each_tensor_is_missed(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name in tensors:
        save_file({key: value for key, value in tensors.items() if key != name}, directory / "model.safetensors")
        refuses(directory, f"the weights lack tensor {name}$")


def test_a_lost_layer_is_missed(directory: Path) -> None:
    edit(directory, lambda t: [t.pop(name) for name in list(t) if ".layer.1." in name])
    refuses(directory, r"lack tensor bert\.encoder\.layer\.1\.attention\.self\.key\.bias, .* and 13 more")


def test_an_absent_head_is_new_and_drawn_from_the_seed(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(directory, lambda t: [t.pop(f"classifier.{part}") for part in ("weight", "bias")])
    with caplog.at_level(logging.INFO):
        found = load(directory, seed=3, classes=5)
    assert "drawn from seed 3: head.bias, head.kernel" in caplog.text
    assert found["head.kernel"].shape == (36, 5)
    assert 0.015 < found["head.kernel"].std() < 0.025 and not found["head.bias"].any()
    assert same(found, load(directory, seed=3, classes=5))
    assert not np.array_equal(found["head.kernel"], load(directory, seed=4, classes=5)["head.kernel"])


def test_a_pooler_may_be_absent_only_where_no_head_was_trained_on_it(directory: Path) -> None:
    edit(directory, lambda t: [t.pop(f"bert.pooler.dense.{part}") for part in ("weight", "bias")])
    refuses(directory, r"lack tensor bert\.pooler\.dense\.bias, bert\.pooler\.dense\.weight")
    edit(directory, lambda t: [t.pop(f"classifier.{part}") for part in ("weight", "bias")])
    assert load(directory)["pooler.dense.kernel"].std() > 0.015


def test_other_heads_stay_in_the_file_and_new_ones_are_drawn(directory: Path) -> None:
    pretraining = load(FIXTURES / "bert_pretraining")
    assert "transform.kernel" not in pretraining and pretraining["head.kernel"].shape == (36, 3)
    masked = load(directory, masked_lm=True)
    np.testing.assert_array_equal(masked["transform_norm.scale"], np.ones(36))
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
def test_an_extra_tensor_is_refused(directory: Path, name: str, message: str) -> None:
    edit(directory, lambda t: t.update({name: np.zeros((2, 3), np.float32)}))
    refuses(directory, message)


def test_position_ids_are_left_in_the_file(directory: Path) -> None:
    before = load(directory)
    edit(directory, lambda t: t.update({"bert.embeddings.position_ids": np.arange(24)[None]}))
    assert same(before, load(directory))


def test_older_names_are_the_same_tensors(directory: Path) -> None:
    before = load(directory)

    def rename(tensors: Tensors) -> None:
        for name in list(tensors):
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old.removeprefix("bert.")] = tensors.pop(name)

    edit(directory, rename)
    assert same(before, load(directory))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        (QUERY, (36, 35), r"query\.weight has shape \[36, 35\], the model of its config\.json needs \[36, 36\]"),
        (NORM, (36, 1), r"LayerNorm\.weight has shape \[36, 1\], the model of its config\.json needs \[36\]"),
        ("bert.encoder.layer.0.output.dense.weight", (44, 36), r"has shape \[44, 36\], .* needs \[36, 44\]"),
        ("classifier.weight", (2, 36), r"classifier\.weight has shape \[2, 36\], .* needs \[3, 36\]"),
    ],
)
def test_a_wrong_shape_is_refused_with_both_shapes(
    directory: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    edit(directory, lambda t: t.update({name: np.ones(shape, np.float32)}))
    refuses(directory, message)


@pytest.mark.parametrize(("dtype", "shown"), [(np.float64, "F64"), (np.int32, "I32"), (np.uint8, "U8")])
def test_other_dtypes_are_refused(directory: Path, dtype: Any, shown: str) -> None:
    edit(directory, lambda t: t.update({NORM: t[NORM].astype(dtype)}))
    refuses(directory, rf"LayerNorm\.weight has dtype {shown}: one of F32, F16, BF16")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_widened(directory: Path, dtype: str) -> None:
    narrow = jax.numpy.dtype(dtype)
    before = load(directory)
    edit(directory, lambda t: t.update({name: value.astype(narrow) for name, value in t.items()}))
    after = load(directory)
    assert {value.dtype for value in after.values()} == {np.dtype(np.float32)}
    assert same(after, {path: value.astype(narrow).astype(np.float32) for path, value in before.items()})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(directory: Path, value: float) -> None:
    edit(directory, lambda t: t[QUERY].__setitem__((3, 5), value))
    refuses(directory, r"self\.query\.weight has NaN or Inf")


def test_a_repeated_tied_tensor_has_to_be_equal(tmp_path: Path) -> None:
    directory = Path(shutil.copytree(FIXTURES / "bert_pretraining", tmp_path / "model"))
    before = load(directory, masked_lm=True)
    word = "bert.embeddings.word_embeddings.weight"
    edit(
        directory,
        lambda t: t.update(
            {
                "cls.predictions.decoder.weight": t[word].copy(),
                "cls.predictions.decoder.bias": t["cls.predictions.bias"].copy(),
            }
        ),
    )
    assert same(before, load(directory, masked_lm=True))
    edit(directory, lambda t: t["cls.predictions.decoder.weight"].__setitem__((0, 0), 9.0))
    refuses(directory, r"decoder\.weight differs from the one it is tied to", masked_lm=True)


def test_a_truncated_or_corrupt_file_is_named(directory: Path) -> None:
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    for content in (b"", whole[:7], whole[:500], whole[:-1], whole[:-4000], b"\xff" * 8 + whole[8:], b"not weights"):
        path.write_bytes(content)
        refuses(directory, r"model\.safetensors: not a whole safetensors file")
    path.write_bytes(whole)
    load(directory)


def test_pickled_weights_alone_are_refused_with_advice(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refuses(directory, r"no model\.safetensors \(pickled weights such as pytorch_model\.bin are never read: convert")


def shard(directory: Path) -> dict[str, str]:
    """Splits the weights over two files with an index; returns its weight_map."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    table = {name: files[i % 2] for i, name in enumerate(tensors)}
    for file in files:
        save_file({name: value for name, value in tensors.items() if table[name] == file}, directory / file)
    write_index(directory, table)
    return table


def write_index(directory: Path, table: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_weights_in_several_files_are_the_same(directory: Path) -> None:
    before = load(directory)
    shard(directory)
    assert same(before, load(directory))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {NORM: "../outside.safetensors"}, "has to map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "/etc/x.safetensors"}, "has to map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "pytorch_model.bin"}, "has to map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: 3}, "has to map tensors to .safetensors files of this directory"),
        (lambda t: [], "has to map tensors to .safetensors files of this directory"),
        (lambda t: t | {NORM: "lost.safetensors"}, r"lost\.safetensors missing"),
        (lambda t: t | {"ghost": t[NORM]}, "tensor ghost is in the index or in the files, not in both"),
        (lambda t: {k: v for k, v in t.items() if k != NORM}, "LayerNorm.weight is in the index or in the files, not"),
    ],
)
def test_an_index_that_is_not_true_is_refused(directory: Path, change: Callable[[Any], Any], message: str) -> None:
    write_index(directory, change(shard(directory)))
    refuses(directory, rf"index\.json: .*{message}")
