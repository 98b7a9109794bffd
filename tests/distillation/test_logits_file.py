"""Files of logits, probabilities, and labels: what they mean, and that every fault is named with its row."""

import decimal
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xtransfer.distillation.logits_file import read_logits_file
from xtransfer.errors import DataError

CLASSES = ("bad", "good", "soso")


def jsonl(path, *rows):
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def parquet(path, **columns):
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_each_kind_becomes_logits_in_the_order_of_the_classes(tmp_path):
    tiny = math.log(1e-9)
    rows = [{"id": "b", "logits": [1, -2.5, 0]}, {"id": 7, "logits": {"soso": 3, "bad": 1, "good": 2}}]
    file = read_logits_file(jsonl(tmp_path / "l.jsonl", *rows), CLASSES)
    np.testing.assert_array_equal(file.of(["7", "b"]), np.array([[1, 2, 3], [1, -2.5, 0]], np.float32))
    assert file.logits.dtype == np.float32 and file.kind == "logits"
    probabilities = {"good": 0.75, "bad": 0.2505}  # within 1e-3 of 1, and without soso
    file = read_logits_file(jsonl(tmp_path / "p.jsonl", {"id": "a", "probabilities": probabilities}), CLASSES)
    expected = [math.log(0.2505 / 1.0005), math.log(0.75 / 1.0005), tiny]
    np.testing.assert_allclose(file.of(["a"]), [expected], rtol=1e-6)
    file = read_logits_file(jsonl(tmp_path / "y.jsonl", {"id": "a", "label": "soso"}), CLASSES)
    np.testing.assert_allclose(file.of(["a"]), [[tiny, tiny, 0]], rtol=1e-6)


def test_the_most_informative_column_counts(tmp_path):
    """Read predictions of `predict` by their probabilities, and those of an evaluation by their logits."""
    row = {"id": "a", "label": "bad", "prediction": "soso", "logits": [0, 1, 2]}
    assert read_logits_file(jsonl(tmp_path / "a.jsonl", row), CLASSES).of(["a"]).argmax() == 2
    row = {"id": "a", "label": "bad", "probabilities": {"good": 1.0}}
    assert read_logits_file(jsonl(tmp_path / "b.jsonl", row), CLASSES).of(["a"]).argmax() == 1


