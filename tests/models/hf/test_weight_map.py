"""The name tables: one rule per name, and its inverse."""

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

from xtransfer.models import encoder
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import Classifier, MaskedLM
from xtransfer.models.hf import families, weight_map
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.families.bert import BERT
from xtransfer.models.hf.weight_map import TRANSPOSED, Layout, Rule

CONFIG = EncoderConfig(
    vocab_size=9, hidden_size=4, num_layers=11, num_heads=2, intermediate_size=6, max_positions=8, type_vocab_size=1
)
# Settings without which the leaves that only some checkpoints of a family have would not be there.
ALL_LEAVES: dict[str, dict[str, Any]] = {
    "modernbert": {
        **dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "head_bias"), True),
        "layer_types": ("full_attention",) * 11,
    },
    "deberta-v2": {
        **{"convolution_size": 3, "type_vocab_size": 2, "embedding_size": 3},
        "normalizes_distances": True,
    },
    "eurobert": {"attention_bias": True, "mlp_bias": True},
}
MODELS: dict[str, Callable[[EncoderConfig], Any]] = {
    "classifier": lambda config: Classifier(config, 2, rngs=nnx.Rngs(0)),
    "masked_lm": lambda config: MaskedLM(config, rngs=nnx.Rngs(0)),
    "pretraining": lambda config: MaskedLM(config, rngs=nnx.Rngs(0), with_next_sentence=True),
}


def config_of(family: str) -> EncoderConfig:
    """Return settings of a family's architecture with eleven layers, and with all of its optional leaves."""
    defaults = dict(FAMILIES[family].defaults)
    cls = ARCHITECTURES[str(defaults.get("architecture", "bert"))].config_class
    settings = {field.name: getattr(CONFIG, field.name) for field in dataclasses.fields(CONFIG)}
    return cls(**(settings | defaults | ALL_LEAVES.get(family, {})))


@cache
def targets(model: str, family: str = "bert") -> list[str]:
    config = config_of(family)
    state = nnx.state(nnx.eval_shape(lambda: MODELS[model](config)))
    return [".".join(map(str, path)) for path, _ in nnx.to_flat_state(state)]


def pretrains(family: str, model: str) -> bool:
    return model == "classifier" or FAMILIES[family].pretrains


@pytest.mark.parametrize(
    ("family", "model"),
    [
        *((name, model) for name in FAMILIES for model in ("classifier", "masked_lm") if pretrains(name, model)),
        ("bert", "pretraining"),
    ],
)
def test_leaves_and_names_map_one_to_one(family: str, model: str) -> None:
    check_names(FAMILIES[family], targets(model, family))


def check_names(family: weight_map.Family, paths: list[str]) -> None:
    names = [family.source(path) for path in paths]
    assert len(set(names)) == len(paths)
    for path, (name, layout) in zip(paths, names, strict=True):
        assert (path, layout) in family.targets(name)
        assert layout.transposed == ("kernel" in path)


def test_registry_has_every_family_under_its_name() -> None:
    assert {model_type: family.name for model_type, family in FAMILIES.items()} == {name: name for name in FAMILIES}
    assert set(FAMILIES) >= {"bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra"}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_families_refer_to_existing_config_fields(family: weight_map.Family) -> None:
    fields = {field.name for field in dataclasses.fields(config_of(family.name))}
    assert {field for field, _ in family.defaults} | {field for _, field in family.config_keys} <= fields
    assert set(family.required) <= {key for key, _ in family.config_keys}


@given(st.integers(0, 10**6))
def test_layer_numbers_are_preserved(layer: int) -> None:
    target = f"encoder.layers.{layer}.attention.query.kernel"
    assert BERT.source(target) == (f"bert.encoder.layer.{layer}.attention.self.query.weight", TRANSPOSED)
    assert BERT.targets(f"bert.encoder.layer.{layer}.attention.self.query.weight") == [(target, TRANSPOSED)]


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
def test_unknown_names_match_no_rule(name: str) -> None:
    assert not BERT.targets(BERT.canonical(name))
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
def test_older_and_unprefixed_names_become_canonical(name: str, canonical: str) -> None:
    assert BERT.canonical(name) == canonical
    assert BERT.canonical(canonical) == canonical
    assert BERT.targets(canonical)


