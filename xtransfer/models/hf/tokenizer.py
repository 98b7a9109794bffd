"""A tokenizer beside a model: whether it belongs to one, its special ids for `config.json`, and its files."""

import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xtransfer import storage
from xtransfer.errors import CheckpointError, one_line
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf.config import CONFIG, read_config, read_raw
from xtransfer.models.hf.families import FAMILIES

_SETTINGS, _TOKENIZER = "tokenizer_config.json", "tokenizer.json"
# Keys that transformers 5 writes and that say nothing about the tokenizer.
_OF_THE_SESSION = ("backend", "is_local", "local_files_only", "trust_remote_code")

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")

# The share of the embedding's rows that a tokenizer has tokens for. Rows are added to round a size up, and some
# embeddings are far larger than their vocabulary (IndoBERT: 50,000 rows for 30,521 tokens).
_MINIMUM_SHARE, _USUAL_SHARE = 0.5, 0.9

log = logging.getLogger(__name__)


def check_tokenizer(directory: str | Path, tokenizer: Any, pooling: str = "cls") -> None:
    """Refuse a tokenizer that cannot belong to the model of `directory`, by its `config.json`.

    Refused are ids beyond the embedding, a vocabulary of less than half of it, a different begin or end id, a different
    pad id if positions depend on it, no special token at the front (whose vector is pooled), and token types that the
    model does not have. Oddities that change no number are warnings. If config.json names a `tokenizer_class`, the
    model was trained with another family's tokenizer, so its begin and end ids may be leftovers and are not compared.

    Any special token will do at the front: [CLS], <s>, or <bos>, whether or not it is the `cls_token`. Mean pooling
    needs none.

    A tokenizer that passes may still be unfit for pairs of texts; see `check_pairs`.

    Args:
      directory: a Hugging Face directory.
      tokenizer: a fast tokenizer.
      pooling: one of `heads.POOLINGS`.

    Raises:
      UserError: the tokenizer is refused.
    """
    config, raw = read_config(directory), read_raw(directory)
    name = _name_of(tokenizer)
    config_file = f"({Path(directory) / CONFIG})"
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= config.vocab_size:
        problem = f"token ids up to {largest}, but the model embeds {config.vocab_size}"
    elif len(vocabulary) < _MINIMUM_SHARE * config.vocab_size:
        problem = f"{len(vocabulary)} tokens, but the model embeds {config.vocab_size}"
    else:
        problem = _wrong_special_id(config, raw, tokenizer) or _wrong_layout(config, tokenizer, pooling)
    if problem:
        raise CheckpointError(f"{name}: {problem} {config_file}: another model's tokenizer?")
    if len(vocabulary) < _USUAL_SHARE * config.vocab_size:
        _warn(f"{name}: only {len(vocabulary)} tokens, but the model embeds {config.vocab_size} {config_file}")
    if tokenizer.pad_token_id != config.pad_id:
        pads = f"pad id {tokenizer.pad_token_id}, but the model's is {config.pad_id}"
        _warn(f"{name}: {pads} {config_file}; padding is masked, so no number changes")


def check_pairs(directory: str | Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives pairs of texts more token types than the model of `directory` has.

    Raises:
      UserError: the tokenizer is refused. It may still work for single texts.
    """
    types = _types_beyond(read_config(directory), _encode(tokenizer, "a", "a"))
    if types:
        raise CheckpointError(
            f"{_name_of(tokenizer)}: pairs have {types} ({Path(directory) / CONFIG}): it cannot be used with text pairs"
        )


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or "tokenizer"


@cache
def _warn(message: str) -> None:
    """Warn once per process: teacher, student, and `describe` may use the same checkpoint."""
    log.warning(message)


def _wrong_special_id(config: EncoderConfig, raw: Mapping[str, Any], tokenizer: Any) -> str:
    """Return the special id that differs from the model's and matters, in words, or ""."""
    if FAMILIES[config.family].positions_after_pad and tokenizer.pad_token_id != config.pad_id:
        return f"pad id {tokenizer.pad_token_id}, but the model's is {config.pad_id}"
    if raw.get("tokenizer_class") is not None:
        return ""
    for kind in ("bos", "eos"):
        expected, actual = raw.get(f"{kind}_token_id"), getattr(tokenizer, f"{kind}_token_id")
        if expected is None or actual is None:
            continue
        if actual not in (expected if isinstance(expected, list) else [expected]):
            return f"{kind} id {actual}, but the model's is {expected}"
    return ""


def _wrong_layout(config: EncoderConfig, tokenizer: Any, pooling: str) -> str:
    """Return the flaw in the layout of a tokenized text, in words, if it does not suit the model, or ""."""
    single = _encode(tokenizer, "a")
    if pooling == "cls" and not any(single["special_tokens_mask"][:1]):
        return "no special token at the front, but the model classifies by it"
    return _types_beyond(config, single)


def _encode(tokenizer: Any, *texts: str) -> Mapping[str, Any]:
    """Return the encoding of a text or of a pair, with its `special_tokens_mask`."""
    try:
        return tokenizer(*texts, return_special_tokens_mask=True)
    except Exception as error:  # tokenizers raises nothing narrower
        raise CheckpointError(
            f"{_name_of(tokenizer)}: the tokenizer fails on {texts[0]!r}: {one_line(error)}: correct its tokenizer.json"
        ) from error


def _types_beyond(config: EncoderConfig, encoding: Mapping[str, Any]) -> str:
    """Return the token types of an example that the model lacks, in words, or ""; a missing type is 0."""
    types = max(encoding.get("token_type_ids", ()), default=0) + 1
    if 1 <= config.type_vocab_size < types:
        return f"{types} token types, but the model's type_vocab_size is {config.type_vocab_size}"
    return ""


def special_ids(tokenizer: Any) -> dict[str, int]:
    """Return the special ids that a tokenizer has, under their keys in `config.json`."""
    ids = {key: getattr(tokenizer, key, None) for key in SPECIAL_IDS}
    return {key: value for key, value in ids.items() if value is not None}


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer that transformers from 4.40 on, and 5, load as it is.

    tokenizer.json holds everything, so the class is the one that takes it unchanged, under the name that both know. The
    classes of a family rebuild parts of it, and not in the same way (see `data.tokens.vocabularies`). Their defaults,
    such as the model's inputs, are written out.

    Raises:
      OSError: a file cannot be written.
    """
    save_as_loaded(tokenizer, directory)
    settings = storage.read_object(directory / _SETTINGS, "")
    settings = {key: value for key, value in settings.items() if key not in _OF_THE_SESSION}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["model_input_names"] = list(tokenizer.model_input_names)
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # a table of names in transformers 4, which fails on a list
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    _write(directory / _SETTINGS, settings)
    content = json.loads((directory / _TOKENIZER).read_text(encoding="utf-8"))
    if _with_old_merges(content["model"]):
        _write(directory / _TOKENIZER, content)


def save_as_loaded(tokenizer: Any, directory: Path) -> None:
    """Write a tokenizer under the class that it has.

    Raises:
      OSError: a file cannot be written.
    """
    try:
        tokenizer.save_pretrained(str(directory))
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # tokenizers raises nothing narrower if a file cannot be written


def _with_old_merges(model: dict[str, Any]) -> bool:
    """Write a BPE's merges as "a b", as transformers before 4.45 reads them; False if a token has a space."""
    merges = model.get("merges")
    if not merges or any(isinstance(pair, str) or " " in pair[0] + pair[1] for pair in merges):
        return False
    model["merges"] = [" ".join(pair) for pair in merges]
    return True


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
