"""Parquet files are read in bounded memory, and errors name damage and columns that are not text."""

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from xtransfer.data.formats import parquet
from xtransfer.errors import UserError


def write(path: Path, **columns) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def error_message(path: Path, *columns: str) -> str:
    """Return the error of reading these columns, without the path, and check that it is one line."""
    with pytest.raises(UserError) as caught:
        list(parquet.rows(path, columns))
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}")


def test_rows_are_numbered_and_have_the_requested_columns(tmp_path: Path):
    path = write(tmp_path / "a", n=[5, 6], text=["x", None], when=[[1], [2]])
    assert parquet.column_names(path) == ("n", "text", "when")
    assert list(parquet.rows(path, ["text", "n"])) == [(1, {"n": 5, "text": "x"}), (2, {"n": 6, "text": None})]


@pytest.mark.parametrize(
    "type_", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_every_string_type_is_read_as_text(tmp_path: Path, type_: pa.DataType):
    path = write(tmp_path / "a", text=pa.array(["é\u2028", "", None, "é\u2028"], pa.string()).cast(type_))
    assert [row["text"] for _, row in parquet.rows(path, ["text"])] == ["é\u2028", "", None, "é\u2028"]


def test_rows_are_numbered_across_row_groups_and_batches(tmp_path: Path):
    texts = [f"text {i}" for i in range(2000)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a", row_group_size=700)
    rows = list(parquet.rows(tmp_path / "a", ["text"]))
    assert [number for number, _ in rows] == list(range(1, 2001))
    assert [row["text"] for _, row in rows] == texts


def test_a_file_without_rows_yields_none(tmp_path: Path):
    path = write(tmp_path / "a", text=pa.array([], pa.string()))
    assert parquet.column_names(path) == () and list(parquet.rows(path, ["text"])) == []


def test_memory_does_not_grow_with_the_size_of_a_row_group(tmp_path: Path):
    text = "words of no meaning " * 50

    def peak_memory(rows: int) -> int:
        path = tmp_path / str(rows)
        pq.write_table(
            pa.table({"text": [f"{i} {text}" for i in range(rows)]}), path, use_dictionary=False, compression="none"
        )
        before = pa.total_allocated_bytes()
        return max(pa.total_allocated_bytes() - before for _ in parquet.rows(path, ["text"]))

    small, large = peak_memory(3_000), peak_memory(30_000)
    assert small > 0 and large < small + (4 << 20)


def test_long_texts_are_read_in_smaller_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path / "a", text=[f"{i}" * 1000 for i in range(9)])
    sizes = []
    values = parquet._values
    monkeypatch.setattr(parquet, "_values", lambda column, *rest: sizes.append(len(column)) or values(column, *rest))
    assert len(list(parquet.rows(tmp_path / "a", ["text"]))) == 9
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 3500)
    assert len(list(parquet.rows(tmp_path / "a", ["text"]))) == 9
    assert sizes[0] == 9 and max(sizes[1:]) <= 3


def test_missing_non_text_and_duplicate_columns_are_errors(tmp_path: Path):
    path = write(tmp_path / "a", text=["x"], when=pa.array([0], pa.timestamp("ns")), raw=[b"x"], parts=[{"text": "x"}])
    assert error_message(path, "tex") == ": no column 'tex' among 'text', 'when', 'raw', 'parts'; did you mean 'text'?"
    write(tmp_path / "c", id=pa.array([Decimal("1.50")], pa.decimal128(5, 2)))
    assert error_message(tmp_path / "c", "id") == ": column 'id' is of type decimal128(5, 2), expected text or a number"
    assert error_message(path, "when") == ": column 'when' is of type timestamp[ns], expected text or a number"
    assert error_message(path, "text", "raw") == ": column 'raw' is of type binary, expected text or a number"
    assert error_message(path, "parts").startswith(": column 'parts' is of type struct")
    duplicated = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(duplicated, tmp_path / "b")
    assert error_message(tmp_path / "b", "text") == ": column 'text' occurs twice"


def test_an_error_for_invalid_utf8_names_the_row(tmp_path: Path):
    damaged = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"caf\xe9", b"x"]).buffers())
    path = write(tmp_path / "a", text=damaged)
    assert error_message(path, "text") == ":2: column 'text': byte 0xe9 is not UTF-8"


def test_files_that_cannot_be_opened(tmp_path: Path):
    assert error_message(tmp_path / "none", "text") == ": no such file"
    (tmp_path / "folder").mkdir()
    assert error_message(tmp_path / "folder", "text") == ": cannot be read: Is a directory"
    for content in (b"", b"text\nhello\n", b"PAR1" + b"\0" * 40 + b"PAR1"):
        (tmp_path / "a").write_bytes(content)
        assert error_message(tmp_path / "a", "text").startswith(": damaged, or not a Parquet file: ")


def test_a_damaged_file_never_reads_as_a_shorter_one(tmp_path: Path):
    """Cut the file at every third byte, or alter that byte: it is refused in one line or still has all its rows."""
    texts = [f"text {i}" for i in range(20)]
    intact = write(tmp_path / "a", text=texts).read_bytes()
    reasons = set()
    for i in range(0, len(intact), 3):
        for content in (intact[:i], intact[:i] + bytes([intact[i] ^ 0x5A]) + intact[i + 1 :]):
            (tmp_path / "b").write_bytes(content)
            try:
                assert len(list(parquet.rows(tmp_path / "b", ["text"]))) == len(texts)
            except UserError as error:
                assert "\n" not in str(error)
                reasons.add(str(error).removeprefix(f"{tmp_path / 'b'}").split(":")[1].strip()[:20])
    assert {"damaged, or not a Pa", "damaged after row 0"} <= reasons


def test_a_page_that_does_not_match_its_checksum_is_refused(tmp_path: Path):
    table = pa.table({"text": [f"text {i}" for i in range(20)]})
    pq.write_table(table, tmp_path / "a", write_page_checksum=True, compression="none", use_dictionary=False)
    content = (tmp_path / "a").read_bytes()
    assert content.count(b"text 7") == 1
    (tmp_path / "a").write_bytes(content.replace(b"text 7", b"text 8"))
    assert error_message(tmp_path / "a", "text").startswith(": damaged after row 0: ")
