"""A small token cache for tests of what it stores and of damage to its files."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from xtransfer.data.tokens import cache as token_cache
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.cache import TokenCache

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = ["good", "bad", "book", "##s", "a", "b", "本"]
TEXTS = [" ".join(["good", "bad", "books", "a", "b"][i % 3 : 2 + i % 4]) for i in range(40)]
PAIRS = TEXTS[::-1]
MAX_LENGTH = 8


def make_tokenizer(words: tuple[str, ...] = (*SPECIAL, *WORDS)) -> SimpleNamespace:
    """Return a stand-in for a tokenizer that saves the seconds that importing transformers takes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    backend = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return SimpleNamespace(
        backend_tokenizer=backend,
        num_special_tokens_to_add=lambda pair: backend.num_special_tokens_to_add(pair),
        truncation_side="right",
        split_special_tokens=False,
        model_input_names=["input_ids", "token_type_ids"],
    )


def keep_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the cache store even a few texts, and tokenise them in several chunks."""
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", 0)
    monkeypatch.setattr(tokenization, "_CHUNK", 5)


def tokenised(cache: TokenCache, texts=TEXTS, pairs=None):
    """Return the tokens, and the number of examples that had to be tokenised."""
    batch_sizes: list[int] = []
    tokens = cache.tokens(texts, pairs, on_batch=batch_sizes.append)
    return tokens, sum(batch_sizes)


def assert_same(tokens: tokenization.Tokens, expected: tokenization.Tokens) -> None:
    for name in token_cache.ARRAYS:
        np.testing.assert_array_equal(getattr(tokens, name), getattr(expected, name))
        assert getattr(tokens, name).dtype == getattr(expected, name).dtype


def entries(directory: Path) -> list[Path]:
    """Return everything in the cache directory except its lock."""
    return [path for path in directory.iterdir() if path.name != ".tokenizing.lock"]
