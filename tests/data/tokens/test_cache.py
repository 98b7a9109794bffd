"""Tokens on disk: tokenised once for whatever decides them, in memory that does not grow."""

import logging
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tokens.test_tokenizer import SPECIAL, WORDS
from tests.helpers import caching
from tests.helpers.caching import MAX_LENGTH, PAIRS, TEXTS, assert_same, entries, make_tokenizer, tokenised
from xtransfer.data.tokens import cache as token_cache
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.cache import TokenCache, texts_fingerprint


@pytest.fixture(scope="module")
def tokenizer() -> SimpleNamespace:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    caching.keep_everything(monkeypatch)


@given(
    st.lists(st.tuples(*[st.text(st.sampled_from("ab 本god[]"), max_size=20)] * 2), max_size=12),
    st.booleans(),
)
def test_tokens_written_and_reopened_are_those_of_tokenize(tokenizer, tmp_path_factory, examples, paired):
    texts, pairs = [a for a, _ in examples], [b for _, b in examples] if paired else None
    cache = TokenCache(tmp_path_factory.mktemp("cache"), tokenizer, MAX_LENGTH)
    expected = tokenization.tokenize(tokenizer, texts, pairs, MAX_LENGTH)
    written, done = tokenised(cache, texts, pairs)
    assert_same(written, expected)
    assert done == len(texts)
    reopened, done = tokenised(cache, texts, pairs)
    assert_same(reopened, expected)
    assert done == 0


def test_a_second_start_does_not_tokenise(tokenizer, tmp_path, monkeypatch):
    expected, _ = tokenised(TokenCache(tmp_path / "deep" / "cache", tokenizer, MAX_LENGTH), TEXTS, PAIRS)

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenization, "_encode", fail)
    again = TokenCache(tmp_path / "deep" / "cache", make_tokenizer(), MAX_LENGTH).tokens(TEXTS, PAIRS)
    assert_same(again, expected)
    with pytest.raises(AssertionError, match="tokenised again"):
        TokenCache(tmp_path, tokenizer, MAX_LENGTH).tokens(TEXTS, PAIRS)


def test_reopened_arrays_are_read_only_maps_of_the_files(tokenizer, tmp_path):
    tokens, _ = tokenised(TokenCache(tmp_path, tokenizer, MAX_LENGTH))
    for name in token_cache.ARRAYS:
        array = getattr(tokens, name)
        assert type(array) is np.ndarray and isinstance(array.base, np.memmap) and not array.flags.writeable
    assert (
        tokens.item(1)[0].tolist() == tokenization.tokenize(tokenizer, TEXTS[1:2], None, MAX_LENGTH).input_ids.tolist()
    )


def test_whatever_decides_the_tokens_has_an_entry_of_its_own(tokenizer, tmp_path):
    other = make_tokenizer((*SPECIAL, *WORDS[::-1]))
    settings = [
        (tokenizer, MAX_LENGTH, TEXTS, None),
        (tokenizer, MAX_LENGTH, TEXTS, PAIRS),
        (tokenizer, MAX_LENGTH, PAIRS, TEXTS),
        (tokenizer, MAX_LENGTH, TEXTS[1:], None),
        (tokenizer, MAX_LENGTH + 1, TEXTS, None),
        (other, MAX_LENGTH, TEXTS, None),
    ]
    for number, (each, length, texts, pairs) in enumerate(settings):
        tokens, done = tokenised(TokenCache(tmp_path, each, length), texts, pairs)
        assert done == len(texts) and len(entries(tmp_path)) == number + 1
        assert_same(tokens, tokenization.tokenize(each, texts, pairs, length))
    for each, length, texts, pairs in settings:
        assert tokenised(TokenCache(tmp_path, each, length), texts, pairs)[1] == 0


@pytest.mark.parametrize("change", ["format", "library", "limit"])
def test_what_another_version_wrote_is_not_read(tokenizer, tmp_path, monkeypatch, change):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    if change == "format":
        monkeypatch.setattr(token_cache, "FORMAT", 0)
    elif change == "library":
        monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda name: "0.0")
    else:
        monkeypatch.setattr(tokenization, "_CHARACTERS_PER_TOKEN", 1)
    assert tokenised(cache)[1] == len(TEXTS)


sides = st.lists(st.text(max_size=3), max_size=4)


@given(st.tuples(sides, st.none() | sides), st.tuples(sides, st.none() | sides))
def test_fingerprints_are_equal_where_the_texts_are(one, other):
    assert (texts_fingerprint(*one) == texts_fingerprint(*other)) == (one == other)
    assert texts_fingerprint(*one) == texts_fingerprint(*one)


def test_fingerprints_tell_where_texts_end():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_HASHED_TOGETHER", 2)
        found = {
            texts_fingerprint(texts, pairs)
            for texts, pairs in [
                (["ab", "c", "d"], None),
                (["a", "bc", "d"], None),
                (["a", "b", "cd"], None),
                (["d", "c", "ab"], None),
                (["ab"], ["cd"]),
                (["ab", "cd"], None),
                (["ab", "cd"], []),
                (["\ud800"], None),
            ]
        }
    assert len(found) == 8


def test_clipped_texts_are_told_of_every_time(tokenizer, tmp_path, caplog):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    for done in (7, 0):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tokens, heard = tokenised(cache, ["a"] * 5 + ["good " * 100] * 2)
        assert tokens.clipped == 2 and heard == done
        assert "2 of 7 examples had texts of over 160 characters" in caplog.text


def test_little_text_and_no_directory_keep_nothing(tokenizer, tmp_path, monkeypatch):
    assert tokenised(TokenCache(None, tokenizer, MAX_LENGTH))[1] == len(TEXTS)
    size = sum(map(len, TEXTS))
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", size + 1)
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    for _ in range(2):
        tokens, done = tokenised(cache)
        assert done == len(TEXTS) and list(tmp_path.iterdir()) == []
    assert_same(tokens, tokenization.tokenize(tokenizer, TEXTS, None, MAX_LENGTH))
    tokenised(cache, TEXTS, PAIRS)
    assert len(entries(tmp_path)) == 1  # both sides count


def test_memory_does_not_grow_with_the_examples(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenization, "_CHUNK", 100)
    peaks = []
    for n in (2_000, 20_000):
        texts = ["good bad books"] * n
        cache = TokenCache(tmp_path / str(n), tokenizer, MAX_LENGTH)
        tracemalloc.start()
        cache.tokens(texts, None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.3 * peaks[0]
