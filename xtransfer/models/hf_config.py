"""`config.json` of a Hugging Face directory: strict reading, and writing; does the tokenizer belong to the model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xtransfer.errors import UserError
from xtransfer.models.encoder import ACTIVATIONS, EncoderConfig
from xtransfer.models.families import FAMILIES
from xtransfer.models.weight_maps import Family

CONFIG = "config.json"
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")
POOLING_KEY = "xtransfer_pooling"  # in config.json: how a saved classifier pools, where it is not the families' own way

_OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")  # some name it as ours
_SINGLE_LABEL = "single_label_classification"
_COVERED = 0.9  # of the embedding's rows a tokenizer has at least: rows are added to round a size up, words are not


def read_config(directory: str | Path) -> EncoderConfig:
    """The architecture in `config.json`; UserError names the file and the key that is missing, wrong or unknown."""
    path = Path(directory) / CONFIG
    raw = read_json(path)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported: one of {supported}")
    if "auto_map" in raw:
        raise UserError(
            f"{path}: auto_map asks for remote code, which is never run: use a plain {family.name} checkpoint"
        )
    _check_fixed(path, raw, family)
    if missing := [key for key in family.required if key not in raw]:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    stated = {field: _checked(path, key, field, raw[key]) for key, field in family.config_keys if key in raw}
    values = {**dict(family.defaults), **stated}
    if family.positions_after_pad:
        values["position_offset"] = values["pad_id"] + 1
    config = EncoderConfig(**values, family=family.name)
    if config.pad_id >= config.vocab_size:
        raise UserError(f"{path}: pad_token_id is {config.pad_id}, beyond vocab_size {config.vocab_size}")
    if config.position_offset >= config.max_positions:
        raise UserError(
            f"{path}: positions begin after pad_token_id {config.pad_id}, beyond all {config.max_positions} of "
            "max_position_embeddings"
        )
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of its {config.num_heads} attention heads"
        )
    return config


def _check_fixed(path: Path, raw: Mapping[str, Any], family: Family) -> None:
    """UserError where a checkpoint is of a kind that would be run as something else than it was trained as."""
    for key, allowed in family.fixed:
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {raw[key]!r}: only {', '.join(map(repr, allowed))} is supported")
    if raw.get("problem_type") not in (None, _SINGLE_LABEL):
        raise UserError(f"{path}: problem_type is {raw['problem_type']!r}: only {_SINGLE_LABEL!r} is supported")
    architectures = raw.get("architectures")
    for name in architectures if isinstance(architectures, list) else []:
        if str(name).endswith(_OTHER_HEADS):
            raise UserError(
                f"{path}: architectures has {name}, whose head does another task: use a checkpoint of the encoder, "
                "…ForMaskedLM or …ForSequenceClassification"
            )


def _checked(path: Path, key: str, field: str, value: Any) -> Any:
    """`value` as the field of EncoderConfig that it becomes, or a UserError."""
    if field == "hidden_act":
        valid = value in ACTIVATIONS if isinstance(value, str) else False
        wanted = f"one of {', '.join(ACTIVATIONS)}"
    elif field.endswith("dropout"):
        valid = (value is None and key == "classifier_dropout") or (_is_number(value) and 0 <= value < 1)
        wanted = "a number from 0 to below 1"
    elif field == "layer_norm_eps":
        valid, wanted = _is_number(value) and 0 < value < 1, "a small positive number"
    elif field == "pad_id":
        valid, wanted = type(value) is int and value >= 0, "a token id"
    else:
        valid, wanted = type(value) is int and value > 0, "a positive integer"
    if not valid:
        raise UserError(f"{path}: {key} is {value!r}: it has to be {wanted}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_labels(directory: str | Path) -> tuple[str, ...] | None:
    """The class names of `config.json` (id2label) in the order of the head's outputs, None where it has none."""
    path = Path(directory) / CONFIG
    table = read_json(path).get("id2label")
    if table is None:
        return None
    if not isinstance(table, dict) or sorted(table) != sorted(map(str, range(len(table)))):
        raise UserError(f"{path}: id2label has to map 0 … n-1 to names")
    labels = tuple(table[str(index)] for index in range(len(table)))
    if not all(isinstance(label, str) for label in labels) or len(set(labels)) != len(labels):
        raise UserError(f"{path}: id2label has to give every class its own name")
    return labels


