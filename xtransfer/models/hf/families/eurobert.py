"""EuroBERT: Llama's names, a head of dense, GELU, and output, and three ways to pool.

The head of the language model is an untied matrix, and its pretraining is not continued here.
"""

from typing import Any

from xtransfer.models.hf.rope import read_rope
from xtransfer.models.hf.weight_map import SIZE_KEYS, SIZES_REQUIRED, Family, NewLeaves, Rule, dense

_SOURCE = "model.layers.{n}"
_TARGET = "encoder.layers.{n}"
_THETA = 10_000.0  # what transformers assumes; the published files state 250,000


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with `rope_theta` beside the other keys, and with today's key for the pooling."""
    theta, _ = read_rope(raw, _THETA)
    heads, shared = raw.get("num_attention_heads"), raw.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(shared, int) and (shared < 1 or heads % shared):
        raise ValueError(f"num_key_value_heads is {shared}, which does not divide num_attention_heads {heads}")
    older = {"classifier_pooling": raw["clf_pooling"]} if "clf_pooling" in raw else {}
    return older | raw | {"rope_theta": theta}


def _write(values: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the keys of both versions of `transformers`."""
    return values | {"rope_parameters": {"rope_type": "default", "rope_theta": values["rope_theta"]}}


EUROBERT = Family(
    name="eurobert",
    rules=(
        Rule("model.embed_tokens.weight", "encoder.embeddings.word_embeddings.embedding"),
        Rule(f"{_SOURCE}.input_layernorm.weight", f"{_TARGET}.attention_norm.scale"),
        *dense(f"{_SOURCE}.self_attn.q_proj", f"{_TARGET}.attention.query"),
        *dense(f"{_SOURCE}.self_attn.k_proj", f"{_TARGET}.attention.key"),
        *dense(f"{_SOURCE}.self_attn.v_proj", f"{_TARGET}.attention.value"),
        *dense(f"{_SOURCE}.self_attn.o_proj", f"{_TARGET}.attention.output"),
        Rule(f"{_SOURCE}.post_attention_layernorm.weight", f"{_TARGET}.feed_forward_norm.scale"),
        *dense(f"{_SOURCE}.mlp.gate_proj", f"{_TARGET}.feed_forward.gate"),
        *dense(f"{_SOURCE}.mlp.up_proj", f"{_TARGET}.feed_forward.up"),
        *dense(f"{_SOURCE}.mlp.down_proj", f"{_TARGET}.feed_forward.output"),
        Rule("model.norm.weight", "encoder.final_norm.scale"),
        *dense("dense", "pooler.dense"),
        *dense("classifier", "head"),
    ),
    aliases=((r"^(?=embed_tokens\.|layers\.|norm\.)", "model."),),
    copies=(),
    ignorable=(r"lm_head\.(weight|bias)",),
    heads=(r"pooler\..*", r"head\..*"),
    new=(NewLeaves(r"(pooler|head)\..*"),),
    defaults=(
        ("architecture", "eurobert"),
        ("type_vocab_size", 0),
        ("layer_norm_eps", 1e-5),
        ("hidden_act", "silu"),
        ("hidden_dropout", 0.0),
        ("attention_dropout", 0.0),
        ("classifier_dropout", 0.0),
        ("head_act", "gelu"),
        ("pad_id", 128001),
    ),
    config_keys=(
        *SIZE_KEYS,
        ("num_key_value_heads", "kv_heads"),
        ("head_dim", "head_size"),
        ("rms_norm_eps", "layer_norm_eps"),
        ("hidden_act", "hidden_act"),
        ("rope_theta", "rope_theta"),
        ("attention_bias", "attention_bias"),
        ("mlp_bias", "mlp_bias"),
        ("attention_dropout", "attention_dropout"),
        ("pad_token_id", "pad_id"),
    ),
    required=SIZES_REQUIRED,
    nullable=("num_key_value_heads", "head_dim"),
    fixed=(),
    architectures=(("head.kernel", "EuroBertForSequenceClassification"), ("", "EuroBertModel")),
    read=_read,
    write=_write,
    pooling_key=("classifier_pooling", "late"),
    poolings=(("cls", "bos"), ("mean", "mean"), ("late", "late")),
)