def test_parquet_may_hold_lists_structures_and_maps(tmp_path):
    lists = parquet(tmp_path / "l.parquet", id=["a", "b"], logits=[[1.0, 2.0, 3.0], [0.0, 0.5, -1.0]])
    np.testing.assert_array_equal(read_logits_file(lists, CLASSES).of(["b"]), np.array([[0, 0.5, -1]], np.float32))
    rows = [{"good": 1.0, "bad": None}, {"good": 0.5, "bad": 0.5}]
    structures = parquet(tmp_path / "s.parquet", id=["a", "b"], probabilities=rows)
    values = np.exp(read_logits_file(structures, CLASSES).of(["a", "b"]))
    np.testing.assert_allclose(values, [[0, 1, 0], [0.5, 0.5, 0]], atol=1e-6)
    column = pa.array([[("soso", 0.25), ("bad", 0.75)]], pa.map_(pa.string(), pa.float64()))
    maps = parquet(tmp_path / "m.parquet", id=["a"], probabilities=column)
    np.testing.assert_allclose(np.exp(read_logits_file(maps, CLASSES).of(["a"])), [[0.75, 0, 0.25]], atol=1e-6)
    labels = parquet(tmp_path / "y.parquet", id=["a"], label=["good"])
    assert read_logits_file(labels, CLASSES).of(["a"]).argmax() == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "label": "godo"}], r":1: label 'godo' is not one of bad, good, soso; did you mean 'good'\?"),
        (
            [{"id": "a", "probabilities": {"godo": 1}}],
            r":1: .*'godo', which is not one of bad, good, soso; did you mean 'good'\?",
        ),
        ([{"id": "a", "logits": {"bad": 1, "good": 1}}], r":1: column 'logits' has no class 'soso'"),
        (
            [{"id": "a", "logits": [1, 2]}],
            r":1: column 'logits' has 2 numbers, expected 3, in the order bad, good, soso",
        ),
        ([{"id": "a", "logits": []}], r":1: column 'logits' has 0 numbers"),
        ([{"id": "a", "logits": "1 2 3"}], r":1: column 'logits' is text, expected a list or an object by class"),
        ([{"id": "a", "logits": [1, 2, None]}], r":1: column 'logits' has null, expected a number"),
        ([{"id": "a", "logits": [1, 2, True]}], r":1: column 'logits' has true or false, expected a number"),
        ([{"id": "a", "logits": [1, 2, 1e39]}], r":1: column 'logits' has 1e\+39, which is too large for a float32"),
        ([{"id": "a", "logits": [1, 2, 10**400]}], r":1: column 'logits' has inf, expected a finite number"),
        (['{"id": "a", "logits": [1, 2, NaN]}\n'], r":1: malformed JSON: NaN is not a JSON number"),
        ([{"id": "a", "probabilities": [0.5, 0.5, 0]}], r":1: column 'probabilities' is a list, expected an object"),
        (
            [{"id": "a", "probabilities": {"bad": 0.5, "good": 0.498}}],
            r":1: the probabilities sum to 0\.998, expected 1",
        ),
        ([{"id": "a", "probabilities": {"bad": 1.2, "good": -0.2}}], r":1: the probability of 'good' is -0\.2"),
        ([{"id": "a", "probabilities": {}}], r":1: the probabilities sum to 0, expected 1"),
        ([{"id": "a", "label": None}], r":1: column 'label' is null, expected the name of a class"),
        ([{"id": "a", "label": "bad"}, {"id": "b"}], r":2: no column 'label' among 'id'"),
        ([{"id": "a", "label": "bad"}, {"id": "a", "label": "bad"}], r":2: id 'a' already occurs in line 1"),
        ([{"id": "a", "label": "bad"}, {"id": 1.5, "label": "bad"}], r":2: column 'id' is a number, expected the id"),
        ([{"id": "a", "text": "x"}], r"none of the columns logits, probabilities, label; its columns are 'id', 'text'"),
        ([{"label": "bad"}], r"no column 'id'; its columns are 'label'"),
        ([], r"its columns are none: the file is empty"),
    ],
)
def test_every_fault_of_a_file_is_one_line_with_its_row(tmp_path, rows, message):
    path = jsonl(tmp_path / "file.jsonl", *rows)
    with pytest.raises(DataError, match=message) as caught:
        read_logits_file(path, CLASSES)
    assert str(caught.value).startswith(path) and "\n" not in str(caught.value)


def test_faults_of_parquet_name_the_row(tmp_path):
    path = parquet(tmp_path / "f.parquet", id=["a", "b"], logits=[[1.0, 2.0, 3.0], [1.0, math.nan, 0.0]])
    with pytest.raises(DataError, match=r"f\.parquet:2: column 'logits' has nan, expected a finite number"):
        read_logits_file(path, CLASSES)
    path = parquet(tmp_path / "g.parquet", id=["a", "b"], probabilities=[{"bad": 1.0}, {"bad": 0.9}])
    with pytest.raises(DataError, match=r"g\.parquet:2: the probabilities sum to 0\.9"):
        read_logits_file(path, CLASSES)
    path = parquet(tmp_path / "h.parquet", id=["a", "a"], label=["bad", "good"])
    with pytest.raises(DataError, match=r"h\.parquet:2: id 'a' already occurs"):
        read_logits_file(path, CLASSES)
    with pytest.raises(DataError, match=r"teacher\.logits_file .*none\.jsonl: no such file"):
        read_logits_file(str(tmp_path / "none.jsonl"), CLASSES)


def test_missing_ids_are_refused_and_further_ids_are_counted(tmp_path, capsys):
    rows = [{"id": name, "label": "bad"} for name in "abcd"]
    file = read_logits_file(jsonl(tmp_path / "f.jsonl", *rows), CLASSES)
    with pytest.raises(
        DataError, match=r"no row for 2 of 3 examples, such as 'x'; a row that is left over has the id 'b'"
    ):
        file.check(["a", "x", "y"])
    file.check(["a", "b", "c", "d"])
    assert capsys.readouterr().out == ""
    file.check(["c"])
    assert "f.jsonl: 3 of 4 rows belong to no example, and are not used" in " ".join(capsys.readouterr().out.split())


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), max_size=9)
)
def test_logits_keep_every_bit(rows):
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "f.jsonl"
        first = {"id": "first", "logits": [0, 0, 0]}
        jsonl(path, first, *({"id": str(i), "logits": row} for i, row in enumerate(rows)))
        file = read_logits_file(str(path), CLASSES)
        expected = np.array(rows, np.float32).reshape(-1, 3)
        np.testing.assert_array_equal(file.of([str(i) for i in range(len(rows))]), expected)


