"""Error messages: their length, their details, and the hint for a misspelt name."""

import pytest

from xtransfer.errors import MissingSplitError, UserError, nearest, one_line


def test_one_line_joins_and_truncates():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("x" * 300)) == "x" * 200 and one_line(ValueError("abc"), 2) == "ab"
    assert one_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_a_missing_split_error_names_split_and_language():
    with pytest.raises(UserError, match="^no test in de$") as caught:
        raise MissingSplitError("test", "de", "no test in de")
    assert isinstance(caught.value, MissingSplitError)
    assert (caught.value.split, caught.value.language) == ("test", "de")


@pytest.mark.parametrize(("name", "hint"), [("vanila", "; did you mean 'vanilla'?"), ("qqq", "")])
def test_nearest_suggests_a_similar_name(name, hint):
    assert nearest(name, ["vanilla", "monox_kd"]) == hint
