"""Long texts become overlapping chunks that fit, in order, with every token; texts that fit stay as they were."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.tokens.test_tokenizer import FakeTokenizer, write_tokenizer
from tests.helpers import tiny
from xtransfer.data.tokens import chunks
from xtransfer.data.tokens import tokenizer as tokenization
from xtransfer.data.tokens.chunks import chunk_starts, tokenize_chunks
from xtransfer.errors import UserError

CLS, SEP, GOOD, BAD, A, B = 2, 3, 5, 6, 9, 10  # of the tokenizer of `write_tokenizer`


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenization.load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenization.load_tokenizer(tiny.roberta(tmp_path_factory.mktemp("roberta") / "model"))


def chunked(tokenizer: Any, texts: list[str], pairs: list[str] | None, max_length: int) -> list[tuple[int, list, list]]:
    """Return (example, ids, types) of every chunk."""
    return [
        (int(example), tokens.item(i)[0].tolist(), tokens.item(i)[1].tolist())
        for tokens, examples in tokenize_chunks(tokenizer, texts, pairs, max_length)
        for i, example in enumerate(examples)
    ]


@pytest.mark.parametrize(
    ("length", "size", "starts"),
    [
        (0, 6, [0]),
        (6, 6, [0]),
        (7, 6, [0, 5]),  # a quarter of 6, rounded down, is 1
        (11, 6, [0, 5]),
        (12, 6, [0, 5, 10]),
        (20, 8, [0, 6, 12]),
        (21, 8, [0, 6, 12, 18]),
        (62, 62, [0]),
        (200, 62, [0, 47, 94, 141]),  # a quarter of 62 is 15
        (4, 3, [0, 2]),  # at least one token
        (4, 2, [0, 1, 2]),
        (3, 1, [0, 1, 2]),  # except here
    ],
)
def test_starts_by_hand(length: int, size: int, starts: list[int]) -> None:
    assert list(chunk_starts(length, size)) == starts


@given(st.integers(1, 400), st.integers(1, 70))
def test_chunks_cover_the_text_in_order_and_share_a_quarter(length: int, size: int) -> None:
    starts = list(chunk_starts(length, size))
    spans = [range(start, min(start + size, length)) for start in starts]
    assert sorted({i for span in spans for i in span}) == list(range(length))
    shared = [len(set(a) & set(b)) for a, b in zip(spans, spans[1:], strict=False)]
    assert set(shared) <= {max(1, size // 4) if size > 1 else 0}
    assert all(len(span) == size for span in spans[:-1]) and len(spans[-1]) > max([0, *shared])
    assert len(starts) == 1 or length > size


def test_single_texts_by_hand(tokenizer: Any) -> None:
    """Six tokens leave room for four, of which neighbours share one."""
    assert chunked(tokenizer, ["a", "good bad a b a a b good", "", "a a a b"], None, 6) == [
        (0, [CLS, A, SEP], [0] * 3),
        (1, [CLS, GOOD, BAD, A, B, SEP], [0] * 6),
        (1, [CLS, B, A, A, B, SEP], [0] * 6),
        (1, [CLS, B, GOOD, SEP], [0] * 4),
        (2, [CLS, SEP], [0] * 2),
        (3, [CLS, A, A, A, B, SEP], [0] * 6),
    ]


def test_the_longer_text_of_a_pair_is_divided_and_the_other_one_repeated(tokenizer: Any) -> None:
    """Eight tokens leave room for five: for three beside the two of the other text. Neighbours share one."""
    types = [0, 0, 0, 0, 1, 1, 1, 1]
    firsts, seconds = ["good bad", "a b good bad", "a b", "a a a"], ["a b good bad", "a b", "a b", "b b b"]
    assert chunked(tokenizer, firsts, seconds, 8) == [
        (0, [CLS, GOOD, BAD, SEP, A, B, GOOD, SEP], types),
        (0, [CLS, GOOD, BAD, SEP, GOOD, BAD, SEP], types[:7]),
        (1, [CLS, A, B, GOOD, SEP, A, B, SEP], [0, 0, 0, 0, 0, 1, 1, 1]),
        (1, [CLS, GOOD, BAD, SEP, A, B, SEP], [0, 0, 0, 0, 1, 1, 1]),
        (2, [CLS, A, B, SEP, A, B, SEP], [0, 0, 0, 0, 1, 1, 1]),
        # The first of two equally long texts, in chunks of two.
        (3, [CLS, A, A, SEP, B, B, B, SEP], types),
        (3, [CLS, A, A, SEP, B, B, B, SEP], types),
    ]


def test_roberta_has_other_special_tokens_and_no_types(roberta: Any) -> None:
    good, bad = roberta.convert_tokens_to_ids(["good", "bad"])
    assert chunked(roberta, ["good good bad bad"], ["good"], 7) == [
        (0, [0, good, good, 2, 2, good, 2], [0] * 7),
        (0, [0, good, bad, 2, 2, good, 2], [0] * 7),
        (0, [0, bad, bad, 2, 2, good, 2], [0] * 7),
    ]


def test_a_shorter_text_that_fills_the_length_is_refused(tokenizer: Any) -> None:
    assert len(chunked(tokenizer, ["a"], ["a a a a a a"], 5)) == 6  # one token of each
    with pytest.raises(
        UserError, match="example 1: even the shorter text of the pair has 2 tokens, which leave no room"
    ):
        chunked(tokenizer, ["a", "a b"], ["a", "a b"], 5)


texts = st.text(st.sampled_from("ab 本god[]"), max_size=60)


@given(st.lists(st.tuples(texts, texts), max_size=6), st.integers(8, 40), st.booleans(), st.integers(1, 5))
def test_texts_that_fit_have_the_tokens_of_tokenize_and_all_others_every_token(
    tokenizer: Any, examples: list[tuple[str, str]], max_length: int, paired: bool, group: int
) -> None:
    firsts = [first for first, _ in examples]
    seconds = [second[: max_length // 8] for _, second in examples] if paired else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "_GROUP", group)
        rows = chunked(tokenizer, firsts, seconds, max_length)
    whole = tokenization.tokenize(tokenizer, firsts, seconds, max_length)
    assert [example for example, _, _ in rows] == sorted(example for example, _, _ in rows)
    assert {example for example, _, _ in rows} == set(range(len(examples)))
    for i in range(len(examples)):
        members = [(ids, types) for example, ids, types in rows if example == i]
        assert all(len(ids) == len(types) <= max_length for ids, types in members)
        assert (len(members) > 1) == whole.truncated[i]
        if len(members) == 1:
            assert [part.tolist() for part in whole.item(i)] == list(members[0])
            continue
        whole_texts = (firsts[i],) if seconds is None else (firsts[i], seconds[i])
        sides = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in whole_texts]
        parts = list(zip(*(sides_of(*member, paired=paired) for member in members), strict=True))
        divided = max(range(len(sides)), key=lambda side: len(sides[side]))
        size = max_length - len(members[0][0]) + len(parts[divided][0])
        shared = max(1, size // 4) if size > 1 else 0
        assert parts[divided][0] + [t for part in parts[divided][1:] for t in part[shared:]] == sides[divided]
        if paired:
            assert all(part == sides[1 - divided] for part in parts[1 - divided])


def sides_of(ids: list[int], types: list[int], *, paired: bool) -> list[list[int]]:
    """Return the ids of the text, or of the two of a pair, in an example."""
    second = types.index(1) if paired else len(ids)
    return [ids[1 : second - 1], *([ids[second:-1]] if paired else [])]


@given(st.integers(3, 30), st.integers(0, 120))
def test_single_texts_are_divided_as_by_the_stride_of_transformers(
    tokenizer: Any, max_length: int, length: int
) -> None:
    text, room = "good bad a b " * (length // 4) + "a " * (length % 4), max_length - 2
    stride = max(1, room // 4) if room > 1 else 0
    reference = tokenizer(
        text, truncation=True, max_length=max_length, stride=stride, return_overflowing_tokens=True, padding=False
    )
    assert [ids for _, ids, _ in chunked(tokenizer, [text], None, max_length)] == reference["input_ids"]


def test_blanks_at_the_ends_of_long_texts_are_dropped_as_by_tokenize(roberta: Any) -> None:
    """The limit is 20 characters per token. Up to it, white space is up to the tokenizer."""
    (_, ids, _), *others = chunked(roberta, ["\u200b" * 200 + "good" + " " * 200], None, 8)
    assert ids == [0, roberta.convert_tokens_to_ids("good"), 2] and not others
    assert ids == tokenization.tokenize(roberta, ["\u200b" * 200 + "good" + " " * 200], None, 8).input_ids.tolist()


def test_only_the_first_million_characters_are_read_and_the_cut_is_known(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert chunks.CHARACTER_LIMIT == 1_048_576
    monkeypatch.setattr(chunks, "CHARACTER_LIMIT", 200)
    (group,) = tokenize_chunks(tokenizer, ["a " * 100, "a " * 101 + " b", "a"], None, 8)
    tokens, examples = group
    counts = np.bincount(examples)
    assert counts.tolist() == [20, 20, 1]  # 100 tokens: starts 0, 5, …, 95 at six tokens a chunk
    assert tokens.truncated.tolist() == [False] * 20 + [True] * 20 + [False]


def test_memory_is_bounded_by_a_group_of_chunks(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand tokens beside a text that leaves room for one are ten thousand chunks."""
    monkeypatch.setattr(chunks, "_GROUP", 100)
    other, long = "a " * 58, "b " * 10_000
    tracemalloc.start()
    total = sum(len(examples) for _, examples in tokenize_chunks(tokenizer, [other], [long], 62))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 10_000 and peak < 2_000_000, peak


def test_errors_name_the_example(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"^example 1: the tokenizer fails on 'a \\ud800'"):
        chunked(tokenizer, ["a", "a \ud800"], None, 8)
    with pytest.raises(UserError, match="max_length 2 leaves no room for text beside 2 special tokens"):
        chunked(tokenizer, ["a"], None, 2)
    with pytest.raises(ValueError, match="1 texts but 2 second texts"):
        chunked(tokenizer, ["a"], ["a", "b"], 8)


def test_a_tokenizer_that_has_no_token_for_a_letter_is_refused(tokenizer: Any) -> None:
    def without_letters(batch: list[Any]) -> list[Any]:
        return tokenizer.backend_tokenizer.encode_batch_fast([""] * len(batch))

    fake = FakeTokenizer(tokenizer, without_letters)
    with pytest.raises(UserError, match="no token for the letter a, so it cannot divide texts; pass --long truncate"):
        chunked(fake, ["good"], None, 8)


def test_no_texts_give_no_chunks(tokenizer: Any) -> None:
    assert chunked(tokenizer, [], None, 8) == []
