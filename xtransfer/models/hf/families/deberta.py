"""DeBERTa v2 and v3, and mDeBERTa v3.

The files of v3 hold the head of their generator (`lm_predictions`) and of their discriminator (`mask_predictions`),
which are not read. The masked language model's head is that of DebertaV2ForMaskedLM, and new if a file lacks it.
"""

from typing import Any

from xtransfer.models.hf.weight_map import (
    MASKED_LM,
    OLD_NORM,
    SIZE_KEYS,
    SIZES_REQUIRED,
    TIED,
    TRANSPOSED,
    Family,
    NewLeaves,
    Rule,
    dense,
    embeddings,
    masked_lm,
    norm,
)

_SOURCE = "deberta.encoder.layer.{n}"
_TARGET = "encoder.layers.{n}"
_TERMS = ("c2p", "p2c")


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with derived values in place of -1, and a tuple in place of text with bars."""
    if raw.get("relative_attention") is not True:  # the default of transformers is false
        raise ValueError(f"relative_attention is {raw.get('relative_attention')!r}: only True is supported")
    terms = raw.get("pos_att_type") or []
    names = terms.split("|") if isinstance(terms, str) else terms
    if not isinstance(names, list):
        raise ValueError(f"pos_att_type is {terms!r}, expected a list or text like 'c2p|p2c'")
    names = [str(name).strip().lower() for name in names if name]
    if not set(names) <= set(_TERMS) or len(set(names)) != len(names):
        raise ValueError(f"pos_att_type is {terms!r}: only c2p and p2c are supported")
    buckets, distance = _distances(raw)
    normalizes = str(raw.get("norm_rel_ebd", "none")).lower().split("|")
    pooler_size = raw.get("pooler_hidden_size", raw.get("hidden_size"))
    if pooler_size != raw.get("hidden_size"):
        raise ValueError(f"pooler_hidden_size is {pooler_size!r}: only hidden_size is supported")
    width, groups, size = (raw.get(key, 1) for key in ("conv_kernel_size", "conv_groups", "hidden_size"))
    heads, head_size = raw.get("num_attention_heads"), raw.get("attention_head_size")
    if head_size is not None and type(heads) is int and head_size * heads != size:
        raise ValueError(f"attention_head_size is {head_size!r}: only hidden_size / num_attention_heads is supported")
    if type(width) is int and width and width % 2 == 0:
        raise ValueError(f"conv_kernel_size is {width}, expected an odd number")
    if type(groups) is int and groups > 0 and type(size) is int and size % groups:
        raise ValueError(f"conv_groups is {groups}, which does not divide hidden_size {size}")
    return (
        {"embedding_size": raw.get("hidden_size")}
        | raw
        | {
            "pos_att_type": tuple(name for name in _TERMS if name in names),
            "position_buckets": buckets,
            "max_relative_positions": distance,
            "norm_rel_ebd": "layer_norm" in [name.strip() for name in normalizes],
        }
    )


def _distances(raw: dict[str, Any]) -> tuple[int, Any]:
    """Return the number of buckets, 0 for none, and the largest distance, of which -1 or 0 stands for all positions."""
    buckets, distance = raw.get("position_buckets", -1), raw.get("max_relative_positions", -1)
    for key, value in (("position_buckets", buckets), ("max_relative_positions", distance)):
        if type(value) is not int:
            raise ValueError(f"{key} is {value!r}, expected an integer")
    buckets, distance = max(buckets, 0), distance if distance > 0 else raw.get("max_position_embeddings")
    if buckets and (buckets < 2 or (type(distance) is int and distance - 1 <= buckets // 2)):
        raise ValueError(
            f"position_buckets is {buckets}, expected at least 2, and half of it below max_relative_positions - 1 "
            f"({distance!r} - 1)"
        )
    return buckets, distance


def _write(values: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the values that `transformers` has for the same settings."""
    return values | {
        "pos_att_type": list(values["pos_att_type"]),
        "position_buckets": values["position_buckets"] or -1,
        "norm_rel_ebd": "layer_norm" if values["norm_rel_ebd"] else "none",
        "pooler_hidden_size": values["hidden_size"],
        "relative_attention": True,
    }


