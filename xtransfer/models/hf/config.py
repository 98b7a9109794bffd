"""Strict reading and writing of a Hugging Face directory's `config.json`."""

import dataclasses
import functools
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xtransfer import storage
from xtransfer.errors import CheckpointError, MachineError
from xtransfer.models.architectures import ARCHITECTURES
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.heads import POOLINGS
from xtransfer.models.hf.families import FAMILIES
from xtransfer.models.hf.weight_map import Family
from xtransfer.models.layers import ACTIVATIONS

CONFIG = "config.json"
POOLING_KEY = "xtransfer_pooling"  # the key of config.json for a saved classifier's pooling, if it is not its family's

_OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering")  # may share our tensor names
_ADAPTER = "adapter_config.json"
_MOST_LAYERS = 128  # published encoders have up to 48; building layers takes time before any tensor is read
_LARGEST_SIZE = 1 << 24  # of a vocabulary, which has at most a million pieces; every other size is smaller
_INITIALIZER_RANGE = 0.02  # of all supported families, if config.json does not say
_SINGLE_LABEL = "single_label_classification"
_MULTI_LABEL = "multi_label_classification"

log = logging.getLogger(__name__)


def read_config(directory: str | Path) -> EncoderConfig:
    """Return the architecture in `config.json`; a UserError names the file and the missing, wrong, or unknown key.

    `auto_map`, which names code in the checkpoint, is ignored, because a family here has its own code.
    """
    path = Path(directory) / CONFIG
    raw = read_raw(directory)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise CheckpointError(f"{path}: model_type {raw.get('model_type')!r} is not supported: one of {supported}")
    if "auto_map" in raw:
        _log_ignored_code(path, family.name)
    _check_fixed(path, raw, family)
    missing = [key for key in family.required if key not in raw]
    if missing:
        raise CheckpointError(f"{path}: {', '.join(missing)} missing")
    try:
        raw = family.read(raw)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from error
    defaults = dict(family.defaults)
    config_class = ARCHITECTURES[str(defaults.get("architecture", EncoderConfig.architecture))].config_class
    stated = {
        field: _checked(path, key, _field(config_class, field), raw[key], nullable=key in family.nullable)
        for key, field in family.config_keys
        if key in raw
    }
    values = {**defaults, **stated}
    if family.positions_after_pad:
        values["position_offset"] = values["pad_id"] + 1
    config = config_class(**values, family=family.name)
    if config.pad_id >= config.vocab_size:
        raise CheckpointError(f"{path}: pad_token_id is {config.pad_id}, beyond vocab_size {config.vocab_size}")
    if config.position_offset >= config.max_positions:
        raise CheckpointError(
            f"{path}: positions start after pad_token_id {config.pad_id}, beyond the {config.max_positions} of "
            "max_position_embeddings"
        )
    if config.hidden_size % config.num_heads:
        raise CheckpointError(
            f"{path}: hidden_size {config.hidden_size} is not a multiple of its {config.num_heads} attention heads"
        )
    return config


def read_family(directory: str | Path) -> Family:
    """Return the weight table of a checkpoint, which leaves out a head for another task; see `Family.other_heads`."""
    family = FAMILIES[read_config(directory).family]
    names = _architectures(read_raw(directory))
    unread = [pattern for end, pattern in family.other_heads if any(name.endswith(end) for name in names)]
    return dataclasses.replace(family, ignorable=(*family.ignorable, *unread))


def _architectures(raw: Mapping[str, Any]) -> list[str]:
    names = raw.get("architectures")
    return [str(name) for name in names] if isinstance(names, list) else []


@functools.cache  # the config of one model is read several times
def _log_ignored_code(path: Path, model_type: str) -> None:
    log.warning(
        "%s: auto_map names code of the checkpoint, which is never run: it is read as a plain %s", path, model_type
    )


def _check_fixed(path: Path, raw: Mapping[str, Any], family: Family) -> None:
    """Refuse a checkpoint that would run differently here from how it was trained."""
    _check_values(path, raw, family.fixed)
    if raw.get("problem_type") not in (None, _SINGLE_LABEL, _MULTI_LABEL):
        raise CheckpointError(
            f"{path}: problem_type is {raw['problem_type']!r}: only {_SINGLE_LABEL!r} and {_MULTI_LABEL!r} are "
            "supported"
        )
    unread = tuple(end for end, _ in family.other_heads)
    for name in _architectures(raw):
        if name.endswith(_OTHER_HEADS) and not name.endswith(unread):
            raise CheckpointError(
                f"{path}: architectures has {name}, whose head is for another task: use a checkpoint of the encoder, "
                "…ForMaskedLM, or …ForSequenceClassification"
            )


