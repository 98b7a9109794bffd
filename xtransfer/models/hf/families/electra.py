"""ELECTRA: embeddings with a width of their own, projected to the layers' width, and a head like RoBERTa's with GELU.

The head's GELU is the exact one, whatever `hidden_act` is. The parts of the generator and the discriminator beyond
the encoder are not read.
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

ELECTRA = Family(
    name="electra",
    rules=(
        *embeddings("electra.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
        *dense("electra.embeddings_project", "encoder.embeddings.project"),
        *bert_layers("electra.encoder.layer"),
        *dense("classifier.dense", "pooler.dense"),
        *dense("classifier.out_proj", "head"),
    ),
    aliases=((r"^(?=embeddings\.|embeddings_project\.|encoder\.)", "electra."), *OLD_NORM),
    copies=(),
    ignorable=(
        r"electra\.embeddings\.(position_ids|token_type_ids)",
        r"discriminator_predictions\.(dense|dense_prediction)\.(weight|bias)",
        r"generator_predictions\.(dense|LayerNorm)\.(weight|bias)",
        r"generator_lm_head\.(weight|bias)",
    ),
    heads=(r"pooler\..*", r"head\..*"),
    new=(NewLeaves(r"(pooler|head)\..*"),),
    defaults=(("embedding_size", 128), ("head_act", "gelu"), ("head_input_dropout", True)),
    config_keys=(*BERT_KEYS, ("embedding_size", "embedding_size")),
    required=BERT_REQUIRED,
    nullable=BERT_NULLABLE,
    fixed=BERT_FIXED,
    architectures=(
        ("head.kernel", "ElectraForSequenceClassification"),
        ("", "ElectraModel"),
    ),
)
