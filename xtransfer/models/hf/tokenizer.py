"""Does a tokenizer belong to the model of a Hugging Face directory; its special ids for `config.json`."""

import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from xtransfer.errors import UserError
from xtransfer.models.encoder import EncoderConfig
from xtransfer.models.hf.config import CONFIG, read_config, read_raw
from xtransfer.models.hf.families import FAMILIES

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id")

# Of the embedding's rows, those that a tokenizer has. Rows are added to round a size up, and some embeddings are far
# larger than their vocabulary (IndoBERT: 50,000 rows for 30,521 tokens).
_LEAST, _USUAL = 0.5, 0.9

log = logging.getLogger(__name__)


def check_tokenizer(directory: str | Path, tokenizer: Any) -> None:
    """UserError where a tokenizer cannot belong to the model of `directory`, whose `config.json` is read.

    Refused are ids beyond the embedding, a vocabulary of less than half of it, another begin or end id, another pad id
    where positions follow it, no special token at the front (whose vector is pooled), and token types that the model
    does not have. What is unusual but changes no number is a warning. Where config.json names its `tokenizer_class`,
    the model was trained with another family's tokenizer, and its begin and end ids may be leftovers.

    A tokenizer that passes may still be unfit for pairs of texts: see `check_pairs`.
    """
    config, raw = read_config(directory), read_raw(directory)
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    place = f"({Path(directory) / CONFIG})"
    vocabulary = tokenizer.get_vocab()
    largest = max(vocabulary.values(), default=-1)
    if largest >= config.vocab_size:
        wrong = f"token ids up to {largest}, but the model embeds {config.vocab_size}"
    elif len(vocabulary) < _LEAST * config.vocab_size:
        wrong = f"{len(vocabulary)} tokens, but the model embeds {config.vocab_size}"
    else:
        wrong = _wrong_special_id(config, raw, tokenizer) or _wrong_layout(config, tokenizer)
    if wrong:
        raise UserError(f"{name}: {wrong} {place}: another model's tokenizer?")
    if len(vocabulary) < _USUAL * config.vocab_size:
        _warn(f"{name}: only {len(vocabulary)} tokens, and the model embeds {config.vocab_size} {place}")
    if tokenizer.pad_token_id != config.pad_id:
        pads = f"pad id {tokenizer.pad_token_id}, and the model's is {config.pad_id}"
        _warn(f"{name}: {pads} {place}; padding is masked, so no number changes")


def check_pairs(directory: str | Path, tokenizer: Any) -> None:
    """Refuse a tokenizer that gives pairs of texts more token types than the model of `directory` has.

    Raises:
      UserError: it does; single texts can still be used with it.
    """
    types = _types_beyond(read_config(directory), tokenizer("a", "a"))
    if types:
        name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
        raise UserError(
            f"{name}: pairs have {types} ({Path(directory) / CONFIG}): pairs of texts cannot be used with it"
        )


@cache
def _warn(message: str) -> None:
    """Once a process, for teacher, student and description may have the same checkpoint."""
    log.warning(message)


def _wrong_special_id(config: EncoderConfig, raw: Mapping[str, Any], tokenizer: Any) -> str:
    """Which special id of a tokenizer is not the model's and matters, or ""."""
    if FAMILIES[config.family].positions_after_pad and tokenizer.pad_token_id != config.pad_id:
        return f"pad id {tokenizer.pad_token_id}, but the model's is {config.pad_id}"
    for kind in ("bos", "eos") if raw.get("tokenizer_class") is None else ():
        wanted, found = raw.get(f"{kind}_token_id"), getattr(tokenizer, f"{kind}_token_id")
        if None not in (wanted, found) and found not in (wanted if isinstance(wanted, list) else [wanted]):
            return f"{kind} id {found}, but the model's is {wanted}"
    return ""


def _wrong_layout(config: EncoderConfig, tokenizer: Any) -> str:
    """What about a tokenizer's texts the model was not made for, or ""."""
    single = tokenizer("a", return_special_tokens_mask=True)
    if not single["special_tokens_mask"] or not single["special_tokens_mask"][0]:
        return "no special token stands first, but the model classifies by it"
    return _types_beyond(config, single)


def _types_beyond(config: EncoderConfig, encoding: Mapping[str, Any]) -> str:
    """How the token types that an example is fed with are beyond the model's, or ""; without types they are zeros."""
    types = max(encoding.get("token_type_ids", ()), default=0) + 1
    if 1 <= config.type_vocab_size < types:
        return f"{types} token types, but the model's type_vocab_size is {config.type_vocab_size}"
    return ""


def special_ids(tokenizer: Any) -> dict[str, int]:
    """The special ids of a tokenizer under their keys in `config.json`, those that it has."""
    found = {key: getattr(tokenizer, key, None) for key in SPECIAL_IDS}
    return {key: value for key, value in found.items() if value is not None}
