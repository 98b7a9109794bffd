"""The form of a weight map: how the tensor names of a family's checkpoints map to the encoder's parameters.

A rule is a pair of names in which `{n}` stands for a layer's number, so the same table serves reading and writing. The
tables themselves are in `families`. This module touches no arrays; `weights` does.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple


class Layout(NamedTuple):
    """How a parameter lies in its tensor.

    Attributes:
      transposed: whether the axes are reversed: PyTorch's Linear stores [out, in], ours [in, out].
      parts: the number of equal blocks that the tensor's rows are divided into, as in a fused projection.
      part: the number of the parameter's block, from 0.
    """

    transposed: bool = False
    part: int = 0
    parts: int = 1


AS_IS, TRANSPOSED = Layout(), Layout(transposed=True)


@dataclass(frozen=True)
class Rule:
    """Maps the tensor `source` in the file, or a part of it, to the parameter `target`."""

    source: str
    target: str
    layout: Layout = AS_IS


@dataclass(frozen=True)
class NewLeaves:
    """Leaves that a checkpoint may lack, all together; `only_with` names leaves that must then be new too."""

    target: str
    only_with: str | None = None


@dataclass(frozen=True)
class Family:
    """Everything that is particular to the checkpoints of one `model_type`.

    Attributes:
      name: the `model_type`.
      rules: tensors to parameters. Several rules may share a tensor, if each takes another part of it.
      aliases: (pattern, replacement) pairs, applied in order to a tensor's name before the rules see it.
      copies: (pattern, source, leaf) for tensors that repeat another one, such as a tied decoder. They matter only to a
        model with that leaf.
      ignorable: patterns of tensor names that hold none of our parameters.
      heads: patterns of targets that are not read if a model has no such head.
      unused: patterns of targets in the encoder that files hold even if config.json turns them off.
      other_heads: (end of a class name, pattern of tensor names) pairs for heads of other tasks, which are not read. A
        checkpoint that names the class in its `architectures` is read without this head.
      new: leaves that a checkpoint may lack.
      config_keys: (key of config.json, field of EncoderConfig) pairs.
      required: the keys without a default.
      fixed: (key, allowed values) for keys of config.json that may only have these values.
      architectures: (leaf, class name) pairs; the first whose leaf a model has names it, and "" matches any model.
      defaults: fields of EncoderConfig that differ from BERT's, unless a key of config.json sets them.
      nullable: keys of config.json that may be null.
      fixed_in_pretraining: as `fixed`, but only for the pretraining heads.
      positions_after_pad: whether position ids start at pad_id + 1, and not at 0.
      read: turns config.json into one whose `config_keys` have the values of EncoderConfig or its subclass, if older
        or nested keys say the same. Raises ValueError, with a text that names the key, for what is not supported.
      write: the inverse: adds the keys that `transformers` needs.
      saved_as: the `model_type` to write, if `transformers` has a class for another one; None is `name`.
      pooling_key: the key of config.json for the pooling of the family's own head, and what that head reads without it.
      poolings: pairs of our name of a pooling and the value of `pooling_key`. Without such a key, "cls" alone.
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
    unused: tuple[str, ...] = ()
    other_heads: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, object], ...] = ()
    nullable: tuple[str, ...] = ()
    fixed_in_pretraining: tuple[tuple[str, tuple[object, ...]], ...] = ()
    positions_after_pad: bool = False
    read: Callable[[dict[str, Any]], dict[str, Any]] = dict
    write: Callable[[dict[str, Any]], dict[str, Any]] = dict
    saved_as: str | None = None
    pooling_key: tuple[str, str] | None = None
    poolings: tuple[tuple[str, str], ...] = (("cls", ""),)

    def canonical(self, source: str) -> str:
        """Return the name by which the rules know a tensor."""
        for pattern, replacement in self.aliases:
            source = re.sub(pattern, replacement, source)
        return source

    def targets(self, source: str) -> list[tuple[str, Layout]]:
        """Return (target, layout) for each parameter in a tensor, by its canonical name; none if no rule matches.

        Raises:
          ValueError: several rules match that do not divide the tensor among them, which is a fault of the table.
        """
        matches = []
        for rule in self.rules:
            match = _pattern(rule.source).fullmatch(source)
            if match:
                matches.append((_fill(rule.target, match), rule.layout))
        parts = sorted((layout.part, layout.parts) for _, layout in matches)
        if parts != [(part, len(parts)) for part in range(len(parts))]:
            raise ValueError(f"{self.name}: {source} matches {len(matches)} rules")
        return matches

    def source(self, target: str) -> tuple[str, Layout]:
        """Return (canonical tensor name, layout) for a target, the inverse of `targets`; KeyError if it has none."""
        for rule in self.rules:
            match = _pattern(rule.target).fullmatch(target)
            if match:
                return _fill(rule.source, match), rule.layout
        raise KeyError(f"{self.name}: no name for {target}")

    def is_ignorable(self, source: str) -> bool:
        """Return whether a tensor is not read, by its canonical name."""
        return any(re.fullmatch(pattern, source) for pattern in self.ignorable)

    def is_head(self, target: str) -> bool:
        """Return whether a target belongs to a head, which a model may lack."""
        return any(re.fullmatch(pattern, target) for pattern in self.heads)

    def may_be_unused(self, target: str) -> bool:
        """Return whether a model may lack a target that a file has: part of a head, or one of `unused`."""
        return self.is_head(target) or any(re.fullmatch(pattern, target) for pattern in self.unused)

    def copy_of(self, source: str) -> tuple[str, str] | None:
        """Return (the canonical name that this one repeats, the leaf without which it does not matter), or None."""
        return next(
            ((original, leaf) for pattern, original, leaf in self.copies if re.fullmatch(pattern, source)), None
        )

    @property
    def pretrains(self) -> bool:
        """Whether the family has rules for the pretraining heads."""
        return any(_pattern(rule.target).fullmatch("decoder_bias") for rule in self.rules)

    @property
    def pools_in_encoder(self) -> bool:
        """Whether the file of a bare encoder has the dense layer that the head reads."""
        name = self.canonical("pooler.dense.weight")
        return name != "pooler.dense.weight" and bool(self.targets(name))

    def architecture(self, targets: frozenset[str]) -> str:
        """Return the class name in config.json for a model with these leaves."""
        return next(name for leaf, name in self.architectures if not leaf or leaf in targets)


