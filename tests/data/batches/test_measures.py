"""Lengths, words and full rows, counted by hand."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.caching import make_tokenizer
from xtransfer.data.batches import measures
from xtransfer.data.batches.batches import make_plan
from xtransfer.data.batches.measures import Filling, Lengths, count_units, filling, measure
from xtransfer.data.tokens.cache import TokenCache
from xtransfer.data.tokens.tokenizer import Tokens


@pytest.fixture(scope="module")
def tokenizer() -> SimpleNamespace:
    found = make_tokenizer()
    found.unk_token_id = 1
    return found


def measured(tokenizer: SimpleNamespace, texts: list[str], pairs: list[str] | None = None, max_length: int = 8):
    cache = TokenCache(None, tokenizer, max_length)
    return measure(cache, texts, pairs, cache.tokens(texts, pairs))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("— … !", 0),
        ("Don't stop, it's 5:30.", 5),
        ("1,000.5 km, 3,5 % of A.B.", 5),
        ("well-known", 2),
        ("7's", 2),
        ("Köln fährt über", 3),
        ("हिन्दी में किताबें", 3),
        ("كان الطريق طويلاً", 3),
        ("Мы купили хлеб", 3),
        ("họ không biết", 3),
        ("한국어 문장", 2),
        ("book 本 books", 3),
    ],
)
def test_words(text: str, words: int) -> None:
    assert count_units([text]) == (words, "word")


@pytest.mark.parametrize(
    ("text", "characters"),
    [("駅の前で 会いましょう。", 11), ("这家 餐馆!", 5), ("ฉันรักคุณ", 9), ("本 b", 2), ("သူ", 2), ("ខ្ញុំ", 5), ("ལྷ་ས", 4)],
)
def test_characters_where_words_are_not_set_apart(text: str, characters: int) -> None:
    assert count_units([text]) == (characters, "character")


def test_the_unit_is_of_all_texts_together() -> None:
    assert count_units(["本本", "a", "bc de"]) == (4, "word")
    assert count_units(["本本本本本", "a", "bc de"]) == (10, "character")


@given(st.lists(st.text("aäжक", min_size=1), max_size=9), st.sampled_from([" ", "\n", ", ", "  – "]))
def test_runs_of_letters_are_words(words: list[str], between: str) -> None:
    assert count_units([between.join(words)]) == (len(words), "word")


def test_lengths_by_hand(tokenizer: SimpleNamespace) -> None:
    """Two special tokens; books is two tokens, x is none that is known; the last two lose tokens at 8."""
    texts = ["good", "bad books", "x a", "a a a a a a", "a a a a a a a", "x" + " b" * 19]
    assert measured(tokenizer, texts) == Lengths(
        examples=6,
        percentiles=(5, 22, 22, 22),  # of 3, 4, 5, 8, 9, 22
        truncated=2,
        tokens=1 + 3 + 2 + 6 + 7 + 20,
        units=1 + 2 + 2 + 6 + 7 + 20,
        unit="word",
        unknown=2 / (1 + 3 + 2 + 6 + 6 + 6),
    )
    assert measured(tokenizer, texts).fertility == 39 / 38


def test_lengths_of_pairs(tokenizer: SimpleNamespace) -> None:
    found = measured(tokenizer, ["good", "a a a a"], ["books", "a a a"], max_length=9)
    assert found == Lengths(2, (6, 10, 10, 10), truncated=1, tokens=3 + 7, units=2 + 7, unit="word", unknown=0.0)


def test_exactly_max_length_is_not_truncated(tokenizer: SimpleNamespace) -> None:
    assert measured(tokenizer, ["a a a", "b b b"], max_length=5).truncated == 0
    assert measured(tokenizer, ["a a a", "b b b"], max_length=4).truncated == 2


def test_clipped_characters_are_truncated(tokenizer: SimpleNamespace) -> None:
    """Three tokens, but more than 20 characters for each of max_length."""
    found = measured(tokenizer, ["good" + " " * 200 + "bad", "good"])
    assert (found.truncated, found.tokens, found.percentiles[-1]) == (1, 3, 4)


def test_a_very_long_text_is_measured_up_to_a_bound(
    tokenizer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "LONGEST", 30)
    assert measured(tokenizer, ["a " * 100]).percentiles == (30, 30, 30, 30)


def test_the_cached_tokens_stay_as_they_are(tokenizer: SimpleNamespace) -> None:
    cache = TokenCache(None, tokenizer, 8)
    tokens = cache.tokens(["a " * 100], None)
    measure(cache, ["a " * 100], None, tokens)
    assert tokens.lengths.tolist() == [8] and len(cache.tokens(["b " * 100], None).input_ids) == 8


def test_no_words_and_no_texts(tokenizer: SimpleNamespace) -> None:
    found = measured(tokenizer, ["…"])
    assert (found.units, found.fertility, found.unknown) == (0, 0.0, 1.0)
    with pytest.raises(ValueError, match="no texts"):
        measured(tokenizer, [])


def test_no_unknown_token(tokenizer: SimpleNamespace) -> None:
    without = SimpleNamespace(**vars(tokenizer) | {"unk_token_id": None})
    assert measured(without, ["x"]).unknown == 0.0


def tokens_of(*lengths: int) -> Tokens:
    total = sum(lengths)
    return Tokens(np.ones(total, np.int32), np.zeros(total, np.uint8), np.cumsum([0, *lengths]))


PLAN = make_plan(4, 8, pad_id=0, position_offset=0, multiple_of=1)


@pytest.mark.parametrize(
    ("changes", "rows", "real"),
    [
        ({"slots": 2}, 2, 1.0),  # four examples of four tokens in rows of eight
        ({"slots": 1}, 4, 0.5),
        ({"packed": False}, 4, 0.5),
        ({"slots": 2, "multiple_of": 3}, 3, 16 / 24),
    ],
)
def test_filling_by_hand(changes: dict, rows: int, real: float) -> None:
    found = filling(tokens_of(4, 4, 4, 4, 4), dataclasses.replace(PLAN, **changes), seed=0, batches=7)
    assert found == Filling(rows=((rows, 7),), real=pytest.approx(real), unpacked=0.5)


def test_filling_of_batches_that_differ() -> None:
    """Twenty times through the three: 2 and 2 take one row, either with a 7, or two of those, take two."""
    found = filling(tokens_of(2, 2, 7), dataclasses.replace(PLAN, batch_size=2, slots=2), seed=0, batches=30)
    counts = dict(found.rows)
    assert set(counts) == {1, 2} and sum(counts.values()) == 30
    assert found.real == pytest.approx((20 * (2 + 2 + 7)) / (8 * (counts[1] + 2 * counts[2])))
    assert found.unpacked == pytest.approx(11 / 24)


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="0 batches"):
        filling(tokens_of(4), PLAN, seed=0, batches=0)
