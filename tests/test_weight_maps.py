"""The name tables: one rule a name, and the inverse."""

import ast
import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.models import weight_maps
from xtransfer.models.encoder import Classifier, EncoderConfig, MaskedLM
from xtransfer.models.weight_maps import BERT, FAMILIES, Rule

CONFIG = EncoderConfig(
    vocab_size=9, hidden_size=4, num_layers=11, num_heads=2, intermediate_size=6, max_positions=8, type_vocab_size=1
)
MODELS: dict[str, Callable[[], Any]] = {
    "classifier": lambda: Classifier(CONFIG, 2, rngs=nnx.Rngs(0)),
    "masked_lm": lambda: MaskedLM(CONFIG, rngs=nnx.Rngs(0)),
}


@cache
def targets(model: str) -> list[str]:
    state = nnx.state(nnx.eval_shape(MODELS[model]))
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
@pytest.mark.parametrize("model", MODELS)
def test_every_leaf_has_one_name_and_every_name_one_leaf(family: weight_maps.Family, model: str) -> None:
    paths = targets(model)
    names = [family.source(path) for path in paths]
    assert len({name for name, _ in names}) == len(paths)
    assert [family.target(name) for name, _ in names] == [
        (path, transform) for path, (_, transform) in zip(paths, names, strict=True)
    ]
    for path, (_, transform) in zip(paths, names, strict=True):
        assert (transform == weight_maps.TRANSPOSE) == ("kernel" in path)


@given(st.integers(0, 10**6))
def test_layer_numbers_survive(layer: int) -> None:
    target = f"encoder.layers.{layer}.attention.query.kernel"
    assert BERT.source(target) == (f"bert.encoder.layer.{layer}.attention.self.query.weight", "transpose")
    assert BERT.target(f"bert.encoder.layer.{layer}.attention.self.query.weight") == (target, "transpose")


@pytest.mark.parametrize(
    "name",
    [
        "bert.encoder.layer.01.output.dense.bias",  # would be a second name for layer 1
        "bert.encoder.layer.x.output.dense.bias",
        "bert.encoder.layer.1.output.dense.bias.extra",
        "bert.encoder.layer.1.output.denseXbias",
        "roberta.embeddings.word_embeddings.weight",
    ],
)
def test_other_names_match_nothing(name: str) -> None:
    assert BERT.target(BERT.canonical(name)) is None
    assert not BERT.is_ignorable(BERT.canonical(name))


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert.encoder.layer.3.output.LayerNorm.beta", "bert.encoder.layer.3.output.LayerNorm.bias"),
        ("pooler.dense.bias", "bert.pooler.dense.bias"),
        ("classifier.weight", "classifier.weight"),
        ("cls.seq_relationship.bias", "cls.seq_relationship.bias"),
    ],
)
def test_older_and_bare_names_are_the_same_tensors(name: str, canonical: str) -> None:
    assert BERT.canonical(name) == canonical
    assert BERT.canonical(canonical) == canonical
    assert BERT.target(canonical) is not None


def test_copies_and_ignorable_names() -> None:
    assert BERT.copy_of("cls.predictions.decoder.weight") == "bert.embeddings.word_embeddings.weight"
    assert BERT.copy_of("cls.predictions.bias") is None
    assert BERT.is_ignorable(BERT.canonical("embeddings.position_ids"))
    assert not BERT.is_ignorable("bert.embeddings.position_embeddings.weight")


def test_heads_are_all_that_lies_outside_the_encoder() -> None:
    for model in MODELS:
        assert [path for path in targets(model) if not BERT.is_head(path)] == [
            path for path in targets(model) if path.startswith("encoder.")
        ]


@pytest.mark.parametrize(
    ("model", "architecture"), [("classifier", "BertForSequenceClassification"), ("masked_lm", "BertForPreTraining")]
)
def test_leaves_tell_the_architecture(model: str, architecture: str) -> None:
    assert BERT.architecture(frozenset(targets(model))) == architecture
    assert BERT.architecture(frozenset({"encoder.embeddings.norm.bias"})) == "BertModel"


def test_an_ambiguous_table_is_a_fault() -> None:
    twice = dataclasses.replace(BERT, rules=(*BERT.rules, Rule("classifier.bias", "other")))
    with pytest.raises(ValueError, match=r"classifier\.bias matches 2 rules"):
        twice.target("classifier.bias")


def test_a_leaf_without_a_name_is_a_fault() -> None:
    with pytest.raises(KeyError, match="adapter"):
        BERT.source("encoder.adapter.kernel")


def test_the_tables_know_no_arrays() -> None:
    tree = ast.parse(Path(weight_maps.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported <= {"re", "dataclasses", "functools"}