# Tensors of published files outside the encoder, with and without the family's prefix where both occur.
IGNORABLE = {
    "roberta": [
        "roberta.embeddings.position_ids",
        "roberta.pooler.dense.weight",
        "pooler.dense.bias",
    ],
    "distilbert": [
        "distilbert.embeddings.position_ids",
        "embeddings.position_ids",
    ],
    "electra": [
        "electra.embeddings.position_ids",
        "embeddings.token_type_ids",
        "discriminator_predictions.dense.weight",
        "discriminator_predictions.dense_prediction.bias",
    ],
    "deberta-v2": [
        "deberta.embeddings.position_ids",
        "lm_predictions.lm_head.dense.weight",
        "mask_predictions.classifier.bias",
    ],
    "eurobert": ["lm_head.weight"],
    "gte": ["gte.embeddings.position_ids", "new.embeddings.rotary_emb.inv_freq"],
    "xlm-roberta-xl": ["roberta.embeddings.position_ids", "roberta.pooler.dense.weight"],
}
IGNORABLE |= dict.fromkeys(("xlm-roberta", "camembert"), IGNORABLE["roberta"])


@pytest.mark.parametrize("family", IGNORABLE)
def test_other_heads_and_buffers_are_ignorable(family: str) -> None:
    table = FAMILIES[family]
    for name in map(table.canonical, IGNORABLE[family]):
        assert table.is_ignorable(name) and not table.targets(name) and table.copy_of(name) is None
    for name in ("lm_head.extra", "pooler.extra.weight", "vocab_transform.extra", "generator_lm_head.extra.weight"):
        assert not table.is_ignorable(table.canonical(name))


