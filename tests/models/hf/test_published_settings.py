"""The settings and tensors that published checkpoints have, with all of their keys, at tiny sizes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.fixtures.record import FIXTURES
from xtransfer.errors import UserError
from xtransfer.models.hf import checkpoint as hf_checkpoint
from xtransfer.models.hf import config as hf_config
from xtransfer.models.hf.weights import leaves

SIZES = {"vocab_size": 50, "hidden_size": 12, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 20}
MODERNBERT = {
    **SIZES,
    "architectures": ["ModernBertForMaskedLM"],
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 5, "classifier_activation": "gelu"},
    **{"classifier_bias": False, "classifier_dropout": 0.0, "classifier_pooling": "mean", "cls_token_id": 5},
    **{"decoder_bias": True, "deterministic_flash_attn": False, "embedding_dropout": 0.0, "eos_token_id": 6},
    **{"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "gradient_checkpointing": False},
    **{"hidden_activation": "gelu", "initializer_cutoff_factor": 2.0, "initializer_range": 0.02},
    **{"layer_norm_eps": 1e-05, "local_attention": 128, "local_rope_theta": 10000.0, "max_position_embeddings": 8192},
    **{"mlp_bias": False, "mlp_dropout": 0.0, "model_type": "modernbert", "norm_bias": False, "norm_eps": 1e-05},
    **{"pad_token_id": 7, "position_embedding_type": "absolute", "reference_compile": None, "sep_token_id": 6},
    **{"sparse_pred_ignore_index": -100, "sparse_prediction": False, "tie_word_embeddings": True},
    **{"torch_dtype": "float32", "transformers_version": "4.47.0.dev0"},
}
MMBERT = MODERNBERT | {
    **{"bos_token_id": 2, "cls_token_id": 1, "eos_token_id": 1, "mask_token_id": 4, "pad_token_id": 0},
    **{"sep_token_id": 1, "unk_token_id": 3, "local_rope_theta": 160000, "global_rope_theta": 160000},
    **{"position_embedding_type": "sans_pos", "repad_logits_with_grad": False, "reference_compile": True},
}
DEBERTA_V2 = {
    **SIZES,
    **{"model_type": "deberta-v2", "attention_probs_dropout_prob": 0.1, "hidden_act": "gelu"},
    **{"hidden_dropout_prob": 0.1, "initializer_range": 0.02, "max_position_embeddings": 512},
    **{"relative_attention": True, "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True},
    **{"pos_att_type": "p2c|c2p", "layer_norm_eps": 1e-7, "conv_kernel_size": 3, "conv_act": "gelu"},
    **{"max_relative_positions": -1, "position_biased_input": False, "attention_head_size": 6, "type_vocab_size": 0},
}
MDEBERTA = {key: value for key, value in DEBERTA_V2.items() if not key.startswith(("conv_", "attention_head"))} | {
    **{"architectures": ["DebertaV2ForMaskedLM"], "pad_token_id": 0, "pooler_dropout": 0, "pooler_hidden_act": "gelu"},
    **{"pooler_hidden_size": 12, "pos_att_type": ["p2c", "c2p"], "legacy": True, "summary_type": "first"},
}
EUROBERT = {
    **SIZES,
    "architectures": ["EuroBertForMaskedLM"],
    **{"attention_bias": False, "attention_dropout": 0.0, "bos_token": "<|begin_of_text|>", "bos_token_id": 3},
    "auto_map": {"AutoConfig": "configuration_eurobert.EuroBertConfig", "AutoModel": "modeling_eurobert.EuroBertModel"},
    **{"clf_pooling": "late", "eos_token": "<|end_of_text|>", "eos_token_id": 4, "head_dim": 6, "hidden_act": "silu"},
    **{"hidden_dropout": 0.0, "initializer_range": 0.02, "mask_token": "<|mask|>", "mask_token_id": 5},
    **{"max_position_embeddings": 8192, "mlp_bias": False, "model_type": "eurobert", "num_key_value_heads": 2},
    **{"pad_token": "<|end_of_text|>", "pad_token_id": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05},
    **{"rope_scaling": None, "rope_theta": 250000, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
    **{"transformers_version": "4.40.0.dev0", "use_cache": False},
}
GTE = {
    **SIZES,
    "architectures": ["NewModel", "NewForTokenClassification"],
    **{"attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.0, "hidden_act": "gelu"},
    "auto_map": {"AutoModel": "Alibaba-NLP/new-impl--modeling.NewModel"},
    **{"hidden_dropout_prob": 0.1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
    **{"initializer_range": 0.02, "layer_norm_eps": 1e-12, "layer_norm_type": "layer_norm"},
    **{"logn_attention_clip1": False, "logn_attention_scale": False, "max_position_embeddings": 8192},
    **{"model_type": "new", "pack_qkv": True, "pad_token_id": 1, "position_embedding_type": "rope"},
    **{"rope_scaling": {"factor": 8.0, "type": "ntk"}, "rope_theta": 20000, "torch_dtype": "float16"},
    **{"transformers_version": "4.39.1", "type_vocab_size": 1, "unpad_inputs": False},
    "use_memory_efficient_attention": False,
}
XLM_R = {
    **SIZES,
    "architectures": ["XLMRobertaModel"],
    **{"attention_probs_dropout_prob": 0.1, "bos_token_id": 0, "classifier_dropout": None, "eos_token_id": 2},
    **{"hidden_act": "gelu", "hidden_dropout_prob": 0.1, "initializer_range": 0.02, "layer_norm_eps": 1e-05},
    **{"max_position_embeddings": 8194, "model_type": "xlm-roberta", "output_past": True, "pad_token_id": 1},
    **{"position_embedding_type": "absolute", "type_vocab_size": 1, "use_cache": True, "torch_dtype": "float32"},
}
XLM_R_XL = XLM_R | {
    **{"architectures": ["XLMRobertaXLForMaskedLM"], "max_position_embeddings": 514, "model_type": "xlm-roberta-xl"},
}
LAYERS = ("full_attention", "sliding_attention", "sliding_attention", "full_attention")

# The settings that each model's card or paper states; hidden sizes are ours, so a head is 6 wide.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ModernBERT": (
        MODERNBERT,
        {"layer_types": LAYERS, "window": 128, "rope_theta": 160_000.0, "local_rope_theta": 10_000.0, "pad_id": 7},
    ),
    "mmBERT": (MMBERT, {"layer_types": LAYERS, "local_rope_theta": 160_000.0, "pad_id": 0, "position_offset": 0}),
    "DeBERTa v2": (
        DEBERTA_V2,
        {"score_terms": ("c2p", "p2c"), "distances": 256, "max_distance": 512, "shares_projections": True}
        | {"convolution_size": 3, "convolution_act": "gelu", "adds_positions": False, "normalizes_distances": True},
    ),
    "mDeBERTa": (
        MDEBERTA,
        {"score_terms": ("c2p", "p2c"), "distances": 256, "convolution_size": 0, "head_act": "gelu"}
        | {"head_input_rate": 0.0, "classifier_rate": 0.1},
    ),
    "EuroBERT": (
        EUROBERT,
        {"rope_theta": 250_000.0, "kv_heads": 2, "head_size": 6, "classifier_rate": 0.0, "hidden_act": "silu"},
    ),
    "GTE": (GTE, {"rope_theta": 8 * 20_000.0, "rope_divisor": 2.0, "attention_dropout": 0.0, "type_vocab_size": 1}),
    "BGE-M3": (XLM_R, {"max_positions": 8194, "position_offset": 2, "classifier_rate": 0.1}),
    "XLM-R XL": (XLM_R_XL, {"max_positions": 514, "position_offset": 2, "layer_norm_eps": 1e-5}),
}


def write(directory: Path, settings: dict[str, Any]) -> Path:
    (directory / "config.json").write_text(json.dumps(settings))
    return directory


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_are_read(name: str, tmp_path: Path) -> None:
    settings, expected = PUBLISHED[name]
    config = hf_config.read_config(write(tmp_path, settings))
    assert {field: getattr(config, field) for field in expected} == expected


def test_pooling_of_published_heads_is_read(tmp_path: Path) -> None:
    for settings, pooling in ((MODERNBERT, "mean"), (MDEBERTA, "cls"), (EUROBERT, "late"), (GTE, "cls")):
        assert hf_config.read_pooling(write(tmp_path, settings)) == pooling
    assert hf_config.read_pooling(write(tmp_path, EUROBERT | {"clf_pooling": "bos"})) == "cls"


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (MODERNBERT, {"rope_scaling": YARN}, r"rope_scaling is {'rope_type': 'yarn'.*: only null"),
        (MODERNBERT, {"rope_parameters": YARN}, r"rope_parameters is {'rope_type': 'yarn'.*: only full_attention and"),
        (
            MODERNBERT,
            {"rope_parameters": {"full_attention": YARN}},
            r"rope_parameters\.full_attention is .*: only the type 'default'",
        ),
        (MODERNBERT, {"local_rope_theta": None}, "local_rope_theta is None, expected a positive number"),
        (MODERNBERT, {"layer_types": ["full_attention"]}, "layer_types must name full_attention or sliding_attention"),
        (MODERNBERT, {"layer_types": ["conv"] * 4}, "layer_types must name full_attention or sliding_attention"),
        (MODERNBERT, {"num_hidden_layers": "4"}, "num_hidden_layers is '4', expected a positive integer"),
        (MODERNBERT, {"global_attn_every_n_layers": 0}, "global_attn_every_n_layers is 0, expected a positive integer"),
        (MODERNBERT, {"hidden_activation": "mish"}, "hidden_activation is 'mish', expected one of gelu, "),
        (MODERNBERT, {"local_attention": 0}, "local_attention is 0, expected a positive integer"),
        (MODERNBERT, {"norm_bias": None}, "norm_bias is None, expected true or false"),
        (MODERNBERT, {"architectures": ["ModernBertForTokenClassification"]}, "whose head is for another task"),
        (DEBERTA_V2, {"relative_attention": False}, "relative_attention is False: only True"),
        (DEBERTA_V2, {"pos_att_type": "p2c|p2p"}, r"pos_att_type is 'p2c\|p2p': only c2p and p2c"),
        (DEBERTA_V2, {"pos_att_type": 3}, "pos_att_type is 3, expected a list"),
        (DEBERTA_V2, {"pos_att_type": {"c2p": True}}, "pos_att_type is {'c2p': True}, expected a list"),
        (DEBERTA_V2, {"position_buckets": "256"}, "position_buckets is '256', expected an integer"),
        (DEBERTA_V2, {"position_buckets": 1}, "position_buckets is 1, expected at least 2"),
        (DEBERTA_V2, {"max_relative_positions": 129}, r"position_buckets is 256, .* max_relative_positions - 1 \(129"),
        (DEBERTA_V2, {"attention_head_size": 5}, "attention_head_size is 5: only hidden_size / num_attention_heads"),
        (DEBERTA_V2, {"attention_head_size": "6"}, "attention_head_size is '6': only hidden_size / num_"),
        (DEBERTA_V2, {"pooler_hidden_size": 8}, "pooler_hidden_size is 8: only hidden_size"),
        (DEBERTA_V2, {"conv_kernel_size": 4}, "conv_kernel_size is 4, expected an odd number"),
        (DEBERTA_V2, {"conv_groups": 5}, "conv_groups is 5, which does not divide hidden_size 12"),
        (DEBERTA_V2, {"conv_act": "mish"}, "conv_act is 'mish', expected one of gelu, "),
        (DEBERTA_V2, {"type_vocab_size": -1}, "type_vocab_size is -1, expected 0 or a positive integer"),
        (EUROBERT, {"rope_scaling": {"type": "ntk", "factor": 2.0}}, "rope_scaling is .*: only the type 'default'"),
        (
            EUROBERT,
            {"rope_scaling": {"type": "default"}, "rope_parameters": {"rope_type": "default"}},
            "rope_parameters and rope_scaling are both set: keep the one",
        ),
        (EUROBERT, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters has partial_rotary_factor"),
        (EUROBERT, {"head_dim": 5}, "a head is 5 wide .*, expected an even number"),
        (EUROBERT, {"num_key_value_heads": 3}, "num_key_value_heads is 3, which does not divide num_attention_heads 2"),
        (EUROBERT, {"rope_theta": 0}, "rope_theta is 0, expected a positive number"),
        (GTE, {"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute': only 'rope'"),
        (GTE, {"layer_norm_type": "rms_norm"}, "layer_norm_type is 'rms_norm': only 'layer_norm'"),
        (GTE, {"logn_attention_scale": True}, "logn_attention_scale is True: only False"),
        (GTE, {"logn_attention_clip1": True}, "logn_attention_clip1 is True: only False"),
        (GTE, {"model_type": "gte", "layer_norm_type": "rms_norm"}, "layer_norm_type is 'rms_norm': only 'layer_norm'"),
        (GTE, {"model_type": "gte"}, "rope_scaling is .*'ntk'.*: only the type 'default' or 'linear'"),
        (GTE, {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 1.0}}, "rope_scaling has mixed_b, which is"),
        (GTE, {"rope_scaling": {"type": "ntk"}}, r"rope_scaling\.factor is None, expected a positive number"),
        (GTE, {"rope_scaling": ["ntk"]}, r"rope_scaling is \['ntk'\], expected an object"),
        (GTE, {"architectures": ["NewForQuestionAnswering"]}, "NewForQuestionAnswering, whose head is for another"),
        (XLM_R_XL, {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key': only"),
        (XLM_R_XL, {"type_vocab_size": 0}, "type_vocab_size is 0, expected a positive integer"),
    ],
)
def test_variations_that_are_not_supported_name_their_key(
    settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path, settings | changes)
    with pytest.raises(UserError, match=message) as caught:
        hf_config.read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}/config.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "changes", "message"),
    [
        (MODERNBERT, {"classifier_pooling": "last"}, "classifier_pooling is 'last', expected one of cls, mean"),
        (MODERNBERT, {"classifier_pooling": ["cls"]}, r"classifier_pooling is \['cls'\], expected one of cls, mean"),
        (EUROBERT, {"clf_pooling": "cls"}, "classifier_pooling is 'cls', expected one of bos, mean, late"),
        (XLM_R, {"xtransfer_pooling": "last"}, "xtransfer_pooling is 'last', expected one of cls, mean, late"),
    ],
)
def test_unknown_pooling_names_its_key(
    settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        hf_config.read_pooling(write(tmp_path, settings | changes))


def copy(name: str, directory: Path, extra: dict[str, tuple[int, ...]], **changes: Any) -> Path:
    """Copy a recorded checkpoint, with further tensors of these shapes, and other settings."""
    shutil.copytree(FIXTURES / name, directory, dirs_exist_ok=True)
    tensors = load_file(directory / "model.safetensors")
    tensors |= {key: np.ones(shape, np.float32) for key, shape in extra.items()}
    save_file(tensors, directory / "model.safetensors")
    return write(directory, json.loads((directory / "config.json").read_text()) | changes)


def encoder_of(directory: Path) -> dict[str, np.ndarray]:
    _, params = hf_checkpoint.load_classifier(directory, 3, seed=0)
    named = {path: np.asarray(leaf[...]) for path, leaf in leaves(params).items()}
    return {path: array for path, array in named.items() if path.startswith("encoder.")}


def test_positions_that_deberta_adds_only_in_pretraining_are_not_read(tmp_path: Path) -> None:
    """DeBERTa's files hold absolute positions and pretraining heads, which the encoder does not use."""
    extra: dict[str, tuple[int, ...]] = {"deberta.embeddings.position_embeddings.weight": (24, 15)}
    extra |= {f"lm_predictions.lm_head.{name}": (15,) for name in ("dense.bias", "LayerNorm.weight", "LayerNorm.bias")}
    extra |= {"lm_predictions.lm_head.bias": (40,), "lm_predictions.lm_head.dense.weight": (15, 15)}
    extra |= {"mask_predictions.dense.weight": (15, 15), "mask_predictions.classifier.bias": (1,)}
    read = encoder_of(copy("deberta-v2_classifier", tmp_path, extra))
    expected = encoder_of(FIXTURES / "deberta-v2_classifier")
    assert read.keys() == expected.keys() and all(np.array_equal(read[path], expected[path]) for path in read)
    assert "encoder.embeddings.position_embeddings.embedding" not in read


