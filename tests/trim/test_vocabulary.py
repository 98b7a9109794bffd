"""Which pieces are kept: by hand for each model type, and for random vocabularies and texts."""

import json
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tests.helpers import tiny, tokenizers_of_each_kind
from tests.helpers.tokenizers_of_each_kind import BERT_SPECIAL, KINDS, ROBERTA_SPECIAL, TEXT, bpe, unigram, wordpiece
from xtransfer.errors import UserError
from xtransfer.trim import vocabulary
from xtransfer.trim.text import Line, count
from xtransfer.trim.vocabulary import Limits


def trim(tokenizer: Any, texts: Sequence[str], limits: Limits = Limits()) -> tuple[list[str], bool, Tokenizer]:  # noqa: B008
    """Return the kept pieces by their new ids, whether they are all that the text uses, and the trimmed tokenizer."""
    state = vocabulary.read_state(tokenizer)
    lines = [Line(f"x:{i}", text) for i, text in enumerate(texts)]
    usage = count(tokenizer, state["model"], lines)
    always = {*tokenizer.all_special_ids, *vocabulary.lowest_fixed_ids(state)}
    kept, complete = vocabulary.select(state, usage, always, limits)
    result = Tokenizer.from_str(json.dumps(vocabulary.trimmed(state, kept)))
    names = [tokenizer.convert_ids_to_tokens(id_) for id_ in kept]
    assert result.get_vocab() == {name: id_ for id_, name in enumerate(names)}
    return names, complete, result


def split(tokenizer: Any, text: str) -> list[str]:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    backend.no_truncation()
    return [backend.id_to_token(id_) for id_ in backend.encode(text).ids]  # its `tokens` hide that one is unknown


