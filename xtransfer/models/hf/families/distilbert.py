"""DistilBERT: no token types, no dropout after attention, a head of dense, ReLU, and output, and a fixed LayerNorm eps.

Position embeddings come from the file, whether they were learned or are sinusoids.
"""

from xtransfer.models.hf.weight_map import (
    MASKED_LM,
    OLD_NORM,
    TIED,
    Family,
    NewLeaves,
    dense,
    embeddings,
    masked_lm,
    norm,
)

_SOURCE = "distilbert.transformer.layer.{n}"
_TARGET = "encoder.layers.{n}"

DISTILBERT = Family(
    name="distilbert",
    rules=(
        *embeddings("distilbert.embeddings", "word_embeddings", "position_embeddings"),
        *dense(f"{_SOURCE}.attention.q_lin", f"{_TARGET}.attention.query"),
        *dense(f"{_SOURCE}.attention.k_lin", f"{_TARGET}.attention.key"),
        *dense(f"{_SOURCE}.attention.v_lin", f"{_TARGET}.attention.value"),
        *dense(f"{_SOURCE}.attention.out_lin", f"{_TARGET}.attention.output"),
        *norm(f"{_SOURCE}.sa_layer_norm", f"{_TARGET}.attention_norm"),
        *dense(f"{_SOURCE}.ffn.lin1", f"{_TARGET}.intermediate"),
        *dense(f"{_SOURCE}.ffn.lin2", f"{_TARGET}.output"),
        *norm(f"{_SOURCE}.output_layer_norm", f"{_TARGET}.output_norm"),
        *dense("pre_classifier", "pooler.dense"),
        *dense("classifier", "head"),
        *masked_lm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
    ),
    aliases=((r"^(?=embeddings\.|transformer\.)", "distilbert."), *OLD_NORM),
    copies=((r"vocab_projector\.weight", "distilbert.embeddings.word_embeddings.weight", "decoder_bias"),),
    ignorable=(r"distilbert\.embeddings\.position_ids",),
    heads=(r"pooler\..*", r"head\..*", MASKED_LM),
    new=(NewLeaves(r"(pooler|head)\..*"), NewLeaves(MASKED_LM)),
    defaults=(
        ("type_vocab_size", 0),
        ("layer_norm_eps", 1e-12),
        ("attention_output_dropout", False),
        ("head_act", "relu"),
        ("classifier_dropout", 0.2),
    ),
    config_keys=(
        ("vocab_size", "vocab_size"),
        ("dim", "hidden_size"),
        ("n_layers", "num_layers"),
        ("n_heads", "num_heads"),
        ("hidden_dim", "intermediate_size"),
        ("max_position_embeddings", "max_positions"),
        ("activation", "hidden_act"),
        ("dropout", "hidden_dropout"),
        ("attention_dropout", "attention_dropout"),
        ("seq_classif_dropout", "classifier_dropout"),
        ("pad_token_id", "pad_id"),
    ),
    required=("vocab_size", "dim", "n_layers", "n_heads", "hidden_dim", "max_position_embeddings"),
    fixed=(),
    fixed_in_pretraining=TIED,
    architectures=(
        ("head.kernel", "DistilBertForSequenceClassification"),
        ("decoder_bias", "DistilBertForMaskedLM"),
        ("", "DistilBertModel"),
    ),
)
