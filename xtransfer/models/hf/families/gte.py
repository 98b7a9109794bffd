"""Multilingual GTE under its two names: `new`, whose files name their own code, and `gte`, its class in transformers.

Both have the same tensors. The projections of attention are fused, and so are the two of the gated network, of which
`up` comes first. A checkpoint of either is written as `gte`, so that `transformers` needs no code from the hub.
"""

from typing import Any

from xtransfer.models.hf.rope import DEFAULT, LINEAR, NTK, read_rope
from xtransfer.models.hf.weight_map import (
    BERT_KEYS,
    BERT_NULLABLE,
    MASKED_LM,
    SIZES_REQUIRED,
    TIED,
    Family,
    NewLeaves,
    dense,
    embeddings,
    fused,
    masked_lm,
    norm,
)

_SOURCE = "new.encoder.layer.{n}"
_TARGET = "encoder.layers.{n}"
_FIXED: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("position_embedding_type", ("rope",)),
    ("layer_norm_type", ("layer_norm",)),
    ("logn_attention_scale", (False,)),
    ("logn_attention_clip1", (False,)),
)


def _family(model_type: str, theta: float, types: tuple[str, ...]) -> Family:
    def read(raw: dict[str, Any]) -> dict[str, Any]:
        """Return config.json with the base of the angles and their divisor beside the other keys."""
        base, divisor = read_rope(raw, theta, types=types)
        return raw | {"rope_theta": base, "rope_divisor": divisor}

    return Family(
        name=model_type,
        rules=(
            *embeddings("new.embeddings", "word_embeddings", "token_type_embeddings"),
            *fused(
                f"{_SOURCE}.attention.qkv_proj", *(f"{_TARGET}.attention.{name}" for name in ("query", "key", "value"))
            ),
            *dense(f"{_SOURCE}.attention.o_proj", f"{_TARGET}.attention.output"),
            *norm(f"{_SOURCE}.attn_ln", f"{_TARGET}.attention_norm"),
            *fused(f"{_SOURCE}.mlp.up_gate_proj", f"{_TARGET}.feed_forward.up", f"{_TARGET}.feed_forward.gate"),
            *dense(f"{_SOURCE}.mlp.down_proj", f"{_TARGET}.feed_forward.output"),
            *norm(f"{_SOURCE}.mlp_ln", f"{_TARGET}.output_norm"),
            *dense("new.pooler.dense", "pooler.dense"),
            *dense("classifier", "head"),
            *masked_lm("lm_head.dense", "lm_head.norm", "lm_head.decoder.bias"),
            # The same layers unfused: transformers' modules have these names, and `new` if `pack_qkv` is false.
            *(
                rule
                for name in ("query", "key", "value")
                for rule in dense(f"{_SOURCE}.attention.{name[0]}_proj", f"{_TARGET}.attention.{name}")
            ),
            *dense(f"{_SOURCE}.mlp.up_proj", f"{_TARGET}.feed_forward.up"),
            *dense(f"{_SOURCE}.mlp.gate_proj", f"{_TARGET}.feed_forward.gate"),
        ),
        aliases=(
            (r"^(?=embeddings\.|encoder\.|pooler\.)", "new."),
            (r"^gte\.", "new."),
            (r"^new\.layers\.|^layers\.", "new.encoder.layer."),
            (r"\.self_attn\.", ".attention."),
            (r"\.post_attention_layernorm\.", ".attn_ln."),
            (r"\.post_mlp_layernorm\.", ".mlp_ln."),
            (r"^lm_head\.layer_norm\.", "lm_head.norm."),
        ),
        copies=((r"lm_head\.decoder\.weight", "new.embeddings.word_embeddings.weight", "decoder_bias"),),
        ignorable=(r"new\.embeddings\.(position_ids|token_type_ids)", r"new\..*inv_freq"),
        heads=(r"pooler\..*", r"head\..*", MASKED_LM),
        other_heads=(("ForTokenClassification", r"classifier\..*"),),  # gte-multilingual-base weighs tokens with one
        new=(NewLeaves(r"head\..*"), NewLeaves(MASKED_LM), NewLeaves(r"pooler\..*", only_with=r"head\..*")),
        defaults=(
            ("architecture", "gte"),
            ("type_vocab_size", 1),
            ("attention_dropout", 0.0),
            ("masked_lm_act", "gelu"),
            ("pad_id", 1),
        ),
        config_keys=(*BERT_KEYS, ("rope_theta", "rope_theta"), ("rope_divisor", "rope_divisor")),
        required=SIZES_REQUIRED,
        nullable=BERT_NULLABLE,
        fixed=_FIXED,
        fixed_in_pretraining=TIED,
        architectures=(
            ("head.kernel", "GteForSequenceClassification"),
            ("decoder_bias", "GteForMaskedLM"),
            ("", "GteModel"),
        ),
        read=read,
        write=_write,
        saved_as="gte",
    )


def _write(values: dict[str, Any]) -> dict[str, Any]:
    """Return config.json for the class `Gte…` of `transformers`."""
    divisor = values.pop("rope_divisor")
    kind = {"rope_type": DEFAULT} if divisor == 1.0 else {"rope_type": LINEAR, "factor": divisor}
    return values | {"rope_parameters": {**kind, "rope_theta": values["rope_theta"]}}


GTE = _family("gte", 160_000.0, (DEFAULT, LINEAR))
NEW = _family("new", 10_000.0, (DEFAULT, LINEAR, NTK))
