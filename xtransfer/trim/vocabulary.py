"""Which pieces of a vocabulary a text needs, and the tokenizer with only those pieces.

A tokenizer splits a text into the same pieces as before if its vocabulary keeps these:

- WordPiece takes the longest piece from the left, so the pieces of the text suffice. For a word that becomes unknown,
  the pieces before the point of failure are needed too. Otherwise shorter ones could lead past it.
- Unigram takes the path with the highest score. The pieces of the text still form it, and no other path gains, as long
  as the score of unknown characters does not rise. That score depends on the lowest one in the vocabulary.
- BPE applies merges by rank. The pieces of the text, and those that they are merged from, suffice.

Single characters (or bytes) of the text are kept as well, so that other words made of them fall back to smaller pieces.
Kept pieces keep their order.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from xtransfer.errors import CheckpointError

State = Mapping[str, Any]  # a tokenizer as its tokenizer.json describes it, or the part `model` of it

# The keys of tokenizer.json.
_STEPS = ("normalizer", "pre_tokenizer", "model", "post_processor", "decoder")
_PARTS = ("version", "truncation", "padding", "added_tokens", *_STEPS)
_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))


@dataclass(frozen=True, eq=False)
class Usage:
    """What texts use of a vocabulary.

    Attributes:
      counts: [V] int64, how often each id occurs.
      characters: all characters, after normalization and pre-tokenization.
      prefixes: the pieces of WordPiece before the point at which a word becomes unknown.
    """

    counts: np.ndarray
    characters: frozenset[str]
    prefixes: frozenset[str]


@dataclass(frozen=True)
class Limits:
    """Which of the pieces that the text uses to keep.

    Attributes:
      min_count: the least number of occurrences.
      pieces: the number of pieces, the most frequent first; None keeps all.
    """

    min_count: int = 1
    pieces: int | None = None


def read_state(tokenizer: Any) -> dict[str, Any]:
    """Return a fast tokenizer as the object in its tokenizer.json.

    Raises:
      UserError: it has a part that cannot be trimmed. The message names the part.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    name = getattr(tokenizer, "name_or_path", "") or "tokenizer"
    model = state["model"]
    kind = MODELS.get(str(model.get("type")))
    if kind is None:
        raise CheckpointError(f"{name}: a {model.get('type')} tokenizer cannot be trimmed: one of {', '.join(MODELS)}")
    unknown = [key for key in state if key not in _PARTS and state[key]]
    unknown += [f"model.{key}" for key in model if key not in (*kind.keys, *kind.only_empty) and model[key]]
    unknown += [f"model.{key}" for key in kind.only_empty if model.get(key)]
    if unknown:
        value = json.dumps(model.get(unknown[0].removeprefix("model."), state.get(unknown[0])))[:60]
        raise CheckpointError(
            f"{name}: {unknown[0]} is {value} in its tokenizer.json: such a tokenizer cannot be trimmed"
        )
    for processor in _flatten(state.get("post_processor"), "processors"):
        if processor["type"] not in _PROCESSORS:
            known = ", ".join(_PROCESSORS)
            raise CheckpointError(f"{name}: post_processor {processor['type']} cannot be trimmed: one of {known}")
    return state


def all_ids(state: State) -> dict[str, int]:
    """Return the id of every piece and added token."""
    return _model_ids(state["model"]) | {token["content"]: token["id"] for token in state["added_tokens"]}


def select(state: State, usage: Usage, always: Collection[int], limits: Limits) -> tuple[list[int], bool]:
    """Return the ids to keep, ascending, and whether these are all pieces that the text uses.

    Args:
      state: from `read_state`.
      usage: the pieces of the text.
      always: ids to keep in any case, besides added tokens, the fallback, and the ids in the post-processor.
      limits: which used pieces to keep.
    """
    ids, model = all_ids(state), state["model"]
    names = {id_: name for name, id_ in ids.items()}
    kind = MODELS[model["type"]]
    fixed = {*always, *_processor_ids(state.get("post_processor"))} & names.keys()
    fixed |= {token["id"] for token in state["added_tokens"]}
    fixed |= {ids[piece] for piece in (*kind.fallback(state, usage.characters), *usage.prefixes) if piece in ids}
    used = [int(id_) for id_ in np.flatnonzero(usage.counts) if int(id_) not in fixed]
    frequent = [id_ for id_ in used if usage.counts[id_] >= limits.min_count]
    frequent.sort(key=lambda id_: (-usage.counts[id_], id_))
    kept = fixed.union(frequent[: limits.pieces])
    kept |= {ids[piece] for piece in kind.parts(model, [names[id_] for id_ in kept])}
    return sorted(kept), kept.issuperset(used)


