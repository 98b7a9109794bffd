"""RoBERTa, XLM-RoBERTa, and CamemBERT: one architecture, three model types.

They differ from BERT in two ways. Positions start after the pad id. The head has no pooler before it: it is a dense
layer, tanh, and the output, with dropout on its input too. The pooler in an encoder-only file and the language model's
head are not read.
"""

from xtransfer.models.hf.weight_map import (
    BERT_FIXED,
    BERT_KEYS,
    BERT_NULLABLE,
    BERT_REQUIRED,
    OLD_NORM,
    Family,
    NewLeaves,
    bert_layers,
    dense,
    embeddings,
)


def _family(model_type: str, class_prefix: str) -> Family:
    return Family(
        name=model_type,
        rules=(
            *embeddings("roberta.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
            *bert_layers("roberta.encoder.layer"),
            *dense("classifier.dense", "pooler.dense"),
            *dense("classifier.out_proj", "head"),
        ),
        aliases=((r"^(?=embeddings\.|encoder\.|pooler\.)", "roberta."), *OLD_NORM),
        copies=(),
        ignorable=(
            r"roberta\.embeddings\.(position_ids|token_type_ids)",
            r"roberta\.pooler\.dense\.(weight|bias)",
            r"lm_head\.(bias|(dense|layer_norm|decoder)\.(weight|bias))",
        ),
        heads=(r"pooler\..*", r"head\..*"),
        new=(NewLeaves(r"(pooler|head)\..*"),),
        defaults=(("pad_id", 1), ("head_input_dropout", True)),
        config_keys=BERT_KEYS,
        required=BERT_REQUIRED,
        nullable=BERT_NULLABLE,
        fixed=BERT_FIXED,
        positions_after_pad=True,
        architectures=(
            ("head.kernel", f"{class_prefix}ForSequenceClassification"),
            ("", f"{class_prefix}Model"),
        ),
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
CAMEMBERT = _family("camembert", "Camembert")
