"""`config.json` of a Hugging Face directory: strict reading, and writing; does the tokenizer belong to the model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xtransfer.errors import UserError
from xtransfer.models.encoder import ACTIVATIONS, EncoderConfig
from xtransfer.models.weight_maps import FAMILIES

CONFIG = "config.json"
POOLING_KEY = "xtransfer_pooling"  # in config.json: how a saved classifier pools, where it is not BERT's own way


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
    for key, allowed in family.fixed:
        if raw.get(key, allowed[0]) not in allowed:
            raise UserError(f"{path}: {key} is {raw[key]!r}: only {', '.join(map(repr, allowed))} is supported")
    if missing := [key for key in family.required if key not in raw]:
        raise UserError(f"{path}: {', '.join(missing)} missing")
    values = {field: _checked(path, key, field, raw[key]) for key, field in family.config_keys if key in raw}
    config = EncoderConfig(**values, family=family.name)
    if config.pad_id >= config.vocab_size:
        raise UserError(f"{path}: pad_token_id is {config.pad_id}, beyond vocab_size {config.vocab_size}")
    if config.hidden_size % config.num_heads:
        raise UserError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of num_attention_heads {config.num_heads}"
        )
    return config


def _checked(path: Path, key: str, field: str, value: Any) -> Any:
    """`value` as the field of EncoderConfig that it becomes, or a UserError."""
    if field == "hidden_act":
        valid = value in ACTIVATIONS if isinstance(value, str) else False
        wanted = f"one of {', '.join(ACTIVATIONS)}"
    elif field.endswith("dropout"):
        valid = (value is None and field == "classifier_dropout") or (_is_number(value) and 0 <= value < 1)
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


def check_tokenizer(config: EncoderConfig, tokenizer: Any) -> None:
    """UserError where a tokenizer cannot belong to the model: ids beyond the embedding, another pad id."""
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= config.vocab_size:
        raise UserError(
            f"{name}: token ids up to {largest}, but the model embeds {config.vocab_size}: another tokenizer?"
        )
    if tokenizer.pad_token_id != config.pad_id:
        raise UserError(
            f"{name}: pad id {tokenizer.pad_token_id}, but the model's is {config.pad_id}: another tokenizer?"
        )


def write_config(
    file: Path, config: EncoderConfig, leaves: frozenset[str], labels: Sequence[str] | None, pooling: str
) -> None:
    """Writes a `config.json` that `transformers` reads; `leaves` (dotted paths) tell which architecture it is."""
    family = FAMILIES[config.family]
    values: dict[str, Any] = {
        "architectures": [family.architecture(leaves)],
        "model_type": family.name,
        "dtype": "float32",
        **{key: getattr(config, field) for key, field in family.config_keys},
        **{key: allowed[0] for key, allowed in family.fixed},
    }
    if labels is not None:
        values["id2label"] = {str(index): label for index, label in enumerate(labels)}
        values["label2id"] = {label: index for index, label in enumerate(labels)}
    if pooling != "cls":
        values[POOLING_KEY] = pooling
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
