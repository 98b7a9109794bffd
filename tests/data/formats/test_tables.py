"""The strict readers return exactly the rows that were written, and every error names the file and line."""

import csv
import io
import json
import re
import tracemalloc
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xtransfer.data import blank
from xtransfer.data.formats import lines, tables
from xtransfer.data.formats.tables import Columns, Record
from xtransfer.errors import UserError

PLAIN = Columns("text", label="label")

reuses_tmp_path = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80)
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
not_empty = any_text.filter(lambda text: not blank.is_empty(text))
# A TSV cell cannot contain the characters that end it.
tsv_cells = any_text.filter(lambda t: not set(t) & set("\t\n\r"))
labels = not_empty


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(records: list[Record]) -> list[tuple]:
    return [(r.text, r.text_pair, r.label) for r in records]


def error_message(path: Path, content: str | bytes, columns: Columns = PLAIN, **options) -> str:
    """Return the error for a file with this content, without its directory."""
    with pytest.raises(UserError) as caught:
        tables.read_records(write(path, content), columns, **options)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message.removeprefix(f"{path.parent}/")


@reuses_tmp_path
@given(
    st.lists(st.tuples(*2 * [tsv_cells.filter(lambda text: not blank.is_empty(text))]), min_size=1),
    st.booleans(),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
)
def test_tsv_round_trip(tmp_path, rows, bom, newline, final_newline):
    lines = ["label\ttext", *(f"{label}\t{text}" for text, label in rows)]
    content = ("\ufeff" if bom else "") + newline.join(lines) + (newline if final_newline else "")
    records, skipped = tables.read_records(write(tmp_path / "a.tsv", content), PLAIN)
    assert rows_of(records) == [(text, None, label) for text, label in rows] and skipped == 0
    assert [r.line for r in records] == list(range(2, len(rows) + 2))
    assert [r.id for r in records] == [str(i) for i in range(len(rows))]


@reuses_tmp_path
@given(st.lists(st.tuples(not_empty, not_empty, labels), min_size=1), st.booleans())
def test_csv_round_trip(tmp_path, rows, quote_all):
    # Quote every cell if one contains "\r", because csv.writer may leave it unquoted.
    quoting = csv.QUOTE_ALL if quote_all or any("\r" in cell for row in rows for cell in row) else csv.QUOTE_MINIMAL
    out = io.StringIO()
    csv.writer(out, quoting=quoting, lineterminator="\r\n").writerows([("text", "other", "label"), *rows])
    records, _ = tables.read_records(
        write(tmp_path / "a.csv", out.getvalue()), Columns("text", pair="other", label="label")
    )
    assert rows_of(records) == rows


@reuses_tmp_path
@given(st.lists(st.tuples(not_empty, labels | st.integers()), min_size=1), st.booleans(), st.booleans())
def test_jsonl_round_trip(tmp_path, rows, ascii_only, bom):
    lines = [json.dumps({"text": t, "label": x, "extra": [1.5]}, ensure_ascii=ascii_only) for t, x in rows]
    content = ("\ufeff" if bom else "") + "\n".join(lines) + "\n"
    records, _ = tables.read_records(write(tmp_path / "a.jsonl", content), PLAIN)
    assert rows_of(records) == [(text, None, str(label)) for text, label in rows]


@reuses_tmp_path
@given(st.sampled_from([".tsv", ".csv", ".jsonl"]), st.binary(max_size=40) | any_text.map(str.encode))
def test_any_bytes_are_read_or_refused_with_one_line(tmp_path, ending, content):
    path = write(tmp_path / f"a{ending}", b'{"text": "' + content if ending == ".jsonl" else b"text\n" + content)
    try:
        records, _ = tables.read_records(path, Columns("text"))
    except UserError as error:
        assert str(error).startswith(f"{path}:")
    else:
        assert records and all(r.text.strip() for r in records)


def test_quotes_in_tsv_are_ordinary_characters(tmp_path):
    content = 'text\tlabel\n"half a quote\tx\n5" disc\ty\n""\tz\n'
    records, _ = tables.read_records(write(tmp_path / "a.tsv", content), PLAIN)
    assert [r.text for r in records] == ['"half a quote', '5" disc', '""']


