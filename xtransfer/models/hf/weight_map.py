"""What a table of names is: how the names of a family's Hugging Face checkpoints map to the encoder's.

A rule is a pair of names in which `{n}` stands for a layer's number, so that the same table reads and writes. The
tables themselves are in `xtransfer.models.hf.families`. No arrays here: `xtransfer.models.hf` moves the numbers.
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
    `copies`: (pattern, source, leaf) names of tensors that repeat another one (a tied decoder), which matters to a
    model with that leaf only.
    `ignorable`: patterns of source names that carry no parameter of ours.
    `heads`: patterns of targets that a model without that head leaves in the file.
    `defaults`: fields of EncoderConfig that differ from BERT's, where no key of config.json says otherwise.
    `config_keys`: key of config.json -> field of EncoderConfig; `required` are keys without a default.
    `nullable`: keys of config.json that may be null.
    `fixed`: keys of config.json that, where present, must have one of these values; `fixed_in_pretraining` those of
    which only the pretraining heads ask so.
    `positions_after_pad`: position ids begin at pad_id + 1, not at 0.
    `architectures`: (leaf, class name) the first whose leaf a model has; "" for any model.
    """

    name: str
    rules: tuple[Rule, ...]
    aliases: tuple[tuple[str, str], ...]
    copies: tuple[tuple[str, str, str], ...]
    ignorable: tuple[str, ...]
    heads: tuple[str, ...]
    new: tuple[NewLeaves, ...]
    config_keys: tuple[tuple[str, str], ...]
    required: tuple[str, ...]
    fixed: tuple[tuple[str, tuple[object, ...]], ...]
    architectures: tuple[tuple[str, str], ...]
    defaults: tuple[tuple[str, object], ...] = ()
    nullable: tuple[str, ...] = ()
    fixed_in_pretraining: tuple[tuple[str, tuple[object, ...]], ...] = ()
    positions_after_pad: bool = False

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

    def copy_of(self, source: str) -> tuple[str, str] | None:
        """(canonical source name that this one repeats, leaf without which it does not matter), if it repeats one."""
        return next(
            ((original, leaf) for pattern, original, leaf in self.copies if re.fullmatch(pattern, source)), None
        )

    @property
    def pretrains(self) -> bool:
        """Whether there are rules for the pretraining heads."""
        return any(_pattern(rule.target).fullmatch("decoder_bias") for rule in self.rules)

    @property
    def pools_in_encoder(self) -> bool:
        """Whether a bare encoder's file has the dense layer that the head reads."""
        return self.target(self.canonical("pooler.dense.weight")) is not None

    def architecture(self, targets: frozenset[str]) -> str:
        """The class name for config.json of a model with these leaves."""
        return next(name for leaf, name in self.architectures if not leaf or leaf in targets)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>0|[1-9]\d*)"))


def _fill(template: str, match: re.Match[str]) -> str:
    return template.replace("{n}", match.group("n")) if "{n}" in template else template


def dense(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a linear layer."""
    return Rule(f"{source}.weight", f"{target}.kernel", TRANSPOSE), Rule(f"{source}.bias", f"{target}.bias")


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a LayerNorm."""
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def embeddings(prefix: str, *names: str) -> tuple[Rule, ...]:
    """The rules of embedding tables and the LayerNorm over their sum."""
    tables = (Rule(f"{prefix}.{name}.weight", f"encoder.embeddings.{name}.embedding") for name in names)
    return (*tables, *norm(f"{prefix}.LayerNorm", "encoder.embeddings.norm"))


def bert_layers(prefix: str) -> tuple[Rule, ...]:
    """The rules of the layers under the names that BERT, RoBERTa and ELECTRA share."""
    source, target = f"{prefix}.{{n}}", "encoder.layers.{n}"
    return (
        *dense(f"{source}.attention.self.query", f"{target}.attention.query"),
        *dense(f"{source}.attention.self.key", f"{target}.attention.key"),
        *dense(f"{source}.attention.self.value", f"{target}.attention.value"),
        *dense(f"{source}.attention.output.dense", f"{target}.attention.output"),
        *norm(f"{source}.attention.output.LayerNorm", f"{target}.attention_norm"),
        *dense(f"{source}.intermediate.dense", f"{target}.intermediate"),
        *dense(f"{source}.output.dense", f"{target}.output"),
        *norm(f"{source}.output.LayerNorm", f"{target}.output_norm"),
    )


# Keys of config.json that BERT, RoBERTa and ELECTRA share.
BERT_KEYS = (
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
)
BERT_REQUIRED = tuple(key for key, _ in BERT_KEYS[:6])
BERT_NULLABLE = ("classifier_dropout",)
BERT_FIXED: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("position_embedding_type", ("absolute",)),
    ("is_decoder", (False,)),
    ("add_cross_attention", (False,)),
)
# LayerNorm's parameters as TensorFlow's checkpoints, and those converted from them, name them.
OLD_NORM = (
    (r"((?i:layer_?norm))\.gamma$", r"\1.weight"),
    (r"((?i:layer_?norm))\.beta$", r"\1.bias"),
)
