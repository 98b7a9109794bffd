"""XLM-RoBERTa XL and XXL: RoBERTa's names and head around pre-norm layers."""

from xtransfer.models.hf.weight_map import (
    BERT_FIXED,
    BERT_KEYS,
    BERT_NULLABLE,
    MASKED_LM,
    SIZES_REQUIRED,
    TIED,
    Family,
    NewLeaves,
    Rule,
    dense,
    masked_lm,
    norm,
)

_SOURCE = "roberta.encoder.layer.{n}"
_TARGET = "encoder.layers.{n}"

XLM_ROBERTA_XL = Family(
    name="xlm-roberta-xl",
    rules=(
        *(
            Rule(f"roberta.embeddings.{table}.weight", f"encoder.embeddings.{table}.embedding")
            for table in ("word_embeddings", "position_embeddings", "token_type_embeddings")
        ),
        *norm(f"{_SOURCE}.attention.self_attn_layer_norm", f"{_TARGET}.attention_norm"),
        *dense(f"{_SOURCE}.attention.self.query", f"{_TARGET}.attention.query"),
        *dense(f"{_SOURCE}.attention.self.key", f"{_TARGET}.attention.key"),
        *dense(f"{_SOURCE}.attention.self.value", f"{_TARGET}.attention.value"),
        *dense(f"{_SOURCE}.attention.output.dense", f"{_TARGET}.attention.output"),
        *norm(f"{_SOURCE}.LayerNorm", f"{_TARGET}.output_norm"),
        *dense(f"{_SOURCE}.intermediate.dense", f"{_TARGET}.intermediate"),
        *dense(f"{_SOURCE}.output.dense", f"{_TARGET}.output"),
        *norm("roberta.encoder.LayerNorm", "encoder.final_norm"),
        *dense("classifier.dense", "pooler.dense"),
        *dense("classifier.out_proj", "head"),
        *masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
    ),
    aliases=((r"^(?=embeddings\.|encoder\.|pooler\.)", "roberta."),),
    copies=(
        (r"lm_head\.decoder\.weight", "roberta.embeddings.word_embeddings.weight", "decoder_bias"),
        (r"lm_head\.decoder\.bias", "lm_head.bias", "decoder_bias"),
    ),
    ignorable=(r"roberta\.embeddings\.(position_ids|token_type_ids)", r"roberta\.pooler\.dense\.(weight|bias)"),
    heads=(r"pooler\..*", r"head\..*", MASKED_LM),
    new=(NewLeaves(r"(pooler|head)\..*"), NewLeaves(MASKED_LM)),
    defaults=(
        ("architecture", "xlm_roberta_xl"),
        ("pad_id", 1),
        ("type_vocab_size", 1),
        ("layer_norm_eps", 1e-5),
        ("head_input_dropout", True),
        ("masked_lm_act", "gelu"),
    ),
    config_keys=BERT_KEYS,
    required=SIZES_REQUIRED,
    nullable=BERT_NULLABLE,
    fixed=BERT_FIXED,
    fixed_in_pretraining=TIED,
    positions_after_pad=True,
    architectures=(
        ("head.kernel", "XLMRobertaXLForSequenceClassification"),
        ("decoder_bias", "XLMRobertaXLForMaskedLM"),
        ("", "XLMRobertaXLModel"),
    ),
)
