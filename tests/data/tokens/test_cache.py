"""The token cache tokenises the same texts once, and its memory does not grow with them."""

import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import caching
from tests.helpers.caching import (
    MAX_LENGTH,
    PAIRS,
    SPECIAL,
    TEXTS,
    WORDS,
    assert_same,
    entries,
    make_tokenizer,
    tokenised,
)
from xtransfer.data.tokens import cache as token_cache
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.cache import TokenCache, texts_fingerprint


@pytest.fixture(scope="module")
def tokenizer() -> SimpleNamespace:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def cache_short_texts(monkeypatch):
    caching.keep_everything(monkeypatch)


short_texts = st.text(st.sampled_from("ab 本god[]"), max_size=20)


@given(st.lists(st.tuples(short_texts, short_texts), max_size=12), st.booleans())
def test_tokens_written_and_reopened_equal_those_of_tokenize(tokenizer, tmp_path_factory, examples, paired):
    texts, pairs = [a for a, _ in examples], [b for _, b in examples] if paired else None
    cache = TokenCache(tmp_path_factory.mktemp("cache"), tokenizer, MAX_LENGTH)
    expected = tokenization.tokenize(tokenizer, texts, pairs, MAX_LENGTH)
    written, newly_tokenised = tokenised(cache, texts, pairs)
    assert_same(written, expected)
    assert newly_tokenised == len(texts)
    reopened, newly_tokenised = tokenised(cache, texts, pairs)
    assert_same(reopened, expected)
    assert newly_tokenised == 0


def test_a_second_run_does_not_tokenise(tokenizer, tmp_path, monkeypatch):
    expected, _ = tokenised(TokenCache(tmp_path / "deep" / "cache", tokenizer, MAX_LENGTH), TEXTS, PAIRS)

    def fail(*arguments):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(tokenization, "encode_each", fail)
    reopened = TokenCache(tmp_path / "deep" / "cache", make_tokenizer(), MAX_LENGTH).tokens(TEXTS, PAIRS)
    assert_same(reopened, expected)
    with pytest.raises(AssertionError, match="tokenised again"):
        TokenCache(tmp_path, tokenizer, MAX_LENGTH).tokens(TEXTS, PAIRS)


def test_cached_arrays_are_read_only_memory_maps(tokenizer, tmp_path):
    tokens, _ = tokenised(TokenCache(tmp_path, tokenizer, MAX_LENGTH))
    for name in token_cache.ARRAYS:
        array = getattr(tokens, name)
        assert type(array) is np.ndarray and isinstance(array.base, np.memmap) and not array.flags.writeable
    assert (
        tokens.item(1)[0].tolist() == tokenization.tokenize(tokenizer, TEXTS[1:2], None, MAX_LENGTH).input_ids.tolist()
    )


def test_each_input_of_tokenisation_is_part_of_the_cache_key(tokenizer, tmp_path):
    other_vocabulary = make_tokenizer((*SPECIAL, *WORDS[::-1]))
    settings = [
        (tokenizer, MAX_LENGTH, TEXTS, None),
        (tokenizer, MAX_LENGTH, TEXTS, PAIRS),
        (tokenizer, MAX_LENGTH, PAIRS, TEXTS),
        (tokenizer, MAX_LENGTH, TEXTS[1:], None),
        (tokenizer, MAX_LENGTH + 1, TEXTS, None),
        (other_vocabulary, MAX_LENGTH, TEXTS, None),
    ]
    for number, (used_tokenizer, length, texts, pairs) in enumerate(settings):
        tokens, newly_tokenised = tokenised(TokenCache(tmp_path, used_tokenizer, length), texts, pairs)
        assert newly_tokenised == len(texts) and len(entries(tmp_path)) == number + 1
        assert_same(tokens, tokenization.tokenize(used_tokenizer, texts, pairs, length))
    for used_tokenizer, length, texts, pairs in settings:
        assert tokenised(TokenCache(tmp_path, used_tokenizer, length), texts, pairs)[1] == 0


@pytest.mark.parametrize("change", ["format", "library", "limit"])
def test_an_entry_of_another_version_is_not_read(tokenizer, tmp_path, monkeypatch, change):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    tokenised(cache)
    if change == "format":
        monkeypatch.setattr(token_cache, "FORMAT", 0)
    elif change == "library":
        monkeypatch.setattr(token_cache.importlib.metadata, "version", lambda name: "0.0")
    else:
        monkeypatch.setattr(tokenization, "_CHARACTERS_PER_TOKEN", 1)
    assert tokenised(cache)[1] == len(TEXTS)


text_lists = st.lists(st.text(max_size=3), max_size=4)


@given(st.tuples(text_lists, st.none() | text_lists), st.tuples(text_lists, st.none() | text_lists))
def test_fingerprints_are_equal_if_and_only_if_the_texts_are(first, second):
    assert (texts_fingerprint(*first) == texts_fingerprint(*second)) == (first == second)
    assert texts_fingerprint(*first) == texts_fingerprint(*first)


def test_fingerprints_depend_on_where_texts_end():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "_HASHED_TOGETHER", 2)
        fingerprints = {
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
    assert len(fingerprints) == 8


def test_truncated_texts_are_known_in_every_run(tokenizer, tmp_path):
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    for expected_count in (7, 0):
        tokens, newly_tokenised = tokenised(cache, ["good " * 7, *["a"] * 4, "good " * 6, "good " * 100])
        assert tokens.truncated.tolist() == [True, *[False] * 5, True] and newly_tokenised == expected_count


def test_short_inputs_and_caches_without_a_directory_write_nothing(tokenizer, tmp_path, monkeypatch):
    assert tokenised(TokenCache(None, tokenizer, MAX_LENGTH))[1] == len(TEXTS)
    size = sum(map(len, TEXTS))
    monkeypatch.setattr(token_cache, "_WORTH_KEEPING", size + 1)
    cache = TokenCache(tmp_path, tokenizer, MAX_LENGTH)
    for _ in range(2):
        tokens, newly_tokenised = tokenised(cache)
        assert newly_tokenised == len(TEXTS) and list(tmp_path.iterdir()) == []
    assert_same(tokens, tokenization.tokenize(tokenizer, TEXTS, None, MAX_LENGTH))
    tokenised(cache, TEXTS, PAIRS)
    assert len(entries(tmp_path)) == 1  # the texts and the pairs together are long enough


def test_memory_does_not_grow_with_the_number_of_examples(tokenizer, tmp_path, monkeypatch):
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