@pytest.mark.parametrize(
    ("family", "name", "target"),
    [
        ("roberta", "classifier.dense.weight", "pooler.dense.kernel"),
        ("roberta", "lm_head.dense.weight", "transform.kernel"),
        ("camembert", "lm_head.layer_norm.gamma", "transform_norm.scale"),
        ("xlm-roberta", "lm_head.bias", "decoder_bias"),
        ("distilbert", "vocab_transform.weight", "transform.kernel"),
        ("distilbert", "vocab_layer_norm.bias", "transform_norm.bias"),
        ("distilbert", "vocab_projector.bias", "decoder_bias"),
        ("electra", "generator_predictions.dense.bias", "transform.bias"),
        ("electra", "generator_predictions.LayerNorm.beta", "transform_norm.bias"),
        ("electra", "generator_lm_head.bias", "decoder_bias"),
        ("camembert", "classifier.out_proj.bias", "head.bias"),
        ("xlm-roberta", "encoder.layer.7.attention.self.key.bias", "encoder.layers.7.attention.key.bias"),
        ("xlm-roberta", "roberta.embeddings.LayerNorm.gamma", "encoder.embeddings.norm.scale"),
        ("distilbert", "pre_classifier.bias", "pooler.dense.bias"),
        ("distilbert", "classifier.weight", "head.kernel"),
        ("distilbert", "transformer.layer.3.ffn.lin1.weight", "encoder.layers.3.intermediate.kernel"),
        ("distilbert", "distilbert.transformer.layer.3.sa_layer_norm.beta", "encoder.layers.3.attention_norm.bias"),
        ("distilbert", "transformer.layer.0.output_layer_norm.gamma", "encoder.layers.0.output_norm.scale"),
        ("electra", "embeddings_project.weight", "encoder.embeddings.project.kernel"),
        ("electra", "classifier.dense.bias", "pooler.dense.bias"),
        ("electra", "classifier.out_proj.weight", "head.kernel"),
        ("electra", "electra.encoder.layer.1.output.LayerNorm.gamma", "encoder.layers.1.output_norm.scale"),
        ("modernbert", "model.embeddings.tok_embeddings.weight", "encoder.embeddings.word_embeddings.embedding"),
        ("modernbert", "layers.3.mlp_norm.weight", "encoder.layers.3.feed_forward_norm.scale"),
        ("modernbert", "final_norm.weight", "encoder.final_norm.scale"),
        ("modernbert", "head.dense.weight", "pooler.dense.kernel"),
        ("modernbert", "head.norm.weight", "pooler.norm.scale"),
        ("modernbert", "decoder.bias", "decoder_bias"),
        ("deberta-v2", "deberta.encoder.rel_embeddings.weight", "encoder.relative_embeddings.embedding"),
        ("deberta-v2", "encoder.LayerNorm.weight", "encoder.relative_norm.scale"),
        ("deberta-v2", "deberta.encoder.conv.conv.weight", "encoder.layers.0.convolution.kernel"),
        ("deberta-v2", "deberta.encoder.conv.LayerNorm.bias", "encoder.layers.0.convolution.norm.bias"),
        ("deberta-v2", "deberta.embeddings.embed_proj.weight", "encoder.embeddings.project.kernel"),
        (
            "deberta-v2",
            "encoder.layer.2.attention.self.pos_key_proj.bias",
            "encoder.layers.2.attention.position_key.bias",
        ),
        ("deberta-v2", "pooler.dense.bias", "pooler.dense.bias"),
        ("deberta-v2", "cls.predictions.transform.dense.bias", "transform.bias"),
        ("eurobert", "embed_tokens.weight", "encoder.embeddings.word_embeddings.embedding"),
        ("eurobert", "model.layers.5.post_attention_layernorm.weight", "encoder.layers.5.feed_forward_norm.scale"),
        ("eurobert", "dense.weight", "pooler.dense.kernel"),
        ("gte", "new.encoder.layer.1.attn_ln.weight", "encoder.layers.1.attention_norm.scale"),
        ("gte", "gte.layers.1.self_attn.k_proj.weight", "encoder.layers.1.attention.key.kernel"),
        ("new", "encoder.layer.1.attention.v_proj.bias", "encoder.layers.1.attention.value.bias"),
        ("new", "new.encoder.layer.0.mlp.down_proj.bias", "encoder.layers.0.feed_forward.output.bias"),
        ("new", "lm_head.norm.weight", "transform_norm.scale"),
        ("new", "lm_head.decoder.bias", "decoder_bias"),
        (
            "xlm-roberta-xl",
            "encoder.layer.9.attention.self_attn_layer_norm.weight",
            "encoder.layers.9.attention_norm.scale",
        ),
        ("xlm-roberta-xl", "roberta.encoder.LayerNorm.bias", "encoder.final_norm.bias"),
    ],
)
def test_family_specific_names(family: str, name: str, target: str) -> None:
    assert [path for path, _ in FAMILIES[family].targets(FAMILIES[family].canonical(name))] == [target]


@pytest.mark.parametrize(
    ("family", "name", "module", "parts"),
    [
        ("modernbert", "layers.3.attn.Wqkv.weight", "encoder.layers.3.attention", ("query", "key", "value")),
        ("modernbert", "model.layers.0.mlp.Wi.weight", "encoder.layers.0.feed_forward", ("gate", "up")),
        (
            "new",
            "new.encoder.layer.7.attention.qkv_proj.weight",
            "encoder.layers.7.attention",
            ("query", "key", "value"),
        ),
        ("gte", "encoder.layer.2.mlp.up_gate_proj.weight", "encoder.layers.2.feed_forward", ("up", "gate")),
    ],
)
def test_fused_projections_are_divided_in_order(family: str, name: str, module: str, parts: tuple[str, ...]) -> None:
    expected = {f"{module}.{part}.kernel": Layout(True, number, len(parts)) for number, part in enumerate(parts)}
    assert dict(FAMILIES[family].targets(FAMILIES[family].canonical(name))) == expected


@pytest.mark.parametrize(
    ("family", "foreign"),
    [
        ("bert", "classifier.out_proj.weight"),
        ("roberta", "classifier.weight"),
        ("xlm-roberta", "classifier.weight"),
        ("camembert", "classifier.weight"),
        ("distilbert", "classifier.out_proj.weight"),
        ("electra", "classifier.weight"),
    ],
)
def test_another_familys_head_matches_no_rule(family: str, foreign: str) -> None:
    assert not FAMILIES[family].targets(foreign) and not FAMILIES[family].is_ignorable(foreign)


