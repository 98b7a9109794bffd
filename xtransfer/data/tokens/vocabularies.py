"""The vocabulary files of a tokenizer as they are on the hub, and what transformers 5 misreads in them."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from xtransfer import storage
from xtransfer.errors import CheckpointError

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

TOKENIZER, SETTINGS, MODEL = "tokenizer.json", "tokenizer_config.json", "config.json"

_VOCABULARY_FILES = (TOKENIZER, "vocab.txt", "vocab.json", "merges.txt", "*.model", "*.tiktoken")
# Model types whose converter transformers 5 no longer names, with one that has the same tokenizer.
_TOKENIZER_TYPES = {"xlm-roberta-xl": "xlm-roberta"}
_SPECIAL = ("special_tokens_map.json", "added_tokens.json")
_BPE = {"vocab.json", "merges.txt"}
_CONVERTER_SETTINGS = ("do_lower_case", "split_by_punct", "keep_accents")
# `AutoTokenizer` loads the class that tokenizer_config.json names if it is one of these, beside these model types. The
# classes alone take a quarter of a second less to import, and a second less if PyTorch is installed.
_NAMED_CLASSES = ("BertTokenizer", "XLMRobertaTokenizer")
_TYPES_OF_NAMED_CLASSES = ("bert", "xlm-roberta")
_MOST_UNREACHABLE = 0.01  # the share of an uncased vocabulary's pieces that may have capitals by accident

_MOST_GROWTH = 64  # the normalizers of published tokenizers replace one character by one or two

_log = logging.getLogger(__name__)


def vocabulary_files(directory: Path) -> list[Path]:
    """Return the files of a directory that may hold a tokenizer's vocabulary, in order of preference.

    Raises:
      UserError: a file that will be read is a Git LFS pointer, or far larger than any vocabulary.
    """
    files = [file for pattern in _VOCABULARY_FILES for file in sorted(directory.glob(pattern))]
    read_alone = bool(files) and files[0].name == TOKENIZER
    for file in files[:1] if read_alone else files:
        storage.refuse_lfs_pointer(file)
        storage.refuse_size(file)
    return files


def conversion_options(directory: Path, files: list[Path]) -> dict[str, Any]:
    """Return what `AutoTokenizer` must be told about a directory without tokenizer.json; {} with one.

    Args:
      directory: a Hugging Face directory.
      files: its `vocabulary_files`.
    """
    names = [file.name for file in files]
    if TOKENIZER in names:
        return {}
    options: dict[str, Any] = {}
    tokenizer_type = _TOKENIZER_TYPES.get(str(_read(directory / MODEL).get("model_type")))
    if tokenizer_type:
        options["tokenizer_type"] = tokenizer_type
    if len(files) == 1 and names[0].endswith(".model"):
        options["vocab_file"] = str(files[0])  # whatever its name: each class looks for one name only
    return options


def class_name(directory: Path, files: list[Path]) -> str:
    """Return the class of `transformers` that loads a directory's tokenizer.

    This is "AutoTokenizer" unless that is known to choose another one, whose import is faster.

    Args:
      directory: a Hugging Face directory.
      files: its `vocabulary_files`.
    """
    try:
        settings, model = _read(directory / SETTINGS), _read(directory / MODEL)
    except CheckpointError:  # `AutoTokenizer` decides whether that matters
        return "AutoTokenizer"
    name = str(settings.get("tokenizer_class")).removesuffix("Fast")
    is_known = name in _NAMED_CLASSES and model.get("model_type") in _TYPES_OF_NAMED_CLASSES
    return name if is_known and files[0].name == TOKENIZER and "auto_map" not in settings else "AutoTokenizer"


def refuse_damaged(directory: Path, files: list[Path]) -> None:
    """Raise a UserError that names the damaged or missing file, if that is why a tokenizer cannot be loaded.

    transformers takes a damaged SentencePiece model for another format, and asks for a package that reads it.

    Args:
      directory: a Hugging Face directory.
      files: its `vocabulary_files`.
    """
    for name in (SETTINGS, *_SPECIAL):
        _read(directory / name)
    if files[0].name == TOKENIZER:
        _read(files[0])
        return
    names = {file.name for file in files}
    if len(names & _BPE) == 1:
        raise CheckpointError(f"{directory}: {min(names & _BPE)} without {min(_BPE - names)}: add it")
    for file in files:
        if file.suffix == ".model" and not _is_sentencepiece(file):
            raise CheckpointError(f"{file}: not a whole SentencePiece model: download it again")


def remedy(files: list[Path]) -> str:
    """Say what to do about files that transformers does not make a tokenizer of."""
    names = ", ".join(file.name for file in files)
    if files[0].name == TOKENIZER:
        return f"; download it again, or name its tokenizer_class in {SETTINGS}"
    return f"; {names} cannot be converted: add {TOKENIZER}, or name the right tokenizer_class in {SETTINGS}"


def correct_pipeline(tokenizer: "PreTrainedTokenizerFast", files: list[Path]) -> None:
    """Give a tokenizer the pipeline of its files where a class of transformers 5 builds another one.

    Most classes of transformers 5 take only the vocabulary from a file and build the other parts themselves. The one
    for DeBERTa leaves out the Unicode normalisation that the model was trained with. Those for XLM-R and CamemBERT
    split at other spaces than SentencePiece does. Two settings in tokenizer_config.json still win over the file, as in
    transformers 4: BERT's lower-casing, and RoBERTa's space before the first word.

    Raises:
      UserError: tokenizer.json holds another kind of model than the class has.
    """
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast, RobertaTokenizer

    if type(tokenizer) is PreTrainedTokenizerFast:  # it takes a file as it is
        return
    if files[0].name == TOKENIZER:
        _take_pipeline(tokenizer, files[0])
    elif isinstance(tokenizer.backend_tokenizer.model, Unigram):
        _split_like_sentencepiece(tokenizer, _sentencepiece_model(tokenizer, files))
    elif isinstance(tokenizer, RobertaTokenizer):
        _strip_before_mask(tokenizer)


def check_max_length(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Make `model_max_length` an integer; a file may hold 512.0, "512", or 1e30, which stands for no limit.

    Raises:
      UserError: it is not a positive whole number.
    """
    value = tokenizer.model_max_length
    try:
        whole = int(value)
        valid = whole > 0 and whole == float(value) and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        valid = False
    if not valid:
        raise CheckpointError(f"{directory / SETTINGS}: model_max_length is {value!r}, expected a positive integer")
    tokenizer.model_max_length = whole


