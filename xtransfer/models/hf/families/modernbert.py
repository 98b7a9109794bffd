"""ModernBERT, Ettin, and mmBERT: fused projections, LayerNorms without biases, and a head that comes pretrained."""

from collections.abc import Mapping
from typing import Any

from xtransfer.models.hf.rope import head_size, rope_of
from xtransfer.models.hf.weight_map import SIZE_KEYS, SIZES_REQUIRED, TIED, Family, NewLeaves, Rule, dense, fused, norm

_SOURCE = "model.layers.{n}"
_TARGET = "encoder.layers.{n}"
_GLOBAL, _LOCAL = "full_attention", "sliding_attention"
# Kinds of layers: the key of version 4 for theta, the same key here, and its default.
_THETAS = {_GLOBAL: ("global_rope_theta", 160_000.0), _LOCAL: ("local_rope_theta", 10_000.0)}


def _read(raw: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with `layer_types` and both thetas, as version 4 or 5 of `transformers` states them."""
    layers = raw.get("num_hidden_layers")
    if type(layers) is not int or layers < 1:
        raise ValueError(f"num_hidden_layers is {layers!r}, expected a positive integer")
    every = raw.get("global_attn_every_n_layers", 3)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"global_attn_every_n_layers is {every!r}, expected a positive integer")
    kinds = raw.get("layer_types")
    if kinds is None:
        kinds = [_LOCAL if index % every else _GLOBAL for index in range(layers)]
    if not isinstance(kinds, list) or not set(map(str, kinds)) <= set(_THETAS) or len(kinds) != layers:
        raise ValueError(f"layer_types must name {_GLOBAL} or {_LOCAL} for each of the {layers} layers")
    if raw.get("rope_scaling"):
        raise ValueError(f"rope_scaling is {raw['rope_scaling']!r}: only null is supported")
    parameters = raw.get("rope_parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"rope_parameters is {parameters!r}, expected an object")
    if not parameters.keys() <= _THETAS.keys():
        raise ValueError(f"rope_parameters is {dict(parameters)}: only {_GLOBAL} and {_LOCAL} are supported in it")
    thetas = {}
    for kind, (key, default) in _THETAS.items():
        settings = parameters.get(kind) or {}
        name, theta = f"rope_parameters.{kind}", raw.get(key, default)
        thetas[key], _ = rope_of(name, settings, theta, head_size(raw), theta_key=key)
    return raw | thetas | {"layer_types": tuple(kinds)}


def _write(values: dict[str, Any]) -> dict[str, Any]:
    """Return config.json with the keys of both versions."""
    parameters = {kind: {"rope_type": "default", "rope_theta": values[key]} for kind, (key, _) in _THETAS.items()}
    kinds = list(values["layer_types"])
    written = values | {"layer_types": kinds, "rope_parameters": parameters}
    steps = [step for step in range(1, len(kinds) + 1) if kinds == _every(step, len(kinds))]
    return written | ({"global_attn_every_n_layers": steps[0]} if steps else {})


def _every(step: int, layers: int) -> list[str]:
    return [_LOCAL if index % step else _GLOBAL for index in range(layers)]


MODERNBERT = Family(
    name="modernbert",
    rules=(
        Rule("model.embeddings.tok_embeddings.weight", "encoder.embeddings.word_embeddings.embedding"),
        *norm("model.embeddings.norm", "encoder.embeddings.norm"),
        *norm(f"{_SOURCE}.attn_norm", f"{_TARGET}.attention_norm"),
        *fused(f"{_SOURCE}.attn.Wqkv", *(f"{_TARGET}.attention.{name}" for name in ("query", "key", "value"))),
        *dense(f"{_SOURCE}.attn.Wo", f"{_TARGET}.attention.output"),
        *norm(f"{_SOURCE}.mlp_norm", f"{_TARGET}.feed_forward_norm"),
        *fused(f"{_SOURCE}.mlp.Wi", f"{_TARGET}.feed_forward.gate", f"{_TARGET}.feed_forward.up"),
        *dense(f"{_SOURCE}.mlp.Wo", f"{_TARGET}.feed_forward.output"),
        *norm("model.final_norm", "encoder.final_norm"),
        *dense("head.dense", "pooler.dense"),
        *norm("head.norm", "pooler.norm"),
        *dense("classifier", "head"),
        Rule("decoder.bias", "decoder_bias"),
    ),
    aliases=((r"^(?=embeddings\.|layers\.|final_norm\.)", "model."),),
    copies=((r"decoder\.weight", "model.embeddings.tok_embeddings.weight", "decoder_bias"),),
    ignorable=(),
    heads=(r"pooler\..*", r"head\..*", "decoder_bias"),
    new=(NewLeaves(r"head\..*"), NewLeaves(r"pooler\..*", only_with=r"head\..*"), NewLeaves("decoder_bias")),
    defaults=(
        ("architecture", "modernbert"),
        ("type_vocab_size", 0),
        ("layer_norm_eps", 1e-5),
        ("norm_bias", False),
        ("hidden_dropout", 0.0),
        ("attention_dropout", 0.0),
        ("classifier_dropout", 0.0),
        ("head_act", "gelu"),
        ("pad_id", 50283),
    ),
    config_keys=(
        *SIZE_KEYS,
        ("norm_eps", "layer_norm_eps"),
        ("norm_bias", "norm_bias"),
        ("hidden_activation", "hidden_act"),
        ("embedding_dropout", "embedding_dropout"),
        ("attention_dropout", "attention_dropout"),
        ("mlp_dropout", "hidden_dropout"),
        ("attention_bias", "attention_bias"),
        ("mlp_bias", "mlp_bias"),
        ("local_attention", "window"),
        ("layer_types", "layer_types"),
        ("global_rope_theta", "rope_theta"),
        ("local_rope_theta", "local_rope_theta"),
        ("classifier_activation", "head_act"),
        ("classifier_bias", "head_bias"),
        ("classifier_dropout", "classifier_dropout"),
        ("pad_token_id", "pad_id"),
    ),
    required=SIZES_REQUIRED,
    fixed=(),
    fixed_in_pretraining=(*TIED, ("decoder_bias", (True,))),
    architectures=(
        ("head.kernel", "ModernBertForSequenceClassification"),
        ("decoder_bias", "ModernBertForMaskedLM"),
        ("", "ModernBertModel"),
    ),
    read=_read,
    write=_write,
    pooling_key=("classifier_pooling", "cls"),
    poolings=(("cls", "cls"), ("mean", "mean")),
)
