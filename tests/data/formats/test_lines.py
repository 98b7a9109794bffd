"""Streams give the same rows as files, and every error names the archive member."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.data.formats import lines, tables
from xtransfer.errors import UserError

any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def error_message(data: bytes, ending: str = ".tsv") -> str:
    with pytest.raises(UserError) as caught:
        list(lines.rows(io.BytesIO(data), "top/a", ending))
    return str(caught.value)


@given(st.lists(any_text), st.booleans())
def test_lines_end_at_newlines_only(texts, bom):
    text = "".join(f"{line}\n" for line in texts)
    prefix = b"\xef\xbb\xbf" if bom else b""
    numbered = list(lines.lines(io.BytesIO(prefix + text.encode()), "a"))
    expected = text if bom else text.removeprefix("\ufeff")
    assert [line for _, line in numbered] == [f"{line}\n" for line in expected.split("\n")[:-1]]
    assert [number for number, _ in numbered] == list(range(1, len(numbered) + 1))


@given(st.binary(max_size=40) | any_text.map(str.encode), st.sampled_from([".tsv", ".csv", ".jsonl"]))
def test_a_stream_gives_the_same_rows_or_error_as_a_file(tmp_path_factory, data, ending):
    path = tmp_path_factory.getbasetemp() / f"a{ending}"
    path.write_bytes(data)
    try:
        expected: object = list(tables.read_rows(path))
    except UserError as error:
        expected = str(error).replace(f"{path}:", "top/a:")
    try:
        result: object = list(lines.rows(io.BytesIO(data), "top/a", ending))
    except UserError as error:
        result = str(error)
    assert result == expected


def test_a_quote_is_an_ordinary_character_in_tsv():
    rows = list(lines.rows(io.BytesIO(b'a\tb\n"x\ty"\n"\t\n'), "n", ".tsv"))
    assert rows == [(2, {"a": '"x', "b": 'y"'}), (3, {"a": '"', "b": ""})]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'a\n"x\ry"\nz\n', [(2, "x\ry"), (3, "z")]),
        (b'a\n"x\ry\nw"\nz\n', [(2, "x\ry\nw"), (4, "z")]),
        (b"a\nx\ry\nz\n", [(2, "x"), (2, "y"), (3, "z")]),
        (b'a\rx\r"y\n"\r\nz', [(1, "x"), (1, "y\n"), (3, "z")]),
        (b"a\r\nx\r\ny\r\n", [(2, "x"), (3, "y")]),
    ],
)
def test_a_lone_carriage_return_does_not_count_as_a_csv_line(data: bytes, expected: list[tuple[int, str]]):
    """Lines are counted as in other programs, so that a user finds the row."""
    assert list(lines.rows(io.BytesIO(data), "n", ".csv")) == [(line, {"a": text}) for line, text in expected]


def test_errors_name_the_member_and_line(monkeypatch: pytest.MonkeyPatch):
    assert error_message(b"a\tb\nx\n") == "top/a:2: 1 column, expected 2"
    assert error_message(b"a\n\xffx\n") == "top/a:2: byte 0xff is not UTF-8; save the file as UTF-8"
    assert error_message(b'{"a": 1}\n{"a": NaN}\n', ".jsonl").startswith("top/a:2: malformed JSON")
    monkeypatch.setattr(lines, "_MAX_LINE", 1 << 20)
    assert error_message(b"a\n" + b"x" * ((1 << 20) + 1)) == "top/a:2: a line of over 1 MiB; is this a text file?"
