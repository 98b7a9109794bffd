"""Tiny tokenizers of each kind: trained on a text, or with a vocabulary that a test gives."""

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

TEXT = (
    "the film is very good and the book is very bad",
    "der Film ist sehr gut und das Buch ist schön schlecht",
    "naïve façade déjà vu; 東京 is 2,000 km away!",
    "filmed booking goodness badly schönste Bücher unfilmed",
)
BERT_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA_SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
KINDS = ("wordpiece", "unigram", "unigram_bytes", "byte_level", "bpe_bytes")


def trained(kind: str) -> Any:
    """Return a tokenizer of a kind, trained on the text above, as `transformers` wraps it."""
    return {
        "wordpiece": _wordpiece,
        "unigram": _unigram,
        "unigram_bytes": _unigram_bytes,
        "byte_level": _byte_level,
        "bpe_bytes": _bpe_bytes,
    }[kind]()


def wordpiece(vocabulary: Sequence[str], unused: Sequence[str] = ()) -> Any:
    """Return a WordPiece tokenizer whose vocabulary is `unused`, the special tokens of BERT, and these pieces."""
    from transformers import BertTokenizer

    pieces = (*unused, *BERT_SPECIAL, *vocabulary)
    return BertTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, do_lower_case=False)


def unigram(scores: Mapping[str, float]) -> Any:
    """Return XLM-R's tokenizer with these pieces, after its special tokens and before the mask."""
    from transformers import XLMRobertaTokenizer

    special = [(token, 0.0) for token in ROBERTA_SPECIAL]
    return XLMRobertaTokenizer(vocab=[*special[:-1], *scores.items(), special[-1]])


def bpe(pieces: Sequence[str], merges: Sequence[tuple[str, str]], **options: Any) -> Any:
    """Return a BPE tokenizer with RoBERTa's special tokens before these pieces, and merged pieces after them."""
    from tokenizers import Tokenizer, models

    names = dict.fromkeys((*ROBERTA_SPECIAL, *pieces, *(left + right for left, right in merges)))
    vocabulary = {piece: i for i, piece in enumerate(names)}
    return _wrapped(Tokenizer(models.BPE(vocabulary, list(merges), unk_token="<unk>", **options)))


def _wrapped(backend: Any) -> Any:
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    special = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=special
    )
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token")
    tokens = dict(zip(names, [*ROBERTA_SPECIAL, "<s>", "</s>"], strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


def _wordpiece() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=150, show_progress=False))
    return wordpiece(sorted(backend.get_vocab(), key=backend.token_to_id))


def _unigram() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    backend.train_from_iterator(TEXT, trainer)

    pieces = json.loads(backend.to_str())["model"]["vocab"]
    return unigram({piece: score for piece, score in pieces if piece != "<unk>"})


def _unigram_bytes() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = random.Random(0)
    words = [f"▁{word}" for text in TEXT for word in text.split() if word.isascii()]
    parts = sorted({word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, len(word) + 1)})
    scores = [(piece, rng.uniform(-9, -1) / len(piece)) for piece in parts]
    entries = [(token, 0.0) for token in (*ROBERTA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)))]
    backend = Tokenizer(models.Unigram([*entries, *scores], unk_id=3, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return _wrapped(backend)


def _byte_level() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizer

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(ROBERTA_SPECIAL[:-1]), initial_alphabet=alphabet)
    trainer.show_progress = False
    backend.train_from_iterator(TEXT, trainer)

    model = json.loads(backend.to_str())["model"]
    vocabulary = model["vocab"] | {"<mask>": len(model["vocab"])}
    return RobertaTokenizer(vocab=vocabulary, merges=[tuple(merge) for merge in model["merges"]])


def _bpe_bytes() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    words = [word for text in TEXT for word in text.split() if word.isascii()]
    backend.train_from_iterator(words, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    wrapped = bpe(pieces, [tuple(merge) for merge in model["merges"]], byte_fallback=True, fuse_unk=True)
    wrapped.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return wrapped
