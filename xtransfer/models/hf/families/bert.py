"""BERT, multilingual BERT, LaBSE, MiniLM, and multilingual-e5: the reference for the other families."""

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

BERT = Family(
    name="bert",
    rules=(
        *embeddings("bert.embeddings", "word_embeddings", "position_embeddings", "token_type_embeddings"),
        *bert_layers("bert.encoder.layer"),
        *dense("bert.pooler.dense", "pooler.dense"),
        *dense("classifier", "head"),
        *masked_lm("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias"),
        *dense("cls.seq_relationship", "next_sentence"),
    ),
    aliases=((r"^(?=embeddings\.|encoder\.|pooler\.)", "bert."), *OLD_NORM),
    copies=(
        (r"cls\.predictions\.decoder\.weight", "bert.embeddings.word_embeddings.weight", "decoder_bias"),
        (r"cls\.predictions\.decoder\.bias", "cls.predictions.bias", "decoder_bias"),
    ),
    ignorable=(r"bert\.embeddings\.(position_ids|token_type_ids)",),
    heads=(r"pooler\..*", r"head\..*", MASKED_LM, r"next_sentence\..*"),
    new=(
        NewLeaves(r"head\..*"),
        NewLeaves(r"next_sentence\..*"),
        NewLeaves(MASKED_LM),
        NewLeaves(r"pooler\..*", only_with=r"(head|next_sentence)\..*"),
    ),
    config_keys=BERT_KEYS,
    required=SIZES_REQUIRED,
    nullable=BERT_NULLABLE,
    fixed=BERT_FIXED,
    fixed_in_pretraining=TIED,
    architectures=(
        ("head.kernel", "BertForSequenceClassification"),
        ("next_sentence.kernel", "BertForPreTraining"),
        ("decoder_bias", "BertForMaskedLM"),
        ("", "BertModel"),
    ),
)