@cache
def _pattern(template: str) -> re.Pattern[str]:
    return re.compile(re.escape(template).replace(r"\{n\}", r"(?P<n>0|[1-9]\d*)"))


def _fill(template: str, match: re.Match[str]) -> str:
    return template.replace("{n}", match.group("n")) if "{n}" in template else template


def dense(source: str, target: str) -> tuple[Rule, Rule]:
    """Return the rules of a linear layer."""
    return Rule(f"{source}.weight", f"{target}.kernel", TRANSPOSED), Rule(f"{source}.bias", f"{target}.bias")


def fused(source: str, *targets: str) -> tuple[Rule, ...]:
    """Return the rules of linear layers whose outputs one layer of the file computes, one after the other."""
    places = [(part, len(targets)) for part in range(len(targets))]
    return tuple(
        rule
        for target, (part, parts) in zip(targets, places, strict=True)
        for rule in (
            Rule(f"{source}.weight", f"{target}.kernel", Layout(True, part, parts)),
            Rule(f"{source}.bias", f"{target}.bias", Layout(False, part, parts)),
        )
    )


def norm(source: str, target: str) -> tuple[Rule, Rule]:
    """Return the rules of a LayerNorm."""
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def masked_lm(dense_name: str, norm_name: str, bias: str) -> tuple[Rule, ...]:
    """Return the rules of a masked language model's head."""
    return (*dense(dense_name, "transform"), *norm(norm_name, "transform_norm"), Rule(bias, "decoder_bias"))


def embeddings(prefix: str, *names: str) -> tuple[Rule, ...]:
    """Return the rules of embedding tables, and of the LayerNorm over their sum."""
    tables = (Rule(f"{prefix}.{name}.weight", f"encoder.embeddings.{name}.embedding") for name in names)
    return (*tables, *norm(f"{prefix}.LayerNorm", "encoder.embeddings.norm"))


def bert_layers(prefix: str) -> tuple[Rule, ...]:
    """Return the rules of the layers under the names that BERT, RoBERTa, and ELECTRA share."""
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


MASKED_LM = r"(transform\..*|transform_norm\..*|decoder_bias)"  # the targets of `masked_lm`
TIED = (("tie_word_embeddings", (True,)),)

# Keys of config.json for an encoder's sizes, which all families but DistilBERT share, and which must be there.
SIZE_KEYS = (
    ("vocab_size", "vocab_size"),
    ("hidden_size", "hidden_size"),
    ("num_hidden_layers", "num_layers"),
    ("num_attention_heads", "num_heads"),
    ("intermediate_size", "intermediate_size"),
    ("max_position_embeddings", "max_positions"),
)
SIZES_REQUIRED = tuple(key for key, _ in SIZE_KEYS)
# Keys that BERT, RoBERTa, ELECTRA, GTE, and XLM-R XL share.
BERT_KEYS = (
    *SIZE_KEYS,
    ("type_vocab_size", "type_vocab_size"),
    ("layer_norm_eps", "layer_norm_eps"),
    ("hidden_act", "hidden_act"),
    ("hidden_dropout_prob", "hidden_dropout"),
    ("attention_probs_dropout_prob", "attention_dropout"),
    ("classifier_dropout", "classifier_dropout"),
    ("pad_token_id", "pad_id"),
)
BERT_NULLABLE = ("classifier_dropout",)
BERT_FIXED: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("position_embedding_type", ("absolute",)),
    ("is_decoder", (False,)),
    ("add_cross_attention", (False,)),
)
# LayerNorm's parameters under the names in TensorFlow's checkpoints, and in those converted from them.
OLD_NORM = (
    (r"((?i:layer_?norm))\.gamma$", r"\1.weight"),
    (r"((?i:layer_?norm))\.beta$", r"\1.bias"),
)
