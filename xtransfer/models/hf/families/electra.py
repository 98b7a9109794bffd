"""ELECTRA: embeddings with a width of their own, projected to the layers' width, and a head like RoBERTa's with GELU.

The head's GELU is the exact one, whatever `hidden_act` is, and so is the generator's. The head of the discriminator
is not read.
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

ELECTRA = Family(
    name="electra",
    rules=(
        *embeddings("electra.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
        *dense("electra.embeddings_project", "encoder.embeddings.project"),
        *bert_layers("electra.encoder.layer"),
        *dense("classifier.dense", "pooler.dense"),
        *dense("classifier.out_proj", "head"),
        *masked_lm("generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head.bias"),
    ),
    aliases=((r"^(?=embeddings\.|embeddings_project\.|encoder\.)", "electra."), *OLD_NORM),
    copies=((r"generator_lm_head\.weight", "electra.embeddings.word_embeddings.weight", "decoder_bias"),),
    ignorable=(
        r"electra\.embeddings\.(position_ids|token_type_ids)",
        r"discriminator_predictions\.(dense|dense_prediction)\.(weight|bias)",
    ),
    heads=(r"pooler\..*", r"head\..*", MASKED_LM),
    new=(NewLeaves(r"(pooler|head)\..*"), NewLeaves(MASKED_LM)),
    defaults=(("embedding_size", 128), ("head_act", "gelu"), ("head_input_dropout", True), ("masked_lm_act", "gelu")),
    config_keys=(*BERT_KEYS, ("embedding_size", "embedding_size")),
    required=SIZES_REQUIRED,
    nullable=BERT_NULLABLE,
    fixed=BERT_FIXED,
    fixed_in_pretraining=TIED,
    architectures=(
        ("head.kernel", "ElectraForSequenceClassification"),
        ("decoder_bias", "ElectraForMaskedLM"),
        ("", "ElectraModel"),
    ),
)
