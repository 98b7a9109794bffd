"""Strict readers: what was written comes back, and every fault names its file and line."""

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtransfer.data import files
from xtransfer.data.files import Columns, Record
from xtransfer.errors import UserError

PLAIN = Columns("text", label="label")

reuses_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
# What a TSV cell cannot hold is what ends it.
tsv_cells = any_text.filter(lambda t: not set(t) & set("\t\n\r"))
labels = any_text.filter(bool)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(records: list[Record]) -> list[tuple]:
    return [(r.text, r.text_pair, r.label) for r in records]


def refused(path: Path, content: str | bytes, columns: Columns = PLAIN, **options) -> str:
    """The message for a file with this content, without its directory."""
    with pytest.raises(UserError) as caught:
        files.read_records(write(path, content), columns, **options)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(f"{path.parent}/")


@reuses_tmp_path
@given(
    st.lists(st.tuples(tsv_cells.filter(str.strip), tsv_cells.filter(bool)), min_size=1),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_tsv_round_trip(tmp_path, rows, bom, newline, last_newline):
    lines = ["label\ttext", *(f"{label}\t{text}" for text, label in rows)]
    content = ("\ufeff" if bom else "") + newline.join(lines) + (newline if last_newline else "")
    records, skipped = files.read_records(write(tmp_path / "a.tsv", content), PLAIN)
    assert rows_of(records) == [(text, None, label) for text, label in rows] and skipped == 0
    assert [r.line for r in records] == list(range(2, len(rows) + 2))
    assert [r.id for r in records] == [str(i) for i in range(len(rows))]


@reuses_tmp_path
@given(st.lists(st.tuples(any_text.filter(str.strip), any_text.filter(str.strip), labels), min_size=1), st.booleans())
def test_csv_round_trip(tmp_path, rows, quote_all):
    # the module's writer leaves a lone "\r" unquoted where lines end in "\n", so quote what it would not
    quoting = csv.QUOTE_ALL if quote_all or any("\r" in cell for row in rows for cell in row) else csv.QUOTE_MINIMAL
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator="\r\n").writerows([("text", "other", "label"), *rows])
    records, _ = files.read_records(
        write(tmp_path / "a.csv", out.getvalue()), Columns("text", pair="other", label="label")
    )
    assert rows_of(records) == rows


@reuses_tmp_path
@given(
    st.lists(st.tuples(any_text.filter(str.strip), labels | st.integers()), min_size=1), st.booleans(), st.booleans()
)
def test_jsonl_round_trip(tmp_path, rows, ascii_only, bom):
    lines = [json.dumps({"text": t, "label": x, "extra": [1.5]}, ensure_ascii=ascii_only) for t, x in rows]
    content = ("\ufeff" if bom else "") + "\n".join(lines) + "\n"
    records, _ = files.read_records(write(tmp_path / "a.jsonl", content), PLAIN)
    assert rows_of(records) == [(text, None, str(label)) for text, label in rows]


@reuses_tmp_path
@given(st.sampled_from([".tsv", ".csv", ".jsonl"]), st.binary(max_size=40) | any_text.map(str.encode))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path, ending, content):
    path = write(tmp_path / f"a{ending}", b'{"text": "' + content if ending == ".jsonl" else b"text\n" + content)
    try:
        records, _ = files.read_records(path, Columns("text"))
    except UserError as error:
        assert str(error).startswith(f"{path}:")
    else:
        assert records and all(r.text.strip() for r in records)


def test_quotes_in_tsv_are_characters(tmp_path):
    content = 'text\tlabel\n"half a quote\tx\n5" disc\ty\n""\tz\n'
    records, _ = files.read_records(write(tmp_path / "a.tsv", content), PLAIN)
    assert [r.text for r in records] == ['"half a quote', '5" disc', '""']


def test_only_a_line_feed_ends_a_line(tmp_path):
    odd = "a\u2028b\u0085c\x0bd"
    for name, content in [
        ("a.tsv", f"text\n{odd}\n"),
        ("a.csv", f"text\n{odd}\n"),
        ("a.jsonl", json.dumps({"text": odd}, ensure_ascii=False) + "\n"),
    ]:
        records, _ = files.read_records(write(tmp_path / name, content), Columns("text"))
        assert [r.text for r in records] == [odd]


def test_csv_lines_count_line_breaks_inside_quotes(tmp_path):
    content = 'text,label\n"two\nlines",x\nplain,y\n'
    records, _ = files.read_records(write(tmp_path / "a.csv", content), PLAIN)
    assert [(r.line, r.text) for r in records] == [(2, "two\nlines"), (4, "plain")]


def test_huge_cells_are_read(tmp_path):
    limit = csv.field_size_limit()
    records, _ = files.read_records(write(tmp_path / "a.csv", "text\n" + "x" * 300_000), Columns("text"))
    assert len(records[0].text) == 300_000
    assert csv.field_size_limit() == limit