DEBERTA_V2 = Family(
    name="deberta-v2",
    rules=(
        *embeddings("deberta.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
        Rule("deberta.embeddings.embed_proj.weight", "encoder.embeddings.project.kernel", TRANSPOSED),
        Rule("deberta.encoder.rel_embeddings.weight", "encoder.relative_embeddings.embedding"),
        *norm("deberta.encoder.LayerNorm", "encoder.relative_norm"),
        *dense(f"{_SOURCE}.attention.self.query_proj", f"{_TARGET}.attention.query"),
        *dense(f"{_SOURCE}.attention.self.key_proj", f"{_TARGET}.attention.key"),
        *dense(f"{_SOURCE}.attention.self.value_proj", f"{_TARGET}.attention.value"),
        *dense(f"{_SOURCE}.attention.self.pos_key_proj", f"{_TARGET}.attention.position_key"),
        *dense(f"{_SOURCE}.attention.self.pos_query_proj", f"{_TARGET}.attention.position_query"),
        *dense(f"{_SOURCE}.attention.output.dense", f"{_TARGET}.attention.output"),
        *norm(f"{_SOURCE}.attention.output.LayerNorm", f"{_TARGET}.attention_norm"),
        *dense(f"{_SOURCE}.intermediate.dense", f"{_TARGET}.intermediate"),
        *dense(f"{_SOURCE}.output.dense", f"{_TARGET}.output"),
        *norm(f"{_SOURCE}.output.LayerNorm", f"{_TARGET}.output_norm"),
        *dense("deberta.encoder.conv.conv", "encoder.layers.0.convolution"),
        *norm("deberta.encoder.conv.LayerNorm", "encoder.layers.0.convolution.norm"),
        *dense("pooler.dense", "pooler.dense"),
        *dense("classifier", "head"),
        *masked_lm("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
    ),
    aliases=((r"^(?=embeddings\.|encoder\.)", "deberta."), *OLD_NORM),
    copies=(
        (r"cls\.predictions\.decoder\.weight", "deberta.embeddings.word_embeddings.weight", "decoder_bias"),
        (r"cls\.predictions\.decoder\.bias", "cls.predictions.bias", "decoder_bias"),
    ),
    ignorable=(r"deberta\.embeddings\.position_ids", r"(lm_predictions|mask_predictions)\..*"),
    heads=(r"pooler\..*", r"head\..*", MASKED_LM),
    unused=(r"encoder\.embeddings\.position_embeddings\..*",),  # in v2 and v3, only the pretraining decoder adds them
    new=(NewLeaves(r"head\..*"), NewLeaves(r"pooler\..*", only_with=r"head\..*"), NewLeaves(MASKED_LM)),
    defaults=(("architecture", "deberta"), ("type_vocab_size", 0), ("layer_norm_eps", 1e-7), ("head_act", "gelu")),
    config_keys=(
        *SIZE_KEYS,
        ("embedding_size", "embedding_size"),
        ("type_vocab_size", "type_vocab_size"),
        ("layer_norm_eps", "layer_norm_eps"),
        ("hidden_act", "hidden_act"),
        ("hidden_dropout_prob", "hidden_dropout"),
        ("attention_probs_dropout_prob", "attention_dropout"),
        ("max_relative_positions", "max_distance"),
        ("position_buckets", "buckets"),
        ("pos_att_type", "score_terms"),
        ("share_att_key", "shares_projections"),
        ("norm_rel_ebd", "normalizes_distances"),
        ("position_biased_input", "adds_positions"),
        ("conv_kernel_size", "convolution_size"),
        ("conv_groups", "convolution_groups"),
        ("conv_act", "convolution_act"),
        ("pooler_dropout", "pooler_dropout"),
        ("pooler_hidden_act", "head_act"),
        ("cls_dropout", "classifier_dropout"),
        ("pad_token_id", "pad_id"),
    ),
    required=SIZES_REQUIRED,
    nullable=("cls_dropout",),
    fixed=(),
    fixed_in_pretraining=(*TIED, ("legacy", (True,))),
    architectures=(
        ("head.kernel", "DebertaV2ForSequenceClassification"),
        ("decoder_bias", "DebertaV2ForMaskedLM"),
        ("", "DebertaV2Model"),
    ),
    read=_read,
    write=_write,
)