def test_positions_are_read_if_deberta_adds_them_to_the_input(tmp_path: Path) -> None:
    copy("deberta-v2_classifier", tmp_path, {}, position_biased_input=True)
    with pytest.raises(UserError, match=r"the weights lack tensor deberta\.embeddings\.position_embeddings\.weight"):
        encoder_of(tmp_path)
    copy("deberta-v2_classifier", tmp_path, {"deberta.embeddings.position_embeddings.weight": (24, 15)})
    write(tmp_path, json.loads((tmp_path / "config.json").read_text()) | {"position_biased_input": True})
    assert (encoder_of(tmp_path)["encoder.embeddings.position_embeddings.embedding"] == 1).all()


def test_head_for_tokens_beside_the_encoder_is_not_read(tmp_path: Path) -> None:
    """gte-multilingual-base has a head that weighs tokens for sparse retrieval, under the names of a classifier's."""
    directory = copy("new_classifier", tmp_path, {}, architectures=["NewModel", "NewForTokenClassification"])
    tensors = load_file(directory / "model.safetensors")
    tensors["classifier.weight"], tensors["classifier.bias"] = np.ones((1, 18), np.float32), np.ones(1, np.float32)
    pooler = [name for name in tensors if ".pooler." in name]
    save_file({name: tensors[name] for name in tensors if name not in pooler}, directory / "model.safetensors")
    expected = encoder_of(FIXTURES / "new_classifier")
    assert all(np.array_equal(array, expected[path]) for path, array in encoder_of(directory).items())
    assert "head.kernel" not in leaves(hf_checkpoint.load_parameters(directory)[0])
    head = leaves(hf_checkpoint.load_classifier(directory, 3, seed=0)[1])["head.kernel"][...]
    assert head.shape == (18, 3) and 0 < float(np.abs(head).max()) < 0.2  # a new one


def test_unfused_projections_of_gte_are_read(tmp_path: Path) -> None:
    """With `pack_qkv` false, `new` has three projections in place of one."""
    directory = copy("new_classifier", tmp_path, {}, pack_qkv=False)
    tensors = {}
    for name, array in load_file(directory / "model.safetensors").items():
        parts = np.split(array, 3) if ".qkv_proj." in name else [array]
        names = [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if len(parts) == 3 else [name]
        tensors |= {new: np.ascontiguousarray(part) for new, part in zip(names, parts, strict=True)}
    assert "gte.encoder.layer.1.attention.v_proj.bias" in tensors
    save_file(tensors, directory / "model.safetensors")
    read, expected = encoder_of(directory), encoder_of(FIXTURES / "new_classifier")
    assert read.keys() == expected.keys() and all(np.array_equal(read[path], expected[path]) for path in read)