def trimmed(state: State, kept: Sequence[int]) -> dict[str, Any]:
    """Return the tokenizer with only these pieces, under new ids: piece kept[i] has id i.

    Args:
      state: from `read_state`.
      kept: ids of pieces and added tokens, ascending, from `select`.
    """
    ids = {old: new for new, old in enumerate(kept)}
    tokens = [token | {"id": ids[token["id"]]} for token in state["added_tokens"]]
    result = dict(state) | {"model": _trimmed_model(state["model"], ids), "added_tokens": tokens}
    result["post_processor"] = _renumbered(state.get("post_processor"), ids)
    padding = state.get("padding")
    if padding and padding["pad_id"] in ids:
        result["padding"] = padding | {"pad_id": ids[padding["pad_id"]]}
    return result


def lowest_fixed_ids(state: State) -> range:
    """Return the ids that must not change: `transformers` expects XLM-R's unknown piece at its usual place."""
    unknown = state["model"].get("unk_id")
    return range(0 if unknown is None else unknown + 1)


def dead_end(model: State, word: str) -> list[str]:
    """Return the pieces that WordPiece takes from the left of a word until no piece fits; [] for a known word."""
    vocabulary, prefix = model["vocab"], model["continuing_subword_prefix"]
    pieces: list[str] = []
    start = 0
    while start < len(word) <= model["max_input_chars_per_word"]:
        candidates = ((prefix if start else "") + word[start:stop] for stop in range(len(word), start, -1))
        piece = next((piece for piece in candidates if piece in vocabulary), None)
        if piece is None:
            return pieces
        pieces.append(piece)
        start += len(piece) - (len(prefix) if start else 0)
    return []


@dataclass(frozen=True)
class Model:
    """How one type of tokenizer model is trimmed.

    Attributes:
      keys: the keys of `model` in tokenizer.json that are understood.
      only_empty: keys that must be null, false, empty, or zero.
      fallback: (tokenizer, characters of the text) -> the names of pieces to keep in any case, if they exist.
      parts: (model, kept pieces) -> the names of the pieces that they are made of.
    """

    keys: tuple[str, ...]
    only_empty: tuple[str, ...]
    fallback: Callable[[State, Collection[str]], Iterable[str]]
    parts: Callable[[State, Sequence[str]], Collection[str]]


def _wordpiece_fallback(state: State, characters: Collection[str]) -> Iterator[str]:
    model = state["model"]
    yield model["unk_token"]
    for character in characters:
        yield character
        yield model["continuing_subword_prefix"] + character


def _unigram_fallback(state: State, characters: Collection[str]) -> Iterator[str]:
    vocabulary = state["model"]["vocab"]
    # The score of an unknown character depends on the lowest score of all pieces.
    yield min(vocabulary, key=lambda entry: entry[1])[0]
    yield from characters
    if state["model"]["byte_fallback"]:
        yield from _BYTES


