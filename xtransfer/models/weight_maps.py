"""Name tables, one per model family: how a Hugging Face checkpoint's names map to the encoder's.

A rule is a pair of names in which `{n}` stands for a layer's number, so that the same table reads and writes.
No arrays here: `xtransfer.models.hf` moves the numbers.
"""

import re
from dataclasses import dataclass
from functools import cache

NONE = "none"
TRANSPOSE = "transpose"  # PyTorch's Linear keeps [out, in], ours is [in, out]


@dataclass(frozen=True)
class Rule:
    """`source` in the file is `target` in the model; the first is transformed to give the second."""

    source: str
    target: str
    transform: str = NONE


@dataclass(frozen=True)
class NewLeaves:
    """Leaves that a checkpoint may lack, all together or none: `only_with` names leaves that must then be new too."""

    target: str
    only_with: str | None = None


@dataclass(frozen=True)
class Family:
    """Everything that is particular to the checkpoints of one `model_type`.

    `aliases`: (pattern, replacement) applied in order to a source name before the rules see it.
    `copies`: (pattern, source) names of tensors that repeat another one (a tied decoder).
    `ignorable`: patterns of source names that carry no parameter of ours.
    `heads`: patterns of targets that a model without that head leaves in the file.
    `config_keys`: key of config.json -> field of EncoderConfig; `required` are keys without a default.
    `fixed`: keys of config.json that, where present, must have one of these values.
    """

    name: str
    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, str], ...]
    ignorable: tuple[str, ...]
    heads: tuple[str, ...]
    new: tuple[NewLeaves, ...]
    config_keys: tuple[tuple[str, str], ...]
    required: tuple[str, ...]
    fixed: tuple[tuple[str, tuple[object, ...]], ...]
    architectures: tuple[tuple[str, str], ...]

    def canonical(self, source: str) -> str:
        """The name under which the rules know a source tensor."""
        for pattern, replacement in self.aliases:
            source = re.sub(pattern, replacement, source)
        return source

    def target(self, source: str) -> tuple[str, str] | None:
        """(target, transform) of a canonical source name; None where no rule matches.

        Raises ValueError where several rules match: a fault of the table.
        """
        found = [
            (_fill(rule.target, match), rule.transform)
            for rule in self.rules
            if (match := _pattern(rule.source).fullmatch(source))
        ]
        if len(found) > 1:
            raise ValueError(f"{self.name}: {source} matches {len(found)} rules")
        return found[0] if found else None

    def source(self, target: str) -> tuple[str, str]:
        """(canonical source, transform) of a target: the inverse of `target`. KeyError where there is none."""
        for rule in self.rules:
            if match := _pattern(rule.target).fullmatch(target):
                return _fill(rule.source, match), rule.transform
        raise KeyError(f"{self.name}: no name for {target}")

    def is_ignorable(self, source: str) -> bool:
        """Whether a canonical source name is one that is left in the file."""
        return any(re.fullmatch(pattern, source) for pattern in self.ignorable)

    def is_head(self, target: str) -> bool:
        """Whether a target belongs to a head, which a model may not have."""
        return any(re.fullmatch(pattern, target) for pattern in self.heads)

    def copy_of(self, source: str) -> str | None:
        """The canonical source name that this one repeats, if it does."""
        return next((original for pattern, original in self.copies if re.fullmatch(pattern, source)), None)

    def architecture(self, targets: frozenset[str]) -> str:
        """The class name for config.json of a model with these leaves."""
        return next(name for leaf, name in self.architectures if not leaf or leaf in targets)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>0|[1-9]\d*)"))


def _fill(template: str, match: re.Match[str]) -> str:
    return template.replace("{n}", match.group("n")) if "{n}" in template else template


def _dense(source: str, target: str) -> tuple[Rule, Rule]:
    weight = Rule(f"{source}.weight", f"{target}.kernel", TRANSPOSE)
    return weight, Rule(f"{source}.bias", f"{target}.bias")


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def _embedding(name: str) -> Rule:
    return Rule(f"bert.embeddings.{name}.weight", f"encoder.embeddings.{name}.embedding")