def test_only_a_line_feed_ends_a_line(tmp_path):
    odd = "a\u2028b\u0085c\x0bd"
    for name, content in [
        ("a.tsv", f"text\n{odd}\n"),
        ("a.csv", f"text\n{odd}\n"),
        ("a.jsonl", json.dumps({"text": odd}, ensure_ascii=False) + "\n"),
    ]:
        records, _ = tables.read_records(write(tmp_path / name, content), Columns("text"))
        assert [r.text for r in records] == [odd]


def test_csv_line_numbers_count_line_breaks_inside_quotes(tmp_path):
    content = 'text,label\n"two\nlines",x\nplain,y\n'
    records, _ = tables.read_records(write(tmp_path / "a.csv", content), PLAIN)
    assert [(r.line, r.text) for r in records] == [(2, "two\nlines"), (4, "plain")]


def test_huge_cells_are_read(tmp_path):
    limit = csv.field_size_limit()
    records, _ = tables.read_records(write(tmp_path / "a.csv", "text\n" + "x" * 300_000), Columns("text"))
    assert len(records[0].text) == 300_000
    assert csv.field_size_limit() == limit


def test_ids_and_pairs_are_read_and_other_columns_ignored(tmp_path):
    path = write(tmp_path / "a.tsv", "n\ta\tb\tz\n7\tone\ttwo\t\nx\tthree\tfour\t\n")
    records, _ = tables.read_records(path, Columns("a", pair="b", id="n"))
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
        ("text\tlabel\n\tx\n", "a.tsv:2: column 'text' is empty; fill it in, or set task.empty_text to 'skip'"),
        ("text\tlabel\na\tx\n \u3000\tx\n", "a.tsv:3: column 'text' is empty"),
        ("text\tlabel\n", "a.tsv: no rows with text"),
        ("", "a.tsv: no rows with text"),
        (b"text\tlabel\nfine\tx\nb\xe9d\tx\n", "a.tsv:3: byte 0xe9 is not UTF-8"),
        (b"text\tlabel\n\xed\xa0\x80\tx\n", "a.tsv:2: byte 0xed is not UTF-8"),
        ("text\tlabel\na\tx\n".encode("utf-16"), "a.tsv:1: byte 0xff is not UTF-8"),
    ],
)
def test_malformed_tsv_is_refused(tmp_path, content, message):
    assert error_message(tmp_path / "a.tsv", content).startswith(message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('text,label\nfine,x\n"open,x\nmore,y\n', "a.csv:3: malformed CSV: unexpected end of data"),
        ('text,label\n"a"b,x\n', "a.csv:2: malformed CSV: ',' expected after '\"'"),
        ("text,label\nfine,x\na,b,c\n", "a.csv:3: 3 columns, expected 2"),
        ("text,label\nfine,x\n\n", "a.csv:3: 0 columns, expected 2"),
        ("text;label\nfine;x\n", "a.csv:1: the columns are separated by ';' (semicolon), not by ',': save"),
    ],
)
def test_malformed_csv_is_refused(tmp_path, content, message):
    assert error_message(tmp_path / "a.csv", content).startswith(message)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "label": "x"', "malformed JSON: Expecting ',' delimiter at column 27"),
        ('{"text": "a", "text": "b", "label": "x"}', "malformed JSON: the key 'text' occurs twice"),
        ('{"text": "a", "label": "x", "p": {"q": 1, "q": 2}}', "malformed JSON: the key 'q' occurs twice"),
        ('{"text": "a", "label": "x", "p": NaN}', "malformed JSON: NaN is not a JSON number"),
        ('{"text": "a", "label": "x", "p": [-Infinity]}', "malformed JSON: -Infinity is not a JSON number"),
        ('{"text": "a", "label": "x", "p": 1e999}', "malformed JSON: 1e999 is too large a number"),
        ('{"text": "a", "label": "x", "p": ' + "9" * 5000 + "}", "malformed JSON: Exceeds the limit"),
        ('{"text": "a", "label": "x", "p": ' + "[" * 100_000, "malformed JSON: nested too deeply"),
        ('["a", "x"]', "expected a JSON object, got a list"),
        ("3", "expected a JSON object, got a number"),
        ("", "malformed JSON: Expecting value at column 1"),
        ('{"label": "x"}', "no column 'text' among 'label'"),
        ('{"text": 3, "label": "x"}', "column 'text' is a number, expected text"),
        ('{"text": null, "label": "x"}', "column 'text' is empty; fill it in, or set task.empty_text to 'skip'"),
        ('{"text": "\\u200b\\ufeff", "label": "x"}', "column 'text' is empty; fill it in, or set task.empty_text to"),
        ('{"text": "a", "label": null}', "column 'label' is null, expected text or an integer"),
        ('{"text": "a", "label": true}', "column 'label' is true or false, expected text or an integer"),
        ('{"text": "a", "label": 0.5}', "column 'label' is a number, expected text or an integer"),
        ('{"text": "a\\ud800", "label": "x"}', "column 'text' has half of a surrogate pair"),
        ('{"text": "a", "label": "\\udfff"}', "column 'label' has half of a surrogate pair"),
        (b'{"text": "\xff", "label": "x"}', "byte 0xff is not UTF-8"),
    ],
)
def test_malformed_jsonl_is_refused(tmp_path, line, message):
    valid_line = b'{"text": "fine", "label": 0}\n'
    line = line if isinstance(line, bytes) else line.encode()
    assert error_message(tmp_path / "a.jsonl", valid_line + line + b"\n").startswith(f"a.jsonl:2: {message}")