def _check_values(path: Path, raw: Mapping[str, Any], fixed: Iterable[tuple[str, tuple[object, ...]]]) -> None:
    for key, allowed in fixed:
        if raw.get(key, allowed[0]) not in allowed:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}: only {', '.join(map(repr, allowed))} is supported")


def check_pretraining(directory: str | Path) -> None:
    """Refuse a checkpoint whose pretraining cannot continue here: another family, or other pretraining heads."""
    path, family = Path(directory) / CONFIG, FAMILIES[read_config(directory).family]
    if not family.pretrains:
        supported = ", ".join(name for name, other in FAMILIES.items() if other.pretrains)
        raise CheckpointError(
            f"{path}: model_type is {family.name}: only {supported} checkpoints can be pretrained further"
        )
    _check_values(path, read_raw(directory), family.fixed_in_pretraining)


def _field(config_class: type[EncoderConfig], name: str) -> dataclasses.Field[Any]:
    return next(field for field in dataclasses.fields(config_class) if field.name == name)


def _checked(path: Path, key: str, field: dataclasses.Field[Any], value: Any, *, nullable: bool) -> Any:
    """Return a value for a field of EncoderConfig, or raise a UserError that names its key.

    What is valid follows from the field's name or type. Values that `Family.read` made were checked there.
    """
    if field.name.endswith("_act"):
        valid = value in ACTIVATIONS if isinstance(value, str) else False
        expected = f"one of {', '.join(ACTIVATIONS)}"
    elif field.name.endswith("dropout"):
        valid = _is_number(value) and 0 <= value < 1
        expected = "a number from 0 to below 1"
    elif field.name == "layer_norm_eps":
        valid, expected = _is_number(value) and 0 < value < 1, "a small positive number"
    elif field.name == "pad_id":
        valid, expected = type(value) is int and value >= 0, "a token id"
    elif field.type is bool:
        valid, expected = type(value) is bool, "true or false"
    elif field.type is float:
        valid, expected = _is_number(value) and value > 0, "a positive number"
    elif field.type in (int, int | None):
        may_be_zero = bool(field.metadata.get("may_be_zero"))
        valid = type(value) is int and (value > 0 or (may_be_zero and value == 0))
        expected = "0 or a positive integer" if may_be_zero else "a positive integer"
        largest = _MOST_LAYERS if field.name == "num_layers" else _LARGEST_SIZE
        if valid and value > largest:
            valid, expected = False, f"at most {largest:,}"
    else:
        valid, expected = True, ""
    if not valid and not (value is None and nullable):
        raise CheckpointError(f"{path}: {key} is {value!r}, expected {expected}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_labels(directory: str | Path) -> tuple[str, ...] | None:
    """Return the class names of `config.json` (id2label) in the order of the head's outputs; None without id2label.

    Raises:
      UserError: a name is neither text nor an integer, or label2id has the same names in another order, so that
        it is unclear which is right.
    """
    path, raw = Path(directory) / CONFIG, read_raw(directory)
    table = raw.get("id2label")
    if table is None:
        return None
    if not isinstance(table, dict) or sorted(table) != sorted(map(str, range(len(table)))):
        raise CheckpointError(f"{path}: id2label must map 0 … n-1 to names")
    names = [table[str(index)] for index in range(len(table))]
    labels = tuple(map(str, names))
    if not all(type(name) in (str, int) for name in names) or len(set(labels)) != len(labels):
        raise CheckpointError(f"{path}: id2label must give every class a name of its own")
    label2id = raw.get("label2id")
    # A label2id with other names is left over from an earlier checkpoint; transformers does not read it either.
    expected = {name: index for index, name in enumerate(labels)}
    if isinstance(label2id, dict) and set(label2id) == set(labels) and label2id != expected:
        raise CheckpointError(
            f"{path}: id2label and label2id list the classes in different orders: correct one of them"
        )
    return labels


def class_names(directory: str | Path, outputs: int) -> tuple[str, ...]:
    """Return `read_labels`, or else the names that `transformers` gives to this number of outputs.

    Raises:
      UserError: see `read_labels`; or num_labels is another number.
    """
    stated = read_raw(directory).get("num_labels", outputs)
    if stated != outputs:
        raise CheckpointError(
            f"{Path(directory) / CONFIG}: num_labels is {stated!r}, but the head in the weights has {outputs} outputs: "
            "correct it"
        )
    return read_labels(directory) or tuple(f"LABEL_{index}" for index in range(outputs))


def read_initializer_range(directory: str | Path) -> float:
    """Return the standard deviation of the random kernels that a checkpoint's pretraining started from."""
    path, value = Path(directory) / CONFIG, read_raw(directory).get("initializer_range", _INITIALIZER_RANGE)
    if not _is_number(value) or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: initializer_range is {value!r}, expected a positive number")
    return float(value)


def is_multi_label(directory: str | Path) -> bool:
    """Return whether a classifier gives a text any number of labels, by a sigmoid for each class."""
    return read_raw(directory).get("problem_type") == _MULTI_LABEL


def read_pooling(directory: str | Path) -> str:
    """Return how a saved classifier pools: as its family's own head does, unless `config.json` says otherwise.

    Raises:
      UserError: the family has no such pooling.
    """
    path, raw = Path(directory) / CONFIG, read_raw(directory)
    family = FAMILIES[read_config(directory).family]
    if POOLING_KEY in raw or family.pooling_key is None:
        key, default, names = POOLING_KEY, "cls", {pooling: pooling for pooling in POOLINGS}
    else:
        key, default = family.pooling_key
        names = {theirs: ours for ours, theirs in family.poolings}
    value = family.read(raw).get(key, default)
    if not isinstance(value, str) or value not in names:
        raise CheckpointError(f"{path}: {key} is {value!r}, expected one of {', '.join(names)}")
    return names[value]


def transformers_pools(family: str, pooling: str) -> bool:
    """Return whether the sequence classifier of `transformers` has this pooling for a family."""
    return pooling in dict(FAMILIES[family].poolings)


def write_config(
    file: Path,
    config: EncoderConfig,
    leaves: frozenset[str],
    labels: Sequence[str] | None,
    pooling: str,
    special_ids: Mapping[str, int] = MappingProxyType({}),
    *,
    multi_label: bool = False,
) -> None:
    """Write a `config.json` that `transformers` reads.

    Args:
      file: the file to write.
      config: the architecture.
      leaves: the dotted paths of the parameters, which decide the name of the architecture.
      labels: the class names, in order; None without a classification head.
      pooling: how the classifier pools.
      special_ids: the tokenizer's special ids (see `hf.tokenizer.special_ids`), which replace the checkpoint's.
      multi_label: whether a text has any number of the labels.
    """
    family = FAMILIES[config.family]
    values: dict[str, Any] = {
        "architectures": [family.architecture(leaves)],
        "model_type": family.saved_as or family.name,
        "dtype": "float32",
    }
    for key, field in family.config_keys:
        value = getattr(config, field)
        if value is None and key not in family.nullable:
            value = {"embedding_size": config.embedding_width, "classifier_dropout": config.classifier_rate}[field]
        values[key] = value
    values.update({key: allowed[0] for key, allowed in (*family.fixed, *family.fixed_in_pretraining)})
    values = family.write(values)
    values.update(special_ids)
    if labels is not None:
        values["problem_type"] = _MULTI_LABEL if multi_label else _SINGLE_LABEL
        values["id2label"] = {str(index): label for index, label in enumerate(labels)}
        values["label2id"] = {label: index for index, label in enumerate(labels)}
    if family.pooling_key and pooling in dict(family.poolings):
        values[family.pooling_key[0]] = dict(family.poolings)[pooling]
    elif pooling != "cls":
        values[POOLING_KEY] = pooling
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_adapter(directory: Path) -> None:
    """Raise a UserError if a directory holds the weights of a PEFT adapter and no model."""
    if (directory / _ADAPTER).is_file() and not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory}: a PEFT adapter ({_ADAPTER} without {CONFIG}), not a whole model: merge it into its base "
            "model with merge_and_unload(), and save the result with save_pretrained()"
        )


def read_raw(directory: str | Path) -> dict[str, Any]:
    """Return everything in `config.json`, or raise a UserError that names the file."""
    path = Path(directory) / CONFIG
    try:
        return storage.read_object(path, "download it again")
    except FileNotFoundError:
        refuse_adapter(path.parent)
        raise CheckpointError(f"{path}: no such file: not a Hugging Face model directory?") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror or error}") from error