_SOURCE_LAYER = "bert.encoder.layer.{n}"
_TARGET_LAYER = "encoder.layers.{n}"

BERT = Family(
    name="bert",
    rules=(
        _embedding("word_embeddings"),
        _embedding("position_embeddings"),
        _embedding("token_type_embeddings"),
        *_norm("bert.embeddings.LayerNorm", "encoder.embeddings.norm"),
        *_dense(f"{_SOURCE_LAYER}.attention.self.query", f"{_TARGET_LAYER}.attention.query"),
        *_dense(f"{_SOURCE_LAYER}.attention.self.key", f"{_TARGET_LAYER}.attention.key"),
        *_dense(f"{_SOURCE_LAYER}.attention.self.value", f"{_TARGET_LAYER}.attention.value"),
        *_dense(f"{_SOURCE_LAYER}.attention.output.dense", f"{_TARGET_LAYER}.attention.output"),
        *_norm(f"{_SOURCE_LAYER}.attention.output.LayerNorm", f"{_TARGET_LAYER}.attention_norm"),
        *_dense(f"{_SOURCE_LAYER}.intermediate.dense", f"{_TARGET_LAYER}.intermediate"),
        *_dense(f"{_SOURCE_LAYER}.output.dense", f"{_TARGET_LAYER}.output"),
        *_norm(f"{_SOURCE_LAYER}.output.LayerNorm", f"{_TARGET_LAYER}.output_norm"),
        *_dense("bert.pooler.dense", "pooler.dense"),
        *_dense("classifier", "head"),
        *_dense("cls.predictions.transform.dense", "transform"),
        *_norm("cls.predictions.transform.LayerNorm", "transform_norm"),
        Rule("cls.predictions.bias", "decoder_bias"),
        *_dense("cls.seq_relationship", "next_sentence"),
    ),
    aliases=(
        (r"^(?=embeddings\.|encoder\.|pooler\.)", "bert."),
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
    ),
    copies=(
        (r"cls\.predictions\.decoder\.weight", "bert.embeddings.word_embeddings.weight"),
        (r"cls\.predictions\.decoder\.bias", "cls.predictions.bias"),
    ),
    ignorable=(r"bert\.embeddings\.(position_ids|token_type_ids)",),
    heads=(r"pooler\..*", r"head\..*", r"transform\..*", r"transform_norm\..*", r"decoder_bias", r"next_sentence\..*"),
    new=(
        NewLeaves(r"head\..*"),
        NewLeaves(r"next_sentence\..*"),
        NewLeaves(r"(transform\..*|transform_norm\..*|decoder_bias)"),
        NewLeaves(r"pooler\..*", only_with=r"(head|next_sentence)\..*"),
    ),
    config_keys=(
        ("vocab_size", "vocab_size"),
        ("hidden_size", "hidden_size"),
        ("num_hidden_layers", "num_layers"),
        ("num_attention_heads", "num_heads"),
        ("intermediate_size", "intermediate_size"),
        ("max_position_embeddings", "max_positions"),
        ("type_vocab_size", "type_vocab_size"),
        ("layer_norm_eps", "layer_norm_eps"),
        ("hidden_act", "hidden_act"),
        ("hidden_dropout_prob", "hidden_dropout"),
        ("attention_probs_dropout_prob", "attention_dropout"),
        ("classifier_dropout", "classifier_dropout"),
        ("pad_token_id", "pad_id"),
    ),
    required=(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "max_position_embeddings",
    ),
    fixed=(
        ("position_embedding_type", ("absolute",)),
        ("is_decoder", (False,)),
        ("add_cross_attention", (False,)),
        ("tie_word_embeddings", (True,)),
    ),
    architectures=(
        ("head.kernel", "BertForSequenceClassification"),
        ("next_sentence.kernel", "BertForPreTraining"),
        ("", "BertModel"),
    ),
)

FAMILIES: dict[str, Family] = {"bert": BERT}