def check_same(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """Check that texts have the same pieces after trimming, and return the kept pieces."""
    expected = [split(tokenizer, text) for text in texts]
    names, complete, result = trim(tokenizer, texts)
    assert [split(result, text) for text in texts] == expected
    assert complete
    return names


def test_wordpiece_keeps_pieces_characters_and_special_tokens() -> None:
    tokenizer = wordpiece(["good", "##ness", "bad", "g", "##g", "##o", "x", "##x", "goo"])
    assert check_same(tokenizer, ["goodness good"]) == [*BERT_SPECIAL, "good", "##ness", "g", "##g", "##o"]


def test_wordpiece_keeps_the_pieces_before_the_end_of_an_unknown_word() -> None:
    """Greedy "abcd" leaves "##e", which does not exist. Without "abcd", "ab ##cde" would be found."""
    tokenizer = wordpiece(["ab", "##cde", "abcd", "x"])
    assert split(tokenizer, "abcde ab xcde") == ["[CLS]", "[UNK]", "ab", "x", "##cde", "[SEP]"]
    assert "abcd" in check_same(tokenizer, ["abcde ab xcde"])


def test_dead_end_by_hand() -> None:
    model = {
        "vocab": dict.fromkeys(("ab", "##cde", "abcd")),
        "continuing_subword_prefix": "##",
        "max_input_chars_per_word": 6,
    }
    assert vocabulary.dead_end(model, "abcdx") == ["abcd"]
    assert vocabulary.dead_end(model, "abcdex") == ["abcd"]
    assert vocabulary.dead_end(model, "abcde" * 2) == []  # too long, so unknown from the start
    assert vocabulary.dead_end(model, "ab") == []


def test_unigram_keeps_the_lowest_score() -> None:
    """Without "zz", unknown characters score −14 − 10, and "a" unknown with "bcdef" would beat ab, cd, ef.

    ab + cd + ef = −45. Unknown + bcdef = (−22 − 10) − 14 = −46 before, and would be (−15 − 10) − 14 = −39.
    """
    tokenizer = unigram({"▁": -1.0, "ab": -15.0, "cd": -15.0, "ef": -15.0, "bcdef": -14.0, "zz": -22.0, "y": -2.0})
    assert split(tokenizer, "abcdef bcdef") == ["<s>", "▁", "ab", "cd", "ef", "▁", "bcdef", "</s>"]
    kept = check_same(tokenizer, ["abcdef bcdef"])
    assert kept == [*ROBERTA_SPECIAL[:-1], "▁", "ab", "cd", "ef", "bcdef", "zz", "<mask>"]


def test_unigram_keeps_single_characters_of_the_text() -> None:
    tokenizer = unigram({"▁": -5.0, "good": -1.0, "d": -9.0, "g": -9.0, "o": -9.0, "x": -9.0, "goo": -3.0})
    assert check_same(tokenizer, ["good"]) == [*ROBERTA_SPECIAL[:-1], "▁", "good", "d", "g", "o", "<mask>"]


def test_bpe_keeps_what_its_pieces_are_merged_from() -> None:
    tokenizer = bpe("abcde", [("a", "b"), ("d", "e"), ("ab", "c"), ("b", "c")])
    assert check_same(tokenizer, ["abc"]) == [*ROBERTA_SPECIAL, "a", "b", "c", "ab", "abc", "bc"][:-1]
    state = vocabulary.read_state(tokenizer)
    ids = vocabulary.all_ids(state)
    kept = sorted(ids[piece] for piece in (*ROBERTA_SPECIAL, "a", "b", "c", "ab", "abc"))
    assert vocabulary.trimmed(state, kept)["model"]["merges"] == [["a", "b"], ["ab", "c"]]


def test_bpe_merges_one_pair_at_a_time() -> None:
    """In "abab", the first ab makes (ab, a) possible, which comes before the second (a, b)."""
    tokenizer = bpe("ab", [("ab", "a"), ("a", "b"), ("aba", "b")])
    assert split(tokenizer, "abab") == ["<s>", "abab", "</s>"]
    assert check_same(tokenizer, ["abab"]) == [*ROBERTA_SPECIAL, "a", "b", "aba", "ab", "abab"]


def test_bpe_that_ignores_merges_keeps_a_piece_without_its_parts() -> None:
    tokenizer = bpe([*"abc", "abc"], [("b", "c")], ignore_merges=True)
    assert check_same(tokenizer, ["abc"]) == [*ROBERTA_SPECIAL, "a", "b", "c", "abc"]


def test_special_ids_move_together() -> None:
    tokenizer = wordpiece(["film", "x"], unused=["[unused0]", "[unused1]"])
    assert tokenizer("film", "film")["input_ids"] == [4, 7, 5, 7, 5]
    names, _, result = trim(tokenizer, ["film"])
    assert names == [*BERT_SPECIAL, "film"]
    assert result.encode("film", "film").ids == [2, 5, 3, 5, 3]
    assert result.token_to_id("[MASK]") == 4 and result.encode("[MASK]").ids == [2, 4, 3]


def test_unknown_id_of_unigram_moves_with_its_piece() -> None:
    state = vocabulary.read_state(unigram({"a": -1.0, "b": -2.0}))
    state["post_processor"], state["added_tokens"] = None, []
    assert vocabulary.trimmed(state, [1, 3, 5])["model"] == {
        "type": "Unigram",
        "unk_id": 1,
        "byte_fallback": False,
        "vocab": [["<pad>", 0.0], ["<unk>", 0.0], ["b", -2.0]],
    }


@pytest.mark.parametrize("kind", ["unigram_bytes", "byte_level", "bpe_bytes"])
@pytest.mark.parametrize("text", ["quux", "Ωμέγα", "日本語 🙂", "\x01\x7f"])
def test_bytes_stay_so_that_no_text_is_unknown(kind: str, text: str) -> None:
    tokenizer = tokenizers_of_each_kind.trained(kind)
    names, _, result = trim(tokenizer, ["good"])
    assert len(names) < len(tokenizer)
    pieces = split(result, text)
    assert "<unk>" not in pieces
    if kind == "byte_level":  # BPE leaves out what it has no piece for
        assert "".join(pieces) == "".join(split(tokenizer, text))


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_behind_the_vocabulary_are_kept(kind: str) -> None:
    tokenizer = tokenizers_of_each_kind.trained(kind)
    size = len(tokenizer)
    tokenizer.add_tokens(["@user", "@link"])
    assert tokenizer.convert_tokens_to_ids(["@user", "@link"]) == [size, size + 1]
    names, _, result = trim(tokenizer, ["good"])
    assert names[-2:] == ["@user", "@link"]
    assert "@link" in split(result, "good @link")


def test_pair_processors_and_padding_are_renumbered() -> None:
    from tokenizers import processors

    tokenizer = wordpiece(["x", "good"], unused=["[unused0]", "[unused1]"])
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.Sequence(
        [processors.ByteLevel(), processors.RobertaProcessing(("[SEP]", 5), ("[CLS]", 4))]
    )
    backend.enable_padding(pad_id=2, pad_token="[PAD]")
    state = vocabulary.read_state(tokenizer)
    assert [token["id"] for token in state["added_tokens"]] == [2, 3, 4, 5, 6]
    result = vocabulary.trimmed(state, [2, 3, 4, 5, 6, 8])
    assert [token["id"] for token in result["added_tokens"]] == [0, 1, 2, 3, 4]
    assert result["post_processor"]["processors"][1]["sep"] == ["[SEP]", 3]
    assert result["post_processor"]["processors"][1]["cls"] == ["[CLS]", 2]
    assert result["padding"]["pad_id"] == 0
    assert result["model"]["vocab"] == {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "good": 5}


def test_limits_keep_the_most_frequent_pieces() -> None:
    tokenizer = wordpiece(["rare", "often", "twice", "r", "##a", "##r", "##e"])
    texts = ["often often often twice twice rare"]
    for limits, words in (
        (Limits(2), ["often", "twice"]),
        (Limits(1, 1), ["often"]),
        (Limits(1, 2), ["often", "twice"]),
        (Limits(4), []),
    ):
        names, complete, result = trim(tokenizer, texts, limits)
        assert not complete and names == [*BERT_SPECIAL, *words, "r", "##a", "##r", "##e"]
        assert split(result, "rare") == ["[CLS]", "r", "##a", "##r", "##e", "[SEP]"]
    names, complete, _ = trim(tokenizer, texts, Limits(1, 3))
    assert complete and "rare" in names


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "model.dropout is 0.1"),
        ({"end_of_word_suffix": "</w>"}, 'model.end_of_word_suffix is "</w>"'),
        ({"continuing_subword_prefix": "##"}, 'model.continuing_subword_prefix is "##"'),
        ({"surprise": [1]}, r"model.surprise is \[1\]"),
    ],
)
def test_models_that_are_not_understood_are_refused(changes: Mapping[str, Any], message: str) -> None:
    state = json.loads(bpe("ab", []).backend_tokenizer.to_str())
    state["model"] |= changes
    with pytest.raises(UserError, match=f"^some: {message} in its tokenizer.json: such a tokenizer cannot be trimmed$"):
        vocabulary.read_state(fake(state))