def test_tied_copies_and_ignorable_names() -> None:
    words = "bert.embeddings.word_embeddings.weight"
    assert BERT.copy_of("cls.predictions.decoder.weight") == (words, "decoder_bias")
    assert BERT.copy_of("cls.predictions.bias") is None
    assert BERT.is_ignorable(BERT.canonical("embeddings.position_ids"))
    assert not BERT.is_ignorable("bert.embeddings.position_embeddings.weight")


@pytest.mark.parametrize(
    ("family", "copy", "original"),
    [
        ("roberta", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
        ("xlm-roberta", "lm_head.decoder.bias", "lm_head.bias"),
        ("distilbert", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
        ("electra", "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
        ("modernbert", "decoder.weight", "model.embeddings.tok_embeddings.weight"),
        ("deberta-v2", "cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight"),
        ("deberta-v2", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("new", "lm_head.decoder.weight", "new.embeddings.word_embeddings.weight"),
        ("xlm-roberta-xl", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ],
)
def test_the_decoder_of_a_language_model_is_a_copy(family: str, copy: str, original: str) -> None:
    assert FAMILIES[family].copy_of(copy) == (original, "decoder_bias")
    assert FAMILIES[family].targets(original)


def test_every_leaf_outside_the_encoder_belongs_to_a_head() -> None:
    pairs = [(name, model) for name in FAMILIES for model in ("classifier", "masked_lm") if pretrains(name, model)]
    for family, model in [*pairs, ("bert", "pretraining")]:
        assert [path for path in targets(model, family) if not FAMILIES[family].is_head(path)] == [
            path for path in targets(model, family) if path.startswith("encoder.")
        ]


@pytest.mark.parametrize(
    ("model", "architecture"),
    [
        ("classifier", "BertForSequenceClassification"),
        ("masked_lm", "BertForMaskedLM"),
        ("pretraining", "BertForPreTraining"),
    ],
)
def test_architecture_follows_from_the_leaves(model: str, architecture: str) -> None:
    assert BERT.architecture(frozenset(targets(model))) == architecture
    assert BERT.architecture(frozenset({"encoder.embeddings.norm.bias"})) == "BertModel"


@pytest.mark.parametrize(
    ("family", "prefix"),
    [
        ("roberta", "Roberta"),
        ("xlm-roberta", "XLMRoberta"),
        ("camembert", "Camembert"),
        ("distilbert", "DistilBert"),
        ("electra", "Electra"),
    ],
)
def test_classifiers_get_the_class_name_of_their_family(family: str, prefix: str) -> None:
    assert FAMILIES[family].architecture(frozenset({"head.kernel"})) == f"{prefix}ForSequenceClassification"
    assert FAMILIES[family].architecture(frozenset()) == f"{prefix}Model"


def test_ambiguous_table_is_an_error() -> None:
    ambiguous = dataclasses.replace(BERT, rules=(*BERT.rules, Rule("classifier.bias", "other")))
    with pytest.raises(ValueError, match=r"classifier\.bias matches 2 rules"):
        ambiguous.targets("classifier.bias")


def test_leaf_without_a_name_is_an_error() -> None:
    with pytest.raises(KeyError, match="adapter"):
        BERT.source("encoder.adapter.kernel")


def test_tables_import_no_array_library() -> None:
    for file in (Path(weight_map.__file__), *Path(families.__file__).parent.glob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        others = {name for name in imported if not name.startswith("xtransfer.models.hf.families.")}
        ours = {"xtransfer.models.hf.weight_map", "xtransfer.models.hf.rope"}
        assert others <= {"re", "collections.abc", "dataclasses", "functools", "types", "typing"} | ours


def test_encoder_contains_no_checkpoint_names() -> None:
    text = Path(encoder.__file__).read_text(encoding="utf-8")
    for word in ("lin1", "out_proj", "pre_classifier", "LayerNorm.", ".weight", "model_type", "roberta", "distilbert"):
        assert word not in text


def test_capabilities_follow_from_the_rules() -> None:
    assert BERT.pretrains and BERT.pools_in_encoder
    assert not any(FAMILIES[name].pools_in_encoder for name in ("roberta", "distilbert", "electra"))
