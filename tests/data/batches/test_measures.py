"""Token lengths, word counts, and the fill of rows, against values counted by hand."""

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
    tokenizer = make_tokenizer()
    tokenizer.unk_token_id = 1
    return tokenizer


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
def test_words_are_counted(text: str, words: int) -> None:
    assert count_units([text]) == (words, "word")


@pytest.mark.parametrize(
    ("text", "characters"),
    [("駅の前で 会いましょう。", 11), ("这家 餐馆!", 5), ("ฉันรักคุณ", 9), ("本 b", 2), ("သူ", 2), ("ខ្ញុំ", 5), ("ལྷ་ས", 4)],
)
def test_characters_are_counted_in_scripts_without_spaces(text: str, characters: int) -> None:
    assert count_units([text]) == (characters, "character")


def test_all_texts_together_decide_the_unit() -> None:
    assert count_units(["本本", "a", "bc de"]) == (4, "word")
    assert count_units(["本本本本本", "a", "bc de"]) == (10, "character")


@given(st.lists(st.text("aäжक", min_size=1), max_size=9), st.sampled_from([" ", "\n", ", ", "  – "]))
def test_each_run_of_letters_is_a_word(words: list[str], separator: str) -> None:
    assert count_units([separator.join(words)]) == (len(words), "word")


def test_lengths_by_hand(tokenizer: SimpleNamespace) -> None:
    """There are two special tokens. "books" is two tokens, "x" is unknown, and the last two texts are cut at 8."""
    texts = ["good", "bad books", "x a", "a a a a a a", "a a a a a a a", "x" + " b" * 19]
    assert measured(tokenizer, texts) == Lengths(
        examples=6,
        percentiles=(5, 22, 22, 22),  # the lengths are 3, 4, 5, 8, 9, 22
        truncated=2,
        tokens=1 + 3 + 2 + 6 + 7 + 20,
        units=1 + 2 + 2 + 6 + 7 + 20,
        unit="word",
        unknown=2 / (1 + 3 + 2 + 6 + 6 + 6),
    )
    assert measured(tokenizer, texts).fertility == 39 / 38


def test_lengths_of_pairs(tokenizer: SimpleNamespace) -> None:
    lengths = measured(tokenizer, ["good", "a a a a"], ["books", "a a a"], max_length=9)
    assert lengths == Lengths(2, (6, 10, 10, 10), truncated=1, tokens=3 + 7, units=2 + 7, unit="word", unknown=0.0)


def test_a_text_of_exactly_max_length_is_not_truncated(tokenizer: SimpleNamespace) -> None:
    assert measured(tokenizer, ["a a a", "b b b"], max_length=5).truncated == 0
    assert measured(tokenizer, ["a a a", "b b b"], max_length=4).truncated == 2


def test_a_text_with_clipped_characters_counts_as_truncated(tokenizer: SimpleNamespace) -> None:
    """The text has three tokens, but more than 20 characters per token of max_length."""
    lengths = measured(tokenizer, ["good" + " " * 200 + "bad", "good"])
    assert (lengths.truncated, lengths.tokens, lengths.percentiles[-1]) == (1, 3, 4)


def test_the_measured_length_of_a_very_long_text_is_capped(
    tokenizer: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measures, "LONGEST", 30)
    assert measured(tokenizer, ["a " * 100]).percentiles == (30, 30, 30, 30)


def test_measuring_does_not_change_the_cached_tokens(tokenizer: SimpleNamespace) -> None:
    cache = TokenCache(None, tokenizer, 8)
    tokens = cache.tokens(["a " * 100], None)
    measure(cache, ["a " * 100], None, tokens)
    assert tokens.lengths.tolist() == [8] and len(cache.tokens(["b " * 100], None).input_ids) == 8


def test_texts_without_words_and_no_texts_at_all(tokenizer: SimpleNamespace) -> None:
    lengths = measured(tokenizer, ["…"])
    assert (lengths.units, lengths.fertility, lengths.unknown) == (0, 0.0, 1.0)
    with pytest.raises(ValueError, match="no texts"):
        measured(tokenizer, [])


def test_a_tokenizer_without_an_unknown_token_has_no_unknown_tokens(tokenizer: SimpleNamespace) -> None:
    without_unknown = SimpleNamespace(**vars(tokenizer) | {"unk_token_id": None})
    assert measured(without_unknown, ["x"]).unknown == 0.0


def make_tokens(*lengths: int) -> Tokens:
    total = sum(lengths)
    offsets = np.cumsum([0, *lengths])
    return Tokens(np.ones(total, np.int32), np.zeros(total, np.uint8), offsets, np.zeros(len(lengths), bool))


PLAN = make_plan(4, 8, pad_id=0, position_offset=0, multiple_of=1)


@pytest.mark.parametrize(
    ("changes", "rows", "real"),
    [
        ({"slots": 2}, 2, 1.0),  # batches of four examples with four tokens each, in rows of eight
        ({"slots": 1}, 4, 0.5),
        ({"packed": False}, 4, 0.5),
        ({"slots": 2, "multiple_of": 3}, 3, 16 / 24),
    ],
)
def test_filling_by_hand(changes: dict, rows: int, real: float) -> None:
    fill = filling(make_tokens(4, 4, 4, 4, 4), dataclasses.replace(PLAN, **changes), seed=0, batches=7)
    assert fill == Filling(rows=((rows, 7),), real=pytest.approx(real), unpacked=0.5)


def test_filling_averages_over_batches_of_different_sizes() -> None:
    """Thirty batches of two are 20 epochs. Lengths 2 and 2 share a row; a batch with a 7 needs two rows."""
    fill = filling(make_tokens(2, 2, 7), dataclasses.replace(PLAN, batch_size=2, slots=2), seed=0, batches=30)
    counts = dict(fill.rows)
    assert set(counts) == {1, 2} and sum(counts.values()) == 30
    assert fill.real == pytest.approx((20 * (2 + 2 + 7)) / (8 * (counts[1] + 2 * counts[2])))
    assert fill.unpacked == pytest.approx(11 / 24)


def test_filling_of_zero_batches_is_an_error() -> None:
    with pytest.raises(ValueError, match="0 batches"):
        filling(make_tokens(4), PLAN, seed=0, batches=0)