def test_other_types_and_processors_are_refused() -> None:
    state = json.loads(bpe("ab", []).backend_tokenizer.to_str())
    with pytest.raises(UserError, match="^some: post_processor Novel cannot be trimmed: one of TemplateProcessing"):
        vocabulary.read_state(fake(state | {"post_processor": {"type": "Novel"}}))
    with pytest.raises(UserError, match="^some: novelty is 3 in its tokenizer.json"):
        vocabulary.read_state(fake(state | {"novelty": 3}))
    with pytest.raises(UserError, match="a WordLevel tokenizer cannot be trimmed: one of WordPiece, Unigram, BPE"):
        vocabulary.read_state(fake(state | {"model": {"type": "WordLevel"}}))
    vocabulary.read_state(tiny.word_tokenizer())


def fake(state: Mapping[str, Any]) -> Any:
    backend = SimpleNamespace(to_str=lambda: json.dumps(state))
    return SimpleNamespace(backend_tokenizer=backend, name_or_path="some")


# Random vocabularies over three letters, and texts with a fourth that no piece has.
PIECES = st.text("abc", min_size=1, max_size=4)
TEXTS = st.lists(st.text("aaabbbccd ", min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=3)


@given(st.lists(st.tuples(PIECES, st.booleans()), max_size=25), TEXTS)
def test_any_wordpiece_splits_the_text_as_before(pieces: list[tuple[str, bool]], texts: list[str]) -> None:
    names = dict.fromkeys(("##" if inside else "") + piece for piece, inside in pieces)
    check_same(wordpiece(list(names)), texts)


@given(st.dictionaries(PIECES | PIECES.map("▁".__add__), st.floats(-30, -0.5), min_size=1, max_size=25), TEXTS)
def test_any_unigram_splits_the_text_as_before(scores: dict[str, float], texts: list[str]) -> None:
    check_same(unigram(scores), texts)


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=12), st.booleans(), st.randoms(), TEXTS)
def test_any_bpe_splits_the_text_as_before(
    picks: list[tuple[int, int]], ignore_merges: bool, rng: Any, texts: list[str]
) -> None:
    pieces, merges = list("abc"), []
    for left, right in picks:
        merge = (pieces[left % len(pieces)], pieces[right % len(pieces)])
        if "".join(merge) not in pieces:
            merges.append(merge)
            pieces.append("".join(merge))
    rng.shuffle(merges)
    check_same(bpe(pieces, merges, ignore_merges=ignore_merges), texts)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=30)
@given(st.data())
def test_trained_tokenizers_split_texts_as_before_and_fall_back_on_others(kind: str, data: st.DataObject) -> None:
    tokenizer = TRAINED.setdefault(kind, tokenizers_of_each_kind.trained(kind))
    words = sorted({word for text in TEXT for word in text.split()})
    texts = data.draw(st.lists(st.lists(st.sampled_from(words), min_size=1).map(" ".join), min_size=1, max_size=3))
    texts += data.draw(st.lists(st.text(min_size=1, max_size=8).filter(str.strip), max_size=1))
    expected = [split(tokenizer, text) for text in texts]
    _, complete, result = trim(tokenizer, texts)
    assert complete and [split(result, text) for text in texts] == expected
    # A text of the same characters has unknown pieces only if the original tokenizer has some.
    known = data.draw(st.text(sorted(set("".join(texts))), min_size=1, max_size=12))
    if tokenizer.unk_token not in split(tokenizer, known) and kind not in ("wordpiece", "unigram"):
        assert tokenizer.unk_token not in split(result, known)


TRAINED: dict[str, Any] = {}
