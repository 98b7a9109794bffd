"""RoBERTa, XLM-RoBERTa, and CamemBERT: one architecture, three model types.

They differ from BERT in two ways. Positions start after the pad id. The head has no pooler before it: it is a dense
layer, tanh, and the output, with dropout on its input too. The pooler in an encoder-only file is not read. The
language model's head has the exact GELU, whatever `hidden_act` is.
"""

from xtransfer.models.hf.weight_map import (
    BERT_FIXED,
    BERT_KEYS,
    BERT_NULLABLE,
    MASKED_LM,
    OLD_NORM,
    SIZES_REQUIRED,
    TIED,
    Family,
    NewLeaves,
    bert_layers,
    dense,
    embeddings,
    masked_lm,
)


def _family(model_type: str, class_prefix: str) -> Family:
    return Family(
        name=model_type,
        rules=(
            *embeddings("roberta.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
            *bert_layers("roberta.encoder.layer"),
            *dense("classifier.dense", "pooler.dense"),
            *dense("classifier.out_proj", "head"),
            *masked_lm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias"),
        ),
        aliases=((r"^(?=embeddings\.|encoder\.|pooler\.)", "roberta."), *OLD_NORM),
        copies=(
            (r"lm_head\.decoder\.weight", "roberta.embeddings.word_embeddings.weight", "decoder_bias"),
            (r"lm_head\.decoder\.bias", "lm_head.bias", "decoder_bias"),
        ),
        ignorable=(
            r"roberta\.embeddings\.(position_ids|token_type_ids)",
            r"roberta\.pooler\.dense\.(weight|bias)",
        ),
        heads=(r"pooler\..*", r"head\..*", MASKED_LM),
        new=(NewLeaves(r"(pooler|head)\..*"), NewLeaves(MASKED_LM)),
        defaults=(("pad_id", 1), ("head_input_dropout", True), ("masked_lm_act", "gelu")),
        config_keys=BERT_KEYS,
        required=SIZES_REQUIRED,
        nullable=BERT_NULLABLE,
        fixed=BERT_FIXED,
        fixed_in_pretraining=TIED,
        positions_after_pad=True,
        architectures=(
            ("head.kernel", f"{class_prefix}ForSequenceClassification"),
            ("decoder_bias", f"{class_prefix}ForMaskedLM"),
            ("", f"{class_prefix}Model"),
        ),
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
CAMEMBERT = _family("camembert", "Camembert")