def _bpe_fallback(state: State, characters: Collection[str]) -> Iterator[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    model = state["model"]
    if model["unk_token"] is not None:
        yield model["unk_token"]
    yield from characters
    if model["byte_fallback"]:
        yield from _BYTES
    steps = (
        *_flatten(state.get("normalizer"), "normalizers"),
        *_flatten(state.get("pre_tokenizer"), "pretokenizers"),
    )
    if any(step["type"] == "ByteLevel" for step in steps):
        yield from ByteLevel.alphabet()


def _no_parts(model: State, pieces: Sequence[str]) -> Collection[str]:
    return ()


def _merged_parts(model: State, pieces: Sequence[str]) -> Collection[str]:
    """Return all pieces that BPE goes through on its way to these pieces."""
    ranks = {(left, right): rank for rank, (left, right) in enumerate(model["merges"])}
    return {part for piece in pieces for part in _merge_steps(piece, ranks) if part in model["vocab"]}


def _merge_steps(piece: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    """Return the parts that a piece is merged from, or nothing if its merges do not lead to it."""
    parts, seen = list(piece), set(piece)
    while len(parts) > 1:
        rank, i = min((ranks.get((parts[i], parts[i + 1]), len(ranks)), i) for i in range(len(parts) - 1))
        if rank == len(ranks):
            return set()
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        seen.add(parts[i])
    return seen


MODELS: dict[str, Model] = {
    "WordPiece": Model(
        keys=("type", "vocab", "unk_token", "continuing_subword_prefix", "max_input_chars_per_word"),
        only_empty=(),
        fallback=_wordpiece_fallback,
        parts=_no_parts,
    ),
    "Unigram": Model(
        keys=("type", "vocab", "unk_id", "byte_fallback"),
        only_empty=(),
        fallback=_unigram_fallback,
        parts=_no_parts,
    ),
    "BPE": Model(
        keys=("type", "vocab", "merges", "unk_token", "fuse_unk", "byte_fallback", "ignore_merges"),
        only_empty=("dropout", "continuing_subword_prefix", "end_of_word_suffix"),
        fallback=_bpe_fallback,
        parts=_merged_parts,
    ),
}
"""The `type` of a tokenizer's model -> how it is trimmed."""


def _model_ids(model: State) -> dict[str, int]:
    if isinstance(model["vocab"], list):  # Unigram: pieces with their scores
        return {piece: id_ for id_, (piece, _) in enumerate(model["vocab"])}
    return dict(model["vocab"])


def _trimmed_model(model: State, ids: Mapping[int, int]) -> dict[str, Any]:
    vocabulary: Any
    if isinstance(model["vocab"], list):
        vocabulary = [entry for id_, entry in enumerate(model["vocab"]) if id_ in ids]
    else:
        vocabulary = {piece: ids[id_] for piece, id_ in model["vocab"].items() if id_ in ids}
    result = dict(model) | {"vocab": vocabulary}
    if model.get("unk_id") is not None:
        result["unk_id"] = ids[model["unk_id"]]
    if "merges" in model:
        result["merges"] = [
            [left, right]
            for left, right in model["merges"]
            if left in vocabulary and right in vocabulary and left + right in vocabulary
        ]
    return result


_PROCESSORS = ("TemplateProcessing", "BertProcessing", "RobertaProcessing", "ByteLevel")


def _flatten(step: State | None, members: str) -> Iterator[State]:
    """Yield the steps of a normalizer, pre-tokenizer, or post-processor, which may be a sequence."""
    if step is not None and step["type"] == "Sequence":
        for member in step[members]:
            yield from _flatten(member, members)
    elif step is not None:
        yield step


def _processor_ids(processor: State | None) -> set[int]:
    """Return the ids that a post-processor adds."""
    ids: set[int] = set()
    for step in _flatten(processor, "processors"):
        if step["type"] == "TemplateProcessing":
            ids.update(id_ for token in step["special_tokens"].values() for id_ in token["ids"])
        elif step["type"] in ("BertProcessing", "RobertaProcessing"):
            ids.update((step["sep"][1], step["cls"][1]))
    return ids


def _renumbered(processor: State | None, ids: Mapping[int, int]) -> State | None:
    """Return a post-processor with new ids."""
    if processor is None:
        return None
    kind = processor["type"]
    if kind == "Sequence":
        return dict(processor) | {"processors": [_renumbered(step, ids) for step in processor["processors"]]}
    if kind == "TemplateProcessing":
        special = {
            name: token | {"ids": [ids[id_] for id_ in token["ids"]]}
            for name, token in processor["special_tokens"].items()
        }
        return dict(processor) | {"special_tokens": special}
    if kind in ("BertProcessing", "RobertaProcessing"):
        pairs = {side: [processor[side][0], ids[processor[side][1]]] for side in ("sep", "cls")}
        return dict(processor) | pairs
    return processor