def test_ids_pairs_and_unread_columns(tmp_path):
    path = write(tmp_path / "a.tsv", "n\ta\tb\tz\n7\tone\ttwo\t\nx\tthree\tfour\t\n")
    records, _ = files.read_records(path, Columns("a", pair="b", id="n"))
    assert records == [Record(2, "7", "one", "two", None), Record(3, "x", "three", "four", None)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text\tlabel\nfine\tx\nbad\n", "a.tsv:3: 1 column, expected 2"),
        ("text\tlabel\nfine\tx\ty\n", "a.tsv:2: 3 columns, expected 2"),
        ("text\tlabel\nfine\tx\n\n", "a.tsv:3: 1 column, expected 2"),
        ("text\ttext\tlabel\n", "a.tsv:1: column 'text' occurs twice in the header"),
        ("txt\tlabel\na\tx\n", "a.tsv:2: no column 'text' among 'txt', 'label'; did you mean 'txt'?"),
        ("q\tlabel\na\tx\n", "a.tsv:2: no column 'text' among 'q', 'label'"),
        ("text\tlabel\na\t\n", "a.tsv:2: column 'label' is empty"),
        ("text\tlabel\n\tx\n", "a.tsv:2: column 'text' is empty; mend it, or set task.empty_text to 'skip'"),
        ("text\tlabel\na\tx\n \u3000\tx\n", "a.tsv:3: column 'text' is empty"),
        ("text\tlabel\n", "a.tsv: no rows with text"),
        ("", "a.tsv: no rows with text"),
        (b"text\tlabel\nfine\tx\nb\xe9d\tx\n", "a.tsv:3: byte 0xe9 is not UTF-8"),
        (b"text\tlabel\n\xed\xa0\x80\tx\n", "a.tsv:2: byte 0xed is not UTF-8"),
        ("text\tlabel\na\tx\n".encode("utf-16"), "a.tsv:1: byte 0xff is not UTF-8"),
    ],
)
def test_malformed_tsv(tmp_path, content, message):
    assert refused(tmp_path / "a.tsv", content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\nfine,x\n"open,x\nmore,y\n', "a.csv:3: malformed CSV: unexpected end of data"),
        ('text,label\n"a"b,x\n', "a.csv:2: malformed CSV: ',' expected after '\"'"),
        ("text,label\nfine,x\na,b,c\n", "a.csv:3: 3 columns, expected 2"),
        ("text,label\nfine,x\n\n", "a.csv:3: 0 columns, expected 2"),
        ("text;label\nfine;x\n", "a.csv:2: no column 'text' among 'text;label'"),
    ],
)
def test_malformed_csv(tmp_path, content, message):
    assert refused(tmp_path / "a.csv", content).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": "x"', "malformed JSON: Expecting ',' delimiter at column 27"),
        ('{"text": "a", "text": "b", "label": "x"}', "malformed JSON: the key 'text' occurs twice"),
        ('{"text": "a", "label": "x", "p": {"q": 1, "q": 2}}', "malformed JSON: the key 'q' occurs twice"),
        ('{"text": "a", "label": "x", "p": NaN}', "malformed JSON: NaN is no JSON number"),
        ('{"text": "a", "label": "x", "p": [-Infinity]}', "malformed JSON: -Infinity is no JSON number"),
        ('{"text": "a", "label": "x", "p": 1e999}', "malformed JSON: 1e999 is too large a number"),
        ('{"text": "a", "label": "x", "p": ' + "9" * 5000 + "}", "malformed JSON: Exceeds the limit"),
        ('{"text": "a", "label": "x", "p": ' + "[" * 100_000, "malformed JSON: nested too deeply"),
        ('["a", "x"]', "expected a JSON object, got a list"),
        ("3", "expected a JSON object, got a number"),
        ("", "malformed JSON: Expecting value at column 1"),
        ('{"label": "x"}', "no column 'text' among 'label'"),
        ('{"text": 3, "label": "x"}', "column 'text' is a number, expected text"),
        ('{"text": null, "label": "x"}', "column 'text' is null, expected text"),
        ('{"text": "a", "label": true}', "column 'label' is true or false, expected text or an integer"),
        ('{"text": "a", "label": 0.5}', "column 'label' is a number, expected text or an integer"),
        ('{"text": "a\\ud800", "label": "x"}', "column 'text' has half of a surrogate pair"),
        ('{"text": "a", "label": "\\udfff"}', "column 'label' has half of a surrogate pair"),
        (b'{"text": "\xff", "label": "x"}', "byte 0xff is not UTF-8"),
    ],
)
def test_malformed_jsonl(tmp_path, line, message):
    first = b'{"text": "fine", "label": 0}\n'
    line = line if isinstance(line, bytes) else line.encode()
    assert refused(tmp_path / "a.jsonl", first + line + b"\n").startswith(f"a.jsonl:2: {message}")


def test_whole_surrogate_pairs_are_one_character(tmp_path):
    records, _ = files.read_records(write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n'), Columns("text"))
    assert records[0].text == "\U0001f600"


def test_double_ids_name_both_lines(tmp_path):
    message = refused(tmp_path / "a.tsv", "id\ttext\n1\ta\n2\tb\n1\tc\n", Columns("text", id="id"))
    assert message == "a.tsv:4: id '1' already stands in line 2"


def test_empty_text_is_skipped_when_asked_and_counted(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tother\n\tb\na\t \nc\td\n")
    records, skipped = files.read_records(path, Columns("text", pair="other"), empty_text="skip")
    assert [(r.id, r.line, r.text) for r in records] == [("2", 4, "c")] and skipped == 2
    message = refused(tmp_path / "b.tsv", "text\tother\na\t \n", Columns("text", pair="other"))
    assert message.startswith("b.tsv:2: column 'other' is empty")
    only_empty = refused(tmp_path / "c.tsv", "text\tlabel\n \tx\n", empty_text="skip")
    assert only_empty == "c.tsv: no rows with text"


def test_files_that_cannot_be_opened(tmp_path):
    for name, message in [
        ("none.tsv", "no such file"),
        ("a.xlsx", "the ending '.xlsx' is not one of .tsv, .csv, .jsonl"),
        ("folder.tsv", "cannot be read: Is a directory"),
    ]:
        (tmp_path / "folder.tsv").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{name}: {message}"):
            files.read_records(tmp_path / name, PLAIN)
