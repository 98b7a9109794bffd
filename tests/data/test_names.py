"""Names that look alike are found by one rule, and names that lead out of a folder are refused."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.data import names
from xtransfer.data.task import SPLITS
from xtransfer.distillation.objectives import OBJECTIVES
from xtransfer.errors import UserError

COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(
    "pair", [("pos", "pos "), ("pos", "\u200bpos\u00a0"), (COMPOSED, DECOMPOSED), ("Yes", "yes"), ("STRASSE", "straße")]
)
def test_look_alikes_are_refused_with_their_code_points(pair):
    assert names.look_alikes(["other", *pair]) == pair
    with pytest.raises(UserError) as caught:
        names.check_distinct(pair, "x", "correct one")
    message = str(caught.value)
    assert message.startswith("x: ") and message.endswith("look alike: correct one") and "\n" not in message
    for name in pair:
        assert " ".join(f"U+{ord(character):04X}" for character in name) in message


@given(st.text(max_size=8))
def test_spaces_and_unicode_forms_never_make_another_name(name):
    forms = [unicodedata.normalize(form, name) for form in ("NFC", "NFD")]
    assert {names.normal(form) for form in (*forms, f" {name}\n")} == {names.normal(name)}


def test_different_names_are_distinct():
    names.check_distinct(["de", "de", "de-AT", "das", "pos", "po s"], "x", "y")
    assert names.look_alikes([]) is None


def test_a_hint_shows_code_points_only_for_a_look_alike():
    assert (
        names.similar("DE", ["en", "de"]) == "; did you mean 'de' (U+0064 U+0065)? It looks like 'DE' (U+0044 U+0045)"
    )
    assert names.similar("englsh", ["english"]) == "; did you mean 'english'?"
    assert names.similar("qqq", ["english"]) == ""


def test_the_most_frequent_spelling_wins_unless_one_is_preferred():
    counts = {"DE": 1, "de ": 5, "fr": 2, DECOMPOSED: 1}
    assert names.unify(counts) == {"DE": "de", "de ": "de", "fr": "fr", DECOMPOSED: COMPOSED}
    assert names.unify(counts, ["DE", "it"])["de "] == "DE"
    assert names.unify({"b": 1, "B": 1}) == {"b": "B", "B": "B"}


def test_another_column_like_a_requested_one_is_refused():
    names.check_columns(["text", "Label", "label"], ["text"], "x:2")
    with pytest.raises(UserError, match=r"x:2: columns: 'label' \(U\+006C .*'Label' \(U\+004C .*rename one"):
        names.check_columns(["text", "Label", "label"], ["label"], "x:2")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("x/../../../escaped", "slash"),
        ("a\\b", "slash"),
        ("..", "dot"),
        (".ipynb_checkpoints", "dot"),
        ("", "empty"),
        ("a\0b", "cannot be printed"),
        ("a\u2028b", "cannot be printed"),
        ("\udcff", "cannot be printed"),
        ("x" * 260, "longer than 200 bytes"),
        ("é" * 101, "longer than 200 bytes"),
    ],
)
def test_a_name_that_cannot_be_a_file_is_refused(name, problem):
    with pytest.raises(UserError) as caught:
        names.check_path_part(name, "x:3")
    message = str(caught.value)
    assert message.startswith("x:3: ") and problem in message and message.isprintable() and len(message) < 160


def test_usual_names_may_be_files():
    for name in ("zh-Hant-TW", "eng_Latn", "日本語", "$$", "é" * 100, *OBJECTIVES, *SPLITS):
        names.check_path_part(name, "x")


@given(st.text(st.characters(codec="utf-8"), max_size=300))
def test_a_long_name_is_cut_and_stays_distinct(name):
    cut = names.within_limit(name)
    assert len(cut.encode()) <= 200
    assert (cut == name) == (len(name.encode()) <= 200)
    assert cut == name or names.within_limit(name + "x") != cut


def test_a_cut_name_by_hand():
    # Three bytes a letter: 191 bytes leave 63 letters. The digest is from sha256sum.
    assert names.within_limit("日" * 80) == "日" * 63 + "-06aa788c"
