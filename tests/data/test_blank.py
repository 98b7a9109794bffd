"""Texts of characters that show nothing are empty, and no other text is."""

import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.data import blank

EVERY_CHARACTER = list(map(chr, range(sys.maxunicode + 1)))


@pytest.mark.parametrize(
    "text", ["", " ", "\t\r\n", "\u3000\xa0", "\u200b", "\ufeff", "\xad\u2060\u200d", "\u3164", "\ufe0f", "\x00"]
)
def test_invisible_text_is_empty(text: str) -> None:
    assert blank.is_empty(text) and blank.strip(f"{text}a b{text}") == "a b"


@pytest.mark.parametrize("text", ["a", "\u200ba", ".", "本", "\u2800", "\ufffd", "\U0001f600", "\ue000", "\u0301"])
def test_a_text_with_one_visible_character_is_not_empty(text: str) -> None:
    assert not blank.is_empty(text)


def test_spaces_controls_and_formats_are_blank_and_no_letter_digit_or_symbol_is() -> None:
    """The categories of Python's own version of Unicode. The only blank letters are the Hangul fillers."""
    blanks = {character for character in EVERY_CHARACTER if blank.is_empty(character)}
    assert {c for c in EVERY_CHARACTER if unicodedata.category(c) in ("Cc", "Cf", "Zs", "Zl", "Zp")} <= blanks
    assert {c for c in EVERY_CHARACTER if c.isspace()} <= blanks
    assert {c for c in blanks if unicodedata.category(c)[0] in "LNPS"} == {"\u115f", "\u1160", "\u3164", "\uffa0"}


def test_the_ranges_are_those_of_unicode() -> None:
    regex = pytest.importorskip("regex")  # a package that transformers installs, with the properties of Unicode
    pattern = regex.compile(r"[\p{White_Space}\p{Cc}\p{Cf}\p{Default_Ignorable_Code_Point}]")
    assert {c for c in EVERY_CHARACTER if blank.is_empty(c)} == {c for c in EVERY_CHARACTER if pattern.match(c)}


@given(st.text(st.sampled_from("a \u200b\n\ufeffb")))
def test_strip_drops_blanks_at_the_ends_only(text: str) -> None:
    stripped = blank.strip(text)
    assert stripped in text and blank.is_empty(text.replace("a", "").replace("b", ""))
    assert stripped == "" or {stripped[0], stripped[-1]} <= set("ab")
    assert [c for c in stripped if c in "ab"] == [c for c in text if c in "ab"]