def warn_of_lowercasing(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Warn if text is lower-cased by default only, and the vocabulary has pieces with capitals.

    transformers lower-cases for BERT unless tokenizer_config.json says otherwise, whatever tokenizer.json says.
    """
    from tokenizers.normalizers import BertNormalizer
    from transformers import PreTrainedTokenizerFast

    normalizer = tokenizer.backend_tokenizer.normalizer
    if type(tokenizer) is PreTrainedTokenizerFast:  # tokenizer.json decides
        return
    if not (isinstance(normalizer, BertNormalizer) and normalizer.lowercase):
        return
    if "do_lower_case" in _read(directory / SETTINGS):
        return
    pieces = [piece for piece in tokenizer.get_vocab() if not (piece.startswith("[") and piece.endswith("]"))]
    capitals = sum(piece != piece.lower() for piece in pieces)
    if capitals > _MOST_UNREACHABLE * len(pieces):
        _log.warning(
            "%s: text is lower-cased, but %.0f%% of the vocabulary has capitals and is never used; for a cased model "
            'write {"do_lower_case": false} into %s',
            directory,
            100 * capitals / len(pieces),
            SETTINGS,
        )


def refuse_growth(tokenizer: "PreTrainedTokenizerFast", directory: Path) -> None:
    """Refuse a normalizer that multiplies the length of a text, since the tokenizer would fill the memory with it."""
    growth = 1
    parts = [_state(tokenizer.backend_tokenizer.normalizer)]
    while parts:
        part = parts.pop()
        parts += part.get("normalizers", [])
        growth *= max(1, len(part.get("content") or ""))
        if growth > _MOST_GROWTH:
            raise CheckpointError(
                f"{directory / TOKENIZER}: its normalizer makes a text over {_MOST_GROWTH} times as long: not supported"
            )


def _state(normalizer: Any) -> dict[str, Any]:
    return {} if normalizer is None else json.loads(normalizer.__getstate__())


def _read(file: Path) -> dict[str, Any]:
    return storage.read_object(file, "download it again") if file.is_file() else {}


def _is_sentencepiece(file: Path) -> bool:
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor(model_file=str(file)).get_piece_size() > 0
    except (RuntimeError, OSError):
        return False


def _take_pipeline(tokenizer: "PreTrainedTokenizerFast", file: Path) -> None:
    """Replace the parts that differ from tokenizer.json, except those that tokenizer_config.json decides."""
    from tokenizers import normalizers, pre_tokenizers

    content = json.loads(file.read_text(encoding="utf-8"))
    backend = tokenizer.backend_tokenizer
    kind, expected = content["model"].get("type"), type(backend.model).__name__
    if kind not in (None, expected):
        raise CheckpointError(
            f"{file}: holds a {kind} model, but {type(tokenizer).__name__} is for {expected}: name the right "
            f"tokenizer_class in {SETTINGS}"
        )
    stated = _without_vocabulary(content)
    if not _both(normalizers.BertNormalizer, backend.normalizer, stated.normalizer):
        backend.normalizer = stated.normalizer
    if not _both(pre_tokenizers.ByteLevel, backend.pre_tokenizer, stated.pre_tokenizer):
        backend.pre_tokenizer = stated.pre_tokenizer
    backend.post_processor = stated.post_processor


def _without_vocabulary(content: dict[str, Any]) -> "tokenizers.Tokenizer":
    """Return the tokenizer of a tokenizer.json with one word, because parsing a large vocabulary takes seconds."""
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    return Tokenizer.from_str(json.dumps(content | {"model": model, "added_tokens": []}))


def _both(kind: type, first: Any, second: Any) -> bool:
    return isinstance(first, kind) and isinstance(second, kind)


def _sentencepiece_model(tokenizer: Any, files: list[Path]) -> Path:
    """Return the file that a Unigram tokenizer was made of: the one that its class looks for, or else the only one."""
    models = [file for file in files if file.suffix == ".model"]
    usual = [file for file in models if file.name == tokenizer.vocab_files_names.get("vocab_file")]
    return (usual or models)[0]


def _split_like_sentencepiece(tokenizer: Any, file: Path) -> None:
    """Normalise and split text as the converter of transformers does, with the character map of the model's file."""
    from transformers.convert_slow_tokenizer import SLOW_TO_FAST_CONVERTERS

    make_converter = SLOW_TO_FAST_CONVERTERS.get(type(tokenizer).__name__)
    if make_converter is None:
        return
    # A converter reads these of a slow tokenizer, which transformers 5 no longer has.
    settings = {key: getattr(tokenizer, key) for key in _CONVERTER_SETTINGS if hasattr(tokenizer, key)}
    converter = make_converter(SimpleNamespace(vocab_file=str(file), **settings))
    backend = tokenizer.backend_tokenizer
    backend.normalizer = converter.normalizer(converter.proto)
    backend.pre_tokenizer = converter.pre_tokenizer("▁", tokenizer.add_prefix_space)


def _strip_before_mask(tokenizer: Any) -> None:
    """Let a literal mask token take the space before it, as in RoBERTa's published tokenizer.json."""
    from tokenizers import AddedToken

    if not isinstance(tokenizer.init_kwargs.get("mask_token"), AddedToken):  # the files say nothing else
        tokenizer.add_tokens([AddedToken(tokenizer.mask_token, lstrip=True, normalized=False)], special_tokens=True)