def test_a_complete_surrogate_pair_is_one_character(tmp_path):
    records, _ = tables.read_records(write(tmp_path / "a.jsonl", '{"text": "\\ud83d\\ude00"}\n'), Columns("text"))
    assert records[0].text == "\U0001f600"


def test_the_error_for_a_duplicate_id_names_both_lines(tmp_path):
    message = error_message(tmp_path / "a.tsv", "id\ttext\n1\ta\n2\tb\n1\tc\n", Columns("text", id="id"))
    assert message == "a.tsv:4: id '1' already occurs in line 2"
    message = error_message(tmp_path / "a.csv", "id,text\n1,a\r1,c\n", Columns("text", id="id"))
    assert message == "a.csv:2: id '1' already occurs in line 2"


def test_empty_text_is_skipped_and_counted_on_request(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tother\n\tb\na\t \nc\td\n")
    records, skipped = tables.read_records(path, Columns("text", pair="other"), empty_text="skip")
    assert [(r.id, r.line, r.text) for r in records] == [("2", 4, "c")] and skipped == 2
    message = error_message(tmp_path / "b.tsv", "text\tother\na\t \n", Columns("text", pair="other"))
    assert message.startswith("b.tsv:2: column 'other' is empty")
    path = write(tmp_path / "c.jsonl", '{"text": null}\n{"text": "\\u200b \\u00ad"}\n{"text": "a"}\n')
    records, skipped = tables.read_records(path, Columns("text"), empty_text="skip")
    assert [(r.id, r.text) for r in records] == [("2", "a")] and skipped == 2
    only_empty = error_message(tmp_path / "c.tsv", "text\tlabel\n \tx\n", empty_text="skip")
    assert only_empty == "c.tsv: no rows with text"


def test_errors_name_files_that_cannot_be_opened(tmp_path):
    for name, message in [
        ("none.tsv", "no such file"),
        ("a.xlsx", "the ending '.xlsx' is not one of .tsv, .csv, .jsonl, .parquet"),
        ("folder.tsv", "cannot be read: Is a directory"),
    ]:
        (tmp_path / "folder.tsv").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=f"{name}: {message}"):
            tables.read_records(tmp_path / name, PLAIN)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "text\n" + "a" * 60 + "\n", "a.tsv:2: a line of over 0 MiB; is this a text file?"),
        ("a.jsonl", '{"text": "a"}\n' + " " * 60, "a.jsonl:2: a line of over 0 MiB; is this a text file?"),
        ("a.csv", 'text\n"' + "stray\n" * 60, "a.csv:2: a row of over 0 MiB; is a quote not closed?"),
    ],
)
def test_a_row_too_large_for_memory_is_refused(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(lines, "_MAX_LINE", 50)
    assert error_message(tmp_path / name, content, Columns("text")) == message


def test_a_file_is_read_lazily(tmp_path):
    for name, header, row, malformed in [
        ("a.tsv", "text\n", "good\n", "a\tb\n"),
        ("a.csv", "text\n", '"go\nod"\n', "a,b\n"),
        ("a.jsonl", "", '{"text": "good"}\n', "[]\n"),
    ]:
        path = write(tmp_path / name, header + row * 5 + malformed)
        texts = tables.read_texts(tables.inspect(path, "text", None, None, skip_empty=False))
        assert [next(texts).id for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(UserError, match=f"{name}:"):
            next(texts)


def test_memory_does_not_grow_with_the_file(tmp_path):
    def peak(rows: int) -> int:
        path = write(tmp_path / f"{rows}.tsv", "text\n" + "some text of no meaning\n" * rows)
        tracemalloc.start()
        try:
            assert sum(1 for _ in tables.read_rows(path)) == rows
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    assert peak(20_000) < peak(200) + 50_000


def test_columns_are_the_named_ones_or_else_the_default_ones_that_exist(tmp_path):
    path = write(tmp_path / "a.tsv", "id\ttext\ttext_pair\tother\nx\ta\tb\tc\n")

    def columns(pair, id_):
        return tables.inspect(path, "text", pair, id_, skip_empty=False).columns

    assert columns(None, None) == Columns("text", pair="text_pair", id="id")
    assert columns("", "") == Columns("text")
    assert columns("other", "other") == Columns("text", pair="other", id="other")
    plain = tables.inspect(write(tmp_path / "b.tsv", "text\na\n"), "text", None, None, skip_empty=True)
    assert plain == tables.TextTable(tmp_path / "b.tsv", Columns("text"), ("text_pair", "id"), True)


def parquet(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@reuses_tmp_path
@given(st.lists(st.tuples(not_empty, not_empty, labels, st.integers(0, 9)), min_size=1))
def test_parquet_round_trip(tmp_path, rows):
    texts, others, names, numbers = map(list, zip(*rows, strict=True))
    path = parquet(tmp_path / "a.parquet", text=texts, other=others, label=names, unread=[[n] for n in numbers])
    records, skipped = tables.read_records(path, Columns("text", pair="other", label="label"))
    assert rows_of(records) == [row[:3] for row in rows] and skipped == 0
    assert [(r.line, r.id) for r in records] == [(i + 1, str(i)) for i in range(len(rows))]


def test_parquet_errors_name_the_row(tmp_path):
    def message(empty_text="error", id="", **columns) -> str:
        with pytest.raises(UserError) as caught:
            path = parquet(tmp_path / "a.parquet", **columns)
            tables.read_records(path, Columns("text", label="label", id=id), empty_text=empty_text)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    valid = {"text": ["a", "b"], "label": [0, 1]}
    assert message(**valid | {"text": ["a", None]}).startswith("a.parquet:2: column 'text' is empty; fill it in, or")
    assert message("skip", **valid | {"text": pa.array([None, None])}) == "a.parquet: no rows with text"
    assert message(**valid | {"text": [1, 2]}) == "a.parquet:1: column 'text' is a number, expected text"
    assert message(**valid | {"label": [0, None]}).startswith("a.parquet:2: column 'label' is null, expected text or")
    assert message(**valid | {"label": [0.5, 1.0]}).startswith("a.parquet:1: column 'label' is a number, expected")
    assert message(**valid | {"text": ["a", " "]}).startswith("a.parquet:2: column 'text' is empty; fill it in, or")
    assert message(id="n", n=["x", "x"], **valid) == "a.parquet:2: id 'x' already occurs in row 1"
    assert message(text=["a"], lable=["x"]).endswith("no column 'label' among 'text', 'lable'; did you mean 'lable'?")
    assert message(text=pa.array([], pa.string()), label=pa.array([], pa.string())) == "a.parquet: no rows with text"


def test_parquet_ids_and_pairs_follow_the_inspected_columns(tmp_path):
    path = parquet(tmp_path / "A.PARQUET", id=[7, 8], text=["a", "b"], text_pair=["c", "d"], image=[b"\xff", b""])
    source = tables.inspect(path, "text", None, None, skip_empty=False)
    assert source == tables.TextTable(path, Columns("text", pair="text_pair", id="id"), (), False)
    assert list(tables.read_texts(source)) == [tables.Text(1, 7, "a", "c"), tables.Text(2, 8, "b", "d")]
    plain = tables.inspect(path, "text", "", "", skip_empty=False)
    assert [row.id for row in tables.read_texts(plain)] == [0, 1]
    path = parquet(tmp_path / "b.parquet", id=[0.5, float("nan")], text=["a", "b"])
    with pytest.raises(UserError, match=r"b\.parquet:2: column 'id' is nan, expected text or a number"):
        list(tables.read_texts(tables.inspect(path, "text", None, None, skip_empty=False)))
    with pytest.raises(UserError, match=r"c\.parquet: no rows with text"):
        tables.inspect(
            parquet(tmp_path / "c.parquet", text=pa.array([], pa.string())), "text", "", "", skip_empty=False
        )


def test_an_id_is_unique_within_each_language(tmp_path):
    columns = Columns("text", id="id", language="lang")
    path = write(tmp_path / "a.tsv", "id\ttext\tlang\n1\ta\ten\n1\tb\tde\n2\tc\tde\n")
    records, _ = tables.read_records(path, columns)
    assert [(r.id, r.language) for r in records] == [("1", "en"), ("1", "de"), ("2", "de")]
    message = error_message(tmp_path / "b.tsv", "id\ttext\tlang\n1\ta\ten\n2\tb\tde\n1\tc\ten\n", columns)
    assert message == "b.tsv:4: id '1' of 'en' already occurs in line 2"
    assert error_message(tmp_path / "c.tsv", "id\ttext\tlang\n1\ta\t\n", columns) == "c.tsv:2: column 'lang' is empty"
    assert list(tables.column_values(path, "lang")) == [(2, "en"), (3, "de"), (4, "de")]


def test_a_null_text_or_second_text_is_empty(tmp_path):
    rows = [{"text": "a", "text_pair": "b"}, {"text": None, "text_pair": "b"}, {"text": "a", "text_pair": None}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    source = tables.inspect(path, "text", None, None, skip_empty=True)
    assert [row.empty for row in tables.read_texts(source)] == [False, True, True]
    for i, column in ((1, "text"), (2, "text_pair")):
        path = write(tmp_path / "b.jsonl", json.dumps(rows[i]) + "\n")
        with pytest.raises(UserError, match=f"b.jsonl:1: column '{column}' is empty; fill it in, or pass --empty-text"):
            list(tables.read_texts(tables.inspect(path, "text", None, None, skip_empty=False)))


@pytest.mark.parametrize("ending", [".tsv", ".parquet"])
def test_another_column_like_a_requested_one_is_refused(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    if ending == ".tsv":
        write(path, "text\tText \tlabel\tLabel\nx\ty\tz\tw\n")
    else:
        parquet(path, **{"text": ["x"], "Text ": ["y"], "label": ["z"], "Label": ["w"]})
    with pytest.raises(UserError, match=r"columns: 'text' \(U\+0074 .*'Text ' \(U\+0054 .* look alike: rename"):
        tables.read_records(path, Columns("text"))
    with pytest.raises(UserError, match=r"no column 'TEXT' among .*; did you mean 'text' \(U\+0074 "):
        tables.read_records(path, Columns("TEXT"))


@pytest.mark.parametrize(
    ("values", "type_"),
    [
        (pa.array([1, 2], pa.timestamp("us")), r"timestamp\[us\]"),
        (pa.array([Decimal("1.5"), Decimal("2")]), r"decimal128\(2, 1\)"),
        (pa.array([b"0" * 16, b"1" * 16], pa.binary(16)), r"fixed_size_binary\[16\]"),
    ],
)
def test_an_odd_id_column_that_nobody_asked_for_is_not_used(tmp_path, caplog, values, type_):
    path = parquet(tmp_path / "a.parquet", text=["a", "b"], id=values)
    source = tables.inspect(path, "text", None, None, skip_empty=True)
    assert [(row.id, row.text) for row in tables.read_texts(source)] == [(0, "a"), (1, "b")]
    assert re.search(rf"a\.parquet: column 'id' is of type {type_}, not text or a number: the ids are row", caplog.text)
    with pytest.raises(UserError, match=f"column 'id' is of type {type_}, expected text or a number"):
        list(tables.read_texts(tables.inspect(path, "text", None, "id", skip_empty=True)))