def test_a_multi_label_file_has_a_probability_for_each_class_by_itself_or_lists_of_labels(tmp_path):
    sure = math.log((1 - 1e-9) / 1e-9)
    rows = [{"id": "a", "probabilities": {"good": 0.75, "soso": 1}}, {"id": "b", "probabilities": {}}]
    file = read_logits_file(jsonl(tmp_path / "p.jsonl", *rows), CLASSES, multi_label=True)
    expected = [[-sure, math.log(3), sure], [-sure, -sure, -sure]]
    np.testing.assert_allclose(file.of(["a", "b"]), expected, rtol=1e-5)
    rows = [{"id": "a", "labels": ["soso", "bad"]}, {"id": "b", "labels": []}]
    file = read_logits_file(jsonl(tmp_path / "y.jsonl", *rows), CLASSES, multi_label=True)
    np.testing.assert_allclose(file.of(["a", "b"]), [[sure, -sure, sure], [-sure, -sure, -sure]], rtol=1e-5)
    assert file.kind == "labels"
    lists = parquet(tmp_path / "y.parquet", id=["a"], labels=[["good"]])
    assert (read_logits_file(lists, CLASSES, multi_label=True).of(["a"]) > 0).tolist() == [[False, True, False]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "probabilities": {"bad": 1.2}}, r":1: the probability of 'bad' is 1\.2, which is above 1"),
        ({"id": "a", "probabilities": {"bad": -0.1}}, r":1: the probability of 'bad' is -0\.1, which is below 0"),
        ({"id": "a", "labels": "bad"}, r":1: column 'labels' is text, expected a list of classes"),
        ({"id": "a", "labels": [["bad"]]}, r":1: column 'labels' has a list, expected the name of a class"),
        ({"id": "a", "labels": ["godo"]}, r":1: label 'godo' is not one of bad, good, soso; did you mean 'good'\?"),
        ({"id": "a", "labels": ["bad", "bad"]}, r":1: column 'labels' has 'bad' twice: remove one of them"),
        (
            {"id": "a", "label": "bad"},
            r"none of the columns logits, probabilities, labels; its columns are 'id', 'label'",
        ),
    ],
)
def test_every_fault_of_a_multi_label_file_is_named(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as caught:
        read_logits_file(jsonl(tmp_path / "m.jsonl", row), CLASSES, multi_label=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("column", "type_", "value", "message"),
    [
        (
            "probabilities",
            pa.map_(pa.string(), pa.float64()),
            [("bad", 0.9), ("good", 0.1), ("bad", 0.9)],
            "'bad' twice",
        ),
        ("logits", pa.map_(pa.string(), pa.float64()), [("bad", 5.0), ("good", 1.0), ("bad", -5.0)], "'bad' twice"),
        ("logits", pa.list_(pa.timestamp("ns")), [1, 2], "is of type list<.*timestamp"),
        ("logits", pa.list_(pa.binary()), [b"1", b"2"], "is of type list<.*binary"),
    ],
)
def test_odd_parquet_columns_are_refused(tmp_path, column, type_, value, message):
    path = tmp_path / "odd.parquet"
    pq.write_table(pa.table({"id": ["a"], column: pa.array([value], type_)}), path)
    with pytest.raises(DataError, match=message):
        read_logits_file(str(path), CLASSES)


def test_a_structure_with_a_repeated_field_is_refused_and_decimals_are_numbers(tmp_path):
    path = tmp_path / "odd.parquet"
    fields = [pa.field(name, pa.float64()) for name in ("bad", "good", "bad")]
    arrays = [pa.array([0.25]), pa.array([0.5]), pa.array([0.25])]
    pq.write_table(pa.table({"id": ["a"], "probabilities": pa.StructArray.from_arrays(arrays, fields=fields)}), path)
    with pytest.raises(DataError, match="column 'probabilities' is of type struct<"):
        read_logits_file(str(path), CLASSES)
    numbers = [[decimal.Decimal("0.50"), decimal.Decimal("-1.25"), decimal.Decimal("2.00")][: len(CLASSES)]]
    pq.write_table(pa.table({"id": ["a"], "logits": pa.array(numbers, pa.list_(pa.decimal128(5, 2)))}), path)
    np.testing.assert_array_equal(read_logits_file(str(path), CLASSES).of(["a"])[0], [float(n) for n in numbers[0]])