def read_pooling(directory: str | Path) -> str:
    """How a saved classifier pools: "cls" unless `config.json` says otherwise."""
    return str(read_json(Path(directory) / CONFIG).get(POOLING_KEY, "cls"))


def check_tokenizer(directory: str | Path, tokenizer: Any) -> None:
    """UserError where a tokenizer cannot belong to the model of `directory`, whose `config.json` is read.

    Refused are ids beyond the embedding, a vocabulary of less than 90 % of it, another pad, begin or end id, no special
    token at the front (whose vector is pooled), and more token types than the model has. Where config.json names its
    `tokenizer_class`, the model was trained with another family's tokenizer, and its special ids may be leftovers.
    """
    config, raw = read_config(directory), read_json(Path(directory) / CONFIG)
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    wrong = ""
    if largest >= config.vocab_size:
        wrong = f"token ids up to {largest}, but the model embeds {config.vocab_size}"
    elif len(vocabulary) < _COVERED * config.vocab_size:
        wrong = f"{len(vocabulary)} tokens, but the model embeds {config.vocab_size}"
    else:
        wrong = _wrong_special_id(config, raw, tokenizer) or _wrong_layout(config, tokenizer)
    if wrong:
        raise UserError(f"{name}: {wrong} ({Path(directory) / CONFIG}): another model's tokenizer?")


def _wrong_special_id(config: EncoderConfig, raw: Mapping[str, Any], tokenizer: Any) -> str:
    """Which special id of a tokenizer is not the model's, or ""."""
    own_class = raw.get("tokenizer_class") is None
    if tokenizer.pad_token_id != config.pad_id and (own_class or FAMILIES[config.family].positions_after_pad):
        return f"pad id {tokenizer.pad_token_id}, but the model's is {config.pad_id}"
    for kind in ("bos", "eos") if own_class else ():
        wanted, found = raw.get(f"{kind}_token_id"), getattr(tokenizer, f"{kind}_token_id")
        if None not in (wanted, found) and found not in (wanted if isinstance(wanted, list) else [wanted]):
            return f"{kind} id {found}, but the model's is {wanted}"
    return ""


def _wrong_layout(config: EncoderConfig, tokenizer: Any) -> str:
    """What about a tokenizer's examples the model was not made for, or ""."""
    pair = tokenizer("a", "a", return_token_type_ids=True, return_special_tokens_mask=True)
    if not pair["special_tokens_mask"] or not pair["special_tokens_mask"][0]:
        return "no special token stands first, but the model classifies by it"
    types = max(pair["token_type_ids"]) + 1
    if 1 <= config.type_vocab_size < types:
        return f"pairs have {types} token types, but the model's type_vocab_size is {config.type_vocab_size}"
    return ""


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The special ids of a tokenizer under their keys in `config.json`, those that it has."""
    found = {key: getattr(tokenizer, key, None) for key in SPECIAL_IDS}
    return {key: value for key, value in found.items() if value is not None}


def write_config(
    file: Path,
    config: EncoderConfig,
    leaves: frozenset[str],
    labels: Sequence[str] | None,
    pooling: str,
    special_ids: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """Writes a `config.json` that `transformers` reads; `leaves` (dotted paths) tell which architecture it is.

    `special_ids` of the tokenizer (see the function of that name) stand for what the checkpoint said of them.
    """
    family = FAMILIES[config.family]
    values: dict[str, Any] = {
        "architectures": [family.architecture(leaves)],
        "model_type": family.name,
        "dtype": "float32",
        **{key: _stated(config, key, field) for key, field in family.config_keys},
        **{key: allowed[0] for key, allowed in family.fixed},
        **special_ids,
    }
    if labels is not None:
        values["problem_type"] = _SINGLE_LABEL
        values["id2label"] = {str(index): label for index, label in enumerate(labels)}
        values["label2id"] = {label: index for index, label in enumerate(labels)}
    if pooling != "cls":
        values[POOLING_KEY] = pooling
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _stated(config: EncoderConfig, key: str, field: str) -> Any:
    """A field's value for config.json, where only the key `classifier_dropout` may be null."""
    value = getattr(config, field)
    if value is None and key != "classifier_dropout":
        return getattr(config, {"embedding_size": "hidden_size", "classifier_dropout": "hidden_dropout"}[field])
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or a UserError that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: not a Hugging Face model directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not whole JSON ({error}): fetch it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: has to be a JSON object")
    return value
